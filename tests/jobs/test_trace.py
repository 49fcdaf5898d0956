"""The trace command over what stages left: the way back to the images, and what is no longer as it was."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.__main__ import main, run
from toy import noise_in, write_test_table

SETTINGS = [
    "model.backbone=fivefold/small_net", 'model.options={"widths": [8, 8], "stem": 8}', "model.image_size=12", "train.epochs=1",
    "train.batch_size=8", "train.precision=fp32", "train.trackers=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A split, two folds, their ensemble, a student and its ensemble."""
    root = tmp_path_factory.mktemp("made")
    noise_in(root / "data", ("train/a", "train/b", "eval/images"), 6)
    write_test_table(root / "data" / "eval", 6)
    run_folder = root / "run"
    assert stage(run_folder, "split", "split", "split.folds=2") == 0
    for fold in range(2):
        assert stage(run_folder, "train-fold", f"fold-{fold}", f"FOLD={fold}", *SETTINGS) == 0
    assert stage(run_folder, "distill", "distill", *SETTINGS, MODEL=run_folder) == 0
    assert stage(run_folder, "ensemble", "ensemble", MODEL=run_folder) == 0
    assert stage(run_folder, "ensemble", "ensemble-student", MODEL=run_folder / "distill") == 0
    return root


def stage(folder: Path, name: str, step: str, *arguments: str, **channels: Path) -> int:
    given = {"TRAIN": folder.parent / "data" / "train", "EVAL": folder.parent / "data" / "eval"} | channels
    given |= {"FOLDS": folder / "split" / "output"} if name != "split" else {}
    environ = {f"SM_CHANNEL_{channel}": str(path) for channel, path in given.items()}
    environ |= {"SM_MODEL_DIR": str(folder / step / "model"), "SM_OUTPUT_DATA_DIR": str(folder / step / "output")}
    return run(name, arguments, environ)


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """The same in a place of its own: a run may move together with its data."""
    return Path(shutil.copytree(made, tmp_path / "moved"))


def test_the_way_back_ends_at_the_images_and_tells_each_record_once(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    assert main(["trace", "run/ensemble-student/output/submission.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ensemble: run/ensemble-student/output"
    told = [line.split("<- ")[1] for line in lines if "<- " in line]
    assert told == [
        "distill: run/distill/model", "split: run/split/output", "train-fold: run/fold-0/model", "split: run/split/output (above)",
        "train-fold: run/fold-1/model", "split: run/split/output (above)", "split: run/split/output (above)",
    ]  # fmt: skip
    assert sum("train: data/train" in line for line in lines) == 4
    record = json.loads(Path("run/fold-1/model/stage.json").read_text())
    assert any(f"key {record['key'][:12]}, code {record['code']}, torch" in line for line in lines)


@pytest.mark.parametrize("where", ["run/ensemble", "run/ensemble/output", "run/ensemble/output/stage.json"])
def test_a_folder_or_a_record_names_its_stage_and_all_of_it_checks_out(where, world, capsys):
    assert main(["trace", str(world / where), "--check"]) == 0
    out = capsys.readouterr().out
    assert "distill" not in out, "an ensemble of folds has no student in it"
    assert out.splitlines()[-1] == "all as it was: 4 records, their outputs and inputs"


def spoil(root: Path, what: str) -> None:
    if what == "weights":
        path = root / "run" / "fold-1" / "model" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif what == "image":
        path = root / "data" / "train" / "b" / "3.png"
        path.write_bytes((root / "data" / "train" / "b" / "4.png").read_bytes())
    elif what == "gone":
        (root / "run" / "fold-0" / "model" / "oof.parquet").unlink()
    elif what == "test table":
        path = root / "data" / "eval" / "test.csv"
        path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("weights", "fold-1/model/model.safetensors: changed since it was made"),
        ("image", "b/3.png is not the file that the split saw"),
        ("gone", "fold-0/model/oof.parquet: missing"),
        ("test table", "its channel 'eval'"),
    ],
)
def test_what_is_no_longer_as_it_was_is_named(what, message, world, capsys):
    spoil(world, what)
    assert main(["trace", str(world / "run" / "ensemble"), "--check"]) == 65
    assert message in capsys.readouterr().err


def test_a_channel_that_is_gone_is_named(world, capsys):
    record = world / "run" / "ensemble" / "output" / "stage.json"
    told = json.loads(record.read_text())
    told["sources"]["eval"][1] = str(world / "data" / "eval")
    record.write_text(json.dumps(told))
    (world / "data" / "eval").rename(world / "data" / "elsewhere")
    assert main(["trace", str(world / "run" / "ensemble"), "--check"]) == 65
    assert "stage.json: its channel 'eval' is no longer there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "trace takes one path"),
        (["--chek"], 64, "trace takes one path"),
        (["{}/nowhere"], 66, "does not exist"),
        (["{}/data/train/a/1.png"], 66, "no stage left a record"),
        (["{}/run"], 66, "no stage left a record"),
        (["{}/broken/stage.json"], 65, "is not JSON"),
        (
            ["{}/old/stage.json"],
            65,
            "cannot be traced, it has no key, sources, roots, inputs, outputs, settings, metrics: run its stage again",
        ),
        (["{}/odd/stage.json"], 65, "cannot be traced, it has no sources: run its stage again"),
    ],
)
def test_bad_input_gets_one_clear_error(arguments, code, message, world, capsys):
    odd = {**json.loads((world / "run" / "split" / "output" / "stage.json").read_text()), "sources": {"train": [1, 2]}}
    for name, text in (("broken", "{"), ("old", '{"stage": "split"}'), ("odd", json.dumps(odd))):
        (world / name).mkdir()
        (world / name / "stage.json").write_text(text)
    assert main(["trace", *(argument.format(world) for argument in arguments)]) == code
    assert message in capsys.readouterr().err
