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
SHAPES = {"tiny and grey": (1, 5, 4), "large": (3, 390, 330), "high": (3, 200, 30)}


def make_image(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, SHAPES[kind], generator=generator, dtype=torch.uint8).expand(3, *SHAPES[kind][1:])


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_augmentation_of_each_system_depends_only_on_the_seed(system, kind):
    original = make_image(kind)
    transform = build_transforms(SYSTEMS[system], (48, 40))
    outputs = []
    for seed in (0, 0, 1, 2):
        torch.default_generator.manual_seed(derive_seed(42, 0, seed))
        outputs.append(transform(original))
    assert {(output.shape, output.dtype) for output in outputs} == {((3, 48, 40), torch.uint8)}
    assert torch.equal(outputs[0], outputs[1])
    differ = any(not torch.equal(outputs[0], other) for other in outputs[2:])
    assert differ == (system != "mask_profile BaseAugmentation")
    assert torch.equal(original, make_image(kind))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_applies_only_its_deterministic_transforms_at_evaluation(name):
    """The original also applied the whole preset to validation images: jitter, noise and flips changed every score."""
    state = torch.get_rng_state()
    output = build_transforms([name], (48, 40), evaluation=True)(make_image("large"))
    assert torch.equal(torch.get_rng_state(), state)
    crop = {"CustomAugmentation": (320, 256), "bestAugmentation": (380, 380)}.get(name)
    parts = [{"name": "centre_crop_pixels", "height": crop[0], "width": crop[1]}] if crop else []
    assert torch.equal(output, build_transforms(parts, (48, 40))(make_image("large")))


@pytest.mark.parametrize("system", RECIPES)
def test_random_training_transforms_are_rejected_at_evaluation(system):
    with pytest.raises(SettingsError, match=r"augment\.eval: .* random"):
        build_transforms(SYSTEMS[system], (48, 40), evaluation=True)


def test_deterministic_sharpening_and_darkening_are_allowed_at_evaluation():
    specs = ["resize", "unsharp_mask", {"name": "brightness", "amount": -0.2}]
    first = build_transforms(specs, (48, 40), evaluation=True)(make_image("high"))
    assert torch.equal(first, build_transforms(specs, (48, 40))(make_image("high")))
    with pytest.raises(SettingsError, match=r"'unsharp_mask' .*random"):
        build_transforms([{"name": "unsharp_mask", "p": 0.5}], (48, 40), evaluation=True)
