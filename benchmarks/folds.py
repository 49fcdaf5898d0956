"""All k folds, from files to blended predictions, against k runs of timm's loop and the mean of its models; wall seconds of everything.

Fivefold runs `submit platform=local` of split, folds and ensemble, with the defaults of the platform. The other side does what a user
of timm's script does: split the images with scikit-learn, train fold after fold, predict with all models, and decode each image once.
Both times run from the start of the first process to the end of the last, with decoding, imports, validation and checkpoints.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.options import Options
from benchmarks.processes import Call, repeat, run, spread
from benchmarks.results import Finding, ratio_finding
from benchmarks.training import Setting, describe_setting, search, timm_call
from benchmarks.workloads import CLASSES, FOLD_COUNT, Workload, photographs, split_of, workload

WORKLOADS = {"resnet18@64": Workload("resnet18", 64, 64, 1000, 5, 128)}


def measure(options: Options) -> Iterator[Finding]:
    for name in options.select(list(WORKLOADS)):
        work = workload(name, options, WORKLOADS)
        photos = photographs(options, work.images)
        best, tried = search(work, photos, split_of(photos, options), options)
        pairs = repeat(
            lambda work=work, photos=photos, best=best: (
                run_ours(work, photos, options),
                run_timm(work, photos, best, options),
            ),
            options.pairs,
            f"folds {name}",
        )
        seconds = {f"{side}_seconds": spread([pair[s] for pair in pairs]) for s, side in enumerate(("ours", "timm"))}
        ratios = [timm / ours for ours, timm in pairs]
        yield ratio_finding(name, ratios, timm_best=describe_setting(best), tried=tried, **seconds)


def run_ours(work: Workload, photos: Path, options: Options) -> float:
    """Run split, folds and ensemble, which predicts every image; return the seconds."""
    arguments = ["-m", "jobs", "submit", "platform=local", f"train={photos}", f"eval={photos}", "run=first"]
    arguments += [f"runs={options.empty_folder('runs', 'folds')}", "stages=split,train-fold,ensemble"]
    arguments += [f"split.folds={FOLD_COUNT}", *work.settings()]
    return run(Call(arguments), 0).seconds  # submit divides the cores among the folds itself


def run_timm(work: Workload, photos: Path, best: Setting, options: Options) -> float:
    """Split the images, train each fold, predict every image with the mean of the models; return the seconds."""
    folder = options.empty_folder("runs", "timm-folds")
    models = [str(folder / f"{fold}.pth") for fold in range(FOLD_COUNT)]
    calls = [Call(["-c", SPLIT, str(photos), str(folder), str(FOLD_COUNT)])]
    calls += [timm_call(work, best, data=str(folder / f"fold-{fold}"), save=model) for fold, model in enumerate(models)]
    prediction = {"data": str(photos), "models": models, "classes": CLASSES, "save": str(folder / "mean.csv")}
    calls.append(timm_call(work, best, **prediction))
    return sum(run(call, options.cores).seconds for call in calls)


SPLIT = """
import sys
from pathlib import Path
from sklearn.model_selection import StratifiedKFold

photos, target, folds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
paths = sorted(photos.glob("*/*"))
splitter = StratifiedKFold(folds, shuffle=True, random_state=42)
for fold, parts in enumerate(splitter.split(paths, [path.parent.name for path in paths])):
    for name, rows in zip(("train", "validation"), parts):
        for row in rows:
            link = target / f"fold-{fold}" / name / paths[row].relative_to(photos)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(paths[row])
"""
"""The script of a user without a tool for folds. It writes folders `fold-K/{train,validation}` of links."""
