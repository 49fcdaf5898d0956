"""What a request asks and how it is answered: image files in, JSON or a CSV out, or a refusal with its HTTP status."""

import binascii
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MILLION = 1e6
JSON = "application/json"
BINARY = ("application/octet-stream", "application/x-image")
"""Types of a body that is an image file, beside all of `image/`."""
DIGITS = 7
"""Significant digits of a probability: as many as its 32 bits hold."""


class RefusedError(Exception):
    """A request that gets no answer; it ends the request, never the process.

    `image`: the index of the image in a list that is to blame; `later`: seconds until the client may try again.
    """

    def __init__(self, status: int, message: str, *, image: int | None = None, later: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.image = image
        self.later = later

    def as_json(self) -> dict[str, str | int]:
        """What the body of the answer says."""
        return {"error": str(self)} | ({} if self.image is None else {"image": self.image})


@dataclass(frozen=True)
class ImageRequest:
    """The image files of one request; `many` where they were a list, and so is the answer."""

    files: list[bytes]
    many: bool


def is_list(content_type: str) -> bool:
    """Whether a body of this type is a list of images; RefusedError (415) for a type that is neither that nor an image.

    A body of no type is taken as an image.
    """
    plain = content_type.partition(";")[0].strip().lower()
    if plain == JSON:
        return True
    if plain and plain not in BINARY and not plain.startswith("image/"):
        raise RefusedError(
            415,
            f"the body's type is {plain!r}: send an image as image/jpeg, image/png, another image type or "
            f"application/octet-stream, or a list of them as {JSON}",
        )
    return False


def check_plain(encoding: str) -> None:
    """RefusedError (415) for a body that is packed, as by gzip: image files are packed already."""
    if encoding.strip().lower() not in ("", "identity"):
        raise RefusedError(415, f"the body is packed (Content-Encoding: {encoding}): send it as it is")


def read_image(body: bytes) -> ImageRequest:
    """The body itself as the one image; RefusedError (400) where it is empty."""
    if not body:
        raise RefusedError(400, "the body is empty: send the bytes of an image file")
    return ImageRequest([body], many=False)


def read_list(body: bytes) -> ImageRequest:
    """The images of a JSON list of texts, each an image file in base64; RefusedError (400) for anything else."""
    try:
        found = json.loads(body, strict=False)  # line breaks in texts, as `base64` makes them
    except RecursionError:
        raise RefusedError(400, "the body is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from None
    if not isinstance(found, list):
        kind = type(found).__name__
        raise RefusedError(400, f'the body is JSON of type {kind}: send a list of images in base64, ["…", "…"]')
    return ImageRequest([_decode_base64(text, at) for at, text in enumerate(found)], many=True)


def count_wanted(query: Mapping[str, str], classes: int) -> int:
    """How many of the classes an answer names: `top=N`, or all; RefusedError (400) for what is no such number."""
    unknown = sorted(set(query) - {"top"})
    if unknown:
        raise RefusedError(400, f"unknown parameter {unknown[0]!r}; there is top=N, the number of classes in an answer")
    text = query.get("top", str(classes))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise RefusedError(400, f"top={text!r}: a whole number from 1 on is needed")
    return min(int(text), classes)


def declared_length(headers: Mapping[str, str]) -> float:
    """The bytes that a body will have; 0 where its head does not say."""
    text = headers.get("content-length", "0")
    return float(text) if text.isdecimal() else math.inf


def too_large(limit: float) -> RefusedError:
    return RefusedError(413, f"the body is larger than {limit / MILLION:g} MB (serve.max_body_mb): send a smaller one")


@dataclass(frozen=True)
class Prediction:
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


def as_json(prediction: Prediction) -> bytes:
    """`{"predicted_class", "confidence", "probabilities": {class: p}}` of an image, or a list of these."""
    answers = []
    for probabilities in prediction.probabilities():
        best, confidence = next(iter(probabilities.items()))
        answers.append({"predicted_class": best, "confidence": confidence, "probabilities": probabilities})
    return json.dumps(answers if prediction.many else answers[0], ensure_ascii=False, separators=(",", ":")).encode()


def as_csv(prediction: Prediction) -> bytes:
    """A line `predicted_class,confidence` for each image, under a head of these names."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["predicted_class", "confidence"])
    writer.writerows(next(iter(probabilities.items())) for probabilities in prediction.probabilities())
    return text.getvalue().encode()


def negotiate_type(accept: str) -> str:
    """The first type of RENDERERS that an Accept header takes, JSON where it says nothing; RefusedError (406) where none."""
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for name in [name for name in wanted if name]:
        for known in RENDERERS:
            if name in (known, "*/*", f"{known.partition('/')[0]}/*"):
                return known
    if any(wanted):
        raise RefusedError(406, f"Accept is {accept!r}: answers are {' or '.join(RENDERERS)}")
    return next(iter(RENDERERS))


def _decode_base64(text: object, at: int) -> bytes:
    """The image file of one text, which may have line breaks or be a `data:` URL; RefusedError (400) names its index `at`."""
    if not isinstance(text, str):
        raise RefusedError(400, f"image {at} of the list is {type(text).__name__}, not a base64 text", image=at)
    head, comma, rest = text.partition(",")
    if comma and head.lower().startswith("data:") and head.lower().endswith(";base64"):
        text = rest
    try:
        content = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        raise RefusedError(400, f"image {at} of the list is not base64: {error}", image=at) from None
    if not content:
        raise RefusedError(400, f"image {at} of the list is empty", image=at)
    return content


RENDERERS: dict[str, Callable[[Prediction], bytes]] = {"application/json": as_json, "text/csv": as_csv}
