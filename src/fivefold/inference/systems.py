"""Systems in an ensemble: their tables, the weights between them, and their scores. No torch.

The folds of one system have equal weights: an out-of-fold row has a prediction of one fold only. Convex weights between
systems of one split are fitted on the out-of-fold rows. Their score is cross-fitted: refitted without each fold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fivefold.csv_tables import check_same_ids
from fivefold.evaluation.metrics import compute_metrics, cross_fit_temperature, fit_temperature
from fivefold.inference.blending import BLENDS, apply_blend, cross_fit, equal_weights, weights_by_name
from fivefold.log import log
from fivefold.predictions import Predictions

MIN_HOLDOUT_ROWS = 50
"""Fewer rows are too few to fit a temperature."""
Score = dict[str, Any]


@dataclass(frozen=True)
class System:
    """The models of one recipe with their combined tables, if there are any; or a submission file, one model without tables.

    With several `seeds` an out-of-fold row is the mean of one model per seed.
    """

    name: str
    models: int
    seeds: int
    oof: Predictions | None
    holdout: Predictions | None
    selected: bool = False
    """Whether the epoch of one of its models was selected on the holdout."""
    folds_selected: bool = False
    """Whether the epoch of one of its folds was selected on the out-of-fold rows."""


@dataclass(frozen=True)
class BlendConfig:
    """The names of the blends between systems and within a system; `weights`: user-defined weights by system, if any."""

    between: str = "fitted"
    weights: Mapping[str, float] = field(default_factory=dict)
    within: str = "mean"
    product: str = ""
    """For a product: the names of its systems, for people."""

    def describe(self, models: int, systems: int) -> str:
        """Describe an ensemble of `models` in `systems` for its score."""
        if self.product:
            return f"product of {models} models, {self.product}"
        if self.within == "mean" and (systems == 1 or BLENDS[self.between].combine is BLENDS["mean"].combine):
            return f"mean of {models} models"
        return f"{models} models, {self.within} within a system" + (f", {self.between} between" if systems > 1 else "")


def compute_weights(systems: Sequence[System], rule: BlendConfig) -> tuple[np.ndarray, list[Score]]:
    """Return convex weights [systems], and the out-of-fold scores of the systems and of their blend.

    Weights are fitted if there are several systems and all have out-of-fold rows of two or more folds.
    Otherwise they are equal, unless the user sets them.
    """
    scores, blend, weights = score_systems(systems), BLENDS[rule.between], equal_weights(len(systems))
    if rule.between == "weighted":
        weights = weights_by_name([system.name for system in systems], rule.weights)
    tables = [system.oof for system in systems if system.oof is not None]
    if len(systems) == 1 or len(tables) < len(systems):
        if blend.fit and len(systems) > 1:
            unknown = ", ".join(system.name for system in systems if system.oof is None)
            log.warning("equal weights between the systems: no out-of-fold rows of %s to fit weights on", unknown)
        return weights, scores
    tables = align_rows(tables)
    first, codes, log_probs = tables[0], tables[0].codes(), [table.log_probs for table in tables]

    def add_score(description: str, rows: str, blended: np.ndarray) -> None:
        selected = any(system.folds_selected for system in systems)
        scores.append(score(description, rows, replace(first, log_probs=blended), selected))

    add_score(BLENDS["mean"].description, "out-of-fold", apply_blend("mean", log_probs))
    if blend.fit and len(np.unique(first.fold)) > 1:  # with a single fold there are no other rows to fit on
        blended = cross_fit(log_probs, codes, first.fold, blend.fit)
        add_score(blend.description, "out-of-fold, cross-fitted by fold", blended)
        return blend.fit(log_probs, codes), scores
    if blend.fit:
        log.warning("equal weights between the systems: the out-of-fold rows come from one fold only")
    elif rule.between != "mean":
        add_score(blend.description, "out-of-fold", apply_blend(rule.between, log_probs, weights))
    return weights, scores


def score_holdout(
    systems: Sequence[System], weights: np.ndarray, rule: BlendConfig, temperature: str
) -> tuple[Predictions | None, float, list[Score]]:
    """Return the ensemble's table of the holdout rows, its temperature, and its scores.

    The temperature is 1 unless it is fitted on `holdout` rows. Out-of-fold rows cannot fit it: they have single models'
    predictions, and averaging lowers confidence. With a fitted temperature the table is cross-fitted: each row gets the
    temperature fitted on other rows. Rows that selected a model's epoch fit no temperature.
    """
    tables = [system.holdout for system in systems if system.holdout is not None]
    if len(tables) < len(systems):
        return None, 1.0, []
    tables = align_rows(tables)
    table = replace(tables[0], fold=np.full(len(tables[0]), -1, np.int16))
    table = replace(table, log_probs=apply_blend(rule.between, [other.log_probs for other in tables], weights))
    selected = any(system.selected for system in systems)
    rows = "holdout, which chose the epoch" if selected else "holdout"
    scores = [score(rule.describe(sum(s.models for s in systems), len(systems)), rows, table)]
    if temperature == "none" or selected or len(table) < MIN_HOLDOUT_ROWS:
        return table, 1.0, scores
    codes = table.codes()
    fitted, mixed = fit_temperature(table.log_probs, codes), cross_fit_temperature(table.log_probs, codes)
    table = replace(table, log_probs=mixed)
    scores.append(score(f"the same at temperature {fitted:.3f}", "holdout, temperature cross-fitted", table))
    return table, fitted, scores


def score_systems(systems: Sequence[System]) -> list[Score]:
    """Return the out-of-fold score of each system that has such rows."""
    scores = []
    for system in systems:
        words = "single models" if system.seeds == 1 else f"means of {system.seeds} seeds"
        if system.oof is not None:
            scores.append(score(f"{words} of {system.name}", "out-of-fold", system.oof, system.folds_selected))
    return scores


def align_rows(tables: Sequence[Predictions]) -> list[Predictions]:
    """Return all tables in the first one's order of rows and classes; raise a DataError with ids that only one side has."""
    first = tables[0]
    for table in tables[1:]:
        check_same_ids(first.ids, f"system {first.system!r}", table.ids, f"system {table.system!r}")
    return [table.with_classes(first.classes).reindex(first.ids) for table in tables]


def score(subject: str, rows: str, table: Predictions, folds_selected: bool = False) -> Score:
    """Return the scored models `subject`, the kind of `rows`, their number, and the figures.

    `selected_on` is `oof` if the folds selected their epochs on these rows, which makes the figures optimistic.
    """
    figures = {name: round(value, 6) for name, value in compute_metrics(table.log_probs, table.codes()).items()}
    selected_on = {"selected_on": "oof"} if folds_selected else {}
    return {"what": subject, "rows": rows, "n": len(table), **selected_on, **figures}
