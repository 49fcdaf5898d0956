"""Systems in an ensemble: their tables, the weights between them, and what each score speaks of. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fivefold.errors import DataError
from fivefold.evaluation.calibration import apply_temperature, fit_temperature
from fivefold.evaluation.metrics import summary
from fivefold.inference.ensemble import blend, cross_fitted, fit_weights
from fivefold.predictions import Predictions, sample

LEAST_HOLDOUT_ROWS = 50
"""Fewer rows say too little about a temperature."""
Score = dict[str, Any]


@dataclass(frozen=True)
class System:
    """The models of one recipe, averaged equally: their joined out-of-fold and holdout tables, where there are any.

    With several `seeds` an out-of-fold row is the mean of as many models.
    """

    name: str
    models: int
    seeds: int
    oof: Predictions | None
    holdout: Predictions | None


def weigh(systems: Sequence[System], how: str) -> tuple[np.ndarray, list[Score]]:
    """Convex weights [systems], and the out-of-fold scores that speak of them.

    `fitted`: by out-of-fold logloss, where there are several systems; `mean`: equal.
    """
    scores = [score(_one_of(system), "out-of-fold", system.oof) for system in systems if system.oof is not None]
    equal = np.full(len(systems), 1 / len(systems))
    tables = [system.oof for system in systems if system.oof is not None]
    if len(systems) == 1 or len(tables) < len(systems):
        return equal, scores
    tables = same_rows(tables)
    log_probs, first = [table.log_probs for table in tables], tables[0]
    mixed = replace(first, log_probs=blend(log_probs, equal))
    scores.append(score("equal mean of the systems", "out-of-fold", mixed))
    if how == "mean" or len(np.unique(first.fold)) < 2:  # a single fold leaves no rows to fit on
        return equal, scores
    mixed = replace(first, log_probs=cross_fitted(log_probs, first.codes(), first.fold))
    scores.append(score("fitted weights between the systems", "out-of-fold, cross-fitted by fold", mixed))
    return fit_weights(log_probs, first.codes()), scores


def judge_holdout(
    systems: Sequence[System], weights: np.ndarray, temperature: str
) -> tuple[Predictions | None, float, list[Score]]:
    """The ensemble's table of the rows that no model trained or selected on, its temperature, and its scores.

    The temperature is 1 unless `holdout` rows fit it: out-of-fold rows speak of single models, and
    averaging lowers confidence.
    """
    tables = [system.holdout for system in systems if system.holdout is not None]
    if len(tables) < len(systems):
        return None, 1.0, []
    tables = same_rows(tables)
    table = replace(tables[0], fold=np.full(len(tables[0]), -1, np.int16))
    table = replace(table, log_probs=blend([each.log_probs for each in tables], weights))
    scores = [score(f"mean of {sum(s.models for s in systems)} models", "holdout", table)]
    if temperature == "none" or len(table) < LEAST_HOLDOUT_ROWS:
        return table, 1.0, scores
    fitted = fit_temperature(table.log_probs, table.codes())
    table = replace(table, log_probs=apply_temperature(table.log_probs, fitted))
    scores.append(score(f"the same at temperature {fitted:.3f}", "holdout, which fitted the temperature", table))
    return table, fitted, scores


def _one_of(system: System) -> str:
    if system.seeds == 1:
        return f"single models of {system.name}"
    return f"means of {system.seeds} seeds of {system.name}"


def same_rows(tables: Sequence[Predictions]) -> list[Predictions]:
    """All tables in the first one's order of rows and classes; a DataError names ids of one side alone."""
    first = tables[0]
    for table in tables[1:]:
        differing = sorted(set(table.ids) ^ set(first.ids))
        if differing:
            raise DataError(f"systems {first.system!r} and {table.system!r} speak of other rows: {sample(differing)}")
    return [table.with_classes(first.classes).in_order(first.ids) for table in tables]


def score(what: str, rows: str, table: Predictions) -> Score:
    """`what` was scored on which `rows`, how many, and its figures."""
    figures = {name: round(value, 6) for name, value in summary(table.log_probs, table.codes()).items()}
    return {"what": what, "rows": rows, "n": len(table), **figures}
