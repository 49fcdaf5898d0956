"""Shipped recipes at full size: every name in them exists, and `smoke` changes only sizes and counts."""

import tomllib
from typing import Any

import pytest
import timm
import torch
from efficientnet_pytorch import VALID_MODELS
from efficientnet_pytorch.utils import url_map
from torchvision import models as torchvision

from fivefold.build import build_trial_network, check_training
from fivefold.config.loading import flatten, read_recipe
from fivefold.config.recipes import SMOKE, shipped_recipes
from fivefold.config.schema import Settings
from fivefold.data.pipeline.dataset import count_stats
from fivefold.data.transforms.registry import build_transforms
from fivefold.models.backbones import SMALL
from fivefold.models.classifier import build_head

SYSTEMS = ("car_efficientnet_b5", "car_convnext_tiny", "sketch_caformer", "product_image_type", "mask_profile")
SIZES = {
    "split.folds", "model.backbone", "model.pretrained", "model.image_size", "train.epochs", "train.batch_size",
    "train.freeze_epochs", "predict.batch_size", "distill.train.epochs", "distill.train.batch_size",
}  # fmt: skip
"""Keys that `smoke` may change."""
NETWORKS = {
    "timm": (timm.is_model, timm.models.is_model_pretrained),
    "torchvision": (torchvision.list_models().__contains__, lambda name: len(torchvision.get_model_weights(name)) > 0),
    "efficientnet_pytorch": (VALID_MODELS.__contains__, url_map.__contains__),
    "fivefold": (SMALL.__contains__, lambda name: False),
}
"""By family: a test whether a network exists, and a test whether its hub has weights for it."""


def read_variants(name: str) -> dict[str, Any]:
    return tomllib.loads(shipped_recipes()[name].read_text("utf-8")).get("variants", {})


def read_settings(name: str) -> Settings:
    return Settings.model_validate(read_recipe(name))


def flatten_settings(name: str) -> dict[str, Any]:
    """Return all settings with flat keys, also those inside the tables `distill.model` and `distill.train`."""
    flat = flatten(read_settings(name))
    for section in ("model", "train"):
        flat |= {f"distill.{section}.{key}": value for key, value in flat.pop(f"distill.{section}").items()}
    return flat


ALL_RECIPES = [*SYSTEMS] + [f"{name}:{variant}" for name in SYSTEMS for variant in read_variants(name)]
SMOKE_RECIPES = [  # a variant with a backbone of its own follows `smoke`, and overrides the backbone of `smoke`
    f"{name}:{SMOKE},{variant}" if "backbone" in table.get("model", {}) else f"{name}:{variant},{SMOKE}"
    for name in SYSTEMS
    for variant, table in read_variants(name).items()
]


@pytest.mark.parametrize("name", ALL_RECIPES)
def test_every_name_in_a_recipe_is_known(name: str) -> None:
    settings = read_settings(name)
    family, _, network = settings.model.backbone.partition("/")
    exists, has_weights = NETWORKS[family]
    assert exists(network)
    assert has_weights(network) or not settings.model.pretrained
    for resolved in (settings, settings.student()):
        check_training(resolved)
        build_head(resolved.model.head, 8 + count_stats(resolved.model.image_stats), 7, resolved.model.dropout)
    for specs, evaluation in ((settings.augment.train, False), (settings.augment.eval, True)):
        transform = build_transforms(specs, (40, 32), evaluation)
        image = torch.randint(0, 256, (3, 70, 60), dtype=torch.uint8)
        assert transform(image).shape == (3, 40, 32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_RECIPES)
def test_backbone_accepts_the_image_size_of_its_recipe(name: str) -> None:
    build_trial_network(read_settings(name), shapes_only=True)


@pytest.mark.parametrize("name", SMOKE_RECIPES)
def test_smoke_changes_only_sizes_and_counts(name: str) -> None:
    recipe, _, variants = name.partition(":")
    other_variants = [variant for variant in variants.split(",") if variant != SMOKE]
    full, small = flatten_settings(f"{recipe}:{','.join(other_variants)}"), flatten_settings(name)
    assert {key for key in full if full[key] != small[key]} <= SIZES
    assert not small["model.pretrained"]
