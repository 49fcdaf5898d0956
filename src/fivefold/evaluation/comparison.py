"""Several experiments side by side: their figures, how often they agree, and their submissions under one another."""

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
from fivefold.evaluation.metrics import competition_logloss
from fivefold.evaluation.report import Picture, drawn, filled
from fivefold.evaluation.tables import write_csv
from fivefold.evaluation.truth import with_truth
from fivefold.predictions import Predictions, sample

TEMPLATE = Path(__file__).with_name("comparison.html.j2")
FIGURES = ["n", "accuracy", "accuracy_low", "accuracy_high", "logloss", "f1_macro"]


TITLES = {"test": "Test", "oof": "Out-of-fold"}
ABOUT = {
    "test": "Each submission against the ground truth that was handed in, log loss by the competition's rules: rows "
    "brought to sum 1 and clipped. Files that name classes alone have none.",
    "oof": "Each row is predicted by fold models that did not train on it, and that chose their best epoch on these "
    "rows: the figures speak of single models (or of their mean over seeds and systems), not of the ensemble.",
}
Figures = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Experiment:
    """One of those that are compared.

    `source`: the submission file or the run's folder, as people know it. `file` and `table`: its submission
    of the test rows, `labels_only` where that names classes without probabilities. `oof`: its out-of-fold
    rows, and `oof_words` whose they are.
    """

    name: str
    source: str
    file: Path | None = None
    table: Predictions | None = None
    labels_only: bool = False
    oof: Predictions | None = None
    oof_words: str = ""

    def test_figures(self, truth: Mapping[str, str], where: Path) -> Figures | None:
        """FIGURES of the submission by the class names `truth` of ids, logloss by the competition's rules; None without one."""
        if self.table is None or self.file is None:
            return None
        table = with_truth(self.table, dict(truth), where)
        if self.labels_only:
            return _figures(table, None)
        return _figures(table, competition_logloss(np.exp(table.log_probs.astype(np.float64)), table.codes()))

    def oof_figures(self) -> Figures | None:
        """FIGURES of the out-of-fold rows; None without any."""
        return None if self.oof is None else _figures(self.oof, metrics.logloss(self.oof.log_probs, self.oof.codes()))


@dataclass(frozen=True)
class Pairs:
    """How alike experiments are: `agreement` and `correlation` [M, M] of `names` by number, on `rows` in words."""

    names: Mapping[int, str]
    rows: str
    agreement: np.ndarray
    correlation: np.ndarray


def agreement(tables: Sequence[Predictions]) -> np.ndarray:
    """The share of rows [M, M] for which two tables (of the same rows and classes) name the same class."""
    guesses = np.stack([metrics.predicted(table.log_probs) for table in tables])
    return (guesses[:, None] == guesses[None]).mean(axis=2)


def correlation(tables: Sequence[Predictions]) -> np.ndarray:
    """Pearson's correlation [M, M] of all probabilities of two tables; NaN where one of them is constant.

    Of probabilities, never of class indices: an index is a name, and renaming classes would change it.
    """
    flat = np.stack([np.exp(table.log_probs.astype(np.float64)).ravel() for table in tables])
    flat -= flat.mean(axis=1, keepdims=True)
    length = np.sqrt((flat**2).sum(axis=1))
    length[length < 1e-9] = np.nan
    return np.clip((flat @ flat.T) / np.outer(length, length), -1, 1)


def pairs(experiments: Sequence[Experiment]) -> tuple[Pairs | None, list[str]]:
    """How alike the experiments are on the rows that most of them predict, and whom that leaves out, in words."""
    submitted = [each for each in experiments if each.table is not None]
    scored = [each for each in experiments if each.oof is not None]
    chosen, what = (submitted, "test") if len(submitted) >= len(scored) else (scored, "out-of-fold")
    notes = [
        f"{each.name} has no {what} predictions: no likeness"
        for each in experiments
        if not any(each is other for other in chosen)
    ]
    if len(chosen) < 2:
        return None, notes
    tables = [each.table if what == "test" else each.oof for each in chosen]
    tables = same_tables(tables, [each.name for each in chosen], strict=what == "test")
    rows = f"{len(tables[0]):,} {what} rows"
    names = {at: each.name for at, each in enumerate(experiments, start=1) if any(each is other for other in chosen)}
    return Pairs(names, rows, agreement(tables), correlation(tables)), notes


def paired(tables: Mapping[str, Predictions], certain: Collection[str] = ()) -> list[dict[str, Any]]:
    """Each two experiments on the labelled rows that both predict: what the first has more than the second.

    Differences of `accuracy` and `logloss` (None where one of `certain` names classes alone), each with the 95 % interval
    `low` to `high` of a bootstrap over rows (Efron & Tibshirani 1993, section 13.3), and `p` of McNemar's exact test of
    the accuracies (Dietterich 1998, section 3.1). Rows count as independent. Two without a common row are left out.
    """
    from scipy.stats import binomtest

    found = []
    for (a, one), (b, other) in combinations(tables.items(), 2):
        if set(one.classes) != set(other.classes) or set(one.ids).isdisjoint(other.ids):
            continue
        both = same_tables([one, other], [a, b], strict=False)
        codes = both[0].codes()
        right = [(metrics.predicted(each.log_probs) == codes).astype(float) for each in both]
        losses = [
            -each.log_probs[np.arange(len(codes)), codes].clip(np.log(metrics.FLOOR)).astype(float) for each in both
        ]
        wins, defeats = (int((right[at] > right[1 - at]).sum()) for at in (0, 1))
        test = binomtest(wins, wins + defeats).pvalue if wins + defeats else 1.0
        row = {"first": a, "second": b, "n": len(codes), "p": float(test)}
        for name, (mine, theirs) in (("accuracy", right), ("logloss", losses)):
            known = name == "accuracy" or not {a, b} & set(certain)
            low, high = metrics.bootstrap_interval(mine - theirs) if known else (None, None)
            row |= {name: float((mine - theirs).mean()) if known else None, f"{name}_low": low, f"{name}_high": high}
        found.append(row)
    return found


def same_tables(tables: Sequence[Predictions], names: Sequence[str], strict: bool) -> list[Predictions]:
    """The tables in the first one's order of rows and classes: all its rows, or with `strict` false those that all have.

    Raises a DataError that names the experiments and the ids or classes of one side alone.
    """
    first, ids = tables[0], list(tables[0].ids)
    for name, table in zip(names, tables, strict=True):
        differing = sorted(set(table.classes) ^ set(first.classes))
        if differing:
            raise DataError(f"{names[0]} and {name} know different classes: {sample(differing)}")
        there = set(table.ids)
        if strict:
            check_same_ids(ids, names[0], there, name)
        ids = [each for each in ids if each in there]
    if not ids:
        raise DataError(f"{', '.join(names)} have no row in common")
    return [table.with_classes(first.classes).in_order(ids) for table in tables]


def write_stacked(path: Path, experiments: Sequence[Experiment], id_column: str) -> Path:
    """Writes the submissions under one another: `experiment`, the ids, and a column of probabilities a class."""
    submitted = [each for each in experiments if each.table is not None]
    tables = same_tables([each.table for each in submitted], [each.name for each in submitted], strict=True)
    frame = pd.DataFrame(np.exp(np.concatenate([table.log_probs for table in tables]), dtype=np.float64))
    frame.insert(0, "id", np.concatenate([table.ids for table in tables]))
    frame.insert(0, "experiment", np.repeat([each.name for each in submitted], len(tables[0])))
    return write_csv(path, frame, ["experiment", id_column, *tables[0].classes], digits="%.9g")


def draw(
    experiments: Sequence[Experiment], figures: Sequence[Figures | None], alike: Pairs | None
) -> dict[str, Picture]:
    """The pictures, by file name without suffix; those of which nothing is known are left out."""
    found = {}
    if any(figures):
        names, known = [each.name for each in experiments], [each or {} for each in figures]
        found["model_acc"] = drawn(lambda to, theme: plots.scores(names, known, to, theme))
    if alike is not None:
        heat = (alike.names, alike.agreement, alike.correlation)
        found["correlation"] = drawn(lambda to, theme: plots.likeness(*heat, to, theme))
    return found


def write_figures(
    path: Path, experiments: Sequence[Experiment], tables: Mapping[str, Sequence[Figures | None]]
) -> Path:
    """Writes a row an experiment: its number and name, and FIGURES of each of `tables`, empty where unknown."""
    numbers = range(1, len(experiments) + 1)
    frame = pd.DataFrame({"number": numbers, "experiment": [each.name for each in experiments]})
    for name, figures in tables.items():
        known = pd.DataFrame([each or {} for each in figures], columns=FIGURES)
        frame = frame.join(known.astype(dict.fromkeys(FIGURES, float) | {"n": "Int64"}).add_prefix(f"{name}_"))
    return write_csv(path, frame)


def page(
    title: str,
    experiments: Sequence[Experiment],
    tables: Mapping[str, Sequence[Figures | None]],
    alike: Pairs | None,
    pictures: Mapping[str, Picture],
    notes: Sequence[str],
    differences: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The HTML page of a comparison, complete."""
    rows = {
        name: [(at + 1, experiments[at], each) for at, each in enumerate(figures) if each]
        for name, figures in tables.items()
    }
    return filled(
        TEMPLATE,
        title=title,
        experiments=experiments,
        tables=rows,
        titles=TITLES,
        about=ABOUT,
        pairs=alike,
        differences=differences,
        pictures=pictures,
        notes=notes,
    )


def _figures(table: Predictions, logloss: float | None) -> Figures:
    codes = table.codes()
    scores = metrics.summary(table.log_probs, codes)
    low, high = metrics.wilson_interval(scores["accuracy"], len(codes))
    return dict(zip(FIGURES, (len(codes), scores["accuracy"], low, high, logloss, scores["f1_macro"]), strict=True))
