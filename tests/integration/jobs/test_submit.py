"""`python -m jobs submit` from the command line: rejected arguments, output, and the stages that it runs."""

import subprocess
from pathlib import Path

import numpy as np
import pytest

from fivefold.contract.files import read_json
from fivefold.errors import MissingInputError, SettingsError
from jobs import status, submit
from toy_data import LEARNS, REPOSITORY, draw_toy_images, noise, noise_in, write_csv


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with `train/a`, `train/b` and a test table with ground truth."""
    noise_in(tmp_path / "train", ("a", "b"), 6)
    noise(tmp_path / "test" / "1.png", np.random.default_rng(1))
    write_csv(tmp_path / "test" / "test.csv", [["ID", "img_path"], [1, "1.png"]])
    write_csv(tmp_path / "test" / "gt.csv", [["ID", "label"], [1, "a"]])
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs train="),
        (["paralel=2"], "did you mean 'parallel'"),
        (["model=resnet"], "unknown key 'model'"),
        (["platform=slurm"], "known: .*local"),
        (["parallel=0"], "parallel="),
        (["folds=two"], "folds=two: .*integer"),
        (["seeds=1,4294967296"], "seeds="),
        (["--verbose"], "not KEY=VALUE"),
        (["increment=true"], "needs run=NAME"),
        (["increment=maybe", "run=exp"], "increment=maybe"),
    ],
)
def test_invalid_arguments_are_rejected(data: Path, arguments: list[str], message: str) -> None:
    common = [f"train={data / 'train'}", f"runs={data / 'runs'}"] if arguments else []
    with pytest.raises(SettingsError, match=message):
        submit.main([*common, *arguments, "--dry-run"])
    assert not (data / "runs").exists()


def test_ground_truth_without_test_images_gives_a_warning(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = [f"train={data / 'train'}", f"ground_truth={data / 'test'}", "recipe=photographs", "check=false"]
    assert submit.main([*arguments, "--dry-run"]) == 0
    assert any("without eval=" in r.message and r.levelname == "WARNING" for r in caplog.records)
    with pytest.raises(MissingInputError, match="eval="):
        submit.main([f"train={data}", f"eval={data / 'no'}"])


def test_submit_and_status_end_to_end(
    data: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the split by its printed command; then submit an evaluation, which fails without models."""
    runs, truth = data / "my runs", data / "test" / "gt.csv"
    common = [f"train={data / 'train'}", f"runs={runs}", "run=r", "recipe=photographs", "split.folds=3"]
    common.append("check=false")
    assert submit.main([*common, f"eval={truth.parent}", "--dry-run"]) == 0
    printed = capfd.readouterr().out
    assert not runs.exists()
    assert f"SM_CHANNEL_GROUND_TRUTH={truth}" in printed
    assert printed.count(" -m fivefold.jobs train-fold ") == 3
    block = printed.split("\n\n")[1]
    assert block.startswith("# split\n")
    pasted = subprocess.run(["sh", "-e"], input=block, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert pasted.returncode == 0, pasted.stderr
    assert (runs / "r" / "split" / "output" / "folds.parquet").is_file()

    monkeypatch.setenv("FOLD", "1")
    monkeypatch.setenv("TRAIN__EPOCHS", "many")
    assert submit.main([*common, "stages=evaluate"]) == MissingInputError.exit_code
    assert "FOLD, TRAIN__EPOCHS" in caplog.text
    output = capfd.readouterr()
    assert "evaluate failed (exit code 66)" in output.err
    assert "no model is trained yet" in output.out
    assert status.main([f"runs={runs}"]) == 0
    lines = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if line}
    assert "done" in lines["split"]
    assert "failed (66)" in lines["evaluate"]
    assert "waiting" in lines["fold-2"]
    assert [step["name"] for step in read_json(runs / "r" / "plan.json")["steps"]][:2] == ["split", "fold-0"]
    with pytest.raises(MissingInputError, match=r"no run .digits."):
        status.main([f"runs={runs}", "run=digits"])
    with pytest.raises(SettingsError, match=r"did you mean .run."):
        status.main(["rum=r"])


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(key in printed for key in (*submit.Keys.model_fields, "--dry-run", *submit.PLATFORMS))


def test_increment_picks_the_next_free_run_name(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = data / "runs"
    arguments = [f"train={data / 'train'}", f"runs={runs}", "run=exp", "recipe=photographs", "check=false"]
    for expected in ("exp", "exp2", "exp3"):
        assert submit.main([*arguments, "increment=true", "--dry-run"]) == 0
        assert f"# run {expected} in {runs / expected}" in capsys.readouterr().out
        (runs / expected).mkdir(parents=True)
    assert submit.main([*arguments, "--dry-run"]) == 0  # without increment, a run of the same name continues
    assert "# run exp in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_little_time_says_so_and_goes_on_with_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first start ends before any result; the second gives the linear probes' result, then the blend of both systems."""
    root = draw_toy_images(tmp_path)
    common = [
        *LEARNS, f"train={root / 'train'}", f"eval={root / 'eval'}", f"runs={root / 'runs'}", "run=r", "split.folds=3",
        "train.method=lp_ft", "train.linear_first=true", "train.freeze_norms=true", "augment.image_size=10", "system=toy",
        "distill.train.method=linear_probe",
    ]  # fmt: skip
    with pytest.raises(SettingsError, match="time=1s is too short"):
        submit.main([*common, "time=1s"])
    assert not (root / "runs" / "r" / "fold-0").exists()
    assert submit.main([*common, "time=10m"]) == 0
    run = root / "runs" / "r"
    ensemble = read_json(run / "ensemble" / "output" / "ensemble.json")
    assert {member["system"] for member in ensemble["members"]} == {"toy", "toy_linear"}
    assert (run / "ensemble" / "output" / "submission.csv").is_file()
    assert (run / "evaluate" / "output" / "report.html").is_file()
    assert (run / "distill" / "model" / "model.json").is_file()
    log = (run / "ensemble" / "log.txt").read_text()
    assert log.index(": 3 models and 0 files") < log.index(": 6 models and 0 files")
    used = read_json(run / "time.json")["used_seconds"]
    assert 1 < used < 600
    capfd.readouterr()
    assert submit.main([*common, "time=10m"]) == 0, "a finished run has nothing to do"
    assert log in (run / "ensemble" / "log.txt").read_text()
    assert (run / "ensemble" / "log.txt").read_text().count("ensemble runs:") == 2
