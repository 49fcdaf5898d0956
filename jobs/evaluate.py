"""Scores of what is known the truth of: figures, tables, pictures, and one report that opens anywhere."""

import json
import logging
import math
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.contract.files import atomic, write_json, write_text
from fivefold.contract.job import Job
from fivefold.contract.stages import METRICS, REPORT
from fivefold.errors import MissingInputError
from fivefold.evaluation import report, tables
from fivefold.evaluation.metrics import full_report
from fivefold.recipe import Settings

from .outcome import Outcome
from .scoring import Evidence

log = logging.getLogger("fivefold")

WRONG = ("wrong_valid.csv", "wrong_test.csv")
"""Mistakes on rows that a model was selected on, and on rows that no model saw. Rows that a model trained on
are predicted by `predict` alone, which has their wrong_train.csv."""
HEADLINE = ("rows", "n", "accuracy", "logloss", "f1_macro", "ece")


def main(job: Job, settings: Settings) -> Outcome:
    """Scores test, holdout and out-of-fold rows, whichever there are; the files written and the figures."""
    options, folder = settings.evaluate, job.output()
    evidence = Evidence(job, settings.data, settings.ensemble.answer, settings.ensemble.positive_class)
    scored = [rows for rows in (evidence.test(), evidence.holdout(), evidence.out_of_fold()) if rows is not None]
    if not scored:
        if not options.allow_empty:
            raise MissingInputError(
                "nothing to report on: give SM_CHANNEL_GROUND_TRUTH (or SM_GROUND_TRUTH_DIR) with SM_CHANNEL_PREDICTIONS, "
                "or SM_CHANNEL_MODEL with models that have out-of-fold or holdout predictions"
            )
        log.warning(
            "no row has a ground truth, so there are no scores and no report; a gt.csv beside test.csv gives them"
        )
        write_json(folder / METRICS, {})
        return Outcome([folder / METRICS])
    figures = {rows.name: rows.figures(options.top_k, options.bins) for rows in scored}
    if "test" in figures:
        figures["test"] |= in_and_out(scored[0], evidence.overlap, options.top_k, options.bins)
    if evidence.selected and "holdout" in figures:
        figures["holdout"]["selected_on"] = "holdout"
    folds = [
        (model, full_report(table.log_probs, table.codes(), options.top_k, options.bins))
        for model, table in evidence.folds()
    ]
    mistakes = {rows.name: rows.mistakes() for rows in scored}
    shown = {name: rows[: options.gallery] for name, rows in mistakes.items()}
    pictures = report.draw(scored[0], evidence.curves(), options.bins)
    page = report.render(
        report.Content(
            title=settings.run or evidence.title(),
            scored=scored,
            figures=figures,
            folds=[(model.name, scores) for model, scores in folds],
            pictures=pictures,
            mistakes=shown,
            thumbnails={key: image for name in shown for key, image in evidence.thumbnails(name, shown[name]).items()},
            records=evidence.records(),
            notes=evidence.notes() | notes_on_overlap(figures),
            data=evidence.counts(),
            top_k=options.top_k,
        )
    )

    selecting = {"oof", "holdout"} if evidence.selected else {"oof"}
    written = [folder / METRICS, *write_tables(folder, scored[0], mistakes, selecting)]
    per_fold = [{key: model.info[key] for key in ("system", "seed", "fold")} | scores for model, scores in folds]
    write_json(folder / METRICS, finite(figures | ({"oof": figures["oof"] | {"folds": per_fold}} if folds else {})))
    for name, picture in pictures.items():
        written.append(folder / f"{name}.png")
        with atomic(written[-1]) as temporary:
            temporary.write_bytes(picture["light"])
    write_text(folder / REPORT, page)
    headline = finite({name: {key: scores[key] for key in HEADLINE} for name, scores in figures.items()})
    print(json.dumps(headline, ensure_ascii=False), flush=True)
    log.info("report: %s", folder / REPORT)
    return Outcome([*written, folder / REPORT], headline)


def in_and_out(rows: tables.Scored, known: Set[str], top_k: int, bins: int) -> dict[str, Any]:
    """How many of the rows are images of the split, and the scores of the others, if there are any; nothing for none."""
    other = np.array([str(name) not in known for name in rows.table.ids], bool)
    if other.all():
        return {}
    found: dict[str, Any] = {"in_split": int((~other).sum())}
    if not other.any():
        log.warning("all %d test images are images of the split: none of these scores is of unseen images", len(other))
        return found
    rest = rows.table.take(other)
    found["not_in_split"] = full_report(rest.log_probs, rest.codes(), top_k, bins)
    told = found["in_split"], len(other), found["not_in_split"]["accuracy"], found["not_in_split"]["logloss"]
    log.warning("%d of %d test images are images of the split; of the others: accuracy %.4f, logloss %.4f", *told)
    return found


def notes_on_overlap(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What the report says of test images that are images of the split."""
    count = figures.get("test", {}).get("in_split", 0)
    words = f"{count} of these images {'is an image' if count == 1 else 'are images'} of the split by the pixels."
    return {"test": words} if count else {}


def write_tables(
    folder: Path, first: tables.Scored, mistakes: Mapping[str, pd.DataFrame], selecting: Set[str]
) -> list[Path]:
    """Per class and confusion of the rows that open the report, and the mistakes of all, apart for rows of names in `selecting`."""
    written = [tables.write_per_class(folder / "per_class.csv", first)]
    written.append(tables.write_confusion(folder / "confusion_matrix.csv", first))
    for file, selected in zip(WRONG, (True, False), strict=True):
        (folder / file).unlink(missing_ok=True)
        if frames := [rows for name, rows in mistakes.items() if (name in selecting) is selected]:
            ranked = pd.concat(frames).sort_values("confidence", ascending=False, kind="stable")
            written.append(tables.write_csv(folder / file, ranked))
    return written


def finite(value: Any) -> Any:
    """`value` with null for each infinite or undefined number, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
