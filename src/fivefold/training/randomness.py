"""The state of torch's random generators that a training step draws from."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the CPU's default generator, and of the device's where it has its own."""
    own = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *own]


def set_random_state(device: torch.device, state: Sequence[Tensor]) -> None:
    """Sets what `random_state` gave: the same draws follow again."""
    torch.default_generator.set_state(state[0])
    for own in state[1:]:
        torch.get_device_module(device).set_rng_state(own)


def drew(device: torch.device, before: Sequence[Tensor]) -> bool:
    """Whether anything was drawn since the state `before`."""
    now = random_state(device)
    return not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


@torch.no_grad()
def draws(module: nn.Module, *inputs: Tensor) -> bool:
    """Whether the module draws from the generators when it runs in training, by running it.

    Its buffers, its mode and the random state are as before. Waits for the device.
    """
    device, training = inputs[0].device, [(part, part.training) for part in module.modules()]
    before, buffers = random_state(device), [buffer.clone() for buffer in module.buffers()]
    module.train()(*inputs)
    found = drew(device, before)
    set_random_state(device, before)
    for buffer, kept in zip(module.buffers(), buffers, strict=True):
        buffer.copy_(kept)
    for part, was in training:
        part.training = was
    return found
