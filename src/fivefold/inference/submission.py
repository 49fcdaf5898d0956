"""Submission files: written with exactly the columns of the sample, in its order. No torch."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from fivefold.contract.files import atomic
from fivefold.csv_tables import check_same_ids
from fivefold.data.class_aliases import SameClasses
from fivefold.data.readers.eval_images import EvalTable, Submission, check_rows
from fivefold.inference.answer_format import AS_NAMED, form_of
from fivefold.predictions import Predictions

log = logging.getLogger("fivefold")

DIGITS = "%.9g"
"""The format of a probability in a submission: nine digits."""


def write_submission(path: Path, table: Predictions, wanted: Submission, same: SameClasses = AS_NAMED) -> Path:
    """Write the rows and columns of the sample `wanted`, in its order, with its header, delimiter and line endings.

    Class columns get probabilities; the policy of `same` applies to classes with the same meaning. A single column
    gets the content that `form_of` chooses. The file is written atomically. Return its path. Raise a DataError
    with the ids or classes that do not match.
    """
    check_same_ids(wanted.ids, "the sample submission", table.ids, "the predictions")
    rows = table.in_order(wanted.ids)
    form = form_of(wanted, table.classes, same)
    if form.cells:
        frame = pd.DataFrame([form.cells[name] for name in _labels(rows, same)], dtype=object)
    elif form.kind == "probability":
        names = same.names(table.classes)
        frame = pd.DataFrame(_probabilities(rows, names, same)[:, [names.index(form.names[0])]])
    else:
        frame = pd.DataFrame(_probabilities(rows, form.names, same))
    frame.insert(0, "id", pd.Series(rows.ids, dtype=object))
    if wanted.numbered:
        frame.insert(0, "number", np.arange(len(rows)))
    encoding = "utf-8-sig" if wanted.marked else "utf-8"
    with atomic(path) as temporary:
        frame.to_csv(
            temporary,
            header=wanted.header,
            index=False,
            sep=wanted.delimiter,
            decimal=wanted.decimal,
            float_format=DIGITS,
            lineterminator=wanted.end,
            encoding=encoding,
        )
    return path


def check_submission(images: EvalTable, classes: Sequence[str], same: SameClasses) -> None:
    """Raise a DataError, before any training or prediction, unless the sample's rows and columns can be filled."""
    same.check_model(classes)
    if images.sample:
        form = form_of(images.sample, classes, same)
        log.info("submission: %s", form.words)
        if form.doubt:
            log.warning("%s", form.doubt)
    check_rows(images)


def _labels(table: Predictions, same: SameClasses) -> list[str]:
    """Return the predicted class of each row; of classes that are summed, the most probable name of the best sum."""
    probabilities = _probabilities(table, table.classes, same) if same.policy == "sum" else np.exp(table.log_probs)
    best = probabilities.max(axis=1, keepdims=True)
    # Names with one sum are tied: their own probabilities break the tie.
    codes = np.where(probabilities >= best * (1 - 1e-12), table.log_probs, -np.inf).argmax(axis=1)
    return [table.classes[code] for code in codes]


def _probabilities(table: Predictions, columns: Sequence[str], same: SameClasses) -> np.ndarray:
    """Return the probabilities of the `columns` [N, W], each row normalised to sum 1."""
    probabilities = np.exp(table.log_probs.astype(np.float64)) @ same.columns(table.classes, columns)
    return probabilities / probabilities.sum(axis=1, keepdims=True)
