"""`train-fold` ÷ timm's training loop at its best settings on this machine: the same model, batch, files and augmentation.

The search for them is part of it: precision (fp32, or bf16 by autocast) × memory format with no loader worker, then the
number of workers (0, 1, 2) at the best; `search=full` tries every combination, `search=bf16,NHWC,0` none but that. Each try is a fresh process of two epochs, of
which the second counts; the two fastest are tried twice more, in turns, and of each setting its best try counts. What
was tried stands beside the figure.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, LR, SCALE, WEIGHT_DECAY, Case, case, images_of, split_of
from benchmarks.clocks import counted, rate, ratio_of_rounds
from benchmarks.fold_folders import link
from benchmarks.options import Options
from benchmarks.pairs import Call, repeated, run, side_by_side
from benchmarks.results import Finding, ratio
from benchmarks.train import beside, manner_of, told_by, train_fold
from fivefold.contract.stages import CLASSES, FOLDS
from fivefold.data.folds import read_folds
from fivefold.errors import SettingsError
from fivefold.progress import track

Told = dict[str, Any]
Setting = tuple[str, bool, int]
"""Precision, channels-last, workers."""
WORKERS = {"cpu": (0, 1, 2), "cuda": (4, 8, 14)}
FINALS = 2
"""So often the two fastest settings are tried again: a single try may have met a busy machine."""
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}


def measure(options: Options) -> Iterator[Finding]:
    for name in options.chosen(CASES):
        yield against_timm(name, name, CASES, options)


def against_timm(name: str, key: str, table: Mapping[str, Case], options: Options) -> Finding:
    """The ratio of one case, in turns, after the search."""
    found = case(name, options, table)
    photos = images_of(found, options)
    split = split_of(photos, options)
    best, tried = search(found, photos, split, options)
    settings = [*found.arguments(options.device), *manner_of(found, photos, split, options)]

    def pair() -> tuple[Told, Told]:
        stage = train_fold(settings, photos, split, options)
        loop = timm(found, photos, split, best, found.epochs, options)
        return told_by(*side_by_side(stage, loop, options.cores), options)

    turns = repeated(pair, options.pairs, f"peer {name}")
    ratios = [ratio_of_rounds(*turn) for turn in turns]
    return ratio(key, ratios, timm_best=in_words(best), tried=tried, **beside(turns, "timm"))


def search(found: Case, photos: Path, split: Path, options: Options) -> tuple[Setting, list[str]]:
    """The fastest setting, and what each one tried reached, in words; or the one that `search` gives."""
    if options.search not in ("short", "full"):
        return given_setting(options.search), []
    precisions, workers = PRECISIONS[options.device], WORKERS[options.device]
    rates: dict[Setting, float] = {}

    def tries(settings: list[Setting]) -> None:
        for setting in track(settings, len(settings), f"timm's best for {found.name}"):
            told = run(timm(found, photos, split, setting, 2, options).arguments, options.cores).told
            rates[setting] = max(rate(counted(told))["images_per_second"], rates.get(setting, 0.0))

    if options.search == "full":
        tries(list(product(precisions, (False, True), workers)))
    else:
        tries(list(product(precisions, (False, True), workers[:1])))
        precision, last, _ = max(rates, key=rates.__getitem__)
        tries([(precision, last, number) for number in workers[1:]])
    tries(FINALS * sorted(rates, key=rates.__getitem__, reverse=True)[:2])
    ordered = sorted(rates, key=rates.__getitem__, reverse=True)
    return ordered[0], [f"{in_words(each)}: {rates[each]:.1f} images/s" for each in ordered]


def timm(found: Case, photos: Path, split: Path, setting: Setting, epochs: int, options: Options) -> Call:
    """A fresh process of timm's loop on the rows of fold 0."""
    given = request(found, setting, epochs, options) | {"data": str(fold_zero(photos, split, options))}
    return Call(["-m", "benchmarks.timm_loop", json.dumps(given)])


def fold_zero(photos: Path, split: Path, options: Options) -> Path:
    """The rows of fold 0 as folders of links, made once: the files that `train-fold FOLD=0` reads."""
    folder = options.folder("links") / photos.name
    if not folder.is_dir():
        table = read_folds(split / FOLDS, split / CLASSES)
        paths = [table.paths_of(rows) for rows in (table.train_rows(0), table.valid_rows(0))]
        made = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(made, ignore_errors=True)
        link(photos, made, *paths).rename(folder)
    return folder


def request(found: Case, setting: Setting, epochs: int, options: Options) -> dict[str, Any]:
    """What `benchmarks.timm_loop` is asked for."""
    precision, last, workers = setting
    return {
        "model": found.name,
        "size": found.size,
        "batch": found.batch,
        "epochs": epochs,
        "precision": precision,
        "channels_last": last,
        "workers": workers,
        "scale": SCALE,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "device": options.device,
    }


def given_setting(text: str) -> Setting:
    """`bf16,NHWC,0` as a setting."""
    precision, layout, workers = [*text.split(","), "", ""][:3]
    if precision not in ("fp32", "bf16") or layout not in ("NCHW", "NHWC") or not workers.isdigit():
        raise SettingsError(f"search={text}: short, full, or a setting as bf16,NHWC,0 is needed")
    return precision, layout == "NHWC", int(workers)


def in_words(setting: Setting) -> str:
    precision, last, workers = setting
    return f"{precision}, {'NHWC' if last else 'NCHW'}, {workers} workers"
