"""Comparison of several experiments: their figures, their pairwise agreement, and their submissions in one table."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.csv_tables import check_same_ids
from fivefold.errors import DataError
from fivefold.evaluation import metrics, plots
from fivefold.evaluation.report import TITLES, render_png, render_template
from fivefold.evaluation.scored_rows import write_csv
from fivefold.predictions import Predictions, preview

TEMPLATE = Path(__file__).with_name("comparison.html.j2")
SCORE_NAMES = ["n", "accuracy", "accuracy_low", "accuracy_high", "logloss", "f1_macro"]
CAPTIONS = {
    "test": "Each submission scored against the supplied ground truth. Log loss follows the competition's rules: rows "
    "are normalised to sum 1 and clipped. Files of predicted classes have no log loss.",
    "oof": "Each row is predicted by fold models that did not train on it. Those models selected their best epoch on "
    "these rows. The figures cover single models (or their mean over seeds and systems), not the ensemble.",
}
Scores = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Experiment:
    """One experiment of a comparison.

    `source`: the path of the submission file or of the run's folder. `file` and `table`: its submission of the test rows,
    with labels if there is a ground truth, as `labels_only` if it has classes without probabilities. `oof`: its
    out-of-fold rows by the models `oof_description`.
    """

    name: str
    source: str
    file: Path | None = None
    table: Predictions | None = None
    labels_only: bool = False
    oof: Predictions | None = None
    oof_description: str = ""

    def test_scores(self) -> Scores | None:
        """Return SCORE_NAMES of the submission, logloss by competition rules; None without one or without labels."""
        if self.table is None or self.table.labels is None:
            return None
        probs = np.exp(self.table.log_probs.astype(np.float64))
        loss = None if self.labels_only else metrics.competition_logloss(probs, self.table.codes())
        return _figures(self.table, loss)

    def oof_scores(self) -> Scores | None:
        """Return SCORE_NAMES of the out-of-fold rows; None without any."""
        return None if self.oof is None else _figures(self.oof, metrics.logloss(self.oof.log_probs, self.oof.codes()))


@dataclass(frozen=True)
class PairwiseAgreement:
    """Pairwise `agreement` and `correlation` [M, M] of the experiments `names` (by number); `rows` describes the rows."""

    names: Mapping[int, str]
    rows: str
    agreement: np.ndarray
    correlation: np.ndarray


def agreement(tables: Sequence[Predictions]) -> np.ndarray:
    """Return the share of rows [M, M] for which two tables (of the same rows and classes) predict the same class."""
    guesses = np.stack([metrics.predicted_classes(table.log_probs) for table in tables])
    return (guesses[:, None] == guesses[None]).mean(axis=2)


def correlation(tables: Sequence[Predictions]) -> np.ndarray:
    """Return Pearson's correlation [M, M] of all probabilities of two tables; NaN if one of them is constant."""
    flat = np.stack([np.exp(table.log_probs.astype(np.float64)).ravel() for table in tables])
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.sqrt((flat**2).sum(axis=1))
    length[length < 1e-9] = np.nan
    return np.clip((flat @ flat.T) / np.outer(length, length), -1, 1)


def pairwise_agreement(experiments: Sequence[Experiment]) -> tuple[PairwiseAgreement | None, list[str]]:
    """Return the agreement on the rows that most experiments predict, and a note for each experiment without these rows."""
    kinds = {"test": [e.table for e in experiments], "out-of-fold": [e.oof for e in experiments]}
    kind = min(kinds, key=lambda name: kinds[name].count(None))
    predicted = list(zip(experiments, kinds[kind], strict=True))
    notes = [f"{e.name} has no {kind} predictions, so the agreement excludes it" for e, table in predicted if not table]
    names = {number: e.name for number, (e, table) in enumerate(predicted, start=1) if table}
    if len(names) < 2:
        return None, notes
    tables = same_tables({e.name: table for e, table in predicted if table}, strict=kind == "test")
    rows = f"{len(tables[0]):,} {kind} rows"
    return PairwiseAgreement(names, rows, agreement(tables), correlation(tables)), notes


def paired_differences(tables: Mapping[str, Predictions], certain: Collection[str] = ()) -> list[dict[str, Any]]:
    """Compare each pair of experiments on the labelled rows that both predict: first minus second.

    Return differences of `accuracy` and `logloss` (None if one is in `certain`, which has predicted classes only), each
    with the 95 % interval `low` to `high` of a bootstrap over rows (Efron & Tibshirani 1993, section 13.3), and `p` of
    McNemar's exact test of the accuracies (Dietterich 1998, section 3.1). Rows count as independent. Pairs without a
    common row are skipped.
    """
    from scipy.stats import binomtest

    differences = []
    for (a, one), (b, other) in combinations(tables.items(), 2):
        if set(one.classes) != set(other.classes) or set(one.ids).isdisjoint(other.ids):
            continue
        both = same_tables({a: one, b: other}, strict=False)
        codes = both[0].codes()
        right = [(metrics.predicted_classes(table.log_probs) == codes).astype(float) for table in both]
        truth = [table.log_probs[np.arange(len(codes)), codes] for table in both]
        losses = [-values.clip(np.log(metrics.FLOOR)).astype(float) for values in truth]
        only_first, only_second = (int((right[index] > right[1 - index]).sum()) for index in (0, 1))
        test = binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
        row = {"first": a, "second": b, "n": len(codes), "p": float(test)}
        for name, (first, second) in (("accuracy", right), ("logloss", losses)):
            known = name == "accuracy" or not {a, b} & set(certain)
            low, high = metrics.bootstrap_interval(first - second) if known else (None, None)
            row |= {name: float((first - second).mean()) if known else None, f"{name}_low": low, f"{name}_high": high}
        differences.append(row)
    return differences


def same_tables(tables: Mapping[str, Predictions], strict: bool) -> list[Predictions]:
    """Return the tables in the first one's order of rows and classes: all its rows, or the common rows if not `strict`.

    Raise a DataError with the experiments and the ids or classes that only one side has.
    """
    (first_name, first), *_ = tables.items()
    ids = list(first.ids)
    for name, table in tables.items():
        differing = sorted(set(table.classes) ^ set(first.classes))
        if differing:
            raise DataError(f"{first_name} and {name} predict different classes: {preview(differing)}")
        others = set(table.ids)
        if strict:
            check_same_ids(ids, first_name, others, name)
        ids = [row_id for row_id in ids if row_id in others]
    if not ids:
        raise DataError(f"{', '.join(tables)} have no row in common")
    return [table.with_classes(first.classes).reindex(ids) for table in tables.values()]


def write_all_submissions(path: Path, experiments: Sequence[Experiment], id_column: str) -> Path:
    """Write all submissions into one table: `experiment`, the ids, and one probability column per class."""
    submitted = {e.name: e.table for e in experiments if e.table is not None}
    tables = same_tables(submitted, strict=True)
    frame = pd.DataFrame(np.exp(np.concatenate([table.log_probs for table in tables]), dtype=np.float64))
    frame.insert(0, "id", np.concatenate([table.ids for table in tables]))
    frame.insert(0, "experiment", np.repeat(list(submitted), len(tables[0])))
    return write_csv(path, frame, ["experiment", id_column, *tables[0].classes], digits="%.9g")


def draw_comparison(
    experiments: Sequence[Experiment], figures: Sequence[Scores | None], pairs: PairwiseAgreement | None
) -> dict[str, bytes]:
    """Return PNG bytes by file name without suffix; a picture without data is omitted."""
    pictures = {}
    if any(figures):
        known = [scores or {} for scores in figures]
        pictures["model_acc"] = render_png(plots.plot_scores, [e.name for e in experiments], known)
    if pairs is not None:
        pictures["correlation"] = render_png(plots.plot_agreement, pairs.names, pairs.agreement, pairs.correlation)
    return pictures


def write_scores(path: Path, experiments: Sequence[Experiment], tables: Mapping[str, Sequence[Scores | None]]) -> Path:
    """Write one row per experiment: its number and name, and SCORE_NAMES of each of `tables`, empty if unknown."""
    frame = pd.DataFrame({"number": range(1, len(experiments) + 1), "experiment": [e.name for e in experiments]})
    for name, figures in tables.items():
        known = pd.DataFrame([scores or {} for scores in figures], columns=SCORE_NAMES)
        frame = frame.join(known.astype(dict.fromkeys(SCORE_NAMES, float) | {"n": "Int64"}).add_prefix(f"{name}_"))
    return write_csv(path, frame)


def render_page(
    title: str, experiments: Sequence[Experiment], tables: Mapping[str, Sequence[Scores | None]], **content: Any
) -> str:
    """Render the complete HTML page of a comparison; `content`: the template's `pairs`, `differences`, `pictures`, `notes`."""
    numbered = list(enumerate(experiments, start=1))
    rows = {name: [row for row in zip(numbered, figures, strict=True) if row[1]] for name, figures in tables.items()}
    fixed = {"experiments": experiments, "titles": TITLES, "about": CAPTIONS}
    return render_template(TEMPLATE, title=title, tables=rows, **fixed, **content)


def _figures(table: Predictions, logloss: float | None) -> Scores:
    codes = table.codes()
    scores = metrics.compute_metrics(table.log_probs, codes)
    low, high = metrics.wilson_interval(scores["accuracy"], len(codes))
    return dict(zip(SCORE_NAMES, (len(codes), scores["accuracy"], low, high, logloss, scores["f1_macro"]), strict=True))
