"""Estimate the memory of a training step from a forward pass of a few images before the run."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fivefold.errors import SettingsError
from fivefold.inference.predictor import Runtime
from fivefold.progress import MIB
from fivefold.system import free_memory

WORKSPACE_FACTOR = 1.3
"""Memory of a CPU step divided by the tensors that autograd saves: kernels need workspace, and freed memory fragments."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes: `fixed` for weights, gradients, optimiser state and averages; `image` for each image of a batch."""

    fixed: int
    image: int

    def total(self, batch_size: int) -> int:
        return self.fixed + batch_size * self.image


def estimate_memory(
    model: nn.Module, size: tuple[int, ...], runtime: Runtime, copies: int, meta: int = 0
) -> MemoryEstimate:
    """Estimate the memory of a step on images of `size` (with `meta` features each) from the tensors that autograd saves.

    `copies`: number of tensors of the weights' size beside the weights (gradient, optimiser states, average). The model
    and the random state do not change.
    """
    probe = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]):
        # BatchNorm needs two images; the difference is the memory of two more images.
        few, many = (_saved_bytes(probe, size, runtime, images, meta) for images in (2, 4))
    image = (many - few) // 2
    weights = sum(parameter.nbytes for parameter in model.parameters())
    constant = max(0, few - 2 * image)  # the part that does not grow with the batch: the weights cast by autocast
    return MemoryEstimate(fixed=weights * (1 + copies) + constant, image=image)


def _saved_bytes(probe: nn.Module, size: tuple[int, ...], runtime: Runtime, count: int, meta: int) -> int:
    """Return the bytes that a forward pass of `count` images keeps until the backward pass, including the images."""
    owned = {parameter.untyped_storage().data_ptr() for parameter in probe.parameters()}
    images = torch.zeros(count, 3, *size, device=runtime.device).to(memory_format=runtime.memory_format)
    meta_args = (torch.zeros(count, meta, device=runtime.device),) if meta else ()
    saved = {images.untyped_storage().data_ptr(): images.nbytes}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), runtime.autocast():
        probe(images, *meta_args)
    return sum(saved.values())


def available_bytes(device: torch.device, sharers: int = 1) -> int:
    """Return the bytes that this process can still allocate on the device, within a container's limit.

    `sharers`: number of ranks on this host. Each has its own GPU; they share host memory equally.
    """
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() // sharers


def process_bytes(estimate: MemoryEstimate, batch_size: int, images: int) -> int:
    """Return the bytes that this CPU process will use: its memory now, a step, and `images` bytes of decoded images."""
    import psutil

    return psutil.Process().memory_info().rss + round(WORKSPACE_FACTOR * estimate.total(batch_size)) + images


def check_fits(estimate: MemoryEstimate, batch_size: int, free: int, accumulate: int = 1) -> str:
    """Return a text about the memory that a step needs, or raise a SettingsError that names a batch size that fits."""
    needed = estimate.total(batch_size)
    figures = f"about {needed / MIB:,.0f} MiB at batch size {batch_size}, {free / MIB:,.0f} MiB are free"
    if needed <= free:
        return figures
    fits = (free - estimate.fixed) // max(estimate.image, 1)
    advice = "not even one image fits: use a smaller model or image_size"
    if fits > 0:
        advice = f"train.batch_size={fits} would fit; train.grad_accum_steps={accumulate * -(-batch_size // fits)} keeps the step's size"
    raise SettingsError(f"training needs {figures}; {advice}")
