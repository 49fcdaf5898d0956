"""What a benchmark found: JSON to keep, and a table to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bars import BARS, Bar
from benchmarks.options import Options
from benchmarks.pairs import Spread
from fivefold.contract.files import read_json, write_json

PLACES = ("cases", "images", "results", "work")
"""Options that say where things lie or which rows are measured: they are not kept, and paths are nobody's business."""


@dataclass(frozen=True)
class Finding:
    """The figure of the row `key` of a benchmark, and what stands beside it: rates, CPU seconds, settings."""

    key: str
    figure: Spread
    beside: Mapping[str, Any] = field(default_factory=dict)


def ratio(key: str, ratios: Sequence[float], **beside: Any) -> Finding:
    """A finding of paired ratios; a Spread beside it becomes its JSON."""
    ready = {name: value.as_json() if isinstance(value, Spread) else value for name, value in beside.items()}
    return Finding(key, Spread.of(ratios), {"ratios": [round(each, 4) for each in ratios], **ready})


def keep(name: str, findings: Sequence[Finding], options: Options, about: Mapping[str, Any]) -> Path:
    """Writes RESULTS/NAME.json, whole or not at all; its path. Rows that were not measured now stay as they were."""
    path = Path(options.results) / f"{name}.json"
    rows = read_json(path)["rows"] if path.is_file() else {}
    told = {
        key: value for key, value in vars(options).items() if value != getattr(Options(), key) and key not in PLACES
    }
    measured = {each.key: _row(BARS[name][each.key], each) for each in findings}
    rows |= {key: row | {"options": told, "machine": dict(about)} for key, row in measured.items()}
    write_json(path, {"benchmark": name, "rows": {key: rows[key] for key in BARS[name] if key in rows}})
    return path


def table(name: str, findings: Sequence[Finding], about: Mapping[str, Any]) -> str:
    """The findings as people read them: figure and bar side by side, with the spread."""
    lines = [f"{name}: {machine.in_words(dict(about))}", ""]
    width = max(len(BARS[name][each.key].what) for each in findings)
    lines.append(f"{'':{width}}  {'figure':>16} {'bar':>16}           quartiles, extremes (n)")
    for each in findings:
        bar, spread = BARS[name][each.key], each.figure
        q1, q3, least, most = map(bar.number, (spread.q1, spread.q3, spread.least, spread.most))
        verdict = bar.verdict(spread.median)
        lines.append(
            f"{bar.what:{width}}  {bar.shown(spread.median):>16} {bar.wanted:>16}  {verdict:7}  {q1} .. {q3}, {least} .. {most} ({spread.n})"
        )
        lines += [f"    {line}" for line in _beside(each.beside)]
    return "\n".join(lines)


def _beside(beside: Mapping[str, Any]) -> list[str]:
    """What stands beside a figure, a line for what is a list of lines, and one for all that is short."""
    long = [
        f"{key}: {line}"
        for key, value in beside.items()
        if isinstance(value, list) and key != "ratios"
        for line in value
    ]
    short = [f"{key} {_short(value)}" for key, value in beside.items() if not isinstance(value, list)]
    return [*long, *([", ".join(short)] if short else [])]


def _short(value: Any) -> str:
    if isinstance(value, dict) and "median" in value:
        value = value["median"]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _row(bar: Bar, found: Finding) -> dict[str, Any]:
    return {
        "what": bar.what,
        "unit": bar.unit,
        "bar": bar.limit,
        "at": "most" if bar.most else "least",
        "figure": found.figure.as_json(),
        "verdict": bar.verdict(found.figure.median),
        **found.beside,
    }
