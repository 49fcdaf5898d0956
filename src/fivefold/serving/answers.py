"""What the model said as the body of an answer: JSON, or a table."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fivefold.serving.refusals import RefusedError

DIGITS = 7
"""Significant digits of a probability: as many as its 32 bits hold."""


@dataclass(frozen=True)
class Said:
    """The model's word on N images: `log_probs` float32 [N, C] of `classes`, of which the `top` likeliest are told.

    `many`: whether the images were a list, and so is the answer.
    """

    classes: Sequence[str]
    log_probs: np.ndarray
    top: int
    many: bool

    def probabilities(self) -> list[dict[str, float]]:
        """The `top` likeliest classes of each image with their probabilities, the likeliest first."""
        order = np.argsort(-self.log_probs, axis=1, kind="stable")[:, : self.top]
        values = np.minimum(np.exp(np.take_along_axis(self.log_probs, order, axis=1).astype(np.float64)), 1.0)
        return [
            {self.classes[code]: float(f"{value:.{DIGITS}g}") for code, value in zip(codes, row, strict=True)}
            for codes, row in zip(order.tolist(), values.tolist(), strict=True)
        ]


def as_json(said: Said) -> bytes:
    """`{"predicted_class", "confidence", "probabilities": {class: p}}` of an image, or a list of these."""
    answers = []
    for probabilities in said.probabilities():
        best, confidence = next(iter(probabilities.items()))
        answers.append({"predicted_class": best, "confidence": confidence, "probabilities": probabilities})
    return json.dumps(answers if said.many else answers[0], ensure_ascii=False, separators=(",", ":")).encode()


def as_csv(said: Said) -> bytes:
    """A line `predicted_class,confidence` for each image, under a head of these names."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["predicted_class", "confidence"])
    writer.writerows(next(iter(probabilities.items())) for probabilities in said.probabilities())
    return text.getvalue().encode()


def choose_form(accept: str) -> str:
    """The first type of FORMS that an Accept header takes, JSON where it says nothing; RefusedError (406) where none."""
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for name in [name for name in wanted if name]:
        for known in FORMS:
            if name in (known, "*/*", f"{known.partition('/')[0]}/*"):
                return known
    if any(wanted):
        raise RefusedError(406, f"Accept is {accept!r}: answers are {' or '.join(FORMS)}")
    return next(iter(FORMS))


FORMS: dict[str, Callable[[Said], bytes]] = {"application/json": as_json, "text/csv": as_csv}
