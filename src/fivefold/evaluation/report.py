"""One self-contained HTML page of an evaluation: figures, pictures, tables and mistakes, no network.

Names of classes and files come from strangers, so the template escapes all of them (autoescape).
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.evaluation import calibration, metrics, plots
from fivefold.evaluation.tables import Scored, confused_pairs

TEMPLATE = Path(__file__).with_name("report.html.j2")
LOOK = Path(__file__).with_name("look.css")
"""What pages look like, this one and that of a comparison."""
THUMBNAIL = 160
PIXELATED = 64
"""Images up to this side are shown with their pixels as squares, larger ones smoothed."""

Picture = Mapping[str, bytes]
"""PNG bytes by theme: `light` and `dark`."""

COMPARED = ("accuracy", "logloss", "f1_macro", "ece")
ABOUT = {
    "test": "Scored against the ground truth that was handed in; no earlier stage reads it.",
    "holdout": "Rows set aside by the split: no model trained on them.",
    "oof": "Each row is predicted by the fold model that did not train on it. That model did choose its best epoch on "
    "these rows, and the figures speak of single models (where several predict a row of their mean), not of the ensemble.",
}
TITLES = {"test": "Test", "holdout": "Holdout", "oof": "Out-of-fold"}


@dataclass(frozen=True)
class Content:
    """What a report says.

    `scored`: the first opens the report. `figures`: of each of `scored`, by its name. `folds`: name and
    figures of each fold's out-of-fold rows. `pictures`: of `draw`. `mistakes`: by name of `scored`.
    `thumbnails`: PNG or JPEG bytes by (name of `scored`, row id). `notes`: a further remark by name of
    `scored`. `records`: the `stage.json` of what made all this. `data`: name and value of what the split counted.
    """

    title: str
    scored: Sequence[Scored]
    figures: Mapping[str, Mapping[str, Any]]
    folds: Sequence[tuple[str, Mapping[str, Any]]]
    pictures: Mapping[str, Picture]
    mistakes: Mapping[str, pd.DataFrame]
    thumbnails: Mapping[tuple[str, str], bytes]
    records: Sequence[Mapping[str, Any]]
    notes: Mapping[str, str] = field(default_factory=dict)
    data: Sequence[tuple[str, str]] = ()
    top_k: int = 5


def draw(scored: Scored, curves: Mapping[str, Path], bins: int) -> dict[str, Picture]:
    """The pictures of a report, by file name without suffix; `curves` are training logs by model name."""
    log_probs, codes, classes = scored.table.log_probs, scored.codes, scored.table.classes
    calibrated = calibration.reliability_table(log_probs, codes, bins)
    error = calibration.expected_calibration_error(log_probs, codes, bins)
    per_class = metrics.per_class_table(log_probs, codes)
    painters = {
        "confusion_matrix": lambda to, theme: plots.confusion(scored.confusion, classes, to, theme),
        "reliability": lambda to, theme: plots.reliability(calibrated, error, to, theme),
        "confidence": lambda to, theme: plots.confidence_histogram(log_probs, codes, to, theme),
        "per_class_f1": lambda to, theme: plots.class_f1(per_class, classes, to, theme),
    }
    if len(curves) == 1:
        painters["training_curves"] = lambda to, theme: plots.training_curves(*curves.values(), to, theme)
    elif curves:
        painters["training_curves"] = lambda to, theme: plots.fold_curves(curves, to, theme)
    return {name: drawn(paint) for name, paint in painters.items()}


def render(content: Content) -> str:
    """The page, complete."""
    first = content.scored[0]
    per_class = pd.DataFrame(
        {"class": first.table.classes, **metrics.per_class_table(first.table.log_probs, first.codes)}
    )
    return filled(
        TEMPLATE,
        content=content,
        first=first,
        headline=_headline(first, content.figures[first.name], content.top_k),
        about=ABOUT,
        titles=TITLES,
        compared=COMPARED,
        spread=_spread([figures for _, figures in content.folds]),
        per_class=per_class.to_dict("records"),
        pairs=confused_pairs(first),
        galleries=[(scored, _tiles(content, scored.name)) for scored in content.scored],
    )


def filled(template: Path, **values: Any) -> str:
    """The page of a template in the common look, every value escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "figure": figure,
        "percent": percent,
        "uri": data_uri,
        "pretty": _pretty,
        "sentence": _sentence,
    }
    look = Markup(LOOK.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(look=look, **values)


def drawn(paint: Any) -> Picture:
    """What `paint(target, theme)` draws, as PNG bytes by theme."""
    return {theme: _png(paint, theme) for theme in plots.THEMES}


def thumbnail(pixels: np.ndarray) -> bytes:
    """An image uint8 [H, W, 3] as at most 160 px: JPEG, or PNG where it is small and JPEG would smear it."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    encoded = BytesIO()
    if max(image.size) <= PIXELATED:
        image.save(encoded, "PNG", optimize=True)
    else:
        image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def data_uri(image: bytes) -> str:
    """PNG or JPEG bytes as a `data:` URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def figure(value: float | int | None) -> str:
    """A figure as people read it: counts with commas, scores with four digits, a dash for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return "∞" if math.isinf(value) else f"{value:.4f}"


def percent(value: float) -> str:
    """A share as a percentage; never 100 % for less than all."""
    rounded = "100" if value == 1 else f"{min(100 * value, 99.9):.1f}"
    return f"{rounded}\N{NO-BREAK SPACE}%"


def _png(paint: Any, theme: str) -> bytes:
    buffer = BytesIO()
    paint(buffer, theme)
    return buffer.getvalue()


def _headline(scored: Scored, figures: Mapping[str, Any], top_k: int) -> list[tuple[str, str, str]]:
    """Label, figure and remark of each headline figure; the accuracy first."""
    among = f"true class among the first {top_k}" if len(scored.table.classes) > top_k else "there are no more classes"
    low, high = scored.interval()
    told = f"95 % interval {low:.4f} to {high:.4f}" + (", rows of a group being alike" if scored.groups else "")
    return [
        ("Accuracy", figure(figures["accuracy"]), told),
        ("Log loss", figure(figures["logloss"]), "nats a row, lower is better"),
        ("Macro F1", figure(figures["f1_macro"]), "every class counts the same"),
        (f"Top-{top_k} accuracy", figure(figures[f"top{top_k}_accuracy"]), among),
        ("Calibration error", figure(figures["ece"]), "confidence against accuracy"),
        ("Rows", figure(figures["n"]), TITLES[scored.name].lower()),
    ]


def _spread(folds: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation over folds of the compared figures; empty for fewer than two."""
    if len(folds) < 2:
        return {}
    values = {name: [fold[name] for fold in folds] for name in COMPARED}
    return {name: (float(np.mean(column)), float(np.std(column, ddof=1))) for name, column in values.items()}


def _tiles(content: Content, name: str) -> list[dict[str, Any]]:
    tiles = []
    for mistake in content.mistakes[name].itertuples():
        image = content.thumbnails.get((name, mistake.id))
        small = image is not None and image.startswith(b"\x89PNG")
        tiles.append({"mistake": mistake, "image": image, "small": small})
    return tiles


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)
