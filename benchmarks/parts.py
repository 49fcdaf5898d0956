"""What each part is worth: the same small training with and without it, scored on rows that no model saw.

    python benchmarks/parts.py DATA.zip [WORK]

DATA is any training data that `split` takes, WORK a folder for the runs (build/parts). A fifth of the
rows is set aside as the holdout, and every figure is on it. Runs that are done are not repeated: stop
it and start it again as you like. The tables are printed, and kept as WORK/parts.md and WORK/parts.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SEEDS = (42, 43, 44)
BASE = (
    "recipe=small_images",
    "split.holdout=0.2",
    'model.options={"widths": [64, 128, 128], "stem": 32}',
    "model.dropout=0.2",
    'augment.train=[{"name": "random_crop", "padding": 4, "mode": "reflect"}, "horizontal_flip"]',
    "augment.mix=none",
    "augment.mix_off_epochs=0",
    "train.epochs=8",
    "train.batch_size=64",
    "train.optimizer=sgd",
    "train.lr=0.1",
    "train.momentum=0.9",
    "train.weight_decay=1e-3",
    "train.warmup_epochs=1",
    "distill.alpha=0.5",
    "distill.annealing=0",
    "predict.views=plain",
)
PARTS: dict[str, tuple[str, ...]] = {
    "mixup": ("augment.mix=mixup", "augment.mix_alpha=0.4", "augment.mix_p=1.0"),
    "R-Drop": ("train.rdrop_alpha=0.5",),
    "SAM": ("train.update=sam", "train.sam_rho=0.05"),
    "EMA": ("train.ema_decay=0.99",),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "plain, best epoch by accuracy": ("train.monitor=acc",),
    **{f"+ {name}": part for name, part in PARTS.items()},
    "all four": tuple(argument for part in PARTS.values() for argument in part),
}
VIEWS = ("plain", "flip", {"name": "shift", "x": 1, "y": 1})
Figures = dict[str, float]


def main(arguments: Sequence[str]) -> int:
    """Runs what is not done yet, and prints both tables."""
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 64
    data, work = Path(arguments[0]).resolve(), Path(arguments[1] if len(arguments) > 1 else "build/parts").resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([about(data), parts_table(data, work), folds_table(data, work)])
    (work / "parts.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def parts_table(data: Path, work: Path) -> str:
    """Fold 0 alone, each variant with every seed."""
    rows = []
    for name, overrides in VARIANTS.items():
        run = slug(name)
        submit(data, work, run, "folds=0", f"seeds={','.join(map(str, SEEDS))}", *overrides)
        records = [record_of(path) for path in sorted((work / run).glob("fold-0*"))]
        rows.append({"what": name, **spread(records)})
        keep(work, "parts", rows)
    return table("Fold 0", f"{len(SEEDS)} seeds: mean ± standard deviation", rows)


def folds_table(data: Path, work: Path) -> str:
    """All folds once: how many models, views and systems, and who teaches the student."""
    submit(data, work, "whole/one", "system=one", "stages=split,train-fold")
    views = f"predict.views={json.dumps(VIEWS)}"
    submit(data, work, "views/one", "system=one", "stages=split,train-fold", views)
    submit(
        data,
        work,
        "whole/two",
        "system=two",
        "stages=split,train-fold",
        "model.backbone=timm/resnet18",
        "model.options={}",
    )
    single = [record_of(path)["metrics"] for path in sorted((work / "whole/one").glob("fold-*"))]
    rows: list[dict[str, Any]] = [{"what": "one model of five (mean of the five)", **mean_of(single)}]
    rows.append({"what": "five models, one view", **ensembled(data, work, "whole/one", "mean")})
    rows.append({"what": "five models, three views", **ensembled(data, work, "views/one", "mean")})
    rows.append({"what": "two systems, equal mean", **ensembled(data, work, "whole", "mean")})
    rows.append({"what": "two systems, fitted weights", **ensembled(data, work, "whole", "fitted")})
    for teacher in ("oof", "best_fold", "ensemble"):
        rows.append({"what": f"student of {teacher}", **student(data, work, f"distill.teacher={teacher}")})
    rows.append({"what": "student without a teacher", **student(data, work, "distill.alpha=0")})
    keep(work, "folds", rows)
    return table("All folds", "once", rows)


def submit(data: Path, work: Path, run: str, *arguments: str) -> None:
    folder = work / run
    run_jobs(
        ["submit", "platform=local", *BASE, f"train={data}", f"runs={folder.parent}", f"run={folder.name}", *arguments]
    )


def ensembled(data: Path, work: Path, runs: str, blend: str) -> Figures:
    """The holdout scores of all fold models below `runs`, before a temperature is fitted on it."""
    output = work / "ensembles" / f"{slug(runs)}-{blend}"
    channels = {"SM_CHANNEL_MODEL": work / runs, "SM_CHANNEL_EVAL": data, "SM_OUTPUT_DATA_DIR": output}
    run_jobs(["ensemble", f"ensemble.blend={blend}", "ensemble.temperature=none"], channels)
    scores = json.loads((output / "ensemble.json").read_text(encoding="utf-8"))["scores"]
    return next({key: score[key] for key in ("accuracy", "logloss")} for score in scores if score["rows"] == "holdout")


def student(data: Path, work: Path, *arguments: str) -> Figures:
    """The holdout scores of the student that the first system's folds teach."""
    folder = work / "students" / slug(" ".join(arguments))
    channels = {
        "SM_CHANNEL_TRAIN": data,
        "SM_CHANNEL_FOLDS": work / "whole/one/split/output",
        "SM_CHANNEL_MODEL": work / "whole/one",
        "SM_MODEL_DIR": folder / "model",
        "SM_OUTPUT_DATA_DIR": folder / "output",
    }
    run_jobs(["distill", *BASE, *arguments], channels)
    return mean_of([record_of(folder)["metrics"]])


def run_jobs(arguments: Sequence[str], channels: dict[str, Path] | None = None) -> None:
    """`python -m jobs …` as a process of its own, which does nothing where its work is done; stops at its failure."""
    environment = os.environ | {name: str(path) for name, path in (channels or {}).items()}
    done = subprocess.run([sys.executable, "-m", "jobs", *arguments], env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def record_of(step: Path) -> dict[str, Any]:
    return json.loads((step / "model" / "stage.json").read_text(encoding="utf-8"))


def mean_of(metrics: Sequence[dict[str, float]]) -> Figures:
    return {key: statistics.fmean(each[f"holdout_{key}"] for each in metrics) for key in ("accuracy", "logloss")}


def spread(records: Sequence[dict[str, Any]]) -> Figures:
    """Mean and standard deviation over the seeds, and the seconds of a run."""
    metrics = [record["metrics"] for record in records]
    found = mean_of(metrics) | {"n": len(metrics)}
    for key in ("accuracy", "logloss"):
        found[f"{key}_sd"] = statistics.stdev(each[f"holdout_{key}"] for each in metrics)
    return found | {"cpu_seconds": statistics.fmean(record["cpu_seconds"] for record in records)}


def table(title: str, how: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"**{title}** ({how})", "", "| | accuracy | logloss | CPU s a run |", "|---|---|---|---|"]
    for row in rows:
        figures = [
            f"{row[key]:.4f}" + (f" ± {row[f'{key}_sd']:.4f}" if "n" in row else "") for key in ("accuracy", "logloss")
        ]
        lines.append(
            f"| {row['what']} | {' | '.join(figures)} | {row['cpu_seconds']:.0f} |"
            if "n" in row
            else f"| {row['what']} | {' | '.join(figures)} | |"
        )
    return "\n".join(lines)


def keep(work: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Puts the figures so far into WORK/parts.json."""
    path = work / "parts.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(found | {name: list(rows)}, indent=1, ensure_ascii=False), encoding="utf-8")


def about(data: Path) -> str:
    arguments = " ".join(BASE)
    return f"`python benchmarks/parts.py {data.name}` on {platform.machine()}, {os.cpu_count()} cores.\nBase: `{arguments}`"


def slug(text: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in text.lower()).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
