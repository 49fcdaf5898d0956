"""The evaluate stage: score predictions with known truth; write figures, tables, plots and a self-contained report."""

import json
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.config.schema import Settings
from fivefold.contract.files import write_json, write_text
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import METRICS, REPORT
from fivefold.errors import MissingInputError
from fivefold.evaluation import report, scored_rows
from fivefold.evaluation.metrics import full_report
from fivefold.log import log
from fivefold.stages.evaluation_inputs import EvaluationInputs

WRONG_FILES = ("wrong_valid.csv", "wrong_test.csv")
"""Mistakes on rows that selected a model, and on rows that no model used. Only `predict` predicts training rows;
it writes their wrong_train.csv."""
HEADLINE = ("rows", "n", "accuracy", "logloss", "f1_macro", "ece")


def main(job: StageContext, settings: Settings) -> StageResult:
    """Score test, holdout and out-of-fold rows, as far as they exist; return the written files and the figures."""
    options, folder = settings.evaluate, job.output()
    inputs = EvaluationInputs(job, settings)
    scored = [rows for rows in (inputs.test(), inputs.holdout(), inputs.out_of_fold()) if rows is not None]
    if not scored:
        if not options.allow_empty:
            raise MissingInputError(
                "nothing to evaluate: set SM_CHANNEL_GROUND_TRUTH (or SM_GROUND_TRUTH_DIR) with SM_CHANNEL_PREDICTIONS, "
                "or SM_CHANNEL_MODEL with models that have out-of-fold or holdout predictions"
            )
        log.warning("no row has a ground truth, so there are no scores and no report; put a gt.csv beside test.csv")
        write_json(folder / METRICS, {})
        return StageResult([folder / METRICS])
    figures = {rows.name: rows.figures(options.top_k, options.bins) for rows in scored}
    if "test" in figures:
        figures["test"] |= scores_outside_split(scored[0], inputs.overlap, options.top_k, options.bins)
    if inputs.selected and "holdout" in figures:
        figures["holdout"]["selected_on"] = "holdout"
    folds = [(m, full_report(t.log_probs, t.codes(), options.top_k, options.bins)) for m, t in inputs.folds()]
    mistakes = {rows.name: rows.mistakes() for rows in scored}
    shown = {name: rows[: options.num_error_images] for name, rows in mistakes.items()}
    pictures = report.draw_report(scored[0], inputs.curves(), options.bins)
    page = report.render(
        title=settings.run or inputs.title(),
        scored=scored,
        figures=figures,
        folds=[(model.name, scores) for model, scores in folds],
        pictures=pictures,
        mistakes=shown,
        thumbnails={key: image for name in shown for key, image in inputs.thumbnails(name, shown[name]).items()},
        records=inputs.records(),
        notes=inputs.notes(),
        data=inputs.counts(),
        top_k=options.top_k,
    )

    selecting = {"oof", "holdout"} if inputs.selected else {"oof"}
    written = [folder / METRICS, *write_score_tables(folder, scored[0], mistakes, selecting)]
    per_fold = [{key: model.info[key] for key in ("system", "seed", "fold")} | scores for model, scores in folds]
    write_json(folder / METRICS, finite(figures | ({"oof": figures["oof"] | {"folds": per_fold}} if folds else {})))
    written += report.write_pictures(folder, pictures)
    write_text(folder / REPORT, page)
    headline = finite({name: {key: scores[key] for key in HEADLINE} for name, scores in figures.items()})
    print(json.dumps(headline, ensure_ascii=False), flush=True)
    log.info("report: %s", folder / REPORT)
    return StageResult([*written, folder / REPORT], headline)


def scores_outside_split(rows: scored_rows.ScoredRows, known: Set[str], top_k: int, bins: int) -> dict[str, Any]:
    """Return the number of rows that are images of the split and the scores of the other rows; empty without overlap."""
    new = np.array([str(name) not in known for name in rows.table.ids], bool)
    if new.all():
        return {}
    overlap: dict[str, Any] = {"in_split": int((~new).sum())}
    if not new.any():
        log.warning("all %d test images are images of the split: no score covers new images", len(new))
        return overlap
    rest = rows.table.take(new)
    scores = overlap["not_in_split"] = full_report(rest.log_probs, rest.codes(), top_k, bins)
    values = overlap["in_split"], len(new), scores["accuracy"], scores["logloss"]
    log.warning("%d of %d test images are images of the split; of the others: accuracy %.4f, logloss %.4f", *values)
    return overlap


def write_score_tables(
    folder: Path, first: scored_rows.ScoredRows, mistakes: Mapping[str, pd.DataFrame], selecting: Set[str]
) -> list[Path]:
    """Write the per-class table and confusion matrix of the `first` rows, and all mistakes, `selecting` rows to their own file."""
    written = [scored_rows.write_csv(folder / "per_class.csv", first.per_class())]
    written.append(scored_rows.write_confusion(folder / "confusion_matrix.csv", first))
    for file, selected in zip(WRONG_FILES, (True, False), strict=True):
        (folder / file).unlink(missing_ok=True)
        if frames := [rows for name, rows in mistakes.items() if (name in selecting) is selected]:
            ranked = pd.concat(frames).sort_values("confidence", ascending=False, kind="stable")
            written.append(scored_rows.write_csv(folder / file, ranked))
    return written


def finite(value: Any) -> Any:
    """Replace infinite and undefined numbers in `value` by None, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
