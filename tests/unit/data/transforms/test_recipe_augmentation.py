"""The augmentation lists of the five systems as specs: on images of any shape, repeatable, and fixed at evaluation."""

import pytest
import torch

from fivefold.config.loading import arguments_layer, load
from fivefold.data.pipeline.dataset import derive_seed
from fivefold.data.transforms.registry import PRESETS, build_transforms
from fivefold.errors import SettingsError

RECIPES = ["car_efficientnet_b5", "car_convnext_tiny", "sketch_caformer", "product_image_type"]
SYSTEMS = {
    **{name: load([arguments_layer([f"recipe={name}"])]).augment.train for name in RECIPES},
    **{f"mask_profile {name}": [name] for name in PRESETS},
    "automatic": ["rand_augment", "trivial_augment", {"name": "random_erasing", "p": 1.0}],
}
SHAPES = {"grey": (1, 60, 60), "tiny": (3, 5, 4), "large": (3, 450, 400), "wide": (3, 30, 200), "high": (3, 200, 30)}


def image(kind: str) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, SHAPES[kind], generator=drawn, dtype=torch.uint8).expand(3, *SHAPES[kind][1:])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_each_systems_list_repeats_by_seed_and_differs_by_seed(system, kind):
    original = image(kind)
    before = original.clone()
    transform = build_transforms(SYSTEMS[system], (48, 40))
    found = []
    for seed in (0, 0, *range(1, 5)):
        torch.default_generator.manual_seed(derive_seed(42, 0, seed))
        found.append(transform(original))
    for each in found:
        assert each.shape == (3, 48, 40)
        assert each.dtype == torch.uint8
    assert torch.equal(found[0], found[1])
    differ = any(not torch.equal(found[0], other) for other in found[2:])
    assert differ == (system != "mask_profile BaseAugmentation")
    assert torch.equal(original, before)


@pytest.mark.parametrize("name", PRESETS)
def test_a_set_at_evaluation_is_its_fixed_parts_alone(name):
    """The original ran its whole set over the validation images too: jitter, noise and flips moved every score."""
    transform = build_transforms([name], (48, 40), evaluation=True)
    state = torch.get_rng_state()
    found = [transform(image("large")) for _ in range(4)]
    assert all(torch.equal(found[0], other) for other in found)
    assert torch.equal(torch.get_rng_state(), state)
    crop = {"CustomAugmentation": (320, 256), "bestAugmentation": (380, 380)}.get(name)
    parts = [{"name": "centre_crop_pixels", "height": crop[0], "width": crop[1]}] if crop else []
    assert torch.equal(found[0], build_transforms(parts, (48, 40))(image("large")))


@pytest.mark.parametrize("system", RECIPES)
def test_a_training_list_is_no_evaluation(system):
    """The ConvNeXt of the cars validated on randomly cropped, turned and jittered images."""
    with pytest.raises(SettingsError, match=r"augment\.eval: .* random"):
        build_transforms(SYSTEMS[system], (48, 40), evaluation=True)


def test_sharpening_and_darkening_are_an_evaluation_as_the_sketches_have_it():
    specs = ["resize", "unsharp_mask", {"name": "brightness", "amount": -0.2}]
    first = build_transforms(specs, (48, 40), evaluation=True)(image("wide"))
    assert torch.equal(first, build_transforms(specs, (48, 40))(image("wide")))
    with pytest.raises(SettingsError, match=r"'unsharp_mask' .*random"):
        build_transforms([{"name": "unsharp_mask", "p": 0.5}], (48, 40), evaluation=True)


def test_a_probability_is_the_share_of_images_that_are_changed():
    transform = build_transforms([{"name": "brightness", "amount": 0.5, "p": 0.3}], (5, 4))
    torch.manual_seed(0)
    changed = sum(not torch.equal(transform(image("tiny")), image("tiny")) for _ in range(1000))
    assert 250 < changed < 350


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "bestAugmentation", "p": 0.5}, "takes no parameters"),
        ("BestAugmentation", "did you mean 'bestAugmentation'"),
        ({"name": "rotation", "p": 1.5}, "a probability from 0 to 1"),
        ({"name": "rotation", "interpolation": "cubic"}, "cubic"),
        ({"name": "brightness", "amounts": 1}, "did you mean 'amount'"),
        ({"name": "unsharp_mask", "kernel": 6}, "kernel=6 "),
        ({"name": "gaussian_noise", "sigma": "much"}, "gaussian_noise"),
        ({"name": "coarse_dropout", "holes": 8}, "holes=8 "),
        ({"name": "coarse_dropout", "fill": 256}, "fill=256 "),
        ({"name": "grid_distortion", "steps": 0}, "steps=0 "),
        ({"name": "grid_distortion", "limit": [-1.0, 0.5]}, "limit=.* "),
        ({"name": "centre_crop_pixels", "height": 0}, "height=0 "),
        ({"name": "random_crop", "mode": "mirror"}, "mode='mirror' "),
    ],
)
def test_what_cannot_be_is_refused_before_any_image_is_seen(spec, message):
    with pytest.raises(SettingsError, match=message):
        build_transforms([spec], (8, 8))
