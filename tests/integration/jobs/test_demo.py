"""The demo images: all digits of scikit-learn, unchanged, always with the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fivefold.contract.files import tree_sha256
from jobs import demo
from toy_data import read_cells


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data" / "demo"
    demo.write_digits(folder)
    return folder


def test_demo_writes_every_digit_once_and_a_fifth_of_every_class_as_test_images(demo_folder: Path) -> None:
    digits = load_digits()
    truth = dict(read_cells(demo_folder / "test" / "gt.csv")[1:])
    train = {path: path.parent.name for path in (demo_folder / "train").glob("*/*.png")}
    labels = {**train, **{path: truth[path.stem] for path in (demo_folder / "test").glob("*.png")}}
    assert (len(train), len(labels)) == (1437, 1797)
    pixels = sorted((str(label), np.asarray(Image.open(path)).tobytes()) for path, label in labels.items())
    expected = np.rint(digits.images / 16 * 255).astype(np.uint8)
    assert pixels == sorted((str(t), image.tobytes()) for t, image in zip(digits.target, expected, strict=True))
    for digit in "0123456789":
        shares = [list(table.values()).count(digit) for table in (truth, labels)]
        assert shares[0] / shares[1] == pytest.approx(0.2, abs=0.005)


def test_demo_writes_tables_in_competition_format(demo_folder: Path) -> None:
    table, sample = (read_cells(demo_folder / "test" / f"{name}.csv") for name in ("test", "sample_submission"))
    assert table[0] == ["ID", "img_path"]
    assert sample[0] == ["ID", *"0123456789"]
    assert [row[0] for row in table] == [row[0] for row in sample]
    assert all((demo_folder / "test" / path).is_file() for _, path in table[1:])
    assert (demo_folder / "test" / "sample_submission.csv").read_bytes().startswith(b"\xef\xbb\xbfID,")


def test_demo_keeps_complete_files_and_rewrites_incomplete_ones(demo_folder: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in demo_folder.rglob("*.*")}

    before, digest = times(), tree_sha256(demo_folder)
    demo.write_digits(demo_folder)
    assert times() == before
    (demo_folder / "test" / "gt.csv").unlink()
    demo.write_digits(demo_folder)
    assert tree_sha256(demo_folder) == digest


def test_one_epoch_demo_has_no_warmup(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_folder.parents[1])
    assert demo.main(["train.epochs=1", "--dry-run"]) == 0
    assert "train.warmup_epochs=0 train.epochs=1" in capsys.readouterr().out
