"""What the evaluate stage finds in its channels: rows to score, in words whose they are, and their images."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from fivefold import predictions
from fivefold.contract.artifacts import ModelDir, find_models, find_predictions, locate, locate_all
from fivefold.contract.files import read_json
from fivefold.contract.job import Job
from fivefold.contract.record import record_path
from fivefold.contract.stages import (
    ENSEMBLE,
    FOLDS,
    HOLDOUT,
    OOF,
    OVERLAP,
    PREDICTIONS,
    RECORD,
    SPLIT_SUMMARY,
    TRAIN_LOG,
)
from fivefold.csv_tables import open_csv
from fivefold.data.evals import read_eval
from fivefold.data.folds import read_folds
from fivefold.data.images import decode
from fivefold.data.same_classes import SameClasses
from fivefold.data.store import ImageStore, open_store
from fivefold.data.summary import describe_data
from fivefold.errors import DataError
from fivefold.evaluation import truth
from fivefold.evaluation.report import thumbnail
from fivefold.evaluation.tables import Scored, stacked
from fivefold.inference.ensemble import by_system
from fivefold.inference.product import factors_of, needs_product, product_of
from fivefold.inference.submitted import has_one_column, names_classes_alone, read_submitted
from fivefold.predictions import Predictions, mean_by_id
from fivefold.recipe import Data

log = logging.getLogger("fivefold")
RECORDED = {"stage", "key", "settings", "inputs", "packages", "code", "wall_seconds", "finished"}


@dataclass(frozen=True)
class Evidence:
    """The channels of one evaluation, read as they are needed."""

    job: Job
    data: Data
    answer: str = "auto"
    positive: str = ""
    """What a submission of one column holds, and the class that a probability is of, by the settings."""

    @cached_property
    def models(self) -> list[ModelDir]:
        folder = self.job.optional_channel("model")
        return find_models(folder, self.job.scratch) if folder else []

    @cached_property
    def predicted(self) -> dict[str, Path]:
        folder = self.job.optional_channel("predictions")
        found = find_predictions(folder, self.job.scratch) if folder else {}
        if ENSEMBLE in found and not record_path(found[ENSEMBLE].parent, "ensemble").is_file():
            log.warning(
                "%s has no record (%s) of the ensemble stage, which failed or is still running, or was copied in part: "
                "what is scored may be older than its models; run ensemble again",
                found[ENSEMBLE].parent,
                RECORD,
            )
        return found

    @cached_property
    def ensemble(self) -> dict[str, Any]:
        """What `ensemble.json` says, empty without one."""
        return read_json(self.predicted[ENSEMBLE]) if ENSEMBLE in self.predicted else {}

    @property
    def selected(self) -> bool:
        """Whether the holdout chose the epoch of a model that is scored."""
        infos = [*self.ensemble.get("members", []), *(model.info for model in self.models)]
        return any(info.get("selected_on") == "holdout" for info in infos)

    @property
    def tempered(self) -> bool:
        """Whether the holdout's predictions are an ensemble's at temperatures that were fitted."""
        return HOLDOUT in self.predicted and self.ensemble.get("temperature") not in (None, 1)

    @cached_property
    def split(self) -> Path | None:
        """The split: of its own channel, or found beside the models."""
        if self.job.optional_channel("folds"):
            return locate(self.job, "folds", FOLDS)
        folder = self.job.optional_channel("model")
        return next(iter(locate_all(folder, self.job.scratch, FOLDS)), None) if folder else None

    @cached_property
    def overlap(self) -> frozenset[str]:
        """The ids of the test images that are images of the split, as far as the split was given them."""
        folder = self.job.optional_channel("folds")
        found = locate_all(folder, self.job.scratch, OVERLAP) if folder else []
        return frozenset(open_csv(found[0]).read(["id"])["id"]) if found else frozenset()

    def test(self) -> Scored | None:
        """The predicted test rows with their ground truth; None where no ground truth is given."""
        given = self.job.optional_channel("ground_truth")
        if given is None:
            return None
        self.job.channel("predictions")
        file = truth.truth_file(given)
        same = SameClasses(self.data.same_classes, self.data.same_class)
        found = same.merge_table(self._predictions())
        read = truth.read_truth(file, self._id_column(), found.ids)
        labels = {name: same.merged.get(label, label) for name, label in read.items()}
        table = stacked([truth.with_truth(found, self._in_factors(labels, found.classes), file)])
        return Scored(
            "test", self._ensemble_in_words(), f"the {len(table):,} rows of {file.name}", table, self._eval_paths()
        )

    def holdout(self) -> Scored | None:
        """The rows set aside by the split: the ensemble's predictions, or else the mean of the models'."""
        found = [] if HOLDOUT in self.predicted else self._tables(HOLDOUT)
        if HOLDOUT in self.predicted:
            table, what = predictions.read(self.predicted[HOLDOUT]), self._ensemble_in_words()
        elif needs_product([model.info for model, _ in found]):
            table, what = _product(found), _models_in_words(self.models, "product of ")
        elif found:
            table = mean_by_id([table for _, table in found])
            what = _models_in_words(self.models, "equal mean of ")
        else:
            return None
        which = "rows that the split set aside"
        if self.selected:
            which += ", by which the student's epoch was chosen"
        elif self.tempered:
            which += ", each at a temperature that the others fitted"
        return self._of_split("holdout", what, [table], which)

    def out_of_fold(self) -> Scored | None:
        """Each out-of-fold row once: where several models (of seeds, systems) predicted it, by their mean. None without any."""
        found = self.folds()
        if not found:
            return None
        if needs_product([model.info for model, _ in found]):
            tables, what = [_product(found)], _models_in_words(self.models, "product of ")
        else:
            tables, words = [table for _, table in found], "each alone"
            if sum(map(len, tables)) > len({name for table in tables for name in table.ids}):
                tables, words = [mean_by_id(tables)], "their mean where several predict a row"
            what = f"{_models_in_words(self.models)}, {words}"
        return self._of_split("oof", what, tables, "out-of-fold rows of the split")

    def _of_split(self, name: str, what: str, tables: Sequence[Predictions], which: str) -> Scored:
        """The rows of the `tables`, with the paths that the split has of them."""
        table = stacked(tables)
        split = read_folds(self.split) if self.split else None
        ids = split.ids.to_pylist() if split else []
        paths = dict(zip(ids, split.paths.to_pylist(), strict=True)) if split else {}
        grouped = split is not None and split.groups.null_count < len(split)
        groups = dict(zip(ids, split.groups.to_pylist(), strict=True)) if grouped else {}
        return Scored(name, what, f"the {len(table):,} {which}", table, paths, groups)

    def folds(self) -> list[tuple[ModelDir, Predictions]]:
        """Each model that has out-of-fold rows, with them."""
        return self._tables(OOF)

    def curves(self) -> dict[str, Path]:
        """The training log of each model, by its name."""
        one_seed = len({model.info["seed"] for model in self.models}) == 1
        one_system = len({model.info["system"] for model in self.models}) == 1
        logs = [(model, model.path / TRAIN_LOG) for model in self.models if (model.path / TRAIN_LOG).is_file()]
        short = one_seed and one_system and len(logs) > 1
        return {f"fold {m.info['fold']}" if short else m.name: path for m, path in logs}

    def thumbnails(self, name: str, mistakes: pd.DataFrame) -> dict[tuple[str, str], bytes]:
        """Small images of `mistakes` among the rows `name`, by (name, id); those that cannot be read are left out."""
        store = self._store("eval" if name == "test" else "train")
        found = {}
        for mistake in mistakes.itertuples() if store else ():
            path = mistake.path or mistake.id
            try:
                found[name, mistake.id] = thumbnail(decode(store.read(path), path))
            except DataError as error:
                log.warning("no picture of %s: %s", mistake.id, error)
        return found

    def notes(self) -> dict[str, str]:
        """What must be known beside the scores of the ensemble."""
        if self.selected:
            return {"holdout": "The student's epoch was chosen by these very rows, so the figures flatter it."}
        own = self.ensemble.get("temperature")
        said = f" The ensemble's own temperature, {own:.4g}, was fitted on all of them." if self.tempered else ""
        return {"holdout": f"None chose its epoch by them.{said}"}

    def counts(self) -> list[tuple[str, str]]:
        """Return name and value of what the split counted; empty without its summary."""
        path = self.split.with_name(SPLIT_SUMMARY) if self.split else None
        if path is None or not path.is_file():
            return []
        try:
            return describe_data(read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path} is not the summary of a split ({error!r}); run split again or delete the file"
            ) from None

    def records(self) -> list[dict[str, Any]]:
        """The records of the stages that made what is evaluated, in the order of the pipeline."""
        folders = [self.split.parent] if self.split else []
        folders += [model.path for model in self.models]
        folders += [path.parent for path in list(self.predicted.values())[:1]]
        found = [read_json(folder / RECORD) for folder in folders if (folder / RECORD).is_file()]
        return [record for record in found if isinstance(record, dict) and record.keys() >= RECORDED]

    def title(self) -> str:
        systems = sorted({model.info["system"] for model in self.models})
        return ", ".join(systems) or self._predictions().system or "predictions"

    def _store(self, channel: str) -> ImageStore | None:
        path = self.job.optional_channel(channel)
        return open_store(path, self.data.max_unpacked_gib) if path else None

    def _tables(self, file: str) -> list[tuple[ModelDir, Predictions]]:
        """Each model that has the table `file`, with it."""
        return [(model, predictions.read(model.path / file)) for model in self.models if (model.path / file).is_file()]

    def _in_factors(self, labels: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
        """The truth in the words of models that know some factors alone, where it is these that predicted."""
        info = self.models[0].info if self.models else {}
        if not info.get("knows") or set(classes) != set(info["classes"]):
            return dict(labels)
        factors = factors_of(info)
        return {n: factors.part(c, info["knows"]) if c in factors.values else c for n, c in labels.items()}

    def _predictions_file(self) -> Path:
        return self.predicted.get(PREDICTIONS) or locate(self.job, "predictions", PREDICTIONS)

    def _predictions(self) -> Predictions:
        path = self._predictions_file()
        if path.suffix != ".csv":
            return predictions.read(path)
        if names_classes_alone(path):
            raise DataError(f"{path} holds no probabilities, of which evaluate speaks; score classes by `evaluation`")
        return read_submitted(path, likely=self._true_classes(path), answer=self.answer, positive=self.positive)

    def _true_classes(self, path: Path) -> list[str]:
        """The classes that the truth of a submission of one column names; none for another submission."""
        if not has_one_column(path):
            return []
        name = self._id_column()
        labels = truth.read_truth(
            truth.truth_file(self.job.channel("ground_truth")), name, open_csv(path).read([name])[name]
        )
        return sorted({*labels.values()})

    def _id_column(self) -> str:
        """What a submission of the predictions calls their ids; "" where nothing says it."""
        path = self._predictions_file()
        return open_csv(path).columns[0] if path.suffix == ".csv" else self.ensemble.get("id_column", "")

    def _ensemble_in_words(self) -> str:
        members = self.ensemble.get("members", [])
        if len(members) == 1:
            return str(members[0]["model"])
        if members:
            systems = ", ".join(dict.fromkeys(member["system"] for member in members))
            return f"ensemble of {len(members)} models of {systems}"
        return f"predictions {next(iter(self.predicted.values())).name}"

    def _eval_paths(self) -> Mapping[str, str]:
        store = self._store("eval")
        if store is None:
            return {}
        table = read_eval(store, self.data.id_column, self.data.path_column)
        return dict(zip(table.ids, table.paths, strict=True))


def _product(found: Sequence[tuple[ModelDir, Predictions]]) -> Predictions:
    """The tables of models that know different factors as one: the mean of each system's, multiplied."""
    groups = by_system([model for model, _ in found])
    tables = {name: [table for model, table in found if model.system == name] for name in groups}
    return product_of(groups).table({name: mean_by_id(group) for name, group in tables.items()})


def _models_in_words(models: Sequence[ModelDir], prefix: str = "") -> str:
    systems = ", ".join(sorted({model.info["system"] for model in models}))
    if len(models) == 1:
        return models[0].name
    return f"{prefix}{len(models)} fold models of {systems}"
