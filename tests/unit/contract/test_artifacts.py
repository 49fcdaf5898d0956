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

MODEL_INFO = {
    "role": "fold", "system": "s", "seed": 42, "fold": 0, "classes": ["a", "b"],
    "folds": 2, "split": "x", "shares": [0.5, 0.5], "best": {}, "training": {}, "settings": {}, "precision": "fp32",
}  # fmt: skip
"""Every key that a model.json must have."""


def make_model(folder: Path, **info: Any) -> Path:
    """Write a model folder as training does. The weights contain its info: equal info gives equal weights."""
    full_info = MODEL_INFO | info
    write_text(folder / "model.json", json.dumps(full_info))
    write_text(folder / "model.safetensors", f"weights of {sorted(full_info.items())}")
    write_text(folder / "oof.parquet", "rows")
    write_text(folder / "stage.json", "{}")
    return folder


def pack(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=".")
    return path


def make_scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return tmp_path / "scratch"


def make_job(tmp_path: Path, stage: str, **channels: Path) -> StageContext:
    return context_from_env(
        STAGES[stage], {f"SM_CHANNEL_{n.upper()}": str(p) for n, p in channels.items()}, make_scratch(tmp_path)
    )


def list_models(tmp_path: Path) -> list[ModelDir]:
    return find_models(tmp_path / "models", make_scratch(tmp_path))


def test_find_models_searches_subfolders_and_sorts(tmp_path: Path):
    models = tmp_path / "models"
    for fold in (10, 2, 0):
        make_model(models / f"deep/er/{fold}", fold=fold)
    make_model(models / "b", fold=1, seed=43)
    make_model(models / "c", system="a", fold=7)
    identities = [(m.info["system"], m.info["seed"], m.info["fold"]) for m in list_models(tmp_path)]
    assert identities == [("a", 42, 7), ("s", 42, 0), ("s", 42, 2), ("s", 42, 10), ("s", 43, 1)]
    assert list_models(tmp_path)[1].path == models / "deep/er/0"


def test_tarballs_give_the_same_models_and_digest_as_folders(tmp_path: Path):
    for fold in range(3):
        pack(make_model(tmp_path / f"made/{fold}", fold=fold), tmp_path / f"models/job-{fold}/output/model.tar.gz")
    assert [model.name for model in list_models(tmp_path)] == [f"fold {fold} of s, seed 42" for fold in range(3)]
    assert all((model.path / "model.safetensors").is_file() for model in list_models(tmp_path))
    assert hash_models(tmp_path, "models") == hash_models(tmp_path, "made")
    archive = tmp_path / "models/job-0/output/model.tar.gz"
    assert [model.display_path for model in find_models(archive, make_scratch(tmp_path))] == [archive]


def test_copies_of_a_model_count_as_one_if_they_are_equal(tmp_path: Path):
    folder = make_model(tmp_path / "models/fold-0/model")
    archive = pack(folder, tmp_path / "models/fold-0/output/model.tar.gz")
    (model,) = list_models(tmp_path)
    assert model.path == folder
    archive = pack(make_model(tmp_path / "made", classes=["a", "c"]), tmp_path / "models/second/model.tar.gz")
    with pytest.raises(DataError) as caught:
        list_models(tmp_path)
    for part in (folder / "model.json", archive, "fold 0 of s, seed 42"):
        assert str(part) in str(caught.value)


def test_student_is_used_only_without_fold_models(tmp_path: Path):
    student = make_model(tmp_path / "models/distill", role="student", fold=None)
    assert [model.path for model in list_models(tmp_path)] == [student]
    assert list_models(tmp_path)[0].name == "student of s, seed 42"
    fold = make_model(tmp_path / "models/fold-0")
    assert [model.path for model in list_models(tmp_path)] == [fold]
    (student / "stage.json").unlink()
    assert [model.path for model in list_models(tmp_path)] == [fold], "an unfinished student does not block the folds"


def test_model_without_a_record_is_refused(tmp_path: Path):
    make_model(tmp_path / "models/fold-0")
    (make_model(tmp_path / "models/fold-1", fold=1) / "stage.json").unlink()
    with pytest.raises(DataError, match=r"fold-1/model\.json: .* stage\.json"):
        list_models(tmp_path)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ('{"model_type": "bert"}', "does not describe a model: .*role, system, .* fold, "),
        (json.dumps(MODEL_INFO | {"seed": "42"}), "does not describe a model"),
        (json.dumps(MODEL_INFO | {"role": "teacher"}), "'teacher'"),
        ("{", "is not JSON"),
    ],
)
def test_invalid_model_json_is_named_in_the_error(info: str, message: str, tmp_path: Path):
    write_text(make_model(tmp_path / "models/fold-0") / "model.json", info)
    with pytest.raises(DataError, match=message) as caught:
        list_models(tmp_path)
    assert "fold-0/model.json" in str(caught.value)


def test_find_one_accepts_equal_copies_and_refuses_different_ones(tmp_path: Path):
    for name in ("a", "b"):
        write_text(tmp_path / f"run/{name}/folds.parquet", "same")
    job = make_job(tmp_path, "train-fold", folds=tmp_path / "run")
    assert find_one(job, "folds", "folds.parquet") == tmp_path / "run/a/folds.parquet"
    direct = make_job(tmp_path, "train-fold", folds=tmp_path / "run/b/folds.parquet")
    assert find_one(direct, "folds", "folds.parquet") == tmp_path / "run/b/folds.parquet"
    assert len(find_all(tmp_path / "run", make_scratch(tmp_path), "folds.parquet")) == 2
    with pytest.raises(MissingInputError, match=r"no classes\.json below the channel 'folds'"):
        find_one(job, "folds", "classes.json")
    write_text(tmp_path / "made/folds.parquet", "other")
    archive = pack(tmp_path / "made", tmp_path / "run/c/output.tar.gz")
    with pytest.raises(DataError, match=r"several different folds\.parquet below .*/run") as caught:
        find_one(job, "folds", "folds.parquet")
    assert str(archive) in str(caught.value)


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
def test_archives_with_paths_outside_or_links_are_refused(name: str, kind: bytes, link: str, tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    with tarfile.open(models / "model.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("model.json"))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        archive.addfile(info)
    for _ in range(2):  # the second try does not use files that the first one unpacked before it failed
        with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked"):
            list_models(tmp_path)
    assert not list(tmp_path.rglob("escaped"))


def test_archive_that_would_fill_the_disk_is_refused_before_unpacking(tmp_path: Path):
    models = tmp_path / "models"
    models.mkdir()
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(2**26)
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-cSzf", models / "model.tar.gz", "-C", tmp_path, "holes"]
        subprocess.run(command, check=True)
        with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked: .*holes"):
            list_models(tmp_path)
    with tarfile.open(models / "model.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("weights")
        info.size = 2**50
        archive.addfile(info)
    with pytest.raises(DataError, match=r"model\.tar\.gz cannot be unpacked: its files .* more than"):
        list_models(tmp_path)
    assert sum(path.stat().st_size for path in make_scratch(tmp_path).rglob("*") if path.is_file()) == 0


def corrupt(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 64]) + data[middle + 64 :]


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], corrupt, lambda _: b"", lambda _: gzip.compress(b"text")]
)
def test_damaged_archive_is_named_in_the_error(damage: Callable[[bytes], bytes], tmp_path: Path):
    folder = make_model(tmp_path / "made")
    (folder / "weights").write_bytes(bytes(range(256)) * 400)
    path = pack(folder, tmp_path / "models/model.tar.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"models/model\.tar\.gz cannot be unpacked"):
        list_models(tmp_path)


def test_archives_are_unpacked_once_and_only_to_scratch(tmp_path: Path):
    pack(make_model(tmp_path / "made"), tmp_path / "models/model.tar.gz")
    folders = tmp_path / "models", make_scratch(tmp_path)
    before = {path: path.stat().st_ino for root in search_roots(*folders) for path in root.iterdir()}
    assert {path: path.stat().st_ino for root in search_roots(*folders) for path in root.iterdir()} == before
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["model.tar.gz"]


def test_find_predictions_returns_the_known_files_of_their_folder(tmp_path: Path):
    for name in ("predictions.parquet", "holdout.parquet", "ensemble.json", "other.csv"):
        write_text(tmp_path / "p/output" / name, name)
    files = find_predictions(tmp_path / "p", tmp_path)
    assert sorted(files) == ["ensemble.json", "holdout.parquet", "predictions.parquet"]
    write_text(tmp_path / "csv/submission.csv", "ID,a,b")
    write_text(tmp_path / "csv/sample_submission.csv", "ID,a,b")
    single_csv = find_predictions(tmp_path / "csv", tmp_path)
    assert list(single_csv.values()) == [tmp_path / "csv/submission.csv"]
    write_text(tmp_path / "csv/second.csv", "ID,a,b")
    with pytest.raises(DataError, match="several CSVs"):
        find_predictions(tmp_path / "csv", tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(MissingInputError, match=r"no predictions\.parquet"):
        find_predictions(tmp_path / "none", tmp_path)


def hash_models(tmp_path: Path, models: str = "models") -> str:
    return channel_digest("model", tmp_path / models, make_scratch(tmp_path), {})


def test_model_digest_depends_on_every_file_that_is_read_and_on_nothing_else(tmp_path: Path):
    folder = make_model(tmp_path / "models/fold-0")
    digests = {hash_models(tmp_path)}
    write_text(folder / "stage.json", '{"finished": "later"}')
    write_text(tmp_path / "models/log.txt", "x")
    folder = folder.rename(tmp_path / "models/moved")
    assert {hash_models(tmp_path)} == digests
    info = json.dumps(MODEL_INFO | {"classes": ["a", "b", "c"]})
    for name in ("model.safetensors", "model.json", "oof.parquet", "holdout.parquet", "train_log.csv"):
        write_text(folder / name, info)
        digests.add(hash_models(tmp_path))
    assert len(digests) == 6


def test_full_scratch_is_retryable_unless_the_archive_exceeds_the_disk(tiny_disk: Path, tmp_path: Path):
    from fivefold.contract.failure import to_known_error

    folder = make_model(tmp_path / "made")
    for size, filler, expected in ((200_000, 0, DataError), (40_000, 40_000, RetryableError)):
        (folder / "weights").write_bytes(bytes(size))
        (tiny_disk / "filler").write_bytes(bytes(filler))
        pack(folder, tmp_path / "models/model.tar.gz")
        with pytest.raises(expected) as caught:
            find_models(tmp_path / "models", tiny_disk)
        assert type(to_known_error(caught.value)) is expected
