"""The split stage as its container runs it: one process, SM_* variables, exit codes."""

import re
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
from toy_data import call_jobs, draw, failure, noise_in, read_rows, run_stage, write_data


def run_split(root: Path, *arguments: str) -> int:
    """Run the split of `train` below `root` in this process; return the exit code."""
    return run_stage(root, "split", "split", *arguments)


def read_table(root: Path) -> FoldTable:
    return read_folds(root / "split" / "output" / "folds.parquet", root / "split" / "output" / "classes.json")


def read_summary(root: Path) -> dict:
    return read_json(root / "split" / "output" / "split_summary.json")


def test_class_folders_with_unusual_names_are_split(tmp_path, capsys):
    images = tmp_path / "train" / "train"
    noise_in(images, ("id", "fold", "p/x", "사과, 배"), 20)
    modes = {"id/L.jpg": "L", "id/CMYK.jpg": "CMYK", "fold/twin.png": "RGB", "id/twin.bmp": "RGB"}
    with Image.open(images / "p" / "x" / "0.png") as image:
        for name, mode in modes.items():
            image.convert(mode).save(images / name)
    draw(images / "id" / "copy.png", np.random.default_rng(0))  # as id/0.png
    draw(tmp_path / "train" / "test" / "1.png", np.random.default_rng(1))

    assert run_split(tmp_path, "split.holdout=0.2") == 0
    table, summary = read_table(tmp_path), read_summary(tmp_path)
    assert table.classes == ("fold", "id", "p", "사과, 배")
    assert len(table) == summary["rows"] == 85
    counts = {"fold": 21, "id": 24, "p": 20, "사과, 배": 20}
    assert read_json(tmp_path / "split" / "output" / "classes.json")["counts"] == counts
    assert table.num_folds == 5
    assert 16 <= len(table.held_out_rows()) <= 20
    assert np.ptp([len(table.valid_rows(fold)) for fold in range(5)]) <= 4
    assert all(len(value) == 64 for value in table.sha256.to_pylist())

    twins = [row for row, path in enumerate(table.paths.to_pylist()) if "twin" in path or path.endswith("p/x/0.png")]
    assert len({(table.fold[row], table.part[row]) for row in twins}) == 1
    assert (summary["duplicates"]["sets"], summary["conflicting_duplicates"]["sets"]) == (2, 1)
    assert summary["conflicting_duplicates"]["labels"][0]["train/id/twin.bmp"] == "id"
    assert re.search(r"WARNING split: 1 .* labels", capsys.readouterr().err)

    first = table.sha256
    assert run_split(tmp_path, "split.holdout=0.2") == 0
    assert "nothing to do" in capsys.readouterr().err
    draw(images / "id" / "0.png", np.random.default_rng(2))
    assert run_split(tmp_path, "split.holdout=0.2") == 0
    assert "inputs differ: train" in capsys.readouterr().err
    assert not read_table(tmp_path).sha256.equals(first)


def test_unreadable_images_stop_the_stage_unless_they_are_skipped(tmp_path, capsys):
    noise_in(write_data(tmp_path / "train", "c/text.jpg"), ("a", "b"), 10)
    (tmp_path / "train" / "b" / "cut.jpg").write_bytes((tmp_path / "train" / "b" / "1.png").read_bytes()[:200])
    (tmp_path / "train" / "c" / "text.jpg").write_bytes(b"this is no image")
    assert run_split(tmp_path) == 65
    assert all(part in failure(tmp_path / "split") for part in ("2 of 22 images", "b/cut.jpg", "c/text.jpg"))
    assert not list((tmp_path / "split" / "output").glob("*"))

    assert run_split(tmp_path, "split.skip_unreadable=true") == 0
    summary = read_summary(tmp_path)
    assert [entry["path"] for entry in summary["skipped"]] == ["b/cut.jpg", "c/text.jpg"]
    assert summary["lost_classes"] == ["c"]
    assert re.search(r"WARNING split: .*'c'", capsys.readouterr().err)
    assert read_table(tmp_path).classes == ("a", "b")


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
    (tmp_path / "train").mkdir()
    labels.to_csv(tmp_path / "train" / "train.csv", index=False)

    assert run_split(tmp_path, "split.verify_images=false", "split.seed=7", *arguments) == 0
    actual = pd.read_parquet(tmp_path / "split" / "output" / "folds.parquet")
    table = pd.read_csv(tmp_path / "train" / "train.csv").assign(fold=-1, part="train")
    assert table.target.dtype == ("int64" if numbers else "str")
    expected = notebook(table).sort_index()
    assert actual.id.tolist() == expected.image_path.tolist()
    assert actual.fold.tolist() == expected.fold.tolist()
    assert actual.part.tolist() == expected.part.tolist()


def test_digest_without_image_verification_covers_tables_and_names(tmp_path):
    write_data(tmp_path, "a.png", "b.zip", train="path,label\n")

    def digests() -> list[str]:
        return [
            channel_digest("train", tmp_path, tmp_path, {"split.verify_images": verify}) for verify in (False, True)
        ]

    history = [digests()]
    for name, content in [("a.png", b"3"), ("c.png", b""), ("train.csv", b"path,label\n1,2\n"), ("b.zip", b"4")]:
        (tmp_path / name).write_bytes(content)
        history.append(digests())
    assert [before[0] == after[0] for before, after in pairwise(history)] == [True, False, False, False]
    assert not any(before[1] == after[1] for before, after in pairwise(history))


def assert_split_is_cheap(root: Path, *arguments: str) -> None:
    """Run the stage in a process and check its CPU seconds and memory; an idle machine needs no more wall time than that."""
    environ = {"SM_OUTPUT_DATA_DIR": root / "split" / "output", "SM_CHANNEL_TRAIN": root / "train"}
    assert call_jobs("split", "split.verify_images=false", *arguments, **environ).returncode == 0
    record = read_json(root / "split" / "output" / "stage.json")
    assert record["cpu_seconds"] < 30
    assert record["peak_memory_mib"] < 2048


@pytest.mark.slow
def test_a_million_rows_are_split_within_cpu_and_memory_limits(tmp_path):
    rows, random = np.arange(1_000_000), np.random.default_rng(0)
    columns = {
        "image_path": [f"images/{row // 1000:04d}/{row:07d}.jpg" for row in rows],
        "target": random.permutation(rows % 400),
        "person": random.integers(0, 200_000, len(rows)),
    }
    (tmp_path / "train").mkdir()
    pa_csv.write_csv(pa.table(columns), tmp_path / "train" / "train.csv")
    assert_split_is_cheap(tmp_path)
    table = read_table(tmp_path)
    assert set(np.bincount(table.codes * 5 + table.fold)) == {500}
    assert table.sha256.null_count == len(table)
    assert_split_is_cheap(tmp_path, "data.group_column=person")


def test_products_stay_whole_and_parts_are_balanced_by_category(products, tmp_path):
    settings = ("data.layout=products", "split.ratios=[0.8,0.1,0.1]", "split.seed=2025")
    assert run_stage(tmp_path, "split", "split", *settings, TRAIN=products.root) == 0
    table, output = read_table(tmp_path), tmp_path / "split" / "output"
    files = {"train": "train_data.csv", "valid": "validation_data.csv", "test": "test_data.csv"}
    parts = {part: read_rows(output / name) for part, name in files.items()}
    assert sum(map(len, parts.values())) == len(table) == len(list(products.root.rglob("*.png")))
    ids = {part: {row["product_id"] for row in rows} for part, rows in parts.items()}
    # 40 products in categories of 28, 8 and 4: the shares count products, not images
    assert {part: len(names) for part, names in ids.items()} == {"train": 32, "valid": 4, "test": 4}
    assert len(set().union(*ids.values())) == 40
    tops = {part: sum(products.category[name] == "상의" for name in names) for part, names in ids.items()}
    assert (tops["train"] in (22, 23), {tops["valid"], tops["test"]} <= {2, 3}) == (True, True)

    by_path = dict(zip(table.paths.to_pylist(), zip(table.part, table.labels(), strict=True), strict=True))
    for part, rows in parts.items():
        for row in rows:
            assert list(row) == ["product_id", "image_path", "image_type"]
            assert by_path[row["image_path"]] == (part, row["image_type"])
            assert (products.root / row["image_path"]).is_file()
    summary = read_json(output / "data_split_summary.json")
    assert (summary["seed"], summary["shares"]) == (2025, {"train": 0.8, "valid": 0.1, "test": 0.1})
    assert summary["total"]["categories"] == {"가방": 4, "상의": 28, "하의": 8}
    assert summary["parts"]["test"]["products"] == 4
    assert summary["parts"]["test"]["images"] == len(parts["test"])
    assert sum(summary["parts"]["valid"]["image_types"].values()) == len(parts["valid"])
    recorded = read_json(output / "stage.json")["outputs"]
    assert {"output/data_split_summary.json", *(f"output/{name}" for name in files.values())} <= set(recorded)


def test_write_csv_controls_part_tables_of_other_layouts(tmp_path):
    noise_in(tmp_path / "train", ("a", "b"), 10)
    output = tmp_path / "split" / "output"
    assert run_split(tmp_path, "split.write_csv=true", "split.ratios=0.6,0.2,0.2") == 0
    assert len(read_rows(output / "train_data.csv")) == 12
    assert "categories" not in read_json(output / "data_split_summary.json")["total"]
    assert run_split(tmp_path) == 0
    assert not list(output.glob("*_data.csv"))


def test_other_files_are_counted_and_a_class_without_images_stops_the_stage(tmp_path, capsys):
    others = ("a/x.dng", "a/y.DNG", "a/@eaDir/0.png", "@eaDir/1.png", "a/z", "cover.png", ".git/1")
    noise_in(write_data(tmp_path / "train", *others), ("a", "b"), 10)
    (tmp_path / "train" / "empty").mkdir()
    assert run_split(tmp_path) == 0
    summary = read_summary(tmp_path)
    counts = {".dng": 2, "hidden": 1, "in system folders": 2, "without suffix": 1, "in no class folder": 1}
    assert (summary["left_out"], summary["rows"], summary["lost_classes"]) == (counts, 20, [])
    log = capsys.readouterr().err.splitlines()
    assert len([line for line in log if "WARNING" in line and "2 .dng" in line]) == 1
    assert len([line for line in log if "WARNING" in line and "'empty'" in line]) == 1

    write_data(tmp_path / "train", "c/1.dng", "c/2.dng")
    for verify in ("true", "false"):
        assert run_stage(tmp_path, "split", "lost", f"split.verify_images={verify}") == 65
        assert "'c' (2 .dng)" in failure(tmp_path / "lost")
    assert run_split(tmp_path, "split.skip_unreadable=true") == 0
    summary = read_summary(tmp_path)
    assert (summary["lost_classes"], summary["left_out"][".dng"], summary["classes"]) == (["c"], 4, 2)
