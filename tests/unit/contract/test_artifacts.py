"""What an earlier stage made is found in folders and tarballs, once, whole, and of one run."""

import gzip
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fivefold.contract.artifacts import (
    ModelDir,
    channel_digest,
    find_all,
    find_models,
    find_one,
    find_predictions,
    search_roots,
)
from fivefold.contract.files import write_text
from fivefold.contract.job import StageContext, context_from_env
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import DataError, MissingInputError, RetryableError

WHOLE = {
    "role": "fold", "system": "s", "seed": 42, "fold": 0, "classes": ["a", "b"],
    "folds": 2, "split": "x", "shares": [0.5, 0.5], "best": {}, "training": {}, "settings": {}, "precision": "fp32",
}  # fmt: skip
"""All that a model.json must say."""


def model_dir(folder: Path, **info: Any) -> Path:
    """A model's folder as training leaves it; the weights are made of its facts, so that equals are equal."""
    whole = WHOLE | info
    write_text(folder / "model.json", json.dumps(whole))
    write_text(folder / "model.safetensors", f"weights of {sorted(whole.items())}")
    write_text(folder / "oof.parquet", "rows")
    write_text(folder / "stage.json", "{}")
    return folder


def tarball(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=".")
    return path


def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return tmp_path / "scratch"


def given(tmp_path: Path, stage: str, **channels: Path) -> StageContext:
    return context_from_env(
        STAGES[stage], {f"SM_CHANNEL_{n.upper()}": str(p) for n, p in channels.items()}, scratch(tmp_path)
    )


def found(tmp_path: Path) -> list[ModelDir]:
    return find_models(tmp_path / "models", scratch(tmp_path))


def test_models_are_found_anywhere_below_in_order(tmp_path: Path):
    models = tmp_path / "models"
    for fold in (10, 2, 0):
        model_dir(models / f"deep/er/{fold}", fold=fold)
    model_dir(models / "b", fold=1, seed=43)
    model_dir(models / "c", system="a", fold=7)
    assert [(m.info["system"], m.info["seed"], m.info["fold"]) for m in found(tmp_path)] == [
        ("a", 42, 7),
        ("s", 42, 0),
        ("s", 42, 2),
        ("s", 42, 10),
        ("s", 43, 1),
    ]
    assert found(tmp_path)[1].path == models / "deep/er/0"


def test_a_tarball_for_each_fold_is_as_good_as_folders(tmp_path: Path):
    for fold in range(3):
        tarball(model_dir(tmp_path / f"made/{fold}", fold=fold), tmp_path / f"models/job-{fold}/output/model.tar.gz")
    assert [model.name for model in found(tmp_path)] == [f"fold {fold} of s, seed 42" for fold in range(3)]
    assert all((model.path / "model.safetensors").is_file() for model in found(tmp_path))
    assert digest_of(tmp_path, "models") == digest_of(tmp_path, "made")
    packed = tmp_path / "models/job-0/output/model.tar.gz"
    assert [model.display_path for model in find_models(packed, scratch(tmp_path))] == [packed]


def test_a_model_that_lies_there_twice_is_one(tmp_path: Path):
    folder = model_dir(tmp_path / "models/fold-0/model")
    tarball(folder, tmp_path / "models/fold-0/output/model.tar.gz")
    (model,) = found(tmp_path)
    assert model.path == folder


def test_two_different_models_of_one_fold_are_an_error_that_names_both(tmp_path: Path):
    first = model_dir(tmp_path / "models/first")
    packed = tarball(model_dir(tmp_path / "made", classes=["a", "c"]), tmp_path / "models/second/model.tar.gz")
    with pytest.raises(DataError) as caught:
        found(tmp_path)
    for named in (first / "model.json", packed, "fold 0 of s, seed 42"):
        assert str(named) in str(caught.value)


def test_a_student_is_taken_only_where_it_is_alone(tmp_path: Path):
    student = model_dir(tmp_path / "models/distill", role="student", fold=None)
    assert [model.path for model in found(tmp_path)] == [student]
    assert found(tmp_path)[0].name == "student of s, seed 42"
    fold = model_dir(tmp_path / "models/fold-0")
    assert [model.path for model in found(tmp_path)] == [fold]
    (student / "stage.json").unlink()
    assert [model.path for model in found(tmp_path)] == [fold], "a student that still trains does not stop the folds"


def test_a_model_without_its_record_is_not_finished(tmp_path: Path):
    model_dir(tmp_path / "models/fold-0")
    (model_dir(tmp_path / "models/fold-1", fold=1) / "stage.json").unlink()
    with pytest.raises(DataError, match=r"fold-1/model\.json: .* stage\.json"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ("[]", "does not describe a model"),
        ('{"model_type": "bert"}', "does not describe a model: .*role, system, seed, fold"),
        (json.dumps(WHOLE | {"seed": "42"}), "does not describe a model"),
        (json.dumps(WHOLE | {"role": "teacher"}), "'teacher'"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_no_model_is_named(info: str, message: str, tmp_path: Path):
    write_text(model_dir(tmp_path / "models/fold-0") / "model.json", info)
    with pytest.raises(DataError, match=message) as caught:
        found(tmp_path)
    assert "fold-0/model.json" in str(caught.value)


def test_one_file_is_located_wherever_it_is(tmp_path: Path):
    write_text(tmp_path / "run/split/output/folds.parquet", "x")
    job = given(tmp_path, "train-fold", folds=tmp_path / "run")
    assert find_one(job, "folds", "folds.parquet") == tmp_path / "run/split/output/folds.parquet"
    direct = given(tmp_path, "train-fold", folds=tmp_path / "run/split/output/folds.parquet")
    assert find_one(direct, "folds", "folds.parquet") == tmp_path / "run/split/output/folds.parquet"
    with pytest.raises(MissingInputError, match=r"no classes\.json below the channel 'folds'"):
        find_one(job, "folds", "classes.json")


def test_copies_are_one_file_and_different_ones_an_error(tmp_path: Path):
    for name in ("a", "b"):
        write_text(tmp_path / f"run/{name}/folds.parquet", "same")
    job = given(tmp_path, "train-fold", folds=tmp_path / "run")
    assert find_one(job, "folds", "folds.parquet") == tmp_path / "run/a/folds.parquet"
    assert len(find_all(tmp_path / "run", scratch(tmp_path), "folds.parquet")) == 2
    write_text(tmp_path / "made/folds.parquet", "other")
    packed = tarball(tmp_path / "made", tmp_path / "run/c/output.tar.gz")
    with pytest.raises(DataError, match=r"several different folds\.parquet below .*/run") as caught:
        find_one(job, "folds", "folds.parquet")
    assert str(packed) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../escaped", tarfile.REGTYPE, ""),
        ("/tmp/../escaped", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("link", tarfile.LNKTYPE, "model.json"),
        ("fifo", tarfile.FIFOTYPE, ""),
    ],
)
@pytest.mark.parametrize("has_filter", [True, False], ids=["filter", "Python 3.11.2"])
def test_an_archive_that_would_write_elsewhere_is_refused(
    name: str, kind: bytes, link: str, has_filter: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not has_filter:
        monkeypatch.delattr(tarfile, "data_filter")
    models = tmp_path / "models"
    models.mkdir()
    with tarfile.open(models / "model.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("model.json"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        archive.addfile(info)
    for _ in range(2):  # the second try does not take what the first one unpacked before the refusal
        with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked"):
            found(tmp_path)
    assert not list(tmp_path.rglob("escaped"))


def test_an_archive_that_would_fill_the_disk_is_refused_before_it_does(tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(2**26)
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-cSzf", models / "model.tar.gz", "-C", tmp_path, "holes"]
        subprocess.run(command, check=True)
        with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked: .*holes"):
            found(tmp_path)
    with tarfile.open(models / "model.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("weights")
        info.size = 2**50
        archive.addfile(info)
    with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked: its files .* more than"):
        found(tmp_path)
    assert sum(path.stat().st_size for path in scratch(tmp_path).rglob("*") if path.is_file()) == 0


def flip(packed: bytes) -> bytes:
    middle = len(packed) // 2
    return packed[:middle] + bytes(255 - byte for byte in packed[middle : middle + 64]) + packed[middle + 64 :]


@pytest.mark.parametrize(
    "damage", [lambda packed: packed[: len(packed) // 2], flip, lambda _: b"", lambda _: gzip.compress(b"text")]
)
def test_a_damaged_archive_is_named(damage: Callable[[bytes], bytes], tmp_path: Path):
    folder = model_dir(tmp_path / "made")
    (folder / "weights").write_bytes(bytes(range(256)) * 400)
    path = tarball(folder, tmp_path / "models/model.tar.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"models/model\.tar\.gz cannot be unpacked"):
        found(tmp_path)


def test_an_archive_of_nothing_holds_nothing(tmp_path: Path):
    (tmp_path / "models").mkdir()
    with tarfile.open(tmp_path / "models/output.tar.gz", "w:gz"):
        pass
    with pytest.raises(MissingInputError, match=r"no model below .*/models"):
        found(tmp_path)
    model_dir(tmp_path / "models/fold-0")
    assert len(found(tmp_path)) == 1


def test_archives_are_unpacked_once_and_only_to_scratch(tmp_path: Path):
    tarball(model_dir(tmp_path / "made"), tmp_path / "models/model.tar.gz")
    where = tmp_path / "models", scratch(tmp_path)
    before = {path: path.stat().st_ino for root in search_roots(*where) for path in root.iterdir()}
    assert {path: path.stat().st_ino for root in search_roots(*where) for path in root.iterdir()} == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.tar.gz"]


def test_predictions_go_with_what_stands_beside_them(tmp_path: Path):
    for name in ("predictions.parquet", "holdout.parquet", "ensemble.json", "other.csv"):
        write_text(tmp_path / "p/output" / name, name)
    files = find_predictions(tmp_path / "p", tmp_path)
    assert sorted(files) == ["ensemble.json", "holdout.parquet", "predictions.parquet"]
    write_text(tmp_path / "csv/submission.csv", "ID,a,b")
    write_text(tmp_path / "csv/sample_submission.csv", "ID,a,b")
    lone = find_predictions(tmp_path / "csv", tmp_path)
    assert list(lone.values()) == [tmp_path / "csv/submission.csv"]
    write_text(tmp_path / "csv/second.csv", "ID,a,b")
    with pytest.raises(DataError, match="several CSVs"):
        find_predictions(tmp_path / "csv", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingInputError, match=r"no predictions\.parquet"):
        find_predictions(tmp_path / "none", tmp_path)


def digest_of(tmp_path: Path, models: str = "models") -> str:
    return channel_digest("model", tmp_path / models, scratch(tmp_path), {})


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "oof.parquet", "holdout.parquet", "train_log.csv"])
def test_a_models_digest_sees_all_that_is_read_of_it(name: str, tmp_path: Path):
    folder = model_dir(tmp_path / "models/fold-0")
    write_text(folder / "holdout.parquet", "x")
    write_text(folder / "train_log.csv", "x")
    before = digest_of(tmp_path)
    info = WHOLE | {"classes": ["a", "b", "c"]}
    write_text(folder / name, json.dumps(info))
    assert digest_of(tmp_path) != before


def test_a_models_digest_sees_nothing_else_not_even_its_place(tmp_path: Path):
    folder = model_dir(tmp_path / "models/fold-0")
    before = digest_of(tmp_path)
    write_text(folder / "stage.json", '{"finished": "later"}')
    write_text(tmp_path / "models/log.txt", "x")
    folder.rename(tmp_path / "models/moved")
    assert digest_of(tmp_path) == before


def test_a_full_scratch_is_worth_retrying_unless_it_is_too_small_for_ever(tiny_disk: Path, tmp_path: Path):
    from fivefold.contract.failure import to_known_error

    folder = model_dir(tmp_path / "made")
    for size, filler, expected in ((200_000, 0, DataError), (40_000, 40_000, RetryableError)):
        (folder / "weights").write_bytes(bytes(size))
        (tiny_disk / "filler").write_bytes(bytes(filler))
        tarball(folder, tmp_path / "models/model.tar.gz")
        with pytest.raises(expected) as caught:
            find_models(tmp_path / "models", tiny_disk)
        assert type(to_known_error(caught.value)) is expected
