"""Training steps do not wait for the device and do not read tensor values."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.data.pipeline.dataset import Batch, ImageDataset
from fivefold.inference.predictor import Runtime, make_runtime
from fivefold.training.losses import LOSSES
from fivefold.training.trainer import Trainer, _totals, to_micro_batch
from toy_training import CPU, SMALL, images_in, run_of

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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return images_in(tmp_path_factory.mktemp("images"), 48)


def make_trainer(images: ImageDataset, case: dict, mix: str, with_teacher: bool, runtime: Runtime) -> Trainer:
    distill = {"temperature_decay": 0.9, "alpha_anneal_fraction": 0.5} if with_teacher else None
    trainer, _ = run_of(images, {"epochs": 3, "batch_size": 8} | case, SMALL, mix, distill, runtime=runtime)
    trainer.model.train()
    return trainer


def run_step(trainer: Trainer, number: int) -> None:
    """Run a step as the trainer does, starting from a batch of the loader."""
    rows = []
    for part in range(trainer.config.accumulate):
        generator = torch.Generator().manual_seed(2 * number + part)
        images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8, generator=generator)
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
def test_steps_after_the_second_read_no_values(images, case, mix, with_teacher):
    trainer = make_trainer(images, CASES[case], mix, with_teacher, CPU)
    run_step(trainer, 0)
    run_step(trainer, 1)
    with RecordReads() as reads:
        run_step(trainer, 2)
    assert reads.seen == []


def test_record_reads_detects_a_step_that_reads_a_value(images):
    trainer = make_trainer(images, {}, "none", False, CPU)
    weight = trainer.model.head[1].weight.detach()
    trainer.after_step.extend([lambda: bool((weight > 9).any()), lambda: weight[weight > 0]])
    with RecordReads() as reads:
        run_step(trainer, 0)
    assert reads.seen == ["aten._local_scalar_dense.default", "aten.index.Tensor"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("mix", "with_teacher"), MIXES)
@pytest.mark.parametrize("case", CASES)
def test_gpu_steps_do_not_wait(images, case, mix, with_teacher):
    runtime = make_runtime(torch.device("cuda"), torch.bfloat16, True, [0.5] * 3, [0.5] * 3)
    trainer = make_trainer(images, CASES[case], mix, with_teacher, runtime)
    run_step(trainer, 0)
    run_step(trainer, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step(trainer, 2)
        run_step(trainer, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_step_matches_the_plain_step_and_keeps_all_names(images):
    runtime = make_runtime(torch.device("cuda"), None, True, [0.5] * 3, [0.5] * 3)
    options = {"ema_decay": 0.9}
    trainers = {c: make_trainer(images, options | {"compile": c}, "none", False, runtime) for c in (False, True)}
    assert list(trainers[True].model.state_dict()) == list(trainers[False].model.state_dict())
    for number in range(3):
        for trainer in trainers.values():
            torch.manual_seed(number)
            run_step(trainer, number)
    compiled, plain = (dict(trainers[kind].model.state_dict()) for kind in (True, False))
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    assert list(copy.deepcopy(trainers[True].scored_models["ema"]).state_dict()) == list(
        trainers[True].model.state_dict()
    )
    assert isinstance(trainers[True].model.backbone, nn.Module)
