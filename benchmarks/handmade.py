"""mixup, R-Drop, SAM and EMA in one step, written out by hand: what the trainer's composition of parts is measured against.

Both forms draw what the trainer draws. `batched` is the cheapest exact one where the trunk draws too (stochastic depth):
R-Drop's two passes as one batch of twice the rows, foreach kernels for SAM and EMA, the fused AdamW. The other form
is as their papers have it, tensor by tensor: the straightforward version, which shows that the loss curve is right. Neither
knows micro-batches, clipping, fp16, BatchNorm's statistics or several processes.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.inference.predictor import Runtime
from fivefold.recipe import Settings
from fivefold.training.randomness import random_state, set_random_state


@dataclass(frozen=True)
class Numbers:
    """The recipe's: mixup's α, R-Drop's weight, SAM's ρ, EMA's decay, learning rate and weight decay."""

    mix_alpha: float
    rdrop_alpha: float
    rho: float
    decay: float
    lr: float
    weight_decay: float

    @classmethod
    def of(cls, settings: Settings) -> "Numbers":
        train = settings.train
        return cls(
            settings.augment.mix_alpha, train.rdrop_alpha, train.sam_rho, train.ema_decay, train.lr, train.weight_decay
        )


class ByHand:
    """A network of no BatchNorm, its optimiser and its average; `step` is all four in one."""

    def __init__(self, model: nn.Module, runtime: Runtime, numbers: Numbers, batched: bool) -> None:
        self.model, self.runtime, self.numbers, self.batched = model, runtime, numbers, batched
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": numbers.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        how = {"fused": True} if batched else {"foreach": False, "fused": False}
        self.optimizer = torch.optim.AdamW(groups, lr=numbers.lr, **how)
        average = copy.deepcopy(model).eval().requires_grad_(False)
        self.average = list(average.parameters())
        self.steps = 0

    def step(self, images: Tensor, targets: Tensor, seed: Sequence[int]) -> Tensor:
        """One step on normalised images [B, 3, H, W] and targets [B, C]; the loss before it."""
        images, targets = self.mixed(images, targets, seed)
        state = random_state(self.runtime.device)
        loss = self.gradient(images, targets)
        origin = self.climb()
        set_random_state(self.runtime.device, state)
        self.gradient(images, targets)
        self.return_to(origin)
        self.optimizer.step()
        self.follow()
        return loss

    def mixed(self, images: Tensor, targets: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(tuple(seed))
        random.random()  # the trainer draws first whether the batch is mixed
        lam = float(random.beta(self.numbers.mix_alpha, self.numbers.mix_alpha))
        order = torch.from_numpy(random.permutation(len(targets))).to(images.device)
        if self.batched:
            return torch.lerp(images[order], images, lam), torch.lerp(targets[order], targets, lam)
        return lam * images + (1 - lam) * images[order], lam * targets + (1 - lam) * targets[order]

    def gradient(self, images: Tensor, targets: Tensor) -> Tensor:
        """Puts the gradient of cross-entropy + R-Drop at the parameters; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            logits = self.model(torch.cat([images, images])).float()
        first, second = (half.log_softmax(dim=1) for half in logits.chunk(2))
        labelled = -((first + second) / 2 * targets).sum(dim=1).mean()
        apart = ((first.exp() - second.exp()) * (first - second)).sum(dim=1).mean() / 2
        loss = labelled + self.numbers.rdrop_alpha * apart
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def climb(self) -> list[Tensor]:
        """w + ρ·g/‖g‖; where the weights were."""
        gradients, origin = [each.grad for each in self.parameters], [each.clone() for each in self.parameters]
        if self.batched:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_add_(self.parameters, torch._foreach_mul(gradients, self.numbers.rho / (norm + 1e-12)))
            return origin
        norm = torch.sqrt(sum((each**2).sum() for each in gradients))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.add_(gradient * (self.numbers.rho / (norm + 1e-12)))
        return origin

    @torch.no_grad()
    def return_to(self, origin: Sequence[Tensor]) -> None:
        if self.batched:
            torch._foreach_copy_(self.parameters, list(origin))
            return
        for parameter, old in zip(self.parameters, origin, strict=True):
            parameter.copy_(old)

    @torch.no_grad()
    def follow(self) -> None:
        """The average after the step, which forgets its start as the trainer's does."""
        self.steps += 1
        decay = min(self.numbers.decay, (1 + self.steps) / (10 + self.steps))
        if self.batched:
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
            return
        for own, new in zip(self.average, self.parameters, strict=True):
            own.copy_(decay * own + (1 - decay) * new)
