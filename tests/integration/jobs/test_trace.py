"""The trace command over what stages left: the way back to the images, and what is no longer as it was."""

import json
from pathlib import Path

import pytest

from fivefold.contract.files import read_json, write_json
from jobs.__main__ import main
from toy_data import copy_run


@pytest.fixture
def world(toy_run, tmp_path) -> Path:
    """The toy run in a place of its own: it may move together with its data."""
    return copy_run(toy_run, tmp_path / "moved")


def test_the_way_back_ends_at_the_images_and_tells_each_record_once(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    assert main(["trace", "ensemble-student/output/submission.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ensemble: ensemble-student/output"
    told = [line.split("<- ")[1] for line in lines if "<- " in line]
    again = "split: split/output (above)"
    folds = [step for fold in range(3) for step in (f"train-fold: fold-{fold}/model", again)]
    assert sorted(told) == sorted(["distill: distill/model", "split: split/output", *folds, again])
    assert told[:3] == ["distill: distill/model", "split: split/output", "train-fold: fold-0/model"]
    assert sum(line.endswith("train: train") or "train: train " in line for line in lines) == 5
    record = read_json(Path("fold-1/model/stage.json"))
    assert any(f"key {record['key'][:12]}, code {record['code']}, torch" in line for line in lines)


@pytest.mark.parametrize("where", ["ensemble", "ensemble/output", "ensemble/output/stage.json"])
def test_a_folder_or_a_record_names_its_stage_and_all_of_it_checks_out(where, toy_run, capsys):
    assert main(["trace", str(toy_run / where), "--check"]) == 0
    out = capsys.readouterr().out
    assert "distill" not in out, "an ensemble of folds has no student in it"
    assert ": 5 records" in out.splitlines()[-1]


def change_weights(root: Path) -> None:
    path = root / "fold-1" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def change_image(root: Path) -> None:
    (root / "train" / "id" / "3.png").write_bytes((root / "train" / "id" / "4.png").read_bytes())


def change_test_table(root: Path) -> None:
    path = root / "eval" / "test.csv"
    path.write_bytes(path.read_bytes() + b"\n")


def move_channel(root: Path) -> None:
    record = root / "ensemble" / "output" / "stage.json"
    told = read_json(record)
    told["sources"]["eval"][1] = str(root / "eval")
    write_json(record, told)
    (root / "eval").rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "fold-1/model/model.safetensors: changed since"),
        (change_image, "id/3.png "),
        (lambda root: (root / "fold-0" / "model" / "oof.parquet").unlink(), "fold-0/model/oof.parquet: missing"),
        (change_test_table, "its channel 'eval'"),
        (move_channel, "stage.json: its channel 'eval' is"),
    ],
)
def test_what_is_no_longer_as_it_was_is_named(change, message, world, capsys):
    change(world)
    assert main(["trace", str(world / "ensemble"), "--check"]) == 65
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "trace takes one path"),
        (["--chek"], 64, "trace takes one path"),
        (["{}/nowhere"], 66, "does not exist"),
        (["{}/train/id/1.png"], 66, "/train/id/1.png; give a stage's folder"),
        (["{}"], 66, "(stage.json)"),
        (["{}/broken/stage.json"], 65, "is not JSON"),
        (["{}/old/stage.json"], 65, "cannot be traced, it has no key, sources, roots, inputs, outputs"),
        (["{}/odd/stage.json"], 65, "cannot be traced, it has no sources: run its stage again"),
    ],
)
def test_bad_input_gets_one_clear_error(arguments, code, message, world, capsys):
    odd = {**read_json(world / "split" / "output" / "stage.json"), "sources": {"train": [1, 2]}}
    for name, text in (("broken", "{"), ("old", '{"stage": "split"}'), ("odd", json.dumps(odd))):
        (world / name).mkdir()
        (world / name / "stage.json").write_text(text)
    assert main(["trace", *(argument.format(world) for argument in arguments)]) == code
    assert message in capsys.readouterr().err
