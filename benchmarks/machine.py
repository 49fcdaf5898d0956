"""On what was measured: processor, cores, memory, versions, revision; and whether the machine was quiet."""

import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.options import ROOT
from fivefold.contract.record import package_versions
from fivefold.errors import SettingsError
from fivefold.machine import count_cores

log = logging.getLogger("fivefold")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
BF16_UNITS = ("amx_bf16", "avx512_bf16")
"""The flags of processors that compute in bf16, the faster units first."""
QUIET = 0.25
"""A load of less than this a core is that of a machine that does nothing else."""


def about(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Everything that a figure depends on besides the code; warns where others are at work on this machine.

    Raises SettingsError for a device that is not there.
    """
    load = os.getloadavg()[0]
    if load > QUIET * count_cores():
        log.warning(
            "the machine is not quiet: a load of %.1f on %d cores before the start; ratios suffer less than seconds do, "
            "but leave it alone for figures that count",
            load,
            count_cores(),
        )
    return {
        "processor": _cpu("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in _cpu("flags").split()],
        "cores": count_cores(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        **({"gpu": _gpu()} if device == "cuda" else {}),
        "load_before": round(load, 2),
        "revision": _revision(),
        "packages": package_versions(),
    }


def core_kind(facts: dict[str, Any]) -> str:
    """Processor (and GPU), number of cores, and their units for bf16."""
    gpu = f", {facts['gpu']}" if facts.get("gpu") else ""
    units = next((unit for unit in BF16_UNITS if unit in facts["flags"]), "no units for bf16")
    return f"{facts['processor']}{gpu}, {facts['cores']} cores ({units})"


def in_words(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    packages = facts["packages"]
    return (
        f"{core_kind(facts)}, {facts['threads']} threads, {facts['memory_gib']} GiB; "
        f"torch {packages['torch']}, timm {packages['timm']}, torchvision {packages['torchvision']}; revision {facts['revision']}"
    )


def _cpu(key: str) -> str:
    """A line of Linux's /proc/cpuinfo; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _gpu() -> str:
    """The GPU's name; a SettingsError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise SettingsError(
            "device=cuda, as the benchmark gpu has it, needs a GPU with CUDA, and this machine has none"
        )
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _revision() -> str:
    """The commit, with `+` where files are changed; "unknown" outside a repository."""
    told = [_git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    return told[0] + "+" * bool(told[1]) if told[0] else "unknown"


def _git(*arguments: str) -> str:
    try:
        ended = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ended.stdout.strip() if ended.returncode == 0 else ""
