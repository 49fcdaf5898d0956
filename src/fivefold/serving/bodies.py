"""What a request asks: the image files in its body, how many classes it wants, and in which form."""

import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from fivefold.serving.refusals import RefusedError

MILLION = 1e6
JSON = "application/json"
BINARY = ("application/octet-stream", "application/x-image")
"""Types of a body that is an image file, beside all of `image/`."""


@dataclass(frozen=True)
class Limits:
    """How much of what the server takes.

    `batch_size`: images in one step of the model; `max_wait`: seconds that the first of them waits for others;
    `queue`: images under way; `max_body`: bytes; `max_pixels` of an image; `timeout`: seconds for a request.
    """

    batch_size: int
    max_wait: float
    queue: int
    max_body: float
    max_pixels: float
    timeout: float


@dataclass(frozen=True)
class Asked:
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


def read_image(body: bytes) -> Asked:
    """The body itself as the one image; RefusedError (400) where it is empty."""
    if not body:
        raise RefusedError(400, "the body is empty: send the bytes of an image file")
    return Asked([body], many=False)


def read_list(body: bytes) -> Asked:
    """The images of a JSON list of texts, each an image file in base64; RefusedError (400) for anything else."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is not JSON: {_plain(error)}") from None
    if not isinstance(found, list):
        raise RefusedError(400, f'the body holds {_kind(found)}: send a list of images in base64, ["…", "…"]')
    return Asked([_file(text, at) for at, text in enumerate(found)], many=True)


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


def _file(text: object, at: int) -> bytes:
    if not isinstance(text, str):
        raise RefusedError(400, f"image {at} of the list is {_kind(text)}, not an image in base64", image=at)
    try:
        content = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as error:
        raise RefusedError(400, f"image {at} of the list is not base64: {error}", image=at) from None
    if not content:
        raise RefusedError(400, f"image {at} of the list is empty", image=at)
    return content


def _plain(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def _kind(found: object) -> str:
    return KINDS[type(found)]


KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}  # fmt: skip
"""What JSON calls the things that Python reads of it."""
