"""Several runs and submission files side by side: who scores what, who agrees with whom, all submissions in one table."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold import predictions
from fivefold.contract.files import atomic, is_shown, read_json, tree_files, write_json, write_text
from fivefold.contract.job import Job
from fivefold.contract.stages import COMPARISON, ENSEMBLE, MODEL, OOF, PREDICTIONS
from fivefold.contract.submissions import find_submissions
from fivefold.csv_tables import open_csv
from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation import comparison, truth
from fivefold.evaluation.comparison import Experiment
from fivefold.evaluation.tables import write_csv
from fivefold.inference.submitted import has_one_column, names_classes_alone, read_submitted, system_name
from fivefold.predictions import mean_by_id
from fivefold.recipe import Settings

from .outcome import Outcome

log = logging.getLogger("fivefold")
STACKED = "all_experiments_submission_compare.csv"
PAIRED = "paired.csv"
NUMBERS = ("logloss", "logloss_low", "logloss_high")


def main(job: Job, settings: Settings) -> Outcome:
    """Compares all that it is given; the tables, pictures and page, and the figures."""
    file, labels = ground_truth(job)
    found = found_experiments(job, settings.compare.runs, settings.compare.files)
    experiments = with_tables(found, labels, settings.ensemble.answer, settings.ensemble.positive_class)
    tables = {"test": [each.test_figures(labels, file) if file else None for each in experiments]}
    tables["oof"] = [each.oof_figures() for each in experiments]
    alike, notes = comparison.pairs(experiments)
    shown = "test" if any(tables["test"]) else "oof"
    if not any(tables[shown]):
        notes.append("nothing is scored: there is neither a ground truth nor out-of-fold rows")
    known = {e.name: e.oof for e in experiments if e.oof} if file is None else {}
    known |= {e.name: truth.with_truth(e.table, dict(labels), file) for e in experiments if file and e.table}
    differences = comparison.paired(known, {e.name for e in experiments if e.labels_only})
    pictures = comparison.draw(experiments, tables[shown], alike)
    page = comparison.page(
        settings.run or f"{len(experiments)} experiments", experiments, tables, alike, pictures, notes, differences
    )
    for note in notes:
        log.info("%s", note)

    folder = job.output()
    written = write_tables(folder, experiments, tables, as_json(experiments, tables, alike, notes, differences))
    (folder / PAIRED).unlink(missing_ok=True)
    if differences:
        written.append(write_csv(folder / PAIRED, pd.DataFrame(differences).astype(dict.fromkeys(NUMBERS, float))))
    for name in ("model_acc", "correlation"):
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, picture in pictures.items():
        written.append(folder / f"{name}.png")
        with atomic(written[-1]) as temporary:
            temporary.write_bytes(picture["light"])
    write_text(folder / COMPARISON, page)
    figures = {each.name: scores for each, scores in zip(experiments, tables[shown], strict=True) if scores}
    print(json.dumps(figures, ensure_ascii=False), flush=True)
    log.info("comparison: %s", folder / COMPARISON)
    return Outcome([*written, folder / COMPARISON], figures)


def found_experiments(job: Job, runs: Sequence[str], files: Sequence[str]) -> list[Experiment]:
    """The runs of the channel and of the settings, then the files of both; names are theirs, each once."""
    channel = job.optional_channel("runs")
    folders = [path for path in sorted(channel.iterdir()) if path.is_dir() and is_shown(path.name)] if channel else []
    found = [of_run(path) for path in [*folders, *map(Path, runs)]]
    found += [of_file(path) for path in [*find_submissions(job), *map(Path, files)]]
    counts = Counter(each.name for each in found)
    # Files of one name in several folders go by their folder too.
    found = [replace(e, name=f"{Path(e.source).parent.name}/{e.name}") if counts[e.name] > 1 else e for e in found]
    name, count = Counter(each.name for each in found).most_common(1)[0] if found else ("", 0)
    if count > 1:
        raise DataError(f"two experiments are called {name!r}; rename the folder or the file of one")
    if len(found) < 2:
        raise MissingInputError(
            f"{len(found)} experiments are too few to compare: give compare.runs=A,B (folders of runs), "
            "compare.files=x.csv,y.csv, or the channels SM_CHANNEL_RUNS and SM_CHANNEL_SUBMISSIONS"
        )
    return found


def of_file(path: Path) -> Experiment:
    if not path.is_file():
        raise MissingInputError(f"no submission file {path}")
    return Experiment(name=system_name(path), source=str(path), file=path)


def of_run(folder: Path) -> Experiment:
    """A run's ensemble and the out-of-fold rows of its fold models, whichever there are."""
    if not folder.is_dir():
        raise MissingInputError(f"no run {folder}: a folder is needed (files go to compare.files)")
    files = tree_files(folder)
    usual = folder / "ensemble" / "output" / ENSEMBLE
    ensembles = [usual] if usual.is_file() else [path for path in files if path.name == ENSEMBLE]
    if len(ensembles) > 1:
        raise DataError(
            f"several ensembles in the run {folder}: {', '.join(map(str, ensembles[:4]))}; give one's folder"
        )
    submissions = [path.parent / read_json(path).get("submission", "submission.csv") for path in ensembles]
    absent = [path for path in submissions if not path.is_file()]
    if absent:
        raise MissingInputError(f"the run {folder} has no submission {absent[0]}")
    infos = {p.parent: read_json(p) for p in files if p.name == MODEL and (p.parent / OOF).is_file()}
    folds = {path: info for path, info in infos.items() if info.get("role") == "fold"}
    if not folds and not submissions:
        raise MissingInputError(f"the run {folder} holds neither {ENSEMBLE} nor fold models with {OOF}")
    oof = mean_by_id([predictions.read(path / OOF) for path in folds]) if folds else None
    file = next(iter(submissions), None)
    # a submission of one column has lost probabilities, or does not say whose they are; they stand beside it
    kept = file is not None and has_one_column(file) and (file.parent / PREDICTIONS).is_file()
    table = predictions.read(file.parent / PREDICTIONS) if kept else None
    systems = ", ".join(sorted({str(info["system"]) for info in folds.values()}))
    words = f"{len(folds)} fold models of {systems}" if folds else ""
    return Experiment(folder.resolve().name, str(folder), file, table, oof=oof, oof_words=words)


def with_tables(
    experiments: Sequence[Experiment], labels: Mapping[str, str], answer: str = "auto", positive: str = ""
) -> list[Experiment]:
    """The experiments with their submissions read; those of one column know the classes of the others, or of `labels`.

    A file's rows go by the ids that the tables of runs have, or those of `labels`, where one of its columns does.
    `answer` and `positive`: see `read_submitted`.
    """
    read = {each.name: each.table for each in experiments if each.table is not None}
    ids = next((table.ids.tolist() for table in read.values()), list(labels))
    files = {each.name: each.file for each in experiments if each.file is not None and each.name not in read}
    single = {name for name, file in files.items() if has_one_column(file)}
    certain = {name for name in single if names_classes_alone(files[name])}
    read |= {name: read_submitted(files[name], ids, all_ids=False) for name in files.keys() - single}
    known = sorted({name for table in read.values() for name in table.classes})
    options = {"all_ids": False, "likely": known or sorted({*labels.values()}), "answer": answer, "positive": positive}
    if not known:
        alone = [read_submitted(files[name], ids, **options) for name in single]
        known = sorted({name for table in alone for name in table.classes})
    read |= {name: read_submitted(files[name], ids, known, **options) for name in single}
    return [replace(each, table=read.get(each.name), labels_only=each.name in certain) for each in experiments]


def ground_truth(job: Job) -> tuple[Path | None, Mapping[str, str]]:
    given = job.optional_channel("ground_truth")
    file = truth.truth_file(given) if given else None
    return file, truth.read_truth(file) if file else {}


def write_tables(
    folder: Path,
    experiments: Sequence[Experiment],
    tables: Mapping[str, Sequence[comparison.Figures | None]],
    facts: Mapping[str, Any],
) -> list[Path]:
    """The figures as CSV and JSON, and all submissions under one another, where there are any; the files written."""
    written = [comparison.write_figures(folder / "comparison.csv", experiments, tables), folder / "comparison.json"]
    write_json(written[1], facts)
    (folder / STACKED).unlink(missing_ok=True)
    submitted = next((each.file for each in experiments if each.file is not None), None)
    if submitted is not None:
        id_column = open_csv(submitted).columns[0]
        written.append(comparison.write_stacked(folder / STACKED, experiments, id_column))
    return written


def as_json(
    experiments: Sequence[Experiment],
    tables: Mapping[str, Sequence[comparison.Figures | None]],
    alike: comparison.Pairs | None,
    notes: Sequence[str],
    differences: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All figures, the differences of pairs, and the matrices of likeness, null where a number of theirs is undefined."""
    every = [
        {"experiment": each.name, "source": each.source, "oof_rows_of": each.oof_words}
        | {name: figures[at] for name, figures in tables.items()}
        for at, each in enumerate(experiments)
    ]
    likeness = None
    if alike is not None:
        likeness = {"names": list(alike.names.values()), "rows": alike.rows}
        for name, matrix in (("agreement", alike.agreement), ("correlation", alike.correlation)):
            likeness[name] = [[None if np.isnan(cell) else round(float(cell), 6) for cell in row] for row in matrix]
    return {"experiments": every, "paired": list(differences), "likeness": likeness, "notes": list(notes)}
