"""No step waits for the device: neither does it ask a tensor for its value."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.build import build_trainer, one_hot, seed_everything
from fivefold.config.schema import Augment, Distill, Model, Settings, Train
from fivefold.data.pipeline.dataset import Batch
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.models.backbones import build_backbone
from fivefold.models.classifier import Classifier, build_head
from fivefold.training.losses import LOSSES
from fivefold.training.objectives import Teacher
from fivefold.training.trainer import TrainData, Trainer, _totals, to_micro_batch
from toy_training import CPU

READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)
"""What a GPU must be waited for: a value as a number, and results whose size is a value."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
"""These wait too, where an index is a mask."""
CASES = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    "everything": {"sam_rho": 0.05, "rdrop_alpha": 0.5, "ema_decay": 0.9, "max_grad_norm": 1.0, "grad_accum_steps": 2, "freeze_epochs": 1},
    "sgd": {"optimizer": "sgd"},
    "muon": {"optimizer": "muon", "warmup_epochs": 1.0, "class_weights": "balanced"},
    "adam": {"optimizer": "adam", "schedule": "constant", "label_smoothing": 0.1},
}  # fmt: skip


class Reads(TorchDispatchMode):
    """Counts what READS names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXING and any(each is not None and each.dtype == torch.bool for each in args[1])
        if func in READS or masks:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Rows:
    """What a loop asks of a set of images whose batches are made by hand."""

    def __len__(self) -> int:
        return 48

    def measure(self) -> np.ndarray:
        return np.zeros((48, 0), np.float32)


def loop_of(case: dict, mix: str, taught: bool, runtime: Runtime) -> Trainer:
    chosen = {"epochs": 3, "batch_size": 8, "precision": "fp32", "num_workers": 0} | case
    settings = Settings(
        model=Model(image_size=16),
        augment=Augment(batch_mix=mix),
        train=Train(**chosen),
        distill=Distill(temperature_decay=0.9, alpha_anneal_fraction=0.5),
    )
    seed_everything(0)
    backbone = build_backbone("fivefold/small_net", False, {"widths": [8, 16], "stem": 8})
    network = Classifier(backbone, build_head("linear", 16, 3, 0.3))
    codes = np.arange(48) % 3
    teacher = Teacher(np.log(np.full((48, 3), 1 / 3, np.float32)), 0.7, 2.0, runtime.device) if taught else None
    train = TrainData(Rows(), one_hot(codes, 3, runtime.device), teacher)
    return build_trainer("test", network, train, None, settings, runtime, select=False, patience=0)


def step(loop: Trainer, number: int) -> None:
    """A step as the loop takes it, from a batch of the loader on."""
    rows = []
    for part in range(loop.config.accumulate):
        drawn = torch.Generator().manual_seed(2 * number + part)
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=drawn)
        samples = [(1, row) for row in torch.randperm(48, generator=drawn)[:8].tolist()]
        batch = Batch(images, torch.tensor([row for _, row in samples]))
        rows.append(to_micro_batch(batch, samples, loop.train, loop.mixing, loop.runtime, 1, (0, 1, number, part)))
    results = loop.update(rows)
    for call in loop.after_step:
        call()
    count = sum(len(part.targets) for part in rows)
    for result, part in zip(results, rows, strict=True):
        _totals(result, part, count)


@pytest.mark.parametrize(("mix", "taught"), [("mixup", False), ("cutmix", True)])
@pytest.mark.parametrize("case", [case for case in CASES if case != "muon"])  # timm's counts its steps on the CPU
def test_no_step_from_the_second_on_reads_a_value(case, mix, taught):
    made = loop_of(CASES[case], mix, taught, CPU)
    made.model.train()
    step(made, 0)
    step(made, 1)
    with Reads() as found:
        step(made, 2)
        step(made, 3)
    assert found.seen == []


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda weight: weight.sum().item(), "aten._local_scalar_dense.default"),
        (lambda weight: bool((weight > 9).any()), "aten._local_scalar_dense.default"),
        (lambda weight: weight[weight > 0], "aten.index.Tensor"),
    ],
)
def test_a_step_that_reads_a_value_is_seen(read, name):
    made = loop_of({}, "none", False, CPU)
    made.after_step.append(lambda: read(made.model.head[1].weight.detach()))
    with Reads() as found:
        step(made, 0)
    assert found.seen == [name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mix", "taught"), [("mixup", False), ("cutmix", True)])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_no_step_waits(case, mix, taught):
    runtime = make_runtime(torch.device("cuda"), torch.bfloat16, True, [0.5] * 3, [0.5] * 3)
    made = loop_of(CASES[case], mix, taught, runtime)
    made.model.train()
    step(made, 0)
    step(made, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(made, 2)
        step(made, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_step_is_the_steps_own_within_rounding_and_keeps_all_names():
    runtime = make_runtime(torch.device("cuda"), None, True, [0.5] * 3, [0.5] * 3)
    made = {
        compiled: loop_of({"compile": compiled, "ema_decay": 0.9}, "none", False, runtime) for compiled in (False, True)
    }
    assert list(made[True].model.state_dict()) == list(made[False].model.state_dict())
    for number in range(3):
        for each in made.values():
            each.model.train()
            torch.manual_seed(number)
            step(each, number)
    compiled, plain = (dict(made[kind].model.state_dict()) for kind in (True, False))
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert list(copy.deepcopy(made[True].scored_models["ema"]).state_dict()) == list(made[True].model.state_dict())
    assert isinstance(made[True].model.backbone, nn.Module)
