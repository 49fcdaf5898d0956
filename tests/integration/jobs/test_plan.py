"""A planned recipe: the stage plan writes settings with reasons that can be given back, and submit plans without a recipe."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fivefold.config.loading import arguments_layer, load
from fivefold.config.schema import Data
from fivefold.contract.files import read_json
from fivefold.data.readers.stores import open_store
from fivefold.errors import MissingInputError, SettingsError
from fivefold.planning import recipe
from fivefold.planning.facts import read_facts
from fivefold.planning.forecast import MEASUREMENTS, read_measurements
from fivefold.planning.recipe import find_backbones, fitting_batch
from fivefold.training import memory
from jobs import status, submit
from toy_data import MODEL, call_jobs, draw_toy_images, run_stage

OURS = [*MODEL, "model.pretrained=false", "augment.image_size=10", "train.lr=0.003", "train.precision=fp32"]
"""Settings of a user, for a network that needs no weights."""


def test_the_recipe_keeps_what_was_set_and_gives_a_reason_for_the_rest(toy_run: Path, tmp_path: Path) -> None:
    assert run_stage(toy_run, "plan", tmp_path, *OURS, f"data.cache={tmp_path / 'caches'}") == 0
    written = tmp_path / "output" / "recipe.toml"
    settings = load([arguments_layer([f"recipe={written}"])])
    assert (settings.system, settings.model.backbone, settings.train.lr) == ("planned", "fivefold/small_net", 0.003)
    assert settings.model.backbone_kwargs == {"widths": [8, 16], "stem": 8}
    assert settings.model.pretrained is False
    assert settings.data.cache == "auto"
    assert (settings.train.method, settings.data.resize_shorter_side) == ("linear_probe", 256)  # few rows
    lines = written.read_text("utf-8").splitlines()
    before = {line.split(" = ")[0]: lines[number - 1] for number, line in enumerate(lines) if " = " in line}
    assert before["method"].startswith("# a fold has")
    assert not before["lr"].startswith("# ")
    facts, speed, rates = read_measurements(tmp_path / "output" / MEASUREMENTS)
    assert (facts.rows, facts.folds, facts.classes, facts.shorter_side) == (81, 3, 3, 12)
    assert min(speed.train, speed.predict, speed.frozen, speed.memory, speed.start_seconds, rates.at_once) > 0
    record = (tmp_path / "output" / "stage.json").read_bytes()
    assert run_stage(toy_run, "plan", tmp_path, *OURS) == 0
    assert (tmp_path / "output" / "stage.json").read_bytes() == record  # nothing to do


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "auto"),
        (["time=30m", "data.group_column=sender"], "auto"),
        (["model.backbone=timm/resnet18"], ""),
        (["augment.image_size=64"], ""),
        (["train.epochs=3"], ""),
    ],
)
def test_without_a_recipe_one_is_planned_unless_the_training_is_set(arguments: list[str], expected: str) -> None:
    assert submit.default_recipe(arguments) == expected


def test_a_plan_for_another_machine_is_rejected(toy_run: Path, tmp_path: Path) -> None:
    arguments = ["platform=kubernetes", "recipe=auto", "train=/data/photos", f"runs={tmp_path / 'runs'}"]
    with pytest.raises(SettingsError, match="recipe=auto"):
        submit.main(arguments)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_split_and_plan_prints_them_and_runs_nothing(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"train={toy_run / 'train'}", f"runs={tmp_path / 'runs'}", "recipe=auto", "stages=split,plan"]
    assert submit.main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [f" {stage} " in printed for stage in ("split", "plan", "train-fold")] == [True, True, False]
    assert not (tmp_path / "runs").exists()


def test_a_preview_of_images_in_s3_is_rejected() -> None:
    with pytest.raises(SettingsError, match="s3://bucket/photos"):
        submit.main(["train=s3://bucket/photos", "recipe=auto", "--dry-run"])


def test_no_weights_on_this_machine_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "CANDIDATES", {"timm/vgg11": 69.0})
    with pytest.raises(MissingInputError, match="timm/vgg11"):
        find_backbones(load([arguments_layer(["offline=true"])]), None)
    assert find_backbones(load([arguments_layer(["model.backbone=timm/resnet18"])]), None) == ["timm/resnet18"]


def test_weights_without_their_network_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.backbone"):
        find_backbones(load([arguments_layer([])]), tmp_path)
    with pytest.raises(SettingsError, match=r"model\.backbone"):
        find_backbones(load([arguments_layer(["model.weights=some.pth"])]), None)


def test_the_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load([arguments_layer([*OURS, "train.batch_size=64"])])
    assert fitting_batch(settings, 3) == 64
    sizes = []

    def free(_device: object, _sharers: int) -> int:
        sizes.append(1)
        return 0 if len(sizes) < 4 else 1 << 40

    monkeypatch.setattr(memory, "available_bytes", free)
    assert fitting_batch(settings, 3) == 8
    sizes.clear()
    with pytest.raises(SettingsError):
        fitting_batch(load([arguments_layer([*OURS, "train.batch_size=2"])]), 3)


def test_facts_of_grey_and_colour_images(tmp_path: Path) -> None:
    random, paths = np.random.default_rng(0), []
    for number in range(8):
        paths.append(f"{number}.png")
        shape = (20, 30) if number < 6 else (20, 30, 4)
        Image.fromarray(random.integers(0, 255, shape, np.uint8)).save(tmp_path / paths[-1])
    codes = np.array([0] * 7 + [1])
    groups = pa.array(["x", "x", *map(str, range(6))])
    facts = read_facts(open_store(tmp_path), paths, codes, 2, groups, 4, 5, Data())
    assert (facts.rows, facts.smallest_class, facts.largest_class, facts.groups) == (8, 1, 7, 7)
    assert (facts.shorter_side, facts.grey, facts.image_bytes, facts.valid_rows) == (20, 0.75, 20 * 30 * 3, 2)


@pytest.mark.slow
def test_submit_plans_trains_and_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = draw_toy_images(tmp_path)
    common = [
        *OURS,
        "recipe=auto",
        f"train={root / 'train'}",
        f"eval={root / 'eval'}",
        f"runs={root / 'runs'}",
        "run=r",
    ]
    common += ["split.folds=3"]
    preview = call_jobs("submit", *common, "--dry-run")
    assert preview.returncode == 0, preview.stderr
    assert not (root / "runs").exists()
    assert re.search(r"^# +all steps +[1-9]", preview.stdout, re.MULTILINE)
    assert submit.main([*common, "time=10m"]) == 0
    run = root / "runs" / "r"
    steps = [step["name"] for step in read_json(run / "plan.json")["steps"]]
    assert steps[:3] == ["split", "plan", "fold-0"]
    assert (run / "ensemble" / "output" / "submission.csv").is_file()
    assert "starts at" in capfd.readouterr().out
    assert status.main([f"runs={root / 'runs'}", "run=r"]) == 0
    assert "waiting" not in capfd.readouterr().out
    records = {path: path.read_bytes() for path in run.rglob("stage.json")}
    assert submit.main([*common, "time=10m"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("stage.json")} == records


@pytest.mark.slow
def test_too_little_time_to_plan_is_an_error(tmp_path: Path) -> None:
    root = draw_toy_images(tmp_path)
    arguments = [*OURS, "recipe=auto", f"train={root / 'train'}", f"runs={root / 'runs'}", "run=r"]
    assert call_jobs("submit", *arguments, "time=2s").returncode == 64
    assert submit.main([*arguments, "split.folds=3"]) == 0
