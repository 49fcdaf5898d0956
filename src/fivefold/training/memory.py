"""How much memory a training step takes, measured on a few images before the run."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.errors import SettingsError
from fivefold.inference.predictor import Runtime
from fivefold.machine import free_memory

MEBIBYTE = 1 << 20
PROBED_IMAGES = (2, 4)
"""BatchNorm needs two; the difference is what two more images take."""

WORKSPACE = 1.3
"""What a step takes on a CPU, to what autograd saves of it: kernels have room of their own, and freed memory stays in pieces."""


@dataclass(frozen=True)
class Estimate:
    """Bytes: `fixed` for weights, gradients, optimiser state and averages; `image` for each image of a batch."""

    fixed: int
    image: int

    def total(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.image

    def largest_batch(self, available: int) -> int:
        """The most images a batch that fit into `available` bytes; 0 when not even one does."""
        return max(0, (available - self.fixed) // max(self.image, 1))


def estimate(model: nn.Module, size: tuple[int, ...], runtime: Runtime, copies: int, meta: int = 0) -> Estimate:
    """The memory of a step on images of `size` (with `meta` numbers each), from the tensors that autograd saves of a few.

    `copies`: tensors the size of the weights that live beside them (gradient, optimiser state,
    average). The model and the random state stay as they are.
    """
    probe = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        few, many = (_saved(probe, size, runtime, images, meta) for images in PROBED_IMAGES)
    image = (many - few) // (PROBED_IMAGES[1] - PROBED_IMAGES[0])
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # What does not grow with the batch: the weights as autocast made them.
    constant = max(0, few - image * PROBED_IMAGES[0])
    return Estimate(fixed=weights * (1 + copies) + constant, image=image)


def _saved(probe: nn.Module, size: tuple[int, ...], runtime: Runtime, count: int, meta: int) -> int:
    """Bytes that a forward pass of `count` images holds until the backward pass, the images among them."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in probe.parameters()}
    images = torch.zeros(count, 3, *size, device=runtime.device).to(memory_format=runtime.memory_format)
    company = (torch.zeros(count, meta, device=runtime.device),) if meta else ()
    saved = {images.untyped_storage().data_ptr(): images.nbytes}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast():
        output = probe(images, *company)
    del output
    return sum(saved.values())


def available(device: torch.device, sharers: int = 1) -> int:
    """Bytes that this process may still take on the device, with a container's limit observed.

    `sharers`: the processes of this host that train together; each has a GPU of its own, and a part of the other memory.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // sharers


def of_process(found: Estimate, batch_size: int, images: int) -> int:
    """Bytes that this process will have taken on a CPU: what it holds now, a step, and the decoded `images`."""
    import psutil

    return psutil.Process().memory_info().rss + round(WORKSPACE * found.total(batch_size)) + images


def check_fits(found: Estimate, batch_size: int, free: int, accumulate: int = 1) -> str:
    """A sentence on the memory that a run takes; a SettingsError says which batch size would fit."""
    needed = found.total(batch_size)
    figures = f"about {needed / MEBIBYTE:,.0f} MiB at batch size {batch_size}, {free / MEBIBYTE:,.0f} MiB are free"
    if needed <= free:
        return figures
    fits = found.largest_batch(free)
    advice = "not even one image fits: a smaller model or image_size is needed"
    if fits:
        advice = f"train.batch_size={fits} would fit; train.accumulate={accumulate * -(-batch_size // fits)} keeps the step's size"
    raise SettingsError(f"training needs {figures}; {advice}")
