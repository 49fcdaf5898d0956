"""The inputs of the evaluate stage: the rows to score from its channels, their descriptions and their images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold import predictions
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import ModelDir, find_all, find_models, find_one, find_predictions
from fivefold.contract.files import read_json
from fivefold.contract.job import StageContext
from fivefold.contract.record import record_path
from fivefold.contract.stage_specs import (
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
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.image_io import decode
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import ImageStore, open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.data.split.summary import describe_data
from fivefold.errors import DataError
from fivefold.evaluation import ground_truth
from fivefold.evaluation.report import thumbnail
from fivefold.evaluation.scored_rows import ScoredRows, concat_tables
from fivefold.inference.blending import BLENDS, apply_blend
from fivefold.inference.ensemble_spec import group_by_system
from fivefold.inference.factor_product import build_product, needs_product, read_factors
from fivefold.inference.submission_reader import has_labels_only, has_one_column, read_submission
from fivefold.inference.systems import align_rows
from fivefold.log import log
from fivefold.predictions import Predictions, mean_by_id

RECORDED = {"stage", "key", "settings", "inputs", "packages", "code", "wall_seconds", "finished"}


@dataclass(frozen=True)
class EvaluationInputs:
    """The channels of one evaluation, read lazily."""

    job: StageContext
    settings: Settings

    @cached_property
    def models(self) -> list[ModelDir]:
        folder = self.job.optional_channel("model")
        return find_models(folder, self.job.scratch) if folder else []

    @cached_property
    def predicted(self) -> dict[str, Path]:
        folder = self.job.optional_channel("predictions")
        files = find_predictions(folder, self.job.scratch) if folder else {}
        if ENSEMBLE in files and not record_path(files[ENSEMBLE].parent, "ensemble").is_file():
            words = "of the ensemble stage, so the predictions may be older than the models; rerun ensemble"
            log.warning("%s has no record (%s) %s", files[ENSEMBLE].parent, RECORD, words)
        return files

    @cached_property
    def ensemble(self) -> dict[str, Any]:
        """The content of `ensemble.json`, empty without one."""
        return read_json(self.predicted[ENSEMBLE]) if ENSEMBLE in self.predicted else {}

    @property
    def selected(self) -> bool:
        """Whether the epoch of a scored model was selected on the holdout."""
        infos = [*self.ensemble.get("members", []), *(model.info for model in self.models)]
        return any(info.get("selected_on") == "holdout" for info in infos)

    @property
    def tempered(self) -> bool:
        """Whether the holdout's predictions come from an ensemble with fitted temperatures."""
        return HOLDOUT in self.predicted and self.ensemble.get("temperature") not in (None, 1)

    @cached_property
    def split(self) -> Path | None:
        """The split from the folds channel, else from below the model channel."""
        if self.job.optional_channel("folds"):
            return find_one(self.job, "folds", FOLDS)
        folder = self.job.optional_channel("model")
        return next(iter(find_all(folder, self.job.scratch, FOLDS)), None) if folder else None

    @cached_property
    def overlap(self) -> frozenset[str]:
        """The ids of the test images that are also images of the split, if the split stage had the test images."""
        folder = self.job.optional_channel("folds")
        paths = find_all(folder, self.job.scratch, OVERLAP) if folder else []
        return frozenset(open_csv(paths[0]).read(["id"])["id"]) if paths else frozenset()

    def test(self) -> ScoredRows | None:
        """Return the predicted test rows with their ground truth; None without a ground truth."""
        channel = self.job.optional_channel("ground_truth")
        if channel is None:
            return None
        self.job.channel("predictions")
        file = ground_truth.find_ground_truth_file(channel)
        same = ClassAliases.of(self.settings.data)
        predicted = same.merge_table(self._predictions())
        read = ground_truth.read_ground_truth(file, self._id_column(), predicted.ids)
        labels = {name: same.canonical_names.get(label, label) for name, label in read.items()}
        table = concat_tables([ground_truth.add_labels(predicted, self._as_factors(labels, predicted.classes), file)])
        rows = f"the {len(table):,} rows of {file.name}"
        return ScoredRows("test", self._describe_ensemble(), rows, table, self._eval_paths())

    def holdout(self) -> ScoredRows | None:
        """Return the holdout rows of the split: the ensemble's predictions, else the mean of the models'."""
        if HOLDOUT in self.predicted:
            table, what = predictions.read(self.predicted[HOLDOUT]), self._describe_ensemble()
        elif not (tables := self._tables(HOLDOUT)):
            return None
        elif needs_product([model.info for model, _ in tables]):
            table, what = _product(tables), _describe_models(self.models, "product of ")
        else:
            table, what = mean_by_id([t for _, t in tables]), _describe_models(self.models, "equal mean of ")
        which = "rows that the split set aside"
        if self.selected:
            which += ", on which the student's epoch was selected"
        elif self.tempered:
            which += ", each at a temperature fitted on the other rows"
        return self._from_split("holdout", what, [table], which)

    def out_of_fold(self) -> ScoredRows | None:
        """Return each out-of-fold row once. None without any.

        If several systems predicted it, it is their blend with the weights of the ensemble; without an ensemble of them, and
        for several seeds, it is the mean.
        """
        folds, which = self.folds(), "out-of-fold rows of the split"
        if not folds:
            return None
        weights = self.ensemble.get("weights", {})
        if needs_product([model.info for model, _ in folds]):
            tables, what = [_product(folds)], _describe_models(self.models, "product of ")
        elif len(weights) > 1 and weights.keys() == {model.system for model, _ in folds}:
            tables, what = (
                [self._blended(folds, weights)],
                _describe_models(self.models) + ", blended as in the ensemble",
            )
            which += ", to which the weights of the systems were fitted" if BLENDS[self.ensemble["blend"]].fit else ""
        else:
            tables, words = [table for _, table in folds], "one model per row"
            if sum(map(len, tables)) > len({name for table in tables for name in table.ids}):
                tables, words = [mean_by_id(tables)], "mean if several predict a row"
            what = f"{_describe_models(self.models)}, {words}"
        return self._from_split("oof", what, tables, which)

    def _blended(self, folds: Sequence[tuple[ModelDir, Predictions]], weights: Mapping[str, float]) -> Predictions:
        """Return the blend of the systems' out-of-fold tables, as `ensemble.json` describes it."""
        systems = [mean_by_id([table for model, table in folds if model.system == name]) for name in weights]
        systems = align_rows(systems)
        shares = np.array(list(weights.values()))
        blended = apply_blend(self.ensemble["blend"], [table.log_probs for table in systems], shares)
        return replace(systems[0], log_probs=blended)

    def _from_split(self, name: str, what: str, tables: Sequence[Predictions], which: str) -> ScoredRows:
        """Return the rows of the `tables`, with paths and groups from the split."""
        table = concat_tables(tables)
        split = read_folds(self.split) if self.split else None
        ids = split.ids.to_pylist() if split else []
        paths = dict(zip(ids, split.paths.to_pylist(), strict=True)) if split else {}
        grouped = split is not None and split.groups.null_count < len(split)
        groups = dict(zip(ids, split.groups.to_pylist(), strict=True)) if grouped else {}
        return ScoredRows(name, what, f"the {len(table):,} {which}", table, paths, groups)

    def folds(self) -> list[tuple[ModelDir, Predictions]]:
        """Return each model that has out-of-fold rows, with its table."""
        return self._tables(OOF)

    def curves(self) -> dict[str, Path]:
        """Return the training log of each model by name."""
        logs = [(model, model.path / TRAIN_LOG) for model in self.models if (model.path / TRAIN_LOG).is_file()]
        short = len(logs) > 1 and len({(model.info["seed"], model.info["system"]) for model in self.models}) == 1
        return {f"fold {m.info['fold']}" if short else m.name: path for m, path in logs}

    def thumbnails(self, name: str, mistakes: pd.DataFrame) -> dict[tuple[str, str], bytes]:
        """Return thumbnails of the `mistakes` of the rows `name`, by (name, id); unreadable images are skipped."""
        store = self._store("eval" if name == "test" else "train")
        images = {}
        for mistake in mistakes.itertuples() if store else ():
            path = mistake.path or mistake.id
            try:
                images[name, mistake.id] = thumbnail(decode(store.read(path), path))
            except DataError as error:
                log.warning("no thumbnail of %s: %s", mistake.id, error)
        return images

    def notes(self) -> dict[str, str]:
        """Return the notes on the holdout's scores for the report."""
        if self.selected:
            return {"holdout": "The student's epoch was selected on these rows, so the figures are optimistic."}
        fitted = self.ensemble.get("temperature")
        note = f" The ensemble's temperature, {fitted:.4g}, was fitted on all of these rows." if self.tempered else ""
        return {"holdout": f"No model selected its epoch on these rows.{note}"}

    def counts(self) -> list[tuple[str, str]]:
        """Return names and values of the split's counts; empty without its summary."""
        path = self.split.with_name(SPLIT_SUMMARY) if self.split else None
        try:
            return describe_data(read_json(path)) if path and path.is_file() else []
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is no summary of a split ({error!r}); rerun split or delete the file") from None

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the previous stages, in pipeline order."""
        folders = [self.split.parent] if self.split else []
        folders += [model.path for model in self.models]
        folders += [path.parent for path in list(self.predicted.values())[:1]]
        records = [read_json(folder / RECORD) for folder in folders if (folder / RECORD).is_file()]
        return [record for record in records if isinstance(record, dict) and record.keys() >= RECORDED]

    def title(self) -> str:
        systems = sorted({model.info["system"] for model in self.models})
        return ", ".join(systems) or self._predictions().system or "predictions"

    def _store(self, channel: str) -> ImageStore | None:
        path = self.job.optional_channel(channel)
        return open_store(path, self.settings.data.max_unpacked_gib) if path else None

    def _tables(self, file: str) -> list[tuple[ModelDir, Predictions]]:
        """Return each model that has the table `file`, with the table."""
        return [(model, predictions.read(model.path / file)) for model in self.models if (model.path / file).is_file()]

    def _as_factors(self, labels: Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
        """Convert true classes to the classes of models that predict only some factors, if these models made the predictions."""
        info = self.models[0].info if self.models else {}
        if not info.get("knows") or set(classes) != set(info["classes"]):
            return dict(labels)
        factors = read_factors(info)
        return {n: factors.project(c, info["knows"]) if c in factors.values else c for n, c in labels.items()}

    def _predictions_file(self) -> Path:
        return self.predicted.get(PREDICTIONS) or find_one(self.job, "predictions", PREDICTIONS)

    def _predictions(self) -> Predictions:
        path = self._predictions_file()
        if path.suffix != ".csv":
            return predictions.read(path)
        if has_labels_only(path):
            raise DataError(f"{path} has no probabilities, but evaluate needs them; use `evaluation` to score classes")
        likely, options = self._true_classes(path) if has_one_column(path) else (), self.settings.ensemble
        return read_submission(path, likely=likely, answer=options.answer, positive=options.positive_class)

    def _true_classes(self, path: Path) -> list[str]:
        """Return the true classes of the rows of a submission."""
        name, file = self._id_column(), ground_truth.find_ground_truth_file(self.job.channel("ground_truth"))
        return sorted({*ground_truth.read_ground_truth(file, name, open_csv(path).read([name])[name]).values()})

    def _id_column(self) -> str:
        """Return the name of the id column in a submission of the predictions; "" if unknown."""
        path = self._predictions_file()
        return open_csv(path).columns[0] if path.suffix == ".csv" else self.ensemble.get("id_column", "")

    def _describe_ensemble(self) -> str:
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
        table = read_eval(store, self.settings.data.id_column, self.settings.data.path_column)
        return dict(zip(table.ids, table.paths, strict=True))


def _product(tables_of_models: Sequence[tuple[ModelDir, Predictions]]) -> Predictions:
    """Combine the tables of models that predict different factors: the product of each system's mean."""
    groups = group_by_system([model for model, _ in tables_of_models])
    tables = {name: [table for model, table in tables_of_models if model.system == name] for name in groups}
    return build_product(groups).combine_tables({name: mean_by_id(group) for name, group in tables.items()})


def _describe_models(models: Sequence[ModelDir], prefix: str = "") -> str:
    systems = ", ".join(sorted({model.info["system"] for model in models}))
    if len(models) == 1:
        return models[0].name
    return f"{prefix}{len(models)} fold models of {systems}"
