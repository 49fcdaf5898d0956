"""`train-fold` from JPEGs ÷ the model alone (`train`), and ÷ timm's training loop at its best settings (`peer`).

`train-fold` runs as a process. Its training passes count from the second epoch on, with loader, mixing and everything between two
steps. The model alone is the update of a trainer with the same settings, repeated on one batch of floats, in the same precision and
memory format. timm's loop has the same model, batch size, files and augmentation. Fresh processes of two epochs, of which the second
counts, first search for its best precision (fp32, or bf16 by autocast), memory format and number of workers. The two sides run at
the same time and alternate, one pass each.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.options import Options
from benchmarks.processes import Call, rate, ratio_of_passes, repeat, run, run_side_by_side, spread, timed_passes
from benchmarks.results import Finding, ratio_finding
from benchmarks.workloads import LR, SCALE, WEIGHT_DECAY, Workload, names_for, photographs, split_of, workload
from fivefold.contract.files import read_json
from fivefold.contract.stage_specs import CLASSES, FOLDS, MODEL
from fivefold.data.split.fold_table import read_folds
from fivefold.errors import SettingsError
from fivefold.progress import track

Pair = tuple[dict[str, Any], dict[str, Any]]
"""The outputs of the two processes of a pair."""
WARM_UP_STEPS = 3


def measure_train(options: Options) -> Iterator[Finding]:
    for name in options.select(names_for(options)):
        work = workload(name, options)
        photos = photographs(options, work.images)
        data = photos, split_of(photos, options), options
        settings = [*work.settings(), *find_precision(work, *data)]
        steps = -(-work.images * 4 // 5 // work.batch)
        alone = model_only(settings, "update", (work.epochs, steps), *data)
        pairs = repeat(
            lambda settings=settings, alone=alone, data=data: outputs(train_fold(settings, *data), alone, options),
            options.pairs,
            f"train {name}",
        )
        yield ratio_finding(name, [ratio_of_passes(*each) for each in pairs], **describe_pairs(pairs, "alone"))


def describe_pairs(pairs: Sequence[Pair], other: str) -> dict[str, Any]:
    """Return images/s and precision of both sides."""
    details: dict[str, Any] = {}
    for name, side in (("ours", 0), (other, 1)):
        details[name] = spread([rate(timed_passes(pair[side])) for pair in pairs])
        details[f"{name}_precision"] = ", ".join(sorted({pair[side]["precision"] for pair in pairs}))
    return details


def train_fold(settings: Sequence[str], photos: Path, split: Path, options: Options) -> Call:
    """Return the call that times the passes of `train-fold FOLD=0`. All calls share an image cache."""
    folder = options.empty_folder("runs", "train")
    channels = {
        "SM_CHANNEL_TRAIN": photos,
        "SM_CHANNEL_FOLDS": split,
        "SM_MODEL_DIR": folder / "model",
        "SM_OUTPUT_DATA_DIR": folder / "output",
        "SM_CHECKPOINT_DIR": folder / "checkpoints",
    }
    cache = f"data.cache={options.folder('caches')}"
    arguments = ["-m", "benchmarks.instrumented_stage", "epochs", "train-fold", "FOLD=0", cache, *settings]
    return Call(arguments, {name: str(path) for name, path in channels.items()})


def find_precision(work: Workload, photos: Path, split: Path, options: Options) -> list[str]:
    """Run `train-fold` once; return the precision and memory format that it chooses, as settings. This also builds the cache."""
    one_epoch = replace(work, epochs=1).settings()
    run(train_fold(one_epoch, photos, split, options), options.cores)
    model = read_json(options.folder("runs", "train") / "model" / MODEL)
    last = model["settings"]["train"]["channels_last"]
    return [f"train.precision={model['precision']}", f"train.channels_last={json.dumps(last)}"]


def outputs(ours: Call, other: Call, options: Options) -> Pair:
    """Run both at the same time; return their outputs, with the precision from model.json in the first."""
    pair = run_side_by_side(ours, other, options.cores)
    precision = read_json(options.folder("runs", "train") / "model" / MODEL)["precision"]
    return pair[0].output | {"precision": precision}, pair[1].output


def model_only(
    settings: Sequence[str], step: str, size: tuple[int, int], photos: Path, split: Path, options: Options, **more: Any
) -> Call:
    """Return the call of steps on a resident batch. `size`: the number of passes, and of steps in each."""
    request = {"train": str(photos), "split": str(split), "settings": list(settings), "step": step}
    request |= {"passes": size[0], "steps": size[1], "warm_up": WARM_UP_STEPS}
    request |= {"probes": str(options.folder("probes"))}
    return Call(["-m", "benchmarks.model_only", json.dumps(request | more)])


Setting = tuple[str, str, int]
"""Precision, memory format and number of loader workers of timm's loop."""
WORKERS = {"cpu": (0, 1, 2), "cuda": (4, 8, 14)}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}
FORMATS = ("NCHW", "NHWC")


def measure_peer(options: Options) -> Iterator[Finding]:
    for name in options.select(names_for(options)):
        work = workload(name, options)
        photos = photographs(options, work.images)
        data = photos, split_of(photos, options), options
        best, tried = search(work, *data)
        settings = [*work.settings(), *find_precision(work, *data)]
        timm = timm_call(work, best, data=str(fold_zero(*data)))
        pairs = repeat(
            lambda settings=settings, timm=timm, data=data: outputs(train_fold(settings, *data), timm, options),
            options.pairs,
            f"peer {name}",
        )
        ratios = [ratio_of_passes(*each) for each in pairs]
        yield ratio_finding(
            name, ratios, timm_best=describe_setting(best), tried=tried, **describe_pairs(pairs, "timm")
        )


def search(work: Workload, photos: Path, split: Path, options: Options) -> tuple[Setting, list[str]]:
    """Return the fastest setting and the speed of each one tried. If the option `search` is set, return that setting."""
    if options.search:
        return parse_setting(options.search), []
    precisions, workers = PRECISIONS[options.device], WORKERS[options.device]
    data, rates = str(fold_zero(photos, split, options)), dict[Setting, float]()

    def measure_all(settings: list[Setting]) -> None:
        for setting in track(settings, len(settings), f"timm's best for {work.name}"):
            ended = run(timm_call(work, setting, data=data, epochs=2), options.cores)
            rates[setting] = max(rate(timed_passes(ended.output)), rates.get(setting, 0.0))

    def ranking() -> list[Setting]:
        return sorted(rates, key=rates.__getitem__, reverse=True)

    measure_all(list(product(precisions, FORMATS, workers[:1])))
    precision, layout, _ = ranking()[0]
    measure_all([(precision, layout, number) for number in workers[1:]])
    measure_all(2 * ranking()[:2])
    return ranking()[0], [f"{describe_setting(each)}: {rates[each]:.1f} images/s" for each in ranking()]


def timm_call(work: Workload, setting: Setting, **more: Any) -> Call:
    """Return the call of timm's loop."""
    precision, layout, workers = setting
    request = {
        **asdict(work),
        "precision": precision,
        "channels_last": layout == "NHWC",
        "workers": workers,
        "scale": SCALE,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
    }
    return Call(["-m", "benchmarks.timm_train", json.dumps(request | more)])


def fold_zero(photos: Path, split: Path, options: Options) -> Path:
    """Return the rows of fold 0 as folders of links to the files that `train-fold FOLD=0` reads. Create them once."""
    folder = options.folder("links") / photos.name
    if not folder.is_dir():
        table = read_folds(split / FOLDS, split / CLASSES)
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        for part, rows in (("train", table.train_rows(0)), ("validation", table.valid_rows(0))):
            for path in table.paths_of(rows):
                link = temporary / part / path
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(photos / path)
        temporary.rename(folder)
    return folder


def parse_setting(text: str) -> Setting:
    """Parse `bf16,NHWC,0`. Raises SettingsError for anything else."""
    precision, layout, workers = [*text.split(","), "", ""][:3]
    if precision not in ("fp32", "bf16") or layout not in FORMATS or not workers.isdigit():
        raise SettingsError(f"search={text}: expected precision, memory format and workers, such as bf16,NHWC,0")
    return precision, layout, int(workers)


def describe_setting(setting: Setting) -> str:
    return f"{setting[0]}, {setting[1]}, {setting[2]} workers"
