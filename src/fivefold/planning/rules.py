"""The rules by which a plan chooses settings. Each choice has its reason, which the recipe shows as a comment.

`choose` returns the choices for a data set on a measured machine. Sources and measurements: docs/recipes.md, "Planned recipes".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.errors import SettingsError
from fivefold.planning.facts import DataFacts
from fivefold.planning.forecast import Rates, fine_tuning_seconds, linear_seconds, other_seconds
from fivefold.planning.probe import Speed

CANDIDATES = {
    "timm/tf_efficientnet_lite0": 74.8,
    "timm/tf_efficientnet_lite2": 77.5,
    "timm/convnext_tiny.in12k_ft_in1k": 84.2,
    "timm/convnext_small.in12k_ft_in1k": 85.3,
}
"""Backbones to choose from, with the top-1 accuracy of their weights on ImageNet-1k at 224 to 260 pixels (timm's results)."""
RECIPE = "recipe.toml"
"""The file of a planned recipe."""
VIEWS = ("plain", "flip")
BATCH_SIZE = 32
STEPS, FEWEST_EPOCHS, MOST_EPOCHS = 340, 4, 30
"""Steps of a fold, which set the number of epochs, and the bounds of that number; measured with 200, 750 and 2,660 training rows."""
HEAD_EPOCHS = 3.0
"""With fewer epochs, training starts from the linear head; with more, a random head was better."""
FEW_ROWS = 150
"""With fewer training rows in a fold, nothing was measured; with 200, enough epochs of fine-tuning are about as good as a linear probe."""
FULL_EPOCHS = 3.0
"""The time must allow so many epochs of a more accurate backbone; else a faster one is chosen."""
MIN_EPOCHS = 1.0
"""The time must allow so many epochs of fine-tuning; else there is none."""
DECODED_SIDE = 256
"""Photographs are decoded and cached at this shorter side, in pixels."""
PLANNING_S = 45.0
"""Seconds that the split and the plan themselves take; measured: 39 to 52, with 3,400 photographs."""
UNLIMITED_S = 3600.0
"""Without a limit of time, fine-tuning is planned if the run takes at most an hour."""
TRAIN_SIZE = 0.72
"""Side of training images divided by that in prediction (Touvron et al. 2019, arXiv 1906.06423)."""
SIZE_STEP = 32
"""Training sizes are multiples of it, because networks halve the size five times."""
SMALL_IMAGE = 64
"""Images with a shorter side up to this get a hint on the recipe `small_images`."""
IMBALANCE = 10
"""From this ratio of the largest to the smallest class on, the recipe says why classes are not weighted."""
ERROR = 0.2
"""Relative error of a forecast."""


@dataclass(frozen=True)
class Choice:
    """A setting `key` (section.name) with its value and the reason."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Forecast:
    """Seconds of the run with a backbone: of one epoch of all folds, and of everything besides fine-tuning."""

    speed: Speed
    epoch: float
    others: float

    def epochs_within(self, limit: float) -> float:
        """Return how many epochs of all folds fit."""
        return max(0.0, limit - self.others) / self.epoch


DATA_CHOICES = (
    Choice(
        "data.resize_shorter_side", DECODED_SIDE, "images are decoded once, at a size for networks of up to 260 pixels"
    ),
    Choice("data.jpeg_draft", True, "JPEG files are decoded at 1/2, 1/4 or 1/8, which is faster"),
)
"""Choices that the split needs, so a plan makes them before it."""


def training_size(size: int) -> int:
    """Return the side of training images for a side in prediction, in pixels."""
    return max(SIZE_STEP, round(size * TRAIN_SIZE / SIZE_STEP) * SIZE_STEP)


def count_epochs(rows: int) -> int:
    """Return the number of epochs for so many training rows in a fold."""
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(STEPS * BATCH_SIZE / rows)))


def forecast_backbones(speeds: Sequence[Speed], facts: DataFacts, rates: Rates) -> list[Forecast]:
    """Return a forecast for each measured backbone."""
    return [
        Forecast(speed, fine_tuning_seconds(speed, facts, rates, 1.0), other_seconds(speed, facts, rates))
        for speed in speeds
    ]


def choose(
    speeds: Sequence[Speed], facts: DataFacts, rates: Rates, limit: float, words: str, batch: int = BATCH_SIZE
) -> list[Choice]:
    """Return the choices for the measured backbones, in the order of CANDIDATES.

    `words`: how the user set the `limit` of seconds. `batch`: the number of images of a step that fits the memory.

    Raise a SettingsError with the least time that would do if not even linear probes fit.
    """
    forecasts = forecast_backbones(speeds, facts, rates)
    limit -= PLANNING_S
    allowed = limit if limit < math.inf else UNLIMITED_S
    given = words if limit < math.inf else "an hour (no time= is set)"
    shortest = min(linear_seconds(speed, facts, rates) for speed in speeds)
    if limit < (1 - ERROR) * shortest:
        raise SettingsError(
            f"{given} is too short: linear probes alone would take about {shortest:.0f} s here; set at least "
            f"time={math.ceil((1 + ERROR) * shortest + PLANNING_S)}s"
        )
    best = next((each for each in reversed(forecasts) if each.epochs_within(allowed) >= FULL_EPOCHS), forecasts[0])
    fits = best.epochs_within(allowed)
    choices = [
        Choice("model.backbone", best.speed.backbone, _backbone_reason(best, forecasts, given, fits)),
        Choice("model.pretrained", "auto", "photographs need pretrained weights"),
        Choice("predict.tta", list(VIEWS), "the image and its mirror image"),
        *DATA_CHOICES,
    ]
    if facts.train_rows < FEW_ROWS:
        few = f"a fold has {facts.train_rows} training rows; fine-tuning was not measured below {FEW_ROWS}"
        return [*choices, *_linear(few)]
    if fits < MIN_EPOCHS:
        short = f"{given} allows {fits:.1f} epochs of fine-tuning; the least that helps is {MIN_EPOCHS:g}"
        least = best.others + MIN_EPOCHS * best.epoch + PLANNING_S
        return [*choices, *_linear(f"{short}, with time={math.ceil(least / 60)}m")]
    return [*choices, *_fine_tuning(facts, fits, given, batch)]


def _backbone_reason(best: Forecast, forecasts: Sequence[Forecast], given: str, fits: float) -> str:
    known = CANDIDATES.get(best.speed.backbone)
    accuracy = f"{known:g} % on ImageNet, " if known else ""
    others = "; ".join(
        f"{each.speed.backbone} {each.speed.train:.0f} images/s" for each in forecasts if each is not best
    )
    return (
        f"{accuracy}{best.speed.train:.0f} images/s in each process; {given} allows {fits:.1f} epochs of all folds"
        + (f" (measured too: {others})" if others else "")
    )


def _linear(reason: str) -> list[Choice]:
    return [
        Choice("train.method", "linear_probe", reason),
        Choice("train.batch_size", BATCH_SIZE, "images in each pass of the frozen network"),
        Choice("ensemble.blend", "mean", "one system: nothing to weight"),
    ]


def _fine_tuning(facts: DataFacts, fits: float, given: str, batch: int) -> list[Choice]:
    epochs = count_epochs(facts.train_rows)
    steps = f"about {round(epochs * facts.train_rows / BATCH_SIZE)} steps"
    enough = f"{given} allows them" if fits >= epochs else f"{given} allows {fits:.1f}, and ends the folds in time"
    method = Choice("train.method", "fine_tune", "measured: with three epochs or more a random head ends better")
    if fits < HEAD_EPOCHS:
        reason = "few epochs: start from the linear head (Kumar et al. 2022, arXiv 2202.10054)"
        method = Choice("train.method", "lp_ft", reason)
    balanced = facts.largest_class <= IMBALANCE * facts.smallest_class
    counts = f"classes have {facts.smallest_class} to {facts.largest_class} rows"
    choices = [
        method,
        Choice(
            "train.linear_first", True, "a submission and a report in the first minutes, and a second system to blend"
        ),
        Choice("train.epochs", epochs, f"{steps}; {enough}"),
        Choice("train.validate_every", epochs, "no epoch is chosen by the out-of-fold rows"),
        *_batch(batch),
        Choice("train.lr", 2e-4, "measured: half of it was worse"),
        Choice("train.warmup_epochs", 0.2, "for AdamW's first steps"),
        Choice("train.freeze_norms", True, "measured: batches of 32 spoil the statistics of BatchNorm"),
        Choice("ensemble.blend", "fitted", "linear probes and fine-tuned folds, weighted by out-of-fold logloss"),
        Choice("distill.train", {"method": "linear_probe"}, "a student in seconds, from the cached features"),
    ]
    if not balanced:
        reason = f"{counts}; weights would spoil the probabilities that logloss scores"
        choices.append(Choice("train.class_weights", "none", reason))
    return choices


def _batch(batch: int) -> list[Choice]:
    if batch >= BATCH_SIZE:
        return [Choice("train.batch_size", batch, "it fits the memory, and the rate below was measured with it")]
    reason = f"steps of {BATCH_SIZE} images in all, as the rate below was measured"
    return [
        Choice("train.batch_size", batch, f"{BATCH_SIZE} images do not fit the memory"),
        Choice("train.grad_accum_steps", BATCH_SIZE // batch, reason),
    ]


def size_choices(size: Sequence[int], facts: DataFacts) -> list[Choice]:
    """Return the choices of image sizes for a network that expects `size` (height, width)."""
    note = f"the photographs' shorter side is {facts.shorter_side} pixels"
    if facts.shorter_side <= SMALL_IMAGE:
        note += "; the recipe small_images trains from random weights on such images"
    side: int | list[int] = size[0] if size[0] == size[1] else list(size)
    return [
        Choice("model.image_size", side, f"what the weights expect; {note}"),
        Choice(
            "augment.image_size", training_size(min(size)), "about 0.7 of the size in prediction (FixRes), and faster"
        ),
    ]
