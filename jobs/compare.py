"""Compare several runs and submission files: scores, pairwise agreement, and all submissions in one table."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold import predictions
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_submissions
from fivefold.contract.files import is_visible, read_json, tree_files, write_json, write_text
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import COMPARISON, ENSEMBLE, MODEL, OOF, PREDICTIONS
from fivefold.csv_tables import open_csv
from fivefold.errors import DataError, MissingInputError
from fivefold.evaluation import comparison
from fivefold.evaluation.comparison import Experiment
from fivefold.evaluation.ground_truth import add_labels, find_ground_truth_file, read_ground_truth
from fivefold.evaluation.report import write_pictures
from fivefold.evaluation.scored_rows import write_csv
from fivefold.inference.submission_reader import has_labels_only, has_one_column, read_submission, system_name
from fivefold.log import log
from fivefold.predictions import mean_by_id, preview

ALL_SUBMISSIONS = "all_experiments_submission_compare.csv"
DIFFERENCES = "paired.csv"
OPTIONAL = (ALL_SUBMISSIONS, DIFFERENCES, "model_acc.png", "correlation.png")
LOGLOSS_COLUMNS = ("logloss", "logloss_low", "logloss_high")


def main(job: StageContext, settings: Settings) -> StageResult:
    """Compare all experiments; return the tables, plots and page, and the figures."""
    channel = job.optional_channel("ground_truth")
    file = find_ground_truth_file(channel) if channel else None
    labels = read_ground_truth(file) if file else {}
    experiments = load_experiments(job, settings.compare.runs, settings.compare.submissions)
    experiments = with_tables(experiments, labels, settings.ensemble.answer, settings.ensemble.positive_class)
    if file:
        experiments = [replace(e, table=add_labels(e.table, labels, file)) if e.table else e for e in experiments]
    tables = {"test": [e.test_scores() for e in experiments], "oof": [e.oof_scores() for e in experiments]}
    alike, notes = comparison.pairwise_agreement(experiments)
    shown = "test" if any(tables["test"]) else "oof"
    if not any(tables[shown]):
        notes.append("no scores: there is neither a ground truth nor out-of-fold rows")
    known = {e.name: table for e in experiments if (table := e.table if file else e.oof)}
    differences = comparison.paired_differences(known, {e.name for e in experiments if e.labels_only})
    pictures = comparison.draw_comparison(experiments, tables[shown], alike)
    content = {"pairs": alike, "pictures": pictures, "notes": notes, "differences": differences}
    page = comparison.render_page(settings.run or f"{len(experiments)} experiments", experiments, tables, **content)
    for note in notes:
        log.info("%s", note)

    folder = job.output()
    for name in OPTIONAL:
        (folder / name).unlink(missing_ok=True)
    written = [comparison.write_scores(folder / "comparison.csv", experiments, tables), folder / "comparison.json"]
    write_json(written[1], describe_comparison(experiments, tables, alike, notes, differences))
    if submitted := next((e.file for e in experiments if e.file), None):
        id_column = open_csv(submitted).columns[0]
        written.append(comparison.write_all_submissions(folder / ALL_SUBMISSIONS, experiments, id_column))
    if differences:
        frame = pd.DataFrame(differences).astype(dict.fromkeys(LOGLOSS_COLUMNS, float))
        written.append(write_csv(folder / DIFFERENCES, frame))
    written += write_pictures(folder, pictures)
    write_text(folder / COMPARISON, page)
    figures = {experiment.name: scores for experiment, scores in zip(experiments, tables[shown], strict=True) if scores}
    print(json.dumps(figures, ensure_ascii=False), flush=True)
    log.info("comparison: %s", folder / COMPARISON)
    return StageResult([*written, folder / COMPARISON], figures)


def load_experiments(job: StageContext, runs: Sequence[str], files: Sequence[str]) -> list[Experiment]:
    """Return the runs of the channel and of the settings, then the files of both, with unique names."""
    channel = job.optional_channel("runs")
    folders = [path for path in sorted(channel.iterdir()) if path.is_dir() and is_visible(path.name)] if channel else []
    experiments = [load_run(path) for path in [*folders, *map(Path, runs)]]
    for path in [*find_submissions(job), *map(Path, files)]:
        if not path.is_file():
            raise MissingInputError(f"no submission file {path}")
        experiments.append(Experiment(system_name(path), str(path), path))
    counts = Counter(e.name for e in experiments)
    # Files of one name in several folders get their folder's name too.
    names = [f"{Path(e.source).parent.name}/{e.name}" if counts[e.name] > 1 else e.name for e in experiments]
    experiments = [replace(e, name=name) for e, name in zip(experiments, names, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two experiments are called {twice[0]!r}; rename the folder or the file of one of them")
    if len(experiments) < 2:
        raise MissingInputError(
            f"{len(experiments)} experiments are too few to compare: set compare.runs=A,B (folders of runs), "
            "compare.submissions=x.csv,y.csv, or the channels SM_CHANNEL_RUNS and SM_CHANNEL_SUBMISSIONS"
        )
    return experiments


def load_run(folder: Path) -> Experiment:
    """Read a run's ensemble and the out-of-fold rows of its fold models, if they exist."""
    if not folder.is_dir():
        raise MissingInputError(f"no run {folder}: it must be a folder (use compare.submissions for files)")
    files = tree_files(folder)
    usual = folder / "ensemble" / "output" / ENSEMBLE
    ensembles = [usual] if usual.is_file() else [path for path in files if path.name == ENSEMBLE]
    if len(ensembles) > 1:
        raise DataError(f"several ensembles in the run {folder}: {preview(ensembles)}; set the folder of one")
    file = ensembles[0].parent / read_json(ensembles[0]).get("submission", "submission.csv") if ensembles else None
    if file and not file.is_file():
        raise MissingInputError(f"the run {folder} has no submission {file}")
    infos = {p.parent: read_json(p) for p in files if p.name == MODEL and (p.parent / OOF).is_file()}
    folds = {path: info for path, info in infos.items() if info.get("role") == "fold"}
    if not folds and not file:
        raise MissingInputError(f"the run {folder} holds neither {ENSEMBLE} nor fold models with {OOF}")
    oof = mean_by_id([predictions.read(path / OOF) for path in folds]) if folds else None
    # A submission of one column lacks probabilities or does not name their class: read the table beside it instead.
    use_table = file and has_one_column(file) and (file.parent / PREDICTIONS).is_file()
    table = predictions.read(file.parent / PREDICTIONS) if use_table else None
    systems = ", ".join(sorted({str(info["system"]) for info in folds.values()}))
    words = f"{len(folds)} fold models of {systems}" if folds else ""
    return Experiment(folder.resolve().name, str(folder), file, table, oof=oof, oof_description=words)


def with_tables(
    experiments: Sequence[Experiment], labels: Mapping[str, str], answer: str = "auto", positive: str = ""
) -> list[Experiment]:
    """Return the experiments with their submissions; files of one column use the classes of the others, or of `labels`.

    The id column of a file is the one with the ids of the runs' tables, or of `labels`, if there is one.
    """
    read = {e.name: e.table for e in experiments if e.table is not None}
    ids = next((table.ids.tolist() for table in read.values()), list(labels))
    files = {e.name: e.file for e in experiments if e.file is not None and e.name not in read}
    single = {name for name, file in files.items() if has_one_column(file)}
    certain = {name for name in single if has_labels_only(files[name])}
    read |= {name: read_submission(files[name], ids, all_ids=False) for name in files.keys() - single}
    known = sorted({name for table in read.values() for name in table.classes})
    options = {"all_ids": False, "likely": known or sorted({*labels.values()}), "answer": answer, "positive": positive}
    if not known:
        alone = [read_submission(files[name], ids, **options) for name in single]
        known = sorted({name for table in alone for name in table.classes})
    read |= {name: read_submission(files[name], ids, known, **options) for name in single}
    return [replace(e, table=read.get(e.name), labels_only=e.name in certain) for e in experiments]


def describe_comparison(
    experiments: Sequence[Experiment],
    tables: Mapping[str, Sequence[comparison.Scores | None]],
    pairs: comparison.PairwiseAgreement | None,
    notes: Sequence[str],
    differences: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return all figures, the pairwise differences and the agreement matrices; an undefined number is null."""
    rows = [
        {"experiment": e.name, "source": e.source, "oof_rows_of": e.oof_description}
        | {name: figures[index] for name, figures in tables.items()}
        for index, e in enumerate(experiments)
    ]
    likeness = None
    if pairs is not None:
        likeness = {"names": list(pairs.names.values()), "rows": pairs.rows}
        for name, matrix in (("agreement", pairs.agreement), ("correlation", pairs.correlation)):
            likeness[name] = [[None if np.isnan(cell) else round(float(cell), 6) for cell in row] for row in matrix]
    return {"experiments": rows, "paired": list(differences), "likeness": likeness, "notes": list(notes)}
