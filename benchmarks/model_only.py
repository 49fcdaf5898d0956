"""The model alone: steps on a batch that is already on the device, `python -m benchmarks.model_only JSON`.

The trainer is the one that `train-fold FOLD=0` builds from the same settings, photographs and split. JSON contains `train`, `split`,
`probes`, `settings`, `step` (a name of STEPS), and the number of `passes` of `steps` each, timed after `warm_up` other steps. The
process prints the passes, and with `curve` also the losses of all steps.
"""

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.processes import Timer, wait_for_turn
from fivefold import build
from fivefold.config.loading import arguments_layer
from fivefold.config.loading import load as load_settings
from fivefold.config.schema import Settings
from fivefold.contract.stage_specs import CLASSES, FOLDS
from fivefold.data.pipeline.dataset import Batch, Sample, Stream, load_batches, make_generator
from fivefold.data.readers.stores import open_store
from fivefold.data.split.fold_table import read_folds
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.training.checkpoints import random_state, set_random_state
from fivefold.training.objectives import MicroBatch
from fivefold.training.trainer import TrainData, Trainer, to_micro_batch

Step = Callable[[], torch.Tensor]
"""A step; it returns its loss on the device."""


class ReferenceStep:
    """mixup, R-Drop, SAM and EMA in one hand-written step: the reference for the trainer, which composes these parts.

    It draws the same random numbers as the trainer. It is the cheapest exact implementation if the trunk is random: R-Drop's two
    passes are one batch of twice the rows, with foreach kernels and fused AdamW. It does not support micro-batches, clipping, fp16,
    BatchNorm statistics or several processes.
    """

    def __init__(self, model: nn.Module, runtime: object, settings: Settings) -> None:
        train = settings.train
        self.model, self.runtime, self.steps = model, runtime, 0
        self.mix_alpha, self.rdrop_alpha = settings.augment.mix_alpha, train.rdrop_alpha
        self.rho, self.decay = train.sam_rho, train.ema_decay
        self.parameters = [each for each in model.parameters() if each.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
            {"params": [p for p in self.parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, fused=True)
        self.average = list(copy.deepcopy(model).eval().requires_grad_(False).parameters())

    def __call__(self, images: Tensor, targets: Tensor, seed: Sequence[int]) -> Tensor:
        """Do one step on normalised images [B, 3, H, W] and targets [B, C]; return the loss before it."""
        images, targets = self.mix(images, targets, seed)
        state = random_state(self.runtime.device)
        loss = self.compute_gradient(images, targets)
        with torch.no_grad():
            origin = self.perturb()
        set_random_state(self.runtime.device, state)
        self.compute_gradient(images, targets)
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, origin)
        self.optimizer.step()
        with torch.no_grad():
            self.update_average()
        return loss

    def mix(self, images: Tensor, targets: Tensor, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        random = make_generator(Stream.MIX, *seed)
        random.random()  # the trainer first draws whether it mixes the batch
        lam = float(random.beta(self.mix_alpha, self.mix_alpha))
        order = torch.from_numpy(random.permutation(len(targets))).to(images.device)
        return torch.lerp(images[order], images, lam), torch.lerp(targets[order], targets, lam)

    def compute_gradient(self, images: Tensor, targets: Tensor) -> Tensor:
        """Set the gradient of cross-entropy + R-Drop; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.runtime.autocast():
            logits = self.model(torch.cat([images, images])).float()
        first, second = (half.log_softmax(dim=1) for half in logits.chunk(2))
        label_loss = -((first + second) / 2 * targets).sum(dim=1).mean()
        divergence = ((first.exp() - second.exp()) * (first - second)).sum(dim=1).mean() / 2
        loss = label_loss + self.rdrop_alpha * divergence
        loss.backward()
        return loss.detach()

    def perturb(self) -> list[Tensor]:
        """Move to w + ρ·g/‖g‖; return a copy of w."""
        gradients, origin = [each.grad for each in self.parameters], [each.clone() for each in self.parameters]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_add_(self.parameters, torch._foreach_mul(gradients, self.rho / (norm + 1e-12)))
        return origin

    def update_average(self) -> None:
        """Update the average. Its decay warms up as in the trainer."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)


@dataclass(frozen=True)
class Resident:
    """A trainer and its first batch, uint8 as it comes from the loader."""

    loop: Trainer
    settings: Settings
    samples: list[Sample]
    batch: Batch

    def rows(self, step: int = 0) -> MicroBatch:
        """Return the rows on the device, normalised, and mixed as in this step."""
        trainer, seed = self.loop, (self.loop.config.seed, 1, step, 0)
        return to_micro_batch(trainer, self.batch, self.samples, 1, seed)


def main(request: dict[str, Any]) -> dict[str, Any]:
    resident = first_fold(request)
    step = STEPS[request["step"]](resident)
    wait = torch.cuda.synchronize if resident.loop.runtime.device.type == "cuda" else lambda: None
    resident.loop.model.train()
    losses = [step() for _ in range(request["warm_up"])]
    passes = []
    for _ in range(request["passes"]):
        wait()
        wait_for_turn()
        timer = Timer()
        losses += [step() for _ in range(request["steps"])]
        wait()
        passes.append(timer.stop(request["steps"] * len(resident.samples)))
    curve = {"losses": [float(loss) for loss in losses]} if request.get("curve") else {}
    return {"passes": passes, "precision": build.precision_name(resident.loop.runtime), **curve}


def first_fold(request: dict[str, Any]) -> Resident:
    """Build the trainer of fold 0 on one batch of its images. The folder `probes` keeps the results of precision probes."""
    settings = load_settings([arguments_layer(request["settings"])])
    table = read_folds(Path(request["split"]) / FOLDS, Path(request["split"]) / CLASSES)
    rows = table.train_rows(0)[: settings.train.batch_size]
    build.seed_everything(settings.seed)
    network = build.build_classifier(settings.model, len(table.classes))
    settings = build.resolve_precision(settings, network, SINGLE_PROCESS, None, Path(request["probes"]))
    runtime = build.make_training_runtime(settings)
    targets = build.one_hot(table.codes[rows], len(table.classes), runtime.device)
    images = build.split_dataset(open_store(Path(request["train"])), table, rows, settings, training=True)
    data = TrainData(images, targets)
    trainer = build.build_trainer("resident", network, data, None, settings, runtime, select=False, patience=0)
    samples = trainer.batches(1)[0]
    return Resident(trainer, settings, samples, next(load_batches(images, [samples], workers=0)))


def update(resident: Resident) -> Step:
    """Return the update alone: forward pass, backward pass, optimiser step."""
    rows = resident.rows()
    return lambda: resident.loop.update([rows])[0].loss.detach()


def whole(resident: Resident) -> Step:
    """Return a whole step without the loader: normalisation, mixing, the update and the calls after it."""
    numbers = count()

    def step() -> torch.Tensor:
        result = resident.loop.update([resident.rows(next(numbers))])[0]
        for call in resident.loop.after_step:
            call()
        return result.loss.detach()

    return step


def reference(resident: Resident) -> Step:
    """Return the hand-written step on the same network and images."""
    trainer, numbers = resident.loop, count()
    step = ReferenceStep(trainer.model, trainer.runtime, resident.settings)
    targets = trainer.train.targets[resident.batch.rows.to(trainer.runtime.device)]
    return lambda: step(
        trainer.runtime.images(resident.batch.images), targets, (trainer.config.seed, 1, next(numbers), 0)
    )


STEPS: dict[str, Callable[[Resident], Step]] = {"update": update, "whole": whole, "reference": reference}

if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
