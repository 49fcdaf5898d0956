"""The split stage as its container runs it: one process, SM_* variables, exit codes."""

import re
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
from PIL import Image
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split

from fivefold.contract.artifacts import channel_digest
from fivefold.contract.files import read_json
from fivefold.data.split.fold_table import FoldTable, read_folds
from jobs.__main__ import run
from toy_data import call_jobs, read_rows

RANDOM = np.random.default_rng(0)


def run_split(channel: Path, output: Path, *arguments: str) -> int:
    """Run the split of a channel in this process; return the exit code."""
    environ = {"SM_OUTPUT_DATA_DIR": output, "SM_OUTPUT_DIR": output.parent, "SM_CHANNEL_TRAIN": channel}
    return run("split", arguments, {name: str(path) for name, path in environ.items()})


def make_image(kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    """Return an image file of 8 x 12 random pixels, different at each call."""
    pixels = Image.fromarray(RANDOM.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    file = BytesIO()
    pixels.convert(mode).save(file, kind, **options)
    return file.getvalue()


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def make_class_folders(*classes: str, size: int = 10) -> dict[str, bytes]:
    return {f"{name}/{number}.png": make_image() for name in classes for number in range(size)}


def read_table(output: Path) -> FoldTable:
    return read_folds(output / "folds.parquet", output / "classes.json")


def test_class_folders_with_unusual_names_are_split(tmp_path, capsys):
    duplicate = make_image()
    files = make_class_folders("id", "fold", "p/x", "사과, 배", size=20)
    files |= {f"id/{mode}.jpg": make_image("JPEG", mode) for mode in ("L", "CMYK")}
    files |= {f"fold/twin{number}.png": duplicate for number in range(3)} | {"id/twin.bmp": to_bmp(duplicate)}
    channel, output = write_files(tmp_path / "data" / "train", files).parent, tmp_path / "out"
    write_files(channel, {"test/1.png": make_image()})

    assert run_split(channel, output, "split.holdout=0.2") == 0
    table, summary = read_table(output), read_json(output / "split_summary.json")
    assert table.classes == ("fold", "id", "p", "사과, 배")
    assert len(table) == summary["rows"] == 86
    counts = {"fold": 23, "id": 23, "p": 20, "사과, 배": 20}
    assert read_json(output / "classes.json")["counts"] == counts
    assert table.num_folds == 5
    assert 16 <= len(table.held_out_rows()) <= 18
    assert np.ptp([len(table.valid_rows(fold)) for fold in range(5)]) <= 4
    assert all(len(value) == 64 for value in table.sha256.to_pylist())

    duplicate_rows = [row for row, path in enumerate(table.paths.to_pylist()) if "twin" in path]
    assert len({(table.fold[row], table.part[row]) for row in duplicate_rows}) == 1
    assert summary["duplicates"]["sets"] == summary["conflicting_duplicates"]["sets"] == 1
    assert summary["conflicting_duplicates"]["labels"][0]["train/id/twin.bmp"] == "id"
    assert re.search(r"WARNING split: 1 .* labels", capsys.readouterr().err)

    first = (output / "folds.parquet").read_bytes()
    assert run_split(channel, output, "split.holdout=0.2") == 0
    assert "nothing to do" in capsys.readouterr().err
    write_files(channel, {"train/id/0.png": make_image()})
    assert run_split(channel, output, "split.holdout=0.2") == 0
    assert "inputs differ: train" in capsys.readouterr().err
    assert (output / "folds.parquet").read_bytes() != first


def to_bmp(content: bytes) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(content)).save(file, "BMP")
    return file.getvalue()


def test_unreadable_images_stop_the_stage_unless_they_are_skipped(tmp_path, capsys):
    image = make_image("JPEG")
    broken = {"b/cut.jpg": image[: len(image) // 2], "c/text.jpg": b"this is no image"}
    channel = write_files(tmp_path / "data", {**make_class_folders("a", "b"), **broken})
    assert run_split(channel, tmp_path / "out") == 65
    message = (tmp_path / "failure").read_text().splitlines()[0]
    assert all(part in message for part in ("2 of 22 images", "b/cut.jpg", "c/text.jpg"))
    assert not list((tmp_path / "out").glob("*"))

    assert run_split(channel, tmp_path / "out", "split.skip_unreadable=true") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    assert [entry["path"] for entry in summary["skipped"]] == ["b/cut.jpg", "c/text.jpg"]
    assert summary["lost_classes"] == ["c"]
    assert re.search(r"WARNING split: .*'c'", capsys.readouterr().err)
    assert read_table(tmp_path / "out").classes == ("a", "b")


NOTEBOOK = {"shuffle": True, "random_state": 7}


def notebook_folds(table: pd.DataFrame, splitter: object) -> pd.DataFrame:
    for number, (_, valid) in enumerate(splitter.split(table, table.target)):
        table.iloc[valid, table.columns.get_loc("fold")] = number
    return table


def notebook_holdout(table: pd.DataFrame) -> pd.DataFrame:
    train, holdout = train_test_split(table, test_size=0.15, stratify=table.target, random_state=7)
    return pd.concat([notebook_folds(train.copy(), StratifiedKFold(5, **NOTEBOOK)), holdout.assign(part="holdout")])


def notebook_parts(table: pd.DataFrame) -> pd.DataFrame:
    rest, test = train_test_split(table, test_size=0.1, stratify=table.target, random_state=7)
    train, valid = train_test_split(rest, test_size=0.1 / (0.8 + 0.1), stratify=rest.target, random_state=7)
    return pd.concat([train, valid.assign(part="valid", fold=0), test.assign(part="test")])


@pytest.mark.parametrize(
    ("arguments", "notebook"),
    [
        (["split.folds=4"], lambda table: notebook_folds(table, StratifiedKFold(4, **NOTEBOOK))),
        (["split.stratify=false"], lambda table: notebook_folds(table, KFold(5, **NOTEBOOK))),
        (["split.holdout=0.15"], notebook_holdout),
        (["split.ratios=[0.8,0.1,0.1]"], notebook_parts),
    ],
)
@pytest.mark.parametrize("numbers", [True, False])
def test_folds_equal_those_of_a_scikit_learn_notebook_row_by_row(tmp_path, arguments, notebook, numbers):
    random = np.random.default_rng(3)
    codes = np.concatenate([random.choice(12, 1988, p=random.dirichlet(np.full(12, 5.0))), np.arange(12)])
    names = codes.astype(str) if numbers else np.array([f"{'xab'[code % 3]}{code}" for code in codes])
    labels = pd.DataFrame({"image_path": [f"{number:04d}.jpg" for number in random.permutation(2000)], "target": names})
    (tmp_path / "data").mkdir()
    labels.to_csv(tmp_path / "data" / "train.csv", index=False)

    assert run_split(tmp_path / "data", tmp_path / "out", "split.verify_images=false", "split.seed=7", *arguments) == 0
    actual = pd.read_parquet(tmp_path / "out" / "folds.parquet")
    table = pd.read_csv(tmp_path / "data" / "train.csv").assign(fold=-1, part="train")
    assert table.target.dtype == ("int64" if numbers else "str")
    expected = notebook(table).sort_index()
    assert actual.id.tolist() == expected.image_path.tolist()
    assert actual.fold.tolist() == expected.fold.tolist()
    assert actual.part.tolist() == expected.part.tolist()


ONE_CLASS = make_class_folders("only")
THREE_IMAGES = dict.fromkeys((f"a/{n}.png" for n in range(5)), make_image()) | make_class_folders("b", size=2)


@pytest.mark.parametrize(
    ("files", "arguments", "code", "message"),
    [
        (None, [], 66, "does not exist"),
        ({".hidden": b""}, [], 65, "holds no images"),
        (ONE_CLASS, [], 65, "only 1 class"),
        (ONE_CLASS, ["split.fold=3"], 64, "split.folds"),
        (THREE_IMAGES, [], 64, "split.folds=5"),
        (ONE_CLASS, ["split.seed=-1"], 64, "split.seed=-1"),
    ],
)
def test_bad_input_has_its_own_exit_code(tmp_path, files, arguments, code, message, capsys):
    write_files(tmp_path / "data", files or {})
    assert run_split(tmp_path / "data", tmp_path / "out", *arguments) == code
    errors = capsys.readouterr().err
    assert (message in errors, "Traceback" in errors) == (True, False)
    assert not list((tmp_path / "out").glob("*"))


def test_digest_without_image_verification_covers_tables_and_names(tmp_path):
    channel = write_files(tmp_path, {"train.csv": b"path,label\n", "a.png": b"1", "b.zip": b"2"})

    def digests() -> list[str]:
        return [channel_digest("train", channel, tmp_path, {"split.verify_images": verify}) for verify in (False, True)]

    history = [digests()]
    for name, content in [("a.png", b"3"), ("c.png", b""), ("train.csv", b"path,label\n1,2\n"), ("b.zip", b"4")]:
        write_files(channel, {name: content})
        history.append(digests())
    assert [before[0] == after[0] for before, after in pairwise(history)] == [True, False, False, False]
    assert not any(before[1] == after[1] for before, after in pairwise(history))


def assert_split_is_cheap(channel: Path, output: Path, *arguments: str) -> None:
    """Run the stage in a process and check its CPU seconds and memory; an idle machine needs no more wall time than that."""
    environ = {"SM_OUTPUT_DATA_DIR": output, "SM_CHANNEL_TRAIN": channel}
    assert call_jobs("split", "split.verify_images=false", *arguments, **environ).returncode == 0
    record = read_json(output / "stage.json")
    assert record["cpu_seconds"] < 30
    assert record["peak_memory_mib"] < 2048


@pytest.mark.slow
def test_a_million_rows_are_split_within_cpu_and_memory_limits(tmp_path):
    rows = np.arange(1_000_000)
    columns = {
        "image_path": [f"images/{row // 1000:04d}/{row:07d}.jpg" for row in rows],
        "target": RANDOM.permutation(rows % 400),
        "person": RANDOM.integers(0, 200_000, len(rows)),
    }
    (tmp_path / "data").mkdir()
    pa_csv.write_csv(pa.table(columns), tmp_path / "data" / "train.csv")
    assert_split_is_cheap(tmp_path / "data", tmp_path / "out")
    table = read_table(tmp_path / "out")
    assert set(np.bincount(table.codes * 5 + table.fold)) == {500}
    assert table.sha256.null_count == len(table)
    assert_split_is_cheap(tmp_path / "data", tmp_path / "grouped", "data.group_column=person")


PRODUCTS = ("data.layout=products", "split.ratios=[0.8,0.1,0.1]", "split.seed=2025")


def test_products_stay_whole_and_parts_are_balanced_by_category(products, tmp_path):
    assert run_split(products.root, tmp_path / "out", *PRODUCTS) == 0
    table = read_table(tmp_path / "out")
    files = {"train": "train_data.csv", "valid": "validation_data.csv", "test": "test_data.csv"}
    parts = {part: read_rows(tmp_path / "out" / name) for part, name in files.items()}
    assert sum(map(len, parts.values())) == len(table) == len(list(products.root.rglob("*.png")))
    assert all(list(row) == ["product_id", "image_path", "image_type"] for rows in parts.values() for row in rows)
    part_products = {part: {row["product_id"] for row in rows} for part, rows in parts.items()}
    # 40 products in categories of 28, 8 and 4: the shares count products, not images
    assert {part: len(names) for part, names in part_products.items()} == {"train": 32, "valid": 4, "test": 4}
    assert len(part_products["train"] | part_products["valid"] | part_products["test"]) == 40
    top_counts = {
        part: sum(products.category[name] == "상의" for name in names) for part, names in part_products.items()
    }
    assert top_counts["train"] in (22, 23)
    assert {top_counts["valid"], top_counts["test"]} <= {2, 3}

    by_path = dict(zip(table.paths.to_pylist(), zip(table.part, table.labels(), strict=True), strict=True))
    for part, rows in parts.items():
        assert all(by_path[row["image_path"]] == (part, row["image_type"]) for row in rows)
        assert all((products.root / row["image_path"]).is_file() for row in rows)
    summary = read_json(tmp_path / "out" / "data_split_summary.json")
    assert summary["seed"] == 2025
    assert summary["shares"] == {"train": 0.8, "valid": 0.1, "test": 0.1}
    assert summary["total"]["categories"] == {"가방": 4, "상의": 28, "하의": 8}
    assert summary["parts"]["test"]["products"] == 4
    assert summary["parts"]["test"]["images"] == len(parts["test"])
    assert sum(summary["parts"]["valid"]["image_types"].values()) == len(parts["valid"])
    recorded = read_json(tmp_path / "out" / "stage.json")["outputs"]
    assert {"output/data_split_summary.json", *(f"output/{name}" for name in files.values())} <= set(recorded)


def test_write_csv_controls_part_tables_of_other_layouts(tmp_path):
    channel, output = write_files(tmp_path / "data", make_class_folders("a", "b")), tmp_path / "out"
    assert run_split(channel, output, "split.write_csv=true", "split.ratios=0.6,0.2,0.2") == 0
    assert len(read_rows(output / "train_data.csv")) == 12
    assert "categories" not in read_json(output / "data_split_summary.json")["total"]
    assert run_split(channel, output) == 0
    assert not list(output.glob("*_data.csv"))


def test_other_files_are_counted_and_a_class_without_images_stops_the_stage(tmp_path, capsys):
    other_files = dict.fromkeys(
        ["a/x.dng", "a/y.DNG", "a/@eaDir/0.png", "@eaDir/1.png", "a/z", "cover.png", ".git/1"], b""
    )
    channel = write_files(tmp_path / "data", {**make_class_folders("a", "b"), **other_files})
    (channel / "empty").mkdir()
    assert run_split(channel, tmp_path / "out") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    counts = {".dng": 2, "hidden": 1, "in system folders": 2, "without suffix": 1, "in no class folder": 1}
    assert (summary["left_out"], summary["rows"], summary["lost_classes"]) == (counts, 20, [])
    log = capsys.readouterr().err.splitlines()
    assert len([line for line in log if "WARNING" in line and "2 .dng" in line]) == 1
    assert len([line for line in log if "WARNING" in line and "'empty'" in line]) == 1

    write_files(channel, {"c/1.dng": b"", "c/2.dng": b""})
    for verify in ("true", "false"):
        assert run_split(channel, tmp_path / "lost", f"split.verify_images={verify}") == 65
        assert "'c' (2 .dng)" in (tmp_path / "failure").read_text().splitlines()[0]
    assert run_split(channel, tmp_path / "out", "split.skip_unreadable=true") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    assert (summary["lost_classes"], summary["left_out"][".dng"], summary["classes"]) == (["c"], 4, 2)
