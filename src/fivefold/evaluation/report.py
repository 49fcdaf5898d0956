"""The report of an evaluation: one self-contained HTML page with figures, plots, tables and mistakes.

Names of classes and files are untrusted, so the template escapes all of them (autoescape).
"""

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fivefold.contract.files import atomic
from fivefold.evaluation import metrics, plots
from fivefold.evaluation.scored_rows import ScoredRows, confused_pairs

TEMPLATE = Path(__file__).with_name("report.html.j2")
STYLESHEET = Path(__file__).with_name("look.css")
"""The stylesheet of the report and of the comparison page."""
THUMBNAIL = 160
PIXELATED = 64
"""Images up to this side length are shown with square pixels; larger ones are smoothed."""

COMPARED_METRICS = ("accuracy", "logloss", "f1_macro", "ece")
CAPTIONS = {
    "test": "Scored against the supplied ground truth; no earlier stage reads it.",
    "holdout": "Rows that the split set aside: no model trained on them.",
    "oof": "Each row is predicted by the fold model that did not train on it. That model selected its best epoch on "
    "these rows. The figures cover single models (or their mean if several predict a row), not the ensemble.",
}
TITLES = {"test": "Test", "holdout": "Holdout", "oof": "Out-of-fold"}


def draw_report(scored: ScoredRows, curves: Mapping[str, Path], bins: int) -> dict[str, bytes]:
    """Return the plots of a report as PNG bytes by file name without suffix; `curves` are training logs by model name."""
    log_probs, codes, classes = scored.table.log_probs, scored.codes, scored.table.classes
    calibrated = metrics.reliability_table(log_probs, codes, bins)
    error = metrics.expected_calibration_error(log_probs, codes, bins)
    pictures = {
        "confusion_matrix": render_png(plots.plot_confusion, scored.confusion, classes),
        "reliability": render_png(plots.plot_reliability, calibrated, error),
    }
    return pictures | ({"training_curves": render_png(plots.plot_training_curves, curves)} if curves else {})


def render(
    scored: Sequence[ScoredRows],
    figures: Mapping[str, Mapping[str, Any]],
    folds: Sequence[tuple[str, Mapping[str, Any]]],
    top_k: int,
    **content: Any,
) -> str:
    """Render the complete HTML page, which opens with the first of the `scored` rows.

    `figures`: by name of `scored`. `folds`: name and figures of each fold's out-of-fold rows. `content`: the template's
    `title`; `pictures`; by name of `scored` the `mistakes` (a DataFrame) and `notes`; `thumbnails` by (name of `scored`,
    row id); `records`, the `stage.json` of the stages before; and `data`, names and values of the split's counts.
    """
    first = scored[0]
    of_folds = pd.DataFrame([scores for _, scores in folds], columns=list(COMPARED_METRICS))
    return render_template(
        TEMPLATE,
        scored=scored,
        first=first,
        figures=figures,
        folds=folds,
        headline=_headline(first, figures[first.name], top_k),
        about=CAPTIONS,
        titles=TITLES,
        compared=COMPARED_METRICS,
        spread=of_folds.agg(["mean", "std"]).to_dict("list") if len(folds) > 1 else {},
        per_class=first.per_class().to_dict("records"),
        pairs=confused_pairs(first),
        **content,
    )


def render_template(template: Path, **values: Any) -> str:
    """Render a template with the common stylesheet; every value is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "figure": format_number,
        "percent": format_percent,
        "uri": data_uri,
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "sentence": lambda text: text[:1].upper() + text[1:],
    }
    look = Markup(STYLESHEET.read_text(encoding="utf-8"))
    return environment.from_string(template.read_text(encoding="utf-8")).render(look=look, **values)


def render_png(plot: Callable[..., None], *arguments: object) -> bytes:
    """Return the output of `plot(*arguments, target)`."""
    target = BytesIO()
    plot(*arguments, target)
    return target.getvalue()


def write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> list[Path]:
    """Write the PNG bytes by file name without suffix; return the paths."""
    for name, picture in pictures.items():
        with atomic(folder / f"{name}.png") as temporary:
            temporary.write_bytes(picture)
    return [folder / f"{name}.png" for name in pictures]


def thumbnail(pixels: np.ndarray, side: int = THUMBNAIL) -> bytes:
    """Encode an image uint8 [H, W, 3] at up to `side` pixels: as JPEG, or as PNG if it is so small that JPEG would blur it."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    encoded = BytesIO()
    if max(image.size) <= PIXELATED:
        image.save(encoded, "PNG", optimize=True)
    else:
        image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()


def data_uri(image: bytes) -> str:
    """Return PNG or JPEG bytes as a `data:` URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def format_number(value: float | int | None) -> str:
    """Format a figure: counts with commas, scores with four digits, a dash for none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return "∞" if math.isinf(value) else f"{value:.4f}"


def format_percent(value: float) -> str:
    """Format a share as a percentage; a share below 1 is never 100 %."""
    rounded = "100" if value == 1 else f"{min(100 * value, 99.9):.1f}"
    return f"{rounded}\N{NO-BREAK SPACE}%"


def _headline(scored: ScoredRows, figures: Mapping[str, Any], top_k: int) -> list[tuple[str, str, str]]:
    """Return label, figure and remark of each headline figure, accuracy first."""
    among = f"true class in the top {top_k}" if len(scored.table.classes) > top_k else f"at most {top_k} classes"
    low, high = scored.interval()
    interval = f"95 % interval {low:.4f} to {high:.4f}" + (", adjusted for groups of rows" if scored.groups else "")
    return [
        ("Accuracy", format_number(figures["accuracy"]), interval),
        ("Log loss", format_number(figures["logloss"]), "nats per row, lower is better"),
        ("Macro F1", format_number(figures["f1_macro"]), "all classes have equal weight"),
        (f"Top-{top_k} accuracy", format_number(figures[f"top{top_k}_accuracy"]), among),
        ("Calibration error", format_number(figures["ece"]), "confidence against accuracy"),
        ("Rows", format_number(figures["n"]), TITLES[scored.name].lower()),
    ]
