"""Preflight reports errors that every fold would hit before the run starts, with the exit code of the fold."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fivefold.config.loading import arguments_layer, load
from fivefold.errors import FivefoldError
from fivefold.launchers.plan import Inputs, make_plan, select
from fivefold.stages import preflight
from jobs import submit
from jobs.__main__ import main
from toy_data import MODEL, noise_in

CPU_SETTINGS = ("train.precision=fp32", "train.loggers=[]", "train.device=cpu")


def exit_code(check: Callable[..., None], *arguments: object) -> int:
    try:
        check(*arguments)
    except FivefoldError as error:
        return error.exit_code
    return 0


def check_exit_code(*arguments: str, here: bool = False) -> int:
    settings = load([arguments_layer([*MODEL, *CPU_SETTINGS, *arguments])])
    return exit_code(preflight.check_stages, settings, ["train-fold", "distill"], here)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train.epochs=3", "train.warmup_epochs=3"],
        ["train.monitor=auc"],
        ["train.optimizer=adamw2"],
        ["train.schedule=cosinus"],
        ["train.sampler=rare"],
        ["train.precision=fp8"],
        ["train.loggers=wandbb"],
        ["train.loss=hinge"],
        ["train.loss={name=focal, gama=2}"],
        ["train.layer_decay=0.7"],
        ["augment.batch_mix=mixupp"],
        ["augment.train=resizze"],
        ['augment.train=[{name="rotation", degree=10}]'],
        ["augment.eval=horizontal_flip"],
        ["predict.tta=flipp"],
        ["model.backbone=timm/resnet1888"],
        ["model.backbone=resnet18"],
        ["model.backbone=timm/vit_tiny_patch16_224", "model.backbone_kwargs={}", "model.image_size=100"],
        ["model.image_size=1"],
        ["model.backbone_kwargs.width=3"],
        ["model.pretrained=true"],
        ['model.head={name="mlp", hiden=3}'],
        ["model.head=mlp", "train.batch_size=1"],
        ["model.image_stats=colour"],
        ["model.drop_path=0.1"],
        ["data.cache=s3://bucket/cache"],
        ["distill.patience=3"],
        ["distill.teacher_tta=flipp"],
        ["distill.train.monitor=auc"],
        ["distill.model.backbone=fivefold/big_net"],
        ["distill.train.epochs=2", "train.warmup_epochs=2"],
    ],
    ids=" ".join,
)
def test_settings_that_a_fold_or_the_student_would_reject_exit_64(arguments):
    assert check_exit_code(*arguments) == 64


def test_valid_settings_pass():
    assert check_exit_code() == 0
    assert check_exit_code("distill.patience=3", "split.holdout=0.2") == 0
    assert check_exit_code("distill.patience=3", "split.ratios=[0.8,0.1,0.1]") == 0
    pretrained = ["model.pretrained=true", "model.backbone=torchvision/resnet18", "model.backbone_kwargs={}"]
    assert check_exit_code(*pretrained, "model.image_size=64") == 0


def test_limits_of_this_machine_are_checked_only_for_local_runs(tmp_path):
    for arguments, code in (
        (["train.batch_size=1000000000"], 64),
        (["train.device=cuda:77"], 64),
        (["predict.device=cuda:77"], 64),
        (["train.precision=fp16"], 64),
        (["train.compile=true"], 64),
        ([f"distill.teacher={tmp_path / 'none'}"], 66),
    ):
        assert (check_exit_code(*arguments), check_exit_code(*arguments, here=True)) == (0, code), arguments
    assert check_exit_code(here=True) == 0


def test_missing_submissions_and_weights_are_reported(tmp_path):
    (tmp_path / "start.safetensors").touch()

    def plan_exit_code(*arguments: str, here: bool = True, stages: tuple[str, ...] = ("ensemble",)) -> int:
        inputs = Inputs(train="t", eval="e", weights=str(tmp_path))
        plan = select(make_plan(inputs, [*MODEL, *arguments], run="r", recipe="demo"), stages)
        return exit_code(preflight.check_plan, plan, inputs, here)

    blend = "ensemble.blend=weighted"
    assert plan_exit_code(blend, "ensemble.weights={demo=1}") == 0
    assert plan_exit_code(blend, "ensemble.weights={demo=1, other=1}") == 64
    assert plan_exit_code(blend, "ensemble.weights={demo=1}", "system=mine") == 64
    assert plan_exit_code(blend, "ensemble.weights={demo=1, other=1}", stages=("evaluate",)) == 0
    assert plan_exit_code("ensemble.submissions=none.csv") == 66
    assert plan_exit_code("ensemble.submissions=none.csv", here=False) == 0
    assert plan_exit_code("model.weights=none.safetensors", stages=("train-fold",)) == 66
    assert plan_exit_code("model.weights=start.safetensors", stages=("train-fold",)) == 0


def test_submit_exits_before_it_writes_anything(tmp_path: Path, capsys):
    noise_in(tmp_path / "train", ("a", "b"), 4)
    arguments = [f"train={tmp_path / 'train'}", f"runs={tmp_path / 'runs'}", "run=r", *MODEL]
    arguments += ["train.epochs=2", "train.warmup_epochs=2"]
    for more in ([], ["--dry-run"]):
        assert main(["submit", *arguments, *more]) == 64
        errors = capsys.readouterr().err
        assert ("train.warmup_epochs=2" in errors, "Traceback" in errors) == (True, False)
    assert not (tmp_path / "runs").exists()


def test_settings_that_cannot_be_checked_do_not_stop_a_run(tmp_path: Path, monkeypatch, capsys):
    noise_in(tmp_path / "train", ("a", "b"), 4)
    arguments = [f"train={tmp_path / 'train'}", f"runs={tmp_path / 'runs'}", "run=r", *MODEL, "--dry-run"]
    monkeypatch.setattr(preflight, "MODULE", "fivefold.nowhere")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert submit.main(arguments) == 0
    assert "train-fold" in capsys.readouterr().out
