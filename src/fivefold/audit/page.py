"""The page of an audit: one self-contained HTML file on which a person decides on each suspect and downloads `labels.csv`.

Names of classes and files are untrusted: the template escapes them, and the script sets them as text only.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fivefold.errors import DataError
from fivefold.evaluation.report import data_uri, render_template, thumbnail
from fivefold.log import log

TEMPLATE = Path(__file__).with_name("page.html.j2")
SIDE = 112
"""Longer side of a thumbnail, in pixels."""
SHOWN_ODD = 24
"""Odd images that the page shows of each problem; `odd_images.csv` has all."""


def render(
    suspects: pd.DataFrame,
    odd: pd.DataFrame,
    read: Callable[[str], Any],
    **content: Any,
) -> str:
    """Return the page.

    `suspects`: the columns of `labels.csv`, and `near_given` and `near_suggested`, the paths of neighbours or "". `odd`: columns
    `path`, `problem`, `value`, `typical`. `read` returns the pixels uint8 [H, W, 3] of a path, or raises a DataError.
    `content`: the template's `title`, `key`, `cards`, `classes` (names and counts), `confused` and `left_out`.
    """
    shown = odd.groupby("problem", sort=False).head(SHOWN_ODD)
    paths = [*suspects[["path", "near_given", "near_suggested"]].stack(), *shown["path"]]
    images = _thumbnails(list(dict.fromkeys(path for path in paths if path)), read)
    numbers = {path: number for number, path in enumerate(images)}
    entries = [
        {
            **{name: getattr(row, name) for name in ("id", "given", "label", "decision", "suggested")},
            "p": [round(row.given_probability, 3), round(row.suggested_probability, 3)],
            "near": [row.neighbours_given, row.neighbours_suggested],
            "agree": row.agreement,
            "images": [numbers.get(path, -1) for path in (row.path, row.near_given, row.near_suggested)],
        }
        for row in suspects.where(suspects.notna(), None).itertuples()
    ]
    return render_template(
        TEMPLATE,
        data={"suspects": entries, "classes": [name for name, _ in content["classes"]], "images": [*images.values()]},
        odd={str(name): rows.to_dict("records") for name, rows in shown.groupby("problem", sort=False)},
        odd_images=images,
        **content,
    )


def _thumbnails(paths: Sequence[str], read: Callable[[str], Any]) -> Mapping[str, str]:
    """Return a `data:` URI for each path whose image can be read."""
    images = {}
    for path in paths:
        try:
            images[path] = data_uri(thumbnail(read(path), SIDE))
        except DataError as error:
            log.warning("no thumbnail of %s: %s", path, error)
    return images
