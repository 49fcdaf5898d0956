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


def split(channel: Path | None, output: Path, *arguments: str) -> int:
    """Runs the split of a channel in this process; returns the exit code."""
    given = {"SM_OUTPUT_DATA_DIR": str(output), "SM_OUTPUT_DIR": str(output.parent)}
    return run("split", arguments, given | ({"SM_CHANNEL_TRAIN": str(channel)} if channel else {}))


def picture(kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    """A file of 8 x 12 random pixels, no two alike."""
    pixels = Image.fromarray(RANDOM.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    file = BytesIO()
    pixels.convert(mode).save(file, kind, **options)
    return file.getvalue()


def odd_pictures() -> dict[str, bytes]:
    wide, palette, exif = BytesIO(), BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RANDOM.integers(0, 65536, (8, 12), dtype=np.uint16)).save(wide, "PNG")
    Image.frombytes("P", (4, 4), bytes(range(16))).save(palette, "PNG", transparency=bytes(range(16)))
    return {
        "grey.jpg": picture("JPEG", "L"),
        "cmyk.jpg": picture("JPEG", "CMYK"),
        "wide.png": wide.getvalue(),
        "palette.png": palette.getvalue(),
        "rotated.jpg": picture("JPEG", exif=exif),
    }


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def class_folders(*classes: str, size: int = 10) -> dict[str, bytes]:
    return {f"{name}/{number}.png": picture() for name in classes for number in range(size)}


def table_of(output: Path) -> FoldTable:
    return read_folds(output / "folds.parquet", output / "classes.json")


def test_folders_with_odd_images_and_odd_class_names(tmp_path, capsys):
    twin = picture()
    files = class_folders("id", "fold", "p/x", "사과, 배", size=20)
    files |= {f"id/{name}": content for name, content in odd_pictures().items()}
    files |= {f"fold/twin{number}.png": twin for number in range(3)} | {"id/twin.bmp": bmp_of(twin)}
    channel, output = write(tmp_path / "data" / "train", files).parent, tmp_path / "out"
    write(channel, {"test/1.png": picture()})

    assert split(channel, output, "split.holdout=0.2") == 0
    table, summary = table_of(output), read_json(output / "split_summary.json")
    assert table.classes == ("fold", "id", "p", "사과, 배")
    assert len(table) == summary["rows"] == 89
    counts = {"fold": 23, "id": 26, "p": 20, "사과, 배": 20}
    assert read_json(output / "classes.json")["counts"] == counts
    assert table.num_folds == 5
    assert 17 <= len(table.held_out_rows()) <= 19
    assert np.ptp([len(table.valid_rows(fold)) for fold in range(5)]) <= 4
    assert all(len(value) == 64 for value in table.sha256.to_pylist())

    twins = [row for row, path in enumerate(table.paths.to_pylist()) if "twin" in path]
    assert len({(table.fold[row], table.part[row]) for row in twins}) == 1
    assert summary["duplicates"]["sets"] == summary["conflicting_duplicates"]["sets"] == 1
    assert summary["conflicting_duplicates"]["labels"][0]["train/id/twin.bmp"] == "id"
    assert re.search(r"WARNING split: 1 .* labels", capsys.readouterr().err)

    first = (output / "folds.parquet").read_bytes()
    assert split(channel, output, "split.holdout=0.2") == 0
    assert "nothing to do" in capsys.readouterr().err
    write(channel, {"train/id/0.png": picture()})
    assert split(channel, output, "split.holdout=0.2") == 0
    assert "inputs differ: train" in capsys.readouterr().err
    assert (output / "folds.parquet").read_bytes() != first


def bmp_of(content: bytes) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(content)).save(file, "BMP")
    return file.getvalue()


def test_unreadable_images_stop_the_stage_or_are_left_out(tmp_path, capsys):
    whole = picture("JPEG")
    broken = {"b/cut.jpg": whole[: len(whole) // 2], "c/text.jpg": b"this is no image"}
    channel = write(tmp_path / "data", {**class_folders("a", "b"), **broken})
    assert split(channel, tmp_path / "out") == 65
    message = (tmp_path / "failure").read_text().splitlines()[0]
    assert "2 of 22 images cannot be read" in message
    assert "b/cut.jpg" in message
    assert "c/text.jpg" in message
    assert not list((tmp_path / "out").glob("*"))

    assert split(channel, tmp_path / "out", "split.skip_unreadable=true") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    assert [entry["path"] for entry in summary["skipped"]] == ["b/cut.jpg", "c/text.jpg"]
    assert summary["lost_classes"] == ["c"]
    assert re.search(r"WARNING split: .*'c'", capsys.readouterr().err)
    assert table_of(tmp_path / "out").classes == ("a", "b")


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
def test_folds_are_those_of_a_notebook_row_by_row(tmp_path, arguments, notebook, numbers):
    draw = np.random.default_rng(3)
    codes = np.concatenate([draw.choice(12, 1988, p=draw.dirichlet(np.full(12, 5.0))), np.arange(12)])
    names = codes.astype(str) if numbers else np.array([f"{'xab'[code % 3]}{code}" for code in codes])
    written = pd.DataFrame({"image_path": [f"{n:04d}.jpg" for n in draw.permutation(2000)], "target": names})
    (tmp_path / "data").mkdir()
    written.to_csv(tmp_path / "data" / "train.csv", index=False)

    assert split(tmp_path / "data", tmp_path / "out", "split.verify_images=false", "split.seed=7", *arguments) == 0
    found = pd.read_parquet(tmp_path / "out" / "folds.parquet")
    table = pd.read_csv(tmp_path / "data" / "train.csv").assign(fold=-1, part="train")
    assert table.target.dtype == ("int64" if numbers else "str")
    expected = notebook(table).sort_index()
    assert found.id.tolist() == expected.image_path.tolist()
    assert found.fold.tolist() == expected.fold.tolist()
    assert found.part.tolist() == expected.part.tolist()


def nothing(root: Path) -> Path:
    root.mkdir()
    return root


def one_class(root: Path) -> Path:
    return write(root, class_folders("only"))


def three_pictures(root: Path) -> Path:
    twins = dict.fromkeys((f"a/{number}.png" for number in range(5)), picture())
    return write(root, {**twins, "b/1.png": picture(), "b/2.png": picture()})


@pytest.mark.parametrize(
    ("made", "arguments", "code", "message"),
    [
        (None, [], 66, "SM_CHANNEL_TRAIN"),
        (lambda root: root / "nowhere", [], 66, "does not exist"),
        (nothing, [], 65, "holds no images"),
        (one_class, [], 65, "only 1 class"),
        (one_class, ["split.fold=3"], 64, "split.folds"),
        (three_pictures, [], 64, "split.folds=5, but there are only 3 rows"),
        (one_class, ["split.seed=-1"], 64, "split.seed=-1"),
    ],
)
def test_bad_input_has_its_exit_code(tmp_path, made, arguments, code, message, capsys):
    assert split(made(tmp_path / "data") if made else None, tmp_path / "out", *arguments) == code
    told = capsys.readouterr().err
    assert (message in told, "Traceback" in told) == (True, False)
    assert not list((tmp_path / "out").glob("*"))


def test_without_opened_images_the_key_covers_tables_and_names(tmp_path):
    channel = write(tmp_path, {"train.csv": b"path,label\n", "a.png": b"1", "b.zip": b"2"})

    def digests() -> list[str]:
        return [channel_digest("train", channel, tmp_path, {"split.verify_images": opened}) for opened in (False, True)]

    seen = [digests()]
    for name, content in [("a.png", b"3"), ("c.png", b""), ("train.csv", b"path,label\n1,2\n"), ("b.zip", b"4")]:
        write(channel, {name: content})
        seen.append(digests())
    assert [before[0] == after[0] for before, after in pairwise(seen)] == [True, False, False, False]
    assert not any(before[1] == after[1] for before, after in pairwise(seen))


def measure(channel: Path, output: Path, *arguments: str) -> None:
    """Asserts the CPU seconds and the memory of the stage in a process: on an idle machine it takes no more wall seconds."""
    given = {"SM_OUTPUT_DATA_DIR": output, "SM_CHANNEL_TRAIN": channel}
    assert call_jobs("split", "split.verify_images=false", *arguments, **given).returncode == 0
    record = read_json(output / "stage.json")
    assert record["cpu_seconds"] < 30
    assert record["peak_memory_mib"] < 2048


@pytest.mark.slow
def test_a_million_rows_take_seconds(tmp_path):
    rows = np.arange(1_000_000)
    columns = {
        "image_path": [f"images/{row // 1000:04d}/{row:07d}.jpg" for row in rows],
        "target": RANDOM.permutation(rows % 400),
        "person": RANDOM.integers(0, 200_000, len(rows)),
    }
    (tmp_path / "data").mkdir()
    pa_csv.write_csv(pa.table(columns), tmp_path / "data" / "train.csv")
    measure(tmp_path / "data", tmp_path / "out")
    found = table_of(tmp_path / "out")
    assert set(np.bincount(found.codes * 5 + found.fold)) == {500}
    assert found.sha256.null_count == len(found)
    measure(tmp_path / "data", tmp_path / "grouped", "data.group_column=person")


PRODUCTS = ("data.layout=products", "split.ratios=[0.8,0.1,0.1]", "split.seed=2025")


def test_products_are_parted_whole_and_evenly_by_category(products, tmp_path):
    assert split(products.root, tmp_path / "out", *PRODUCTS) == 0
    table = table_of(tmp_path / "out")
    files = {"train": "train_data.csv", "valid": "validation_data.csv", "test": "test_data.csv"}
    parts = {part: read_rows(tmp_path / "out" / name) for part, name in files.items()}
    assert sum(map(len, parts.values())) == len(table) == len(list(products.root.rglob("*.png")))
    assert all(list(row) == ["product_id", "image_path", "image_type"] for rows in parts.values() for row in rows)
    members = {part: {row["product_id"] for row in rows} for part, rows in parts.items()}
    # 40 products, of which 28, 8 and 4 are of a category: shares of products, whatever their numbers of images
    assert {part: len(found) for part, found in members.items()} == {"train": 32, "valid": 4, "test": 4}
    assert len(members["train"] | members["valid"] | members["test"]) == 40
    tops = {part: sum(products.category[name] == "상의" for name in found) for part, found in members.items()}
    assert tops["train"] in (22, 23)
    assert {tops["valid"], tops["test"]} <= {2, 3}

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


def test_other_layouts_get_the_tables_when_asked_and_lose_them_when_not(tmp_path):
    channel, output = write(tmp_path / "data", class_folders("a", "b")), tmp_path / "out"
    assert split(channel, output, "split.write_csv=true", "split.ratios=0.6,0.2,0.2") == 0
    assert len(read_rows(output / "train_data.csv")) == 12
    assert "categories" not in read_json(output / "data_split_summary.json")["total"]
    assert split(channel, output) == 0
    assert not list(output.glob("*_data.csv"))


def test_files_that_are_no_images_are_counted_and_a_class_without_images_stops_the_stage(tmp_path, capsys):
    others = dict.fromkeys(["a/x.dng", "a/y.DNG", "a/@eaDir/0.png", "@eaDir/1.png", "a/z", "cover.png", ".git/1"], b"")
    channel = write(tmp_path / "data", {**class_folders("a", "b"), **others})
    (channel / "empty").mkdir()
    assert split(channel, tmp_path / "out") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    counts = {".dng": 2, "hidden": 1, "in system folders": 2, "without suffix": 1, "in no class folder": 1}
    assert (summary["left_out"], summary["rows"], summary["lost_classes"]) == (counts, 20, [])
    told = capsys.readouterr().err.splitlines()
    assert len([line for line in told if "WARNING" in line and "2 .dng" in line]) == 1
    assert len([line for line in told if "WARNING" in line and "'empty'" in line]) == 1

    write(channel, {"c/1.dng": b"", "c/2.dng": b""})
    for opened in ("true", "false"):
        assert split(channel, tmp_path / "lost", f"split.verify_images={opened}") == 65
        assert "'c' (2 .dng)" in (tmp_path / "failure").read_text().splitlines()[0]
    assert split(channel, tmp_path / "out", "split.skip_unreadable=true") == 0
    summary = read_json(tmp_path / "out" / "split_summary.json")
    assert (summary["lost_classes"], summary["left_out"][".dng"], summary["classes"]) == (["c"], 4, 2)
