"""The contract of the entrypoint, in subprocesses and through `run`: stages, settings, exit codes."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fivefold.build import check_training
from fivefold.config.loading import arguments_layer, load
from fivefold.contract.files import read_json
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import SettingsError
from jobs.__main__ import main, run, stage_name
from permissions import let_others_in
from toy_data import REPOSITORY, call_jobs, environment, failure, noise_in

NOBODY = 65534


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of eight small images."""
    folder = tmp_path_factory.mktemp("images")
    noise_in(folder, ("cat", "dog"), 8)
    return folder


def make_sagemaker_folders(base: Path, images: Path, **hyperparameters: str) -> dict[str, str]:
    """Write the folders of a training job that splits `images`; return its only environment variable."""
    (base / "input" / "config").mkdir(parents=True)
    (base / "input" / "data").mkdir()
    (base / "input" / "data" / "train").symlink_to(images)
    (base / "input" / "config" / "hyperparameters.json").write_text(json.dumps(hyperparameters))
    return {"SAGEMAKER_BASE_DIR": str(base)}


def make_environment(images: Path, out: Path, **more: str) -> dict[str, str]:
    return {"SM_CHANNEL_TRAIN": str(images), "SM_OUTPUT_DATA_DIR": str(out), "SM_OUTPUT_DIR": str(out.parent), **more}


def read_settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "stage.json")["settings"]


def test_sagemaker_job_runs_with_only_its_folders_set(images, tmp_path, monkeypatch, capfd):
    texts = {"stage": '"split"', "split.folds": '"2"', "run": "7", "sagemaker_program": '"x"'}
    environ = make_sagemaker_folders(tmp_path, images, **texts)
    first = call_jobs("train", **environ)
    assert first.returncode == 0, first.stderr
    data = tmp_path / "output" / "data"
    assert read_settings(data)["split.folds"] == 2
    assert not (tmp_path / "output" / "failure").exists()
    newest = max(data.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "stage.json"
    # SDK v3's local mode passes no argument at all; STAGE then comes from the job's environment.
    for name, value in {**environ, "STAGE": "split"}.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 0
    assert f"split: nothing to do: inputs, settings and outputs match {data / 'stage.json'}" in capfd.readouterr().err


def test_setting_sources_override_each_other_in_order(images, tmp_path, capfd):
    (tmp_path / "r.json").write_text(json.dumps({"split": {"folds": 8, "seed": 8, "holdout": 0.4, "stratify": False}}))
    values = {"split.folds": "7", "split.seed": "7", "split.holdout": "0.3", "recipe": str(tmp_path / "r.json")}
    environ = make_sagemaker_folders(tmp_path / "ml", images, **values)
    environ |= {"SM_HP_SPLIT__FOLDS": "6", "SM_HP_SPLIT__SEED": "6", "SM_HP_SPLIT__OPEN-IMAGES": ""}
    environ |= {"SPLIT__FOLDS": "5", "SM_OUTPUT_DATA_DIR": str(tmp_path / "own"), "TRAIN": "x", "MODEL_DIR": "y"}
    assert run("split", ["SPLIT.FOLDS=4", "train.epochs=3"], environ) == 0
    assert "split does not use: train.epochs" in capfd.readouterr().err
    settings = read_settings(tmp_path / "own")
    actual = {key: settings[f"split.{key}"] for key in ("folds", "seed", "holdout", "stratify", "verify_images")}
    assert actual == {"folds": 4, "seed": 6, "holdout": 0.3, "stratify": False, "verify_images": True}


@pytest.mark.parametrize(
    ("stage", "arguments", "environ", "code", "message"),
    [
        ("split", ["split.folds=five"], {}, 64, "split.folds='five' (argument): a whole number is needed"),
        ("split", [], {"SM_HPS": "{"}, 64, "SM_HPS is not JSON"),
        ("split", ["recipe=/no/where.toml"], {}, 66, "recipe '/no/where.toml' does not exist"),
        ("split", [], {}, 66, "split needs the channel 'train': set SM_CHANNEL_TRAIN"),
        ("split", [], {"SM_CHANNEL_TRAIN": "/no/where"}, 66, "channel 'train': /no/where does not exist"),
        ("split", [], {"SM_CHANNEL_TRAIN": "/"}, 64, "split writes to SM_OUTPUT_DATA_DIR, which is not set"),
        ("split", [], {"SM_CHANNEL_TRAIN": "gs://a/b"}, 64, "SM_CHANNEL_TRAIN is a"),
        ("train-fold", [], {"FOLD": "2", "JOB_COMPLETION_INDEX": "3"}, 64, "FOLD=2 and JOB_COMPLETION_INDEX=3 differ"),
        ("train-fold", [], {"FOLD": "-1"}, 64, "fold=-1 (environment): at least 0 is needed"),
        ("split", [], {"SEED": "-1"}, 64, "seed=-1 (environment): at least 0 is needed"),
        ("train-fold", ["train.batch_size=3"], {"NPROC": "2"}, 64, "train.batch_size=3"),
        ("train-fold", ["train.lr=fast"], {"NPROC": "2"}, 64, "train.lr"),
        ("train-fold", [], {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 64, "RANK=2"),
        ("split", [], {"MASTER_PORT": "tcp://10.96.0.12:7077"}, 66, "split needs the channel 'train'"),
    ],
)
def test_invalid_input_sets_exit_code_and_message(stage, arguments, environ, code, message, tmp_path):
    assert run(stage, arguments, {"SM_OUTPUT_DIR": str(tmp_path), **environ}) == code
    assert message in failure(tmp_path)


def test_batch_size_one_is_rejected_if_batchnorm_needs_two_images():
    def check(*arguments: str) -> None:
        check_training(load([arguments_layer(["train.batch_size=1", *arguments])]))

    for arguments in (["model.head=mlp"], ["model.image_size=32"], ["model.image_stats=aspect", "model.head=mlp"]):
        with pytest.raises(SettingsError, match=r"train\.batch_size=1: .*BatchNorm"):
            check(*arguments)
    check("model.image_size=64")
    check("model.backbone=timm/vit_tiny_patch16_224", "model.backbone_kwargs.depth=1")


def test_closed_stdout_exits_141_without_an_error():
    for arguments in (["--help"], ["split", "--help"]):
        command = [sys.executable, "-m", "jobs", *arguments]
        with subprocess.Popen(
            command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.close()
            errors = process.stderr.read()
        assert (process.returncode, errors) == (141, b"")


def test_stage_record_is_removed_first_and_written_last(images, tmp_path, capfd):
    images_copy, out = tmp_path / "own", tmp_path / "out"
    shutil.copytree(images, images_copy)
    assert run("split", ["split.folds=2"], make_environment(images_copy, out)) == 0
    assert "split runs: no record of an earlier run" in capfd.readouterr().err
    image_bytes = (images_copy / "cat" / "0.png").read_bytes()
    (images_copy / "cat" / "0.png").write_bytes(image_bytes[: len(image_bytes) // 2])
    assert run("split", ["split.folds=2"], make_environment(images_copy, out)) == 65
    assert "split runs: inputs differ: train" in capfd.readouterr().err
    assert not (out / "stage.json").exists()
    assert "0.png" in (tmp_path / "failure").read_text()[:1024]
    (images_copy / "cat" / "0.png").write_bytes(image_bytes)
    assert run("split", ["split.folds=3"], make_environment(images_copy, out)) == 0
    assert not (tmp_path / "failure").exists()
    (tmp_path / "failure").write_text("of another attempt")
    assert run("split", ["split.folds=3"], make_environment(images_copy, out)) == 0
    assert "split: nothing to do" in capfd.readouterr().err
    assert not (tmp_path / "failure").exists()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root: takes another user's place")
def test_unwritable_checkpoint_folder_is_reported_before_training(images, tmp_path):
    let_others_in(tmp_path, images)
    for name in ("model", "output"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    assert run("split", [], make_environment(images, tmp_path / "split")) == 0
    code = (  # it switches after the imports, because only root may be able to read Python
        "import os, sys, jobs.split; from jobs.__main__ import main\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-W", "error", "-c", code, "train-fold", "FOLD=0"]
    environ = environment(
        SM_CHANNEL_TRAIN=images, SM_CHANNEL_FOLDS=tmp_path / "split",
        SM_MODEL_DIR=tmp_path / "model", SM_OUTPUT_DATA_DIR=tmp_path / "output",
    )  # fmt: skip
    process = subprocess.run(command, env=environ, cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 64
    assert f"cannot write to {tmp_path / 'checkpoints'} as uid {NOBODY}" in process.stderr
    assert "or set SM_CHECKPOINT_DIR to another folder" in process.stderr


def test_interrupted_stage_exits_130_and_leaves_no_record(images, tmp_path):
    environ = environment(**make_environment(images, tmp_path / "out"))
    command = [sys.executable, "-m", "jobs", "split", "split.folds=2"]
    # If a shell starts the tests in the background, they ignore SIGINT, and children inherit this.
    reset_sigint = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, env=environ, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, preexec_fn=reset_sigint
    ) as process:
        assert process.stderr is not None
        assert "split runs" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "stopped by SIGINT" in rest.rstrip().splitlines()[-1]
    assert not (tmp_path / "failure").exists(), "an interrupted stage writes no failure file"
    assert not (tmp_path / "out" / "stage.json").exists()


@pytest.mark.parametrize(
    ("arguments", "environ", "name", "rest"),
    [
        (["split", "a=1"], {}, "split", ["a=1"]),
        (["train_fold"], {}, "train-fold", []),
        (["Train-Fold"], {}, "train-fold", []),
        (["split"], {"STAGE": "evaluate"}, "split", []),
        (["train"], {"STAGE": "evaluate"}, "evaluate", []),
        (["train", "FOLD=2"], {"SM_CHANNEL_FOLDS": "x"}, "train-fold", ["FOLD=2"]),
        (["train", "FOLD=2"], {"SM_CHANNEL_TRAIN": "x"}, "train", ["FOLD=2"]),
        (["train", "stage=distill"], {"STAGE": "evaluate"}, "distill", ["stage=distill"]),
        ([], {"STAGE": "train_fold"}, "train-fold", []),
        ([], {"stage": "split"}, "split", []),
        (["FOLD=2"], {"STAGE": "train-fold"}, "train-fold", ["FOLD=2"]),
        (["STAGE=split", "split.folds=3"], {}, "split", ["STAGE=split", "split.folds=3"]),
        (["train"], {"STAGE": "", "SM_HP_STAGE": "ensemble"}, "ensemble", []),
        (["train"], {"SM_HPS": '{"stage": "split"}', "STAGE": "ensemble"}, "ensemble", []),
        (["status", "run=x"], {}, "status", ["run=x"]),
    ],
)
def test_stage_name_comes_from_arguments_or_environment(arguments, environ, name, rest):
    assert stage_name(arguments, environ) == (name, rest)


@pytest.mark.parametrize(
    ("arguments", "stage", "message"),
    [
        (["trian-fold"], None, "unknown stage 'trian-fold'; did you mean 'train-fold'?; known: "),
        ([], None, " split, plan, prepare, train-fold, ensemble, evaluate, audit, "),
        (["train"], "spilt", "unknown stage 'spilt'; did you mean 'split'?"),
    ],
)
def test_unknown_or_missing_stage_fails_with_a_hint(arguments, stage, message, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SM_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("STAGE", stage or "")
    assert main(arguments) == 64
    assert message in capfd.readouterr().err
    assert message in (tmp_path / "failure").read_text()[:1024]


def test_help_lists_stages_commands_recipes_and_every_key(capfd):
    assert main(["--help"]) == 0
    text = capfd.readouterr().out
    for word in (*STAGES, "submit", "status", "demo", "train.epochs", "split.folds", "distill.alpha", "evaluate.bins"):
        assert f"  {word} " in text, word


@pytest.mark.parametrize("stage", STAGES)
def test_stage_help_lists_channels_and_keys_and_writes_nothing(stage, tmp_path, capfd):
    assert run(stage, ["FOLD=2", "--help"], {"SM_OUTPUT_DATA_DIR": str(tmp_path / "out")}) == 0
    text = capfd.readouterr().out
    for channel in (*STAGES[stage].channels, *STAGES[stage].optional):
        assert f"SM_CHANNEL_{channel.upper()}" in text
    for section in STAGES[stage].sections:
        assert f"\n  {section}" in text
    assert not (tmp_path / "out").exists()
