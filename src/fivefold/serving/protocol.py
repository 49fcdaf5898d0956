"""The HTTP protocol: parse requests with image files, and render JSON, CSV or an error with its HTTP status."""

import binascii
import csv
import io
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np

MILLION = 1e6
JSON, CSV = "application/json", "text/csv"
BINARY = ("application/octet-stream", "application/x-image")
"""Content types of a body that is an image file, besides `image/*`."""


class RefusedError(Exception):
    """A request is rejected with an HTTP status; the process goes on. `image`: the index of the invalid image in a list."""

    def __init__(self, status: int, message: str, image: int | None = None) -> None:
        super().__init__(message)
        self.status, self.content = status, {"error": message} | ({} if image is None else {"image": image})


def is_list(content_type: str) -> bool:
    """Return whether a body of this type is a list of images; raise a RefusedError (415) for any type but list or image.

    A body without a type counts as an image.
    """
    plain = content_type.partition(";")[0].strip().lower()
    if plain and plain not in (JSON, *BINARY) and not plain.startswith("image/"):
        raise RefusedError(415, f"the Content-Type is {plain!r}: send an image as image/* or a list as {JSON}")
    return plain == JSON


def reject_compressed(encoding: str) -> None:
    """Raise a RefusedError (415) for a compressed body, e.g. gzip: image files are already compressed."""
    if encoding.strip().lower() not in ("", "identity"):
        raise RefusedError(415, f"the body is compressed (Content-Encoding: {encoding}): send it uncompressed")


def read_list(body: bytes) -> list[bytes]:
    """Return the image files of a JSON list of base64 strings; raise a RefusedError (400) for anything else."""
    try:
        content = json.loads(body, strict=False)  # allows line breaks in strings, as the program `base64` writes them
    except (RecursionError, ValueError) as error:
        raise RefusedError(400, f"the body is not JSON: {error}") from None
    if not isinstance(content, list):
        raise RefusedError(400, 'the body is not a list: send images in base64, ["…", "…"]')
    return [_decode_base64(text, index) for index, text in enumerate(content)]


def parse_top(query: Mapping[str, str], classes: int) -> int:
    """Return the number of classes in a response: `top=N`, or all; raise a RefusedError (400) for any other parameter."""
    text = query.get("top", str(classes))
    if set(query) - {"top"} or not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise RefusedError(400, f"{dict(query)}: the only parameter is top=N, the number of classes in the response")
    return min(int(text), classes)


def too_large(limit: float) -> RefusedError:
    return RefusedError(413, f"the body is larger than {limit / MILLION:g} MB (serve.max_body_mb): send a smaller one")


def negotiate_type(accept: str) -> str:
    """Return the first of JSON and CSV that an Accept header allows, JSON if it is empty; raise a RefusedError (406) for none."""
    for name in (part.partition(";")[0].strip().lower() for part in (accept or "*/*").split(",")):
        for known in (JSON, CSV):
            if name in (known, "*/*", f"{known.partition('/')[0]}/*"):
                return known
    raise RefusedError(406, f"Accept is {accept!r}: the response types are {JSON} and {CSV}")


def render(content_type: str, classes: Sequence[str], log_probs: np.ndarray, top: int, many: bool) -> bytes:
    """Return the response for N images: `log_probs` float32 [N, C] of `classes`.

    JSON: class, confidence and the `top` most probable classes, most probable first; `many`: a list of these.
    CSV: the header `predicted_class,confidence` and one row per image.
    """
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :top]
    values = np.minimum(np.exp(np.take_along_axis(log_probs, order, axis=1).astype(np.float64)), 1.0)
    images = [  # seven digits are the precision of 32 bits
        {classes[code]: float(f"{value:.7g}") for code, value in zip(codes, row, strict=True)}
        for codes, row in zip(order.tolist(), values.tolist(), strict=True)
    ]
    best = [next(iter(probabilities.items())) for probabilities in images]
    if content_type == CSV:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([("predicted_class", "confidence"), *best])
        return text.getvalue().encode()
    answers = [
        {"predicted_class": name, "confidence": confidence, "probabilities": probabilities}
        for (name, confidence), probabilities in zip(best, images, strict=True)
    ]
    return json.dumps(answers if many else answers[0], ensure_ascii=False, separators=(",", ":")).encode()


def _decode_base64(text: object, index: int) -> bytes:
    """Decode the base64 of one image file, with or without line breaks or `data:` prefix; raise a RefusedError (400) with its index."""
    if not isinstance(text, str):
        raise RefusedError(400, f"image {index} of the list is {type(text).__name__}, not a base64 string", index)
    head, comma, rest = text.partition(",")
    if comma and head.lower().startswith("data:") and head.lower().endswith(";base64"):
        text = rest
    try:
        content = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        raise RefusedError(400, f"image {index} of the list is not base64: {error}", index) from None
    if not content:
        raise RefusedError(400, f"image {index} of the list is empty", index)
    return content
