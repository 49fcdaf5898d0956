"""The demo's images: all of scikit-learn's digits, as they are, always with the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fivefold.contract.files import tree_sha256
from jobs import demo
from toy_data import read_cells


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo.write_digits(folder)
    return folder


def test_every_digit_is_there_once_with_its_class(folder: Path) -> None:
    digits = load_digits()
    truth = dict(read_cells(folder / "test" / "gt.csv")[1:])
    found = {path: path.parent.name for path in (folder / "train").glob("*/*.png")}
    assert len(found) == 1437
    found |= {path: truth[path.stem] for path in (folder / "test").glob("*.png")}
    assert len(found) == 1797

    pixels = sorted((str(label), np.asarray(Image.open(path)).tobytes()) for path, label in found.items())
    wanted = np.rint(digits.images / 16 * 255).astype(np.uint8)
    assert pixels == sorted((str(t), image.tobytes()) for t, image in zip(digits.target, wanted, strict=True))


def test_every_class_gives_a_fifth_to_the_test(folder: Path) -> None:
    labels = [label for _, label in read_cells(folder / "test" / "gt.csv")[1:]]
    for digit in "0123456789":
        trained = len(list((folder / "train" / digit).glob("*.png")))
        assert labels.count(digit) / (trained + labels.count(digit)) == pytest.approx(0.2, abs=0.005)


def test_tables_are_a_competitions(folder: Path) -> None:
    table, sample = read_cells(folder / "test" / "test.csv"), read_cells(folder / "test" / "sample_submission.csv")
    assert table[0] == ["ID", "img_path"]
    assert sample[0] == ["ID", *"0123456789"]
    assert [row[0] for row in table] == [row[0] for row in sample]
    assert all((folder / "test" / path).is_file() for _, path in table[1:])
    assert (folder / "test" / "sample_submission.csv").read_bytes().startswith(b"\xef\xbb\xbfID,")


def test_files_are_written_once_and_again_where_they_were_half_written(folder: Path, tmp_path: Path) -> None:
    demo.write_digits(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    demo.write_digits(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    (tmp_path / demo.MARKER).unlink()
    (tmp_path / "test" / "gt.csv").unlink()
    demo.write_digits(tmp_path)
    assert tree_sha256(tmp_path) == tree_sha256(folder)


def test_demo_of_one_epoch_has_no_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.main(["train.epochs=1", "--dry-run"]) == 0
    assert "train.warmup_epochs=0 train.epochs=1" in capsys.readouterr().out
