"""The split stage as its container runs it: one process, SM_* variables, exit codes."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.csv as pa_csv
import pytest
from PIL import Image

from fivefold.arrow import pa
from fivefold.contract.artifacts import channel_digest
from fivefold.contract.job import job_from
from fivefold.contract.stages import STAGES
from fivefold.data.folds import FoldTable, read_folds

REPOSITORY = Path(__file__).parents[2]
RANDOM = np.random.default_rng(0)


def split(channel: Path | None, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m jobs split ARGUMENTS`, as a process of its own."""
    environ = {"PATH": os.environ["PATH"], "SM_OUTPUT_DATA_DIR": str(output), "SM_OUTPUT_DIR": str(output.parent)}
    if channel is not None:
        environ["SM_CHANNEL_TRAIN"] = str(channel)
    command = [sys.executable, "-W", "error", "-m", "jobs", "split", *arguments]
    return subprocess.run(
        command, env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )


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


def test_folders_with_odd_images_and_odd_class_names(tmp_path: Path) -> None:
    twin = picture()
    files = class_folders("id", "fold", "p/x", "사과, 배", size=20)
    files |= {f"id/{name}": content for name, content in odd_pictures().items()}
    files |= {f"fold/twin{number}.png": twin for number in range(3)} | {"id/twin.bmp": bmp_of(twin)}
    channel, output = write(tmp_path / "data" / "train", files).parent, tmp_path / "out"
    write(channel, {"test/1.png": picture()})

    done = split(channel, output, "split.holdout=0.2")
    assert done.returncode == 0, done.stderr
    table, summary = table_of(output), json.loads((output / "split_summary.json").read_text())
    assert table.classes == ("fold", "id", "p", "사과, 배")
    assert len(table) == summary["rows"] == 89
    assert json.loads((output / "classes.json").read_text())["counts"] == {
        "fold": 23,
        "id": 26,
        "p": 20,
        "사과, 배": 20,
    }
    assert table.num_folds == 5
    assert 17 <= len(table.aside_rows()) <= 19
    assert np.ptp([len(table.valid_rows(fold)) for fold in range(5)]) <= 4
    assert all(len(value) == 64 for value in table.sha256.to_pylist())

    twins = [row for row, path in enumerate(table.paths.to_pylist()) if "twin" in path]
    assert len({(table.fold[row], table.part[row]) for row in twins}) == 1
    assert summary["duplicates"]["sets"] == summary["conflicting_duplicates"]["sets"] == 1
    assert summary["conflicting_duplicates"]["labels"][0]["train/id/twin.bmp"] == "id"
    assert "1 of them have contradicting labels" in done.stderr

    first = (output / "folds.parquet").read_bytes()
    again = split(channel, output, "split.holdout=0.2")
    assert (again.returncode, "nothing to do" in again.stderr) == (0, True)
    write(channel, {"train/id/0.png": picture()})
    changed = split(channel, output, "split.holdout=0.2")
    assert "inputs differ: train" in changed.stderr
    assert (output / "folds.parquet").read_bytes() != first


def bmp_of(content: bytes) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(content)).save(file, "BMP")
    return file.getvalue()


def test_a_zip_gives_the_same_folds_as_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", class_folders("a", "b", "c"))
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    for channel in (folder, tmp_path / "data.zip"):
        assert split(channel, tmp_path / f"out-{channel.name}").returncode == 0
    outputs = [(tmp_path / f"out-{name}" / "folds.parquet").read_bytes() for name in ("data", "data.zip")]
    assert outputs[0] == outputs[1]


def test_groups_and_parts_of_a_csv(tmp_path: Path) -> None:
    pictures = {f"{number}.png": picture() for number in range(60)}
    lines = [f"{number}.png,{'ab'[number % 2]},p{number // 3}" for number in range(60)]
    channel = write(tmp_path / "data", {**pictures, "train.csv": "\n".join(["path,label,who", *lines]).encode()})
    done = split(channel, tmp_path / "out", "data.group_column=who", "split.parts=[0.6,0.2,0.2]")
    assert done.returncode == 0, done.stderr
    table = table_of(tmp_path / "out")
    assert [len(table.train_rows(0)), len(table.valid_rows(0)), len(table.aside_rows())] == [36, 12, 12]
    parts = list(zip(table.groups.to_pylist(), table.part.tolist(), strict=True))
    assert len(set(parts)) == 20


def test_unreadable_images_stop_the_stage_or_are_left_out(tmp_path: Path) -> None:
    whole = picture("JPEG")
    broken = {"b/cut.jpg": whole[: len(whole) // 2], "c/text.jpg": b"this is no image"}
    channel = write(tmp_path / "data", {**class_folders("a", "b"), **broken})
    stopped = split(channel, tmp_path / "out")
    assert stopped.returncode == 65
    message = (tmp_path / "failure").read_text().splitlines()[0]
    assert "2 of 22 images cannot be read" in message
    assert "b/cut.jpg" in message
    assert "c/text.jpg" in message
    assert not list((tmp_path / "out").glob("*"))

    done = split(channel, tmp_path / "out", "split.skip_unreadable=true")
    assert done.returncode == 0, done.stderr
    skipped = json.loads((tmp_path / "out" / "split_summary.json").read_text())["skipped"]
    assert [entry["path"] for entry in skipped] == ["b/cut.jpg", "c/text.jpg"]
    assert table_of(tmp_path / "out").classes == ("a", "b")


def nothing(root: Path) -> Path:
    root.mkdir()
    return root


def one_class(root: Path) -> Path:
    return write(root, class_folders("only"))


def missing_file(root: Path) -> Path:
    return write(root, {"train.csv": b"image_path,target\n1.png,a\n2.png,b\n", "1.png": picture()})


def path_outside(root: Path) -> Path:
    write(root.parent, {"2.png": picture()})
    return write(root, {"train.csv": b"image_path,target\n1.png,a\n../2.png,b\n", "1.png": picture()})


def evil_zip(root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        archive.writestr("a/../../evil.jpg", picture())
    return root.with_suffix(".zip")


def bomb(root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", bytes(2**24))
    return root.with_suffix(".zip")


@pytest.mark.parametrize(
    ("made", "arguments", "code", "message"),
    [
        (None, [], 66, "SM_CHANNEL_TRAIN"),
        (lambda root: root / "nowhere", [], 66, "does not exist"),
        (nothing, [], 65, "holds no images"),
        (one_class, [], 65, "only 1 class"),
        (one_class, ["split.fold=3"], 64, "split.folds"),
        (missing_file, [], 65, "1 of 2 files that do not exist: '2.png'"),
        (path_outside, [], 65, "'../2.png'"),
        (evil_zip, [], 65, "a/../../evil.jpg"),
        (bomb, ["split.max_unpacked_gib=0.01"], 65, "split.max_unpacked_gib=0.01"),
    ],
)
def test_bad_input_has_its_exit_code(
    tmp_path: Path, made: Callable[[Path], Path] | None, arguments: list[str], code: int, message: str
) -> None:
    failed = split(made(tmp_path / "data") if made else None, tmp_path / "out", *arguments)
    assert failed.returncode == code
    assert message in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_more_folds_than_groups_is_refused_with_the_numbers(tmp_path: Path) -> None:
    twin = picture()
    channel = write(
        tmp_path / "data", {**{f"a/{n}.png": twin for n in range(5)}, "b/1.png": picture(), "b/2.png": picture()}
    )
    failed = split(channel, tmp_path / "out")
    assert failed.returncode == 64
    assert "split.folds=5, but there are only 3 groups (of 7 rows)" in failed.stderr


def test_without_opened_images_the_key_covers_tables_and_names(tmp_path: Path) -> None:
    channel = write(tmp_path, {"train.csv": b"path,label\n", "a.png": b"1", "b.zip": b"2"})
    job = job_from(STAGES["split"], {"SM_CHANNEL_TRAIN": str(channel)}, tmp_path)

    def digests() -> list[str]:
        return [channel_digest(job, "train", {"split.open_images": opened}) for opened in (False, True)]

    seen = [digests()]
    for name, content in [("a.png", b"3"), ("c.png", b""), ("train.csv", b"path,label\n1,2\n"), ("b.zip", b"4")]:
        write(channel, {name: content})
        seen.append(digests())
    assert [before[0] == after[0] for before, after in pairwise(seen)] == [True, False, False, False]
    assert not any(before[1] == after[1] for before, after in pairwise(seen))


def measured(channel: Path, output: Path, *arguments: str) -> tuple[float, float]:
    """(CPU seconds, peak MB) of the stage in a fresh process: on an idle machine it takes no more wall seconds."""
    environ = {"PATH": os.environ["PATH"], "SM_OUTPUT_DATA_DIR": str(output), "SM_CHANNEL_TRAIN": str(channel)}
    command = [sys.executable, "-m", "jobs", "split", "split.open_images=false", *arguments]
    process = subprocess.Popen(command, env=environ, cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    record = json.loads((output / "stage.json").read_text())
    return usage.ru_utime + usage.ru_stime, record["peak_memory_mib"] * 1.048576


@pytest.mark.slow
def test_a_million_rows_take_seconds(tmp_path: Path) -> None:
    rows = np.arange(1_000_000)
    columns = {
        "image_path": [f"images/{row // 1000:04d}/{row:07d}.jpg" for row in rows],
        "target": RANDOM.permutation(rows % 400),
        "person": RANDOM.integers(0, 200_000, len(rows)),
    }
    (tmp_path / "data").mkdir()
    pa_csv.write_csv(pa.table(columns), tmp_path / "data" / "train.csv")
    seconds, megabytes = measured(tmp_path / "data", tmp_path / "out")
    assert seconds < 4
    assert megabytes < 600
    found = table_of(tmp_path / "out")
    assert set(np.bincount(found.codes * 5 + found.fold)) == {500}
    assert found.sha256.null_count == len(found)
    seconds, megabytes = measured(tmp_path / "data", tmp_path / "grouped", "data.group_column=person")
    assert seconds < 10
    assert megabytes < 600
