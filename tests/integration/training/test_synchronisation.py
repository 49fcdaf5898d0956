"""Training steps do not wait for the device and do not read tensor values."""

import copy
from collections.abc import Callable

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

BLOCKING_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)
"""Operations that wait for a GPU: they read a value as a number or return a result of data-dependent size."""
MASK_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
"""These also wait if an index is a mask."""
CASES = {
    **{f"loss {name}": {"loss": name} for name in LOSSES},
    "all options": {"sam_rho": 0.05, "rdrop_alpha": 0.5, "ema_decay": 0.9, "max_grad_norm": 1.0, "grad_accum_steps": 2, "freeze_epochs": 1},
    "sgd": {"optimizer": "sgd"},
    "muon": {"optimizer": "muon", "warmup_epochs": 1.0, "class_weights": "balanced"},
    "adam": {"optimizer": "adam", "schedule": "constant", "label_smoothing": 0.1},
}  # fmt: skip


MIXES = [("mixup", False), ("cutmix", True)]


def needs_gpu(test: Callable) -> Callable:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


class RecordReads(TorchDispatchMode):
    """Record the calls of BLOCKING_READS and of indexing with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        has_mask = func in MASK_INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in BLOCKING_READS or has_mask:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class StubImages:
    """The attributes of an image set that a trainer needs if its batches are made by hand."""

    def __len__(self) -> int:
        return 48

    def measure(self) -> np.ndarray:
        return np.zeros((48, 0), np.float32)


def make_trainer(case: dict, mix: str, with_teacher: bool, runtime: Runtime) -> Trainer:
    options = {"epochs": 3, "batch_size": 8, "precision": "fp32", "num_workers": 0} | case
    settings = Settings(
        model=Model(image_size=16),
        augment=Augment(batch_mix=mix),
        train=Train(**options),
        distill=Distill(temperature_decay=0.9, alpha_anneal_fraction=0.5),
    )
    seed_everything(0)
    backbone = build_backbone("fivefold/small_net", False, {"widths": [8, 16], "stem": 8})
    network = Classifier(backbone, build_head("linear", 16, 3, 0.3))
    codes = np.arange(48) % 3
    teacher = Teacher(np.log(np.full((48, 3), 1 / 3, np.float32)), 0.7, 2.0, runtime.device) if with_teacher else None
    train = TrainData(StubImages(), one_hot(codes, 3, runtime.device), teacher)
    return build_trainer("test", network, train, None, settings, runtime, select=False, patience=0)


def run_step(trainer: Trainer, number: int) -> None:
    """Run a step as the trainer does, starting from a batch of the loader."""
    rows = []
    for part in range(trainer.config.accumulate):
        generator = torch.Generator().manual_seed(2 * number + part)
        images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
        samples = [(1, row) for row in torch.randperm(48, generator=generator)[:8].tolist()]
        batch = Batch(images, torch.tensor([row for _, row in samples]))
        rows.append(to_micro_batch(trainer, batch, samples, 1, (0, 1, number, part)))
    results = trainer.update(rows)
    for call in trainer.after_step:
        call()
    count = sum(len(part.targets) for part in rows)
    for result, part in zip(results, rows, strict=True):
        _totals(result, part, count)


@pytest.mark.parametrize(("mix", "with_teacher"), MIXES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "muon"])  # timm's Muon counts its steps on the CPU
def test_steps_after_the_second_read_no_values(case, mix, with_teacher):
    trainer = make_trainer(CASES[case], mix, with_teacher, CPU)
    trainer.model.train()
    run_step(trainer, 0)
    run_step(trainer, 1)
    with RecordReads() as reads:
        run_step(trainer, 2)
    assert reads.seen == []


def test_record_reads_detects_a_step_that_reads_a_value():
    trainer = make_trainer({}, "none", False, CPU)
    weight = trainer.model.head[1].weight.detach()
    trainer.after_step.extend([lambda: bool((weight > 9).any()), lambda: weight[weight > 0]])
    with RecordReads() as reads:
        run_step(trainer, 0)
    assert reads.seen == ["aten._local_scalar_dense.default", "aten.index.Tensor"]


@needs_gpu
@pytest.mark.parametrize(("mix", "with_teacher"), MIXES)
@pytest.mark.parametrize("case", CASES)
def test_gpu_steps_do_not_wait(case, mix, with_teacher):
    runtime = make_runtime(torch.device("cuda"), torch.bfloat16, True, [0.5] * 3, [0.5] * 3)
    trainer = make_trainer(CASES[case], mix, with_teacher, runtime)
    trainer.model.train()
    run_step(trainer, 0)
    run_step(trainer, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(trainer, 2)
        run_step(trainer, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_compiled_step_matches_the_plain_step_and_keeps_all_names():
    runtime = make_runtime(torch.device("cuda"), None, True, [0.5] * 3, [0.5] * 3)
    trainers = {
        compiled: make_trainer({"compile": compiled, "ema_decay": 0.9}, "none", False, runtime)
        for compiled in (False, True)
    }
    assert list(trainers[True].model.state_dict()) == list(trainers[False].model.state_dict())
    for number in range(3):
        for trainer in trainers.values():
            trainer.model.train()
            torch.manual_seed(number)
            run_step(trainer, number)
    compiled, plain = (dict(trainers[kind].model.state_dict()) for kind in (True, False))
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert list(copy.deepcopy(trainers[True].scored_models["ema"]).state_dict()) == list(
        trainers[True].model.state_dict()
    )
    assert isinstance(trainers[True].model.backbone, nn.Module)
