"""The trace command: the records that lead from a result back to the images, and files that changed since."""

import json
from pathlib import Path

import pytest

from fivefold.contract.files import read_json, write_json
from jobs.__main__ import main
from toy_data import copy_run


@pytest.fixture
def copied_run(toy_run, tmp_path) -> Path:
    """A copy of the toy run, as if it had moved together with its data."""
    return copy_run(toy_run, tmp_path / "moved")


def test_trace_leads_to_the_images_and_prints_each_record_once(copied_run, capsys, monkeypatch):
    monkeypatch.chdir(copied_run)
    assert main(["trace", "ensemble-student/output/submission.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ensemble: ensemble-student/output"
    printed_steps = [line.split("<- ")[1] for line in lines if "<- " in line]
    repeated_split = "split: split/output (above)"
    folds = [step for fold in range(3) for step in (f"train-fold: fold-{fold}/model", repeated_split)]
    assert sorted(printed_steps) == sorted(["distill: distill/model", "split: split/output", *folds, repeated_split])
    assert printed_steps[:3] == ["distill: distill/model", "split: split/output", "train-fold: fold-0/model"]
    assert sum(line.endswith("train: train") or "train: train " in line for line in lines) == 5
    record = read_json(Path("fold-1/model/stage.json"))
    assert any(f"key {record['key'][:12]}, code {record['code']}, torch" in line for line in lines)


@pytest.mark.parametrize("path", ["ensemble", "ensemble/output", "ensemble/output/stage.json"])
def test_trace_accepts_a_folder_or_a_record_and_the_check_passes(path, toy_run, capsys):
    assert main(["trace", str(toy_run / path), "--check"]) == 0
    out = capsys.readouterr().out
    assert "distill" not in out, "an ensemble of folds has no student"
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
    path = root / "ensemble" / "output" / "stage.json"
    record = read_json(path)
    record["sources"]["eval"][1] = str(root / "eval")
    write_json(path, record)
    (root / "eval").rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "fold-1/model/stage.json: model/model.safetensors is"),
        (change_image, "its channel 'train'"),
        (
            lambda root: (root / "fold-0" / "model" / "oof.parquet").unlink(),
            "fold-0/model/stage.json: model/oof.parquet is",
        ),
        (change_test_table, "its channel 'eval'"),
        (move_channel, "stage.json: its channel 'eval' is"),
    ],
)
def test_check_reports_changed_missing_and_moved_files(change, message, copied_run, capsys):
    change(copied_run)
    assert main(["trace", str(copied_run / "ensemble"), "--check"]) == 65
    assert message in capsys.readouterr().err


def test_bad_input_gives_one_clear_error(copied_run, capsys):
    sources = {**read_json(copied_run / "split" / "output" / "stage.json"), "sources": {"train": [1, 2]}}
    for name, text in (("broken", "{"), ("old", '{"stage": "split"}'), ("odd", json.dumps(sources))):
        (copied_run / name).mkdir()
        (copied_run / name / "stage.json").write_text(text)
    for argument, code, part in (
        ("", 64, "trace takes one path"),
        ("--chek", 64, "trace takes one path"),
        ("{}/nowhere", 66, "/nowhere"),
        ("{}/train/id/1.png", 66, "/train/id/1.png"),
        ("{}", 66, "(stage.json)"),
        ("{}/broken/stage.json", 65, "is not JSON"),
        ("{}/old/stage.json", 65, "key, sources, roots, inputs, outputs, settings, metrics, code, packages"),
        ("{}/odd/stage.json", 65, "without valid sources:"),
    ):
        assert main(["trace", *([argument.format(copied_run)] if argument else [])]) == code, argument
        assert part in capsys.readouterr().err
