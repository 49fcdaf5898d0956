"""One step of mixup + R-Drop + SAM + EMA ÷ a plain step, and ÷ the cheapest exact form written by hand; and its loss curve.

ConvNeXt-Tiny at 224 px on resident images, as the recipe `car_convnext_tiny` has it. At stochastic depth 0 only the dropout
of the head draws, so that R-Drop's two passes can share the trunk: there the whole step may cost 3 plain ones. At .1 the
trunk draws too, and the exact form of least work is a batch of twice the rows, in each of SAM's two gradients:
`handmade.py` writes it out for this network, and the trainer may take 5 % more. The curve is that of both at depth 0 and .1 against
the straightforward version, in fp32 and from the same draws: the farthest loss of CURVE_STEPS steps, in shares of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.cases import Case, case, images_of, split_of
from benchmarks.clocks import ratio_of_rounds
from benchmarks.options import Options
from benchmarks.pairs import Call, Spread, repeated, run, side_by_side
from benchmarks.results import Finding, ratio
from benchmarks.train import beside, resident

ALL_FOUR = (
    "augment.mix=mixup",
    "augment.mix_alpha=0.4",
    "train.rdrop_alpha=1.0",
    "train.update=sam",
    "train.ema_decay=0.99",
    "train.schedule=constant",
)
HEAD_DROPOUT = "model.dropout=0.2"
DEPTHS = {"all_four": "model.drop_path=0.0", "stochastic_depth": "model.drop_path=0.1"}
ROUNDS = 4
"""Passes of each side, of which the first warms up."""
CURVE_STEPS = 10
CURVE_BATCH = 8


def measure(options: Options) -> Iterator[Finding]:
    found = case("convnext_tiny@224", options, CASES)
    photos = images_of(found, options)
    split = split_of(photos, options)
    options.fresh("decisions")  # what a probe finds holds for all turns, and for no other run
    kinds = {"all_four": against_plain, "stochastic_depth": against_cheapest, "curve": curve}
    for name in options.chosen(kinds):
        yield kinds[name](found, photos, split, options)


def against_plain(found: Case, photos: Path, split: Path, options: Options) -> Finding:
    plain = [*found.arguments(options.device), DEPTHS["all_four"], HEAD_DROPOUT]
    four = resident([*plain, *ALL_FOUR], "whole", (ROUNDS, found.epochs), photos, split, options)
    alone = resident(plain, "whole", (ROUNDS, 3 * found.epochs), photos, split, options)
    _decide(plain, photos, split, options)
    return _slower("all_four", four, "plain", alone, options)


def against_cheapest(found: Case, photos: Path, split: Path, options: Options) -> Finding:
    settings = [*found.arguments(options.device), DEPTHS["stochastic_depth"], HEAD_DROPOUT, *ALL_FOUR]
    ours, by_hand = (
        resident(settings, what, (ROUNDS, found.epochs), photos, split, options) for what in ("whole", "cheapest")
    )
    _decide(settings, photos, split, options)
    return _slower("stochastic_depth", ours, "by_hand", by_hand, options)


def _decide(settings: list[str], photos: Path, split: Path, options: Options) -> None:
    """Has the precision probed by a process that is alone: those side by side find it."""
    run(resident(settings, "update", (1, 1), photos, split, options).arguments, options.cores)


def _slower(name: str, ours: Call, other_name: str, other: Call, options: Options) -> Finding:
    """Seconds an image of the one ÷ those of the other."""
    turns = repeated(
        lambda: tuple(ended.told for ended in side_by_side(ours, other, options.cores)),
        options.pairs,
        f"step: all four, {other_name}",
    )
    return ratio(name, [1 / ratio_of_rounds(*turn) for turn in turns], **beside(turns, other_name))


def curve(found: Case, photos: Path, split: Path, options: Options) -> Finding:
    """The farthest that the trainer's losses are from the straightforward ones, at both depths, and both curves."""
    small = replace(found, batch=min(CURVE_BATCH, found.batch))
    distances, curves = [], {}
    for name, depth in DEPTHS.items():
        arguments = [*small.arguments(options.device), depth, HEAD_DROPOUT, *ALL_FOUR, "train.precision=fp32"]
        size, more = (1, CURVE_STEPS), {"curve": True, "warm_up": 0}
        calls = (
            resident(arguments, what, size, photos, split, options, **more) for what in ("whole", "straightforward")
        )
        ours, theirs = (run(call.arguments, options.cores).told["losses"] for call in calls)
        distances.append(max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)))
        curves[name] = {"losses": ours, "straightforward": theirs, "distance": distances[-1]}
    farthest = max(distances)
    return Finding("curve", Spread.of([farthest]), {"steps": CURVE_STEPS, "curves": curves})


CASES = {"convnext_tiny@224": Case("convnext_tiny", 224, 16, 100, 2)}
"""`epochs` are the steps of a pass of the four together; of plain ones three times as many."""
