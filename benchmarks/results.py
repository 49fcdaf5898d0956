"""The rows of the table, their targets, the machine and the JSON files: `python -m benchmarks.results [FOLDER]` prints the table."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.options import ROOT, Options
from benchmarks.processes import spread
from fivefold.contract.files import read_json, write_json
from fivefold.contract.record import package_versions
from fivefold.errors import SettingsError

log = logging.getLogger("fivefold")
BF16_UNITS = ("amx_bf16", "avx512_bf16")
"""Processor flags of units that compute in bf16, the faster one first."""
QUIET_LOAD = 0.25
"""The load per core below which a machine is quiet."""


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return the facts about the machine. Warns if other processes are running. Raises SettingsError if `device` is missing."""
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > QUIET_LOAD * cores:
        log.warning("the machine is busy (load %.1f on %d cores); stop other processes first", load, cores)
    rows = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    cpu = {name.strip(): value.strip() for name, value in rows}
    git = ["git", "describe", "--always", "--dirty"]
    return {
        "processor": cpu.get("model name", "unknown"),
        "flags": [flag for flag in BF16_UNITS if flag in cpu.get("flags", "").split()],
        "cores": cores,
        "threads": threads,
        **({"gpu": _gpu()} if device == "cuda" else {}),
        "load_before": round(load, 2),
        "revision": subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip(),
        "packages": package_versions(),
    }


def name_machine(facts: dict[str, Any]) -> str:
    """Return processor (and GPU), number of cores and bf16 units as one string."""
    gpu = f", {facts['gpu']}" if facts.get("gpu") else ""
    units = next((unit for unit in BF16_UNITS if unit in facts["flags"]), "no units for bf16")
    return f"{facts['processor']}{gpu}, {facts['cores']} cores ({units})"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        raise SettingsError("device=cuda needs a GPU with CUDA, and this machine has none")
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


class Target(NamedTuple):
    """What a row measures, and its limit in `unit` ("" for a ratio): a minimum, or with `at_most` a maximum. NaN: no target."""

    text: str
    limit: float
    unit: str
    at_most: bool

    def check(self, value: float) -> str:
        """Return `reached`, `missed`, or "" without a limit."""
        if math.isnan(self.limit):
            return ""
        return "reached" if (value <= self.limit if self.at_most else value >= self.limit) else "missed"

    def number(self, value: float) -> str:
        """Format a value of this row without its unit."""
        if self.unit:
            return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"
        return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"

    def __str__(self) -> str:
        return "–" if math.isnan(self.limit) else f"{'≤' if self.at_most else '≥'} {self.limit:,g} {self.unit}".strip()


TARGETS = {
    name: {row.row: Target(row.text, row.limit, row.unit, bool(row.at_most)) for row in rows.itertuples()}
    for name, rows in pd.read_csv(ROOT / "benchmarks" / "targets.csv")
    .fillna({"unit": ""})
    .groupby("benchmark", sort=False)
}
NOT_SAVED = ("cases", "images", "eval", "results", "work", "threads")
"""Options that name places or select rows."""
SHOWN = ("photo", "count", "epochs", "size", "batch", "minutes")
"""Options that change the meaning of a figure. The table names them if they are not the default."""


@dataclass(frozen=True)
class Finding:
    """The figure of the row `key`, and details: rates, CPU seconds, settings."""

    key: str
    figure: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)


def ratio_finding(key: str, ratios: Sequence[float], **details: Any) -> Finding:
    """Return the finding of paired ratios."""
    return Finding(key, spread(ratios), {"ratios": [round(each, 4) for each in ratios], **details})


def save_row(name: str, finding: Finding, options: Options, facts: Mapping[str, Any]) -> Path:
    """Write the row into RESULTS/NAME.json atomically and keep the other rows. Return the path."""
    path = Path(options.results) / f"{name}.json"
    rows = read_json(path)["rows"] if path.is_file() else {}
    target = TARGETS[name][finding.key]
    rows[finding.key] = {
        "what": target.text,
        "bar": str(target),
        "figure": dict(finding.figure),
        "outcome": target.check(finding.figure["median"]),
        **finding.details,
        "options": options.model_dump(exclude_defaults=True, exclude=set(NOT_SAVED)),
        "machine": dict(facts),
    }
    write_json(path, {"benchmark": name, "rows": {key: rows[key] for key in TARGETS[name] if key in rows}})
    return path


def markdown_table(folder: Path, names: Sequence[str] = tuple(TARGETS)) -> str:
    """Return the table (text, target, figure with quartiles, n, machine, command), followed by the machines."""
    machines: list[str] = []
    lines = ["| | target | figure | n | on | `python -m benchmarks` |", "|---|---|---|---|---|---|"]
    for name in names:
        path = folder / f"{name}.json"
        rows = read_json(path)["rows"] if path.is_file() else {}
        for key, target in TARGETS[name].items():
            cells = _cells(rows[key], target, machines) if key in rows else ["–"] * 3
            lines.append(f"| {' | '.join([target.text, str(target), *cells])} | `{name}` |")
    legend = [f"{letter}: {machine}" for letter, machine in zip(ascii_uppercase, machines, strict=False)]
    return "\n".join([*lines, "", f"{'; '.join(legend)}."])


def _cells(row: dict[str, Any], target: Target, machines: list[str]) -> list[str]:
    """Return figure, n and the letter of the machine. Add the machine to `machines` if it is new."""
    machine, figure = name_machine(row["machine"]), row["figure"]
    if machine not in machines:
        machines.append(machine)
    spread = "" if figure["n"] == 1 else f" [{target.number(figure['q1'])}, {target.number(figure['q3'])}]"
    missed = ", missed" if target.check(figure["median"]) == "missed" else ""
    changed = " ".join(f"{name}={value}" for name, value in row["options"].items() if name in SHOWN)
    text = (
        f"{target.number(figure['median'])} {target.unit}".strip()
        + spread
        + missed
        + (f" ({changed})" if changed else "")
    )
    return [text, str(figure["n"]), ascii_uppercase[machines.index(machine)]]


if __name__ == "__main__":
    print(markdown_table(Path(sys.argv[1] if len(sys.argv) > 1 else Options().results)))
