"""A step of mixup + R-Drop + SAM + EMA ÷ a plain step, the same ÷ the cheapest exact implementation by hand, and the loss curve.

ConvNeXt-Tiny at 224 px on resident images, as in the recipe `car_convnext_tiny`. At stochastic depth 0 only the head's dropout is
random, so R-Drop's two passes can share the trunk: the whole step may cost 3 plain steps. At depth .1 the trunk is random too, and
the trainer may take 5 % more time than the cheapest exact implementation. The curve is the largest relative distance between the
losses of the two, in fp32 with the same random numbers, at both depths.
"""

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.options import Options
from benchmarks.processes import ratio_of_passes, repeat, run, run_side_by_side, spread
from benchmarks.results import Finding, ratio_finding
from benchmarks.training import describe_pairs, model_only
from benchmarks.workloads import Workload, photographs, split_of, workload

ALL_FOUR = (
    "augment.batch_mix=mixup",
    "augment.mix_alpha=0.4",
    "train.rdrop_alpha=1.0",
    "train.sam_rho=0.05",
    "train.ema_decay=0.99",
    "train.schedule=constant",
)
DEPTHS = {"all_four": 0.0, "stochastic_depth": 0.1}
PASSES = 4
"""Passes of each side. The first is the warm-up."""
CURVE_STEPS = 10
CURVE_BATCH = 8
WORKLOADS = {"convnext_tiny@224": Workload("convnext_tiny", 224, 16, 100, 2)}
"""`epochs` is the number of steps in a pass with all four parts. A pass of plain steps has three times as many."""


def measure(options: Options) -> Iterator[Finding]:
    work = workload("convnext_tiny@224", options, WORKLOADS)
    photos = photographs(options, work.images)
    data = (photos, split_of(photos, options), options)
    options.empty_folder("probes")
    for name in options.select(["all_four", "stochastic_depth", "curve"]):
        if name == "curve":
            yield curve(work, *data)
            continue
        plain = [*work.settings(), f"model.drop_path={DEPTHS[name]}", "model.dropout=0.2"]
        ours = model_only([*plain, *ALL_FOUR], "whole", (PASSES, work.epochs), *data)
        if name == "all_four":
            side, other = "plain", model_only(plain, "whole", (PASSES, 3 * work.epochs), *data)
        else:
            side, other = "by_hand", model_only([*plain, *ALL_FOUR], "reference", (PASSES, work.epochs), *data)
        # a process that runs alone probes the precision once; the two processes that alternate read the result
        run(model_only(plain if name == "all_four" else [*plain, *ALL_FOUR], "update", (1, 1), *data), options.cores)
        pairs = repeat(
            lambda calls=(ours, other): tuple(each.output for each in run_side_by_side(*calls, options.cores)),
            options.pairs,
            f"step {name}",
        )
        yield ratio_finding(name, [1 / ratio_of_passes(*pair) for pair in pairs], **describe_pairs(pairs, side))


def curve(work: Workload, *data: object) -> Finding:
    """Measure the largest relative distance between the losses of both implementations. The details have both curves."""
    small, distances, curves = replace(work, batch=min(CURVE_BATCH, work.batch)), [], {}
    options = data[2]
    for name, depth in DEPTHS.items():
        settings = [*small.settings(), f"model.drop_path={depth}", "model.dropout=0.2", *ALL_FOUR]
        ours, theirs = (
            run(
                model_only([*settings, "train.precision=fp32"], step, (1, CURVE_STEPS), *data, curve=True, warm_up=0),
                options.cores,
            ).output["losses"]
            for step in ("whole", "reference")
        )
        distances.append(max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)))
        curves[name] = {"losses": ours, "by_hand": theirs}
    return Finding("curve", spread([max(distances)]), {"steps": CURVE_STEPS, "curves": curves})
