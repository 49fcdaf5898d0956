"""The shipped recipes: every name in them stands for something at its full size, and `smoke` changes sizes alone."""

import json
import re
import tomllib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from efficientnet_pytorch import VALID_MODELS
from efficientnet_pytorch.utils import url_map
from torchvision import models as torchvision

from fivefold.build import OPTIMIZER_STATES
from fivefold.config.loading import flatten, read_recipe
from fivefold.config.recipes import SMOKE, shipped_recipes
from fivefold.config.schema import Settings
from fivefold.data.pipeline.dataset import count_stats
from fivefold.data.pipeline.loader import SAMPLERS
from fivefold.data.transforms.registry import build_transforms
from fivefold.inference.tta import build_views
from fivefold.lookup import choose
from fivefold.models.backbones import SMALL, build_backbone, count_features
from fivefold.models.classifier import build_head
from fivefold.training.losses import build_loss
from fivefold.training.mixing import MIXINGS
from fivefold.training.optim import SCHEDULES
from fivefold.training.trainer import MONITORS

SYSTEMS = ("car_efficientnet_b5", "car_convnext_tiny", "sketch_caformer", "product_image_type", "mask_profile")
SIZES = {
    "split.folds", "model.image_size", "train.epochs", "train.batch_size", "train.freeze_epochs", "predict.batch_size",
    "distill.train.epochs", "distill.train.batch_size",
}  # fmt: skip
"""Keys that a small run may make smaller; besides, another backbone of the same family, and nothing from a hub."""


def variants(name: str) -> dict[str, Any]:
    return tomllib.loads(shipped_recipes()[name].read_text("utf-8")).get("variants", {})


def settings_of(name: str) -> Settings:
    return Settings.model_validate(read_recipe(name))


def everything(name: str) -> dict[str, Any]:
    """All settings, flat; those of the student in place of its two tables."""
    flat = flatten(settings_of(name))
    for section in ("model", "train"):
        flat |= {f"distill.{section}.{key}": value for key, value in flat.pop(f"distill.{section}").items()}
    return flat


EVERY = [*SYSTEMS] + [f"{name}:{variant}" for name in SYSTEMS for variant in variants(name)]


def small(name: str, variant: str) -> str:
    """A variant made small; one that names another network is laid over `smoke`, whose network is the recipe's."""
    first = "backbone" in variants(name)[variant].get("model", {})
    return f"{name}:{SMOKE},{variant}" if first else f"{name}:{variant},{SMOKE}"


SMOKES = [f"{name}:{SMOKE}" for name in SYSTEMS] + [
    small(name, variant) for name in SYSTEMS for variant in variants(name) if variant != SMOKE
]


@pytest.mark.parametrize("name", EVERY)
def test_every_name_in_a_recipe_stands_for_something(name: str) -> None:
    settings = settings_of(name)
    for each in (settings, settings.student()):
        build_head(each.model.head, 8 + count_stats(each.model.image_stats), 7, each.model.dropout)
        choose(MONITORS, "monitor", each.train.monitor)
        choose(OPTIMIZER_STATES, "optimizer", each.train.optimizer)
        choose(SCHEDULES, "schedule", each.train.schedule)
        choose(SAMPLERS, "sampler", each.train.sampler)
        build_loss(each.train.loss, each.train.label_smoothing, None)
    choose(MIXINGS, "mixing", settings.augment.batch_mix)
    build_views(settings.predict.tta)
    for specs, evaluation in ((settings.augment.train, False), (settings.augment.eval, True)):
        transform = build_transforms(specs, (40, 32), evaluation)
        image = torch.randint(0, 256, (3, 70, 60), dtype=torch.uint8)
        assert transform(image).shape == (3, 40, 32)


@pytest.mark.parametrize("name", EVERY)
def test_networks_and_the_weights_that_they_start_from_exist(name: str) -> None:
    model = settings_of(name).model
    family, _, network = model.backbone.partition("/")
    known = choose(NETWORKS, "family", family)
    assert known[0](network)
    assert known[1](network) or not model.pretrained


NETWORKS: dict[str, tuple[Callable[[str], bool], Callable[[str], bool]]] = {
    "timm": (timm.is_model, timm.models.is_model_pretrained),
    "torchvision": (torchvision.list_models().__contains__, lambda name: len(torchvision.get_model_weights(name)) > 0),
    "efficientnet_pytorch": (VALID_MODELS.__contains__, url_map.__contains__),
    "fivefold": (SMALL.__contains__, lambda name: False),
}
"""By family: whether there is a network of a name, and whether its hub has weights of it."""


@lru_cache
def features(backbone: str, options: str, size: tuple[int, int]) -> int:
    with torch.device("meta"):  # shapes without numbers: the real network at its real size
        return count_features(build_backbone(backbone, False, json.loads(options)), size)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_every_network_takes_images_of_its_recipes_size(name: str) -> None:
    model = settings_of(name).model
    assert features(model.backbone, json.dumps(model.backbone_kwargs), model.size) >= 64


@pytest.mark.parametrize("name", SMOKES)
def test_a_small_run_changes_sizes_and_counts_alone(name: str) -> None:
    recipe, _, chosen = name.partition(":")
    others = [variant for variant in chosen.split(",") if variant != SMOKE]
    full, small = everything(f"{recipe}:{','.join(others)}"), everything(name)
    differ = {key for key in full if full[key] != small[key]}
    assert differ <= SIZES | {"model.backbone", "model.pretrained"}
    for key in differ & SIZES:
        assert pixels(small[key]) < pixels(full[key]), key
    assert not small["model.pretrained"]
    assert family(small["model.backbone"]) == family(full["model.backbone"])
    assert small["split.folds"] >= 2


def pixels(value: Any) -> int:
    """One number for a size, which may be (height, width)."""
    return value[0] * value[1] if isinstance(value, list) else value


def family(backbone: str) -> str:
    """`timm/efficientnet` for `timm/efficientnet_b5`: whose network it is, and its name before the size."""
    return re.split(r"(?<=[a-z])[_-]", backbone.partition(".")[0])[0]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_states_what_its_system_is(name: str) -> None:
    tree = read_recipe(name)
    assert {"data", "split", "model", "augment", "train", "predict", "ensemble", "distill"} <= set(tree)
    assert {"seed", "ratios" if "ratios" in tree["split"] else "folds"} <= set(tree["split"])
    stated = {"epochs", "batch_size", "loss", "optimizer", "lr", "weight_decay", "schedule", "monitor", "precision"}
    assert stated <= set(tree["train"])
    assert {"backbone", "head", "image_size", "mean", "std", "pretrained"} <= set(tree["model"])
