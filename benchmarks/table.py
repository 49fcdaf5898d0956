"""The README's table of speed, of the JSON that lies in benchmarks/results: `python -m benchmarks.table [FOLDER]`.

Every bar has its row; a dash stands where nothing was measured yet.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bars import BARS
from benchmarks.options import Options
from fivefold.contract.files import read_json

WEIGHTY = ("photo", "count", "epochs", "size", "batch", "rows")
"""Options that make a figure another one: the table names them where they were not the benchmark's own."""


def main(arguments: Sequence[str]) -> int:
    print(text(Path(arguments[0] if arguments else Options().results)))
    return 0


def text(folder: Path) -> str:
    """The table in Markdown: what, bar, figure with its quartiles, command."""
    lines = ["| | bar | figure | `python -m benchmarks` |", "|---|---|---|---|"]
    for name, bars in BARS.items():
        path = folder / f"{name}.json"
        rows = read_json(path)["rows"] if path.is_file() else {}
        for key, bar in bars.items():
            lines.append(f"| {bar.what} | {bar.wanted or '–'} | {_figure(rows, name, key)} | `{name}` |")
    return "\n".join(lines)


def _figure(rows: dict, name: str, key: str) -> str:
    if key not in rows:
        return "–"
    found, bar = rows[key]["figure"], BARS[name][key]
    spread = "" if found["n"] == 1 else f" [{bar.number(found['q1'])}, {bar.number(found['q3'])}]"
    missed = ", missed" if bar.verdict(found["median"]) == "missed" else ""
    other = [f"{option}={value}" for option, value in rows[key]["options"].items() if option in WEIGHTY]
    return bar.shown(found["median"]) + spread + missed + (f" ({' '.join(other)})" if other else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
