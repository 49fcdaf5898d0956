"""Tables of predictions blended by the ensemble's entrypoint: no model, no image, no table as a whole in memory."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fivefold.contract.files import sha256
from fivefold.inference.tables import save_predictions
from fivefold.predictions import Predictions, TableWriter, read
from jobs.__main__ import run

CLASSES = ("cat", "dog", "eel")
ROWS = 40


def table(system: str, seed: int, rows: int = ROWS) -> Predictions:
    probs = np.random.default_rng(seed).dirichlet(np.ones(len(CLASSES)), rows)
    ids = np.array([f"TEST_{n}" for n in range(rows)], object)
    return Predictions(ids, np.full(rows, -1, np.int16), system, CLASSES, np.log(probs).astype(np.float32))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """The tables of three runs, as they lie in their folders."""
    for seed, system in enumerate(("eva", "nfnet", "resnet")):
        save_predictions(tmp_path / "runs" / system / "predictions.parquet", table(system, seed))
    return tmp_path


def stage(root: Path, folder: str, *arguments: str, **channels: str) -> int:
    given = {"SUBMISSIONS": str(root / "runs")} | channels
    environment = {f"SM_CHANNEL_{key}": path for key, path in given.items()}
    output = {"SM_OUTPUT_DATA_DIR": str(root / folder / "output"), "SM_OUTPUT_DIR": str(root / folder)}
    return run("ensemble", arguments, environment | output)


def cells(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def mean(*systems: str, root: Path) -> np.ndarray:
    return np.mean([np.exp(read(root / "runs" / name / "predictions.parquet").log_probs) for name in systems], axis=0)


def test_tables_become_one_with_a_submission_and_without_an_image(world):
    assert stage(world, "mean") == 0
    found = read(world / "mean" / "output" / "predictions.parquet")
    expected = mean("eva", "nfnet", "resnet", root=world)
    np.testing.assert_allclose(np.exp(found.log_probs), expected, rtol=1e-5)
    assert (found.system, found.classes, found.labels) == ("eva + nfnet + resnet", CLASSES, None)
    rows = cells(world / "mean" / "output" / "submission.csv")
    assert rows[0] == ["ID", *CLASSES]
    assert [row[0] for row in rows[1:]] == list(found.ids)
    np.testing.assert_allclose(np.array([row[1:] for row in rows[1:]], float), expected, rtol=1e-5)
    facts = json.loads((world / "mean" / "output" / "ensemble.json").read_text())
    assert set(facts["weights"]) == {"eva", "nfnet", "resnet"}
    assert [member["model"] for member in facts["members"]] == ["file predictions.parquet"] * 3


def test_weights_answers_and_a_table_that_the_settings_name(world):
    named = save_predictions(world / "output_extra.parquet", table("x", 9))
    weights = 'ensemble.weights={"eva": 3, "nfnet": 0, "resnet": 0, "extra": 1}'
    arguments = ("ensemble.blend=weighted", weights, f"ensemble.submissions={named}", "ensemble.answer_column=target")
    assert stage(world, "weighted", *arguments, "ensemble.number_column=no") == 0
    expected = 0.75 * mean("eva", root=world) + 0.25 * np.exp(read(named).log_probs)
    found = read(world / "weighted" / "output" / "predictions.parquet")
    np.testing.assert_allclose(np.exp(found.log_probs), expected, rtol=1e-5)
    rows = cells(world / "weighted" / "output" / "submission.csv")
    assert rows[0] == ["no", "ID", "target"]
    best = [CLASSES[code] for code in expected.argmax(axis=1)]
    assert rows[1:] == [[str(n), f"TEST_{n}", name] for n, name in enumerate(best)]


def with_images(root: Path) -> str:
    """An eval channel whose sample submission has its rows and columns in another order."""
    folder = root / "eval" / "test"
    folder.mkdir(parents=True)
    for n in range(ROWS):
        Image.new("RGB", (4, 4)).save(folder / f"{n}.png")
    table = [["ID", "img_path"], *([f"TEST_{n}", f"test/{n}.png"] for n in range(ROWS))]
    sample = [["key", *CLASSES[::-1]], *([f"TEST_{n}", 0, 0, 0] for n in reversed(range(ROWS)))]
    for name, rows in (("test.csv", table), ("sample_submission.csv", sample)):
        with open(root / "eval" / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
    return str(root / "eval")


def test_the_sample_submission_is_followed_row_by_row_and_column_by_column(world):
    assert stage(world, "sampled", EVAL=with_images(world)) == 0
    rows = cells(world / "sampled" / "output" / "submission.csv")
    assert rows[0] == ["key", *CLASSES[::-1]]
    assert [row[0] for row in rows[1:]] == [f"TEST_{n}" for n in reversed(range(ROWS))]
    expected = mean("eva", "nfnet", "resnet", root=world)[::-1, ::-1]
    np.testing.assert_allclose(np.array([row[1:] for row in rows[1:]], float), expected, rtol=1e-5)


@pytest.mark.parametrize("blend", ["mean", "geometric", "vote"])
def test_tables_beside_a_csv_or_in_a_blend_of_whole_tables_are_read_as_files_are(world, blend):
    channel = with_images(world)
    with open(world / "output_csv.csv", "w", encoding="utf-8", newline="") as file:
        rows = zip(table("", 7).ids, np.exp(table("", 7).log_probs), strict=True)
        csv.writer(file).writerows([["ID", *CLASSES], *([name, *row] for name, row in rows)])
    arguments = (f"ensemble.blend={blend}", f"ensemble.submissions={world / 'output_csv.csv'}")
    assert stage(world, blend, *arguments, EVAL=channel) == 0
    facts = json.loads((world / blend / "output" / "ensemble.json").read_text())
    assert set(facts["weights"]) == {"eva", "nfnet", "resnet", "csv"}
    if blend == "mean":
        each = [mean("eva", "nfnet", "resnet", root=world) * 3, np.exp(table("", 7).log_probs)]
        found = read(world / blend / "output" / "predictions.parquet").with_classes(CLASSES)
        np.testing.assert_allclose(np.exp(found.log_probs), sum(each) / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "arguments", "code", "message"),
    [
        (lambda root: None, ["ensemble.blend=geometric"], 66, "needs the channel 'eval'"),
        (lambda root: None, ["ensemble.submissions=absent.parquet"], 66, "no file absent.parquet"),
        (
            lambda root: save_predictions(root / "runs" / "again" / "predictions.parquet", table("eva", 5)),
            [], 65, "are both called 'eva'",
        ),
        (
            lambda root: (root / "runs" / "eva" / "predictions.parquet").write_bytes(b"PAR1"),
            [], 65, "is not a Parquet table",
        ),
        (
            lambda root: save_predictions(root / "runs" / "eva" / "predictions.parquet", table("eva", 0, ROWS - 1)),
            [], 65, "speaks of other rows: 1 of its ids are not among them ('TEST_39')",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_blended_leaves_nothing_half_written(world, damage, arguments, code, message):
    damage(world)
    assert stage(world, "refused", *arguments) == code
    assert message in (world / "refused" / "failure").read_text()
    output = world / "refused" / "output"
    assert not output.exists() or list(output.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_half_written(world, tiny_disk):
    for seed, system in enumerate(("eva", "nfnet", "resnet")):
        save_predictions(world / "runs" / system / "predictions.parquet", table(system, seed, 4000))
    channels = {"SM_CHANNEL_SUBMISSIONS": str(world / "runs"), "SM_OUTPUT_DATA_DIR": str(tiny_disk / "output")}
    assert run("ensemble", (), channels | {"SM_OUTPUT_DIR": str(world / "full")}) == 75
    assert "no space left to write" in (world / "full" / "failure").read_text()
    assert list((tiny_disk / "output").iterdir()) == []


def test_the_record_holds_the_digests_of_what_lies_there(world):
    assert stage(world, "mean") == 0
    output = world / "mean" / "output"
    outputs = json.loads((output / "stage.json").read_text())["outputs"]
    assert outputs == {
        f"output/{name}": sha256(output / name) for name in ("predictions.parquet", "submission.csv", "ensemble.json")
    }


GROUP = 65_536


def write_tables(folder: Path, rows: int, classes: int) -> None:
    names = [f"class {number:03d}" for number in range(classes)]
    for seed in range(5):
        random = np.random.default_rng(seed)
        with TableWriter(folder / f"output_s{seed}.parquet", f"s{seed}", names, labelled=False) as writer:
            for start in range(0, rows, GROUP):
                count = min(GROUP, rows - start)
                logits = random.standard_normal((classes, count), dtype=np.float32) * 3
                ids = pa.array([f"row{n:08d}" for n in range(start, start + count)])
                writer.write(ids, np.full(count, -1), logits - np.log(np.exp(logits).sum(axis=0)))


def measured(folder: Path, rows: int) -> dict[str, float]:
    """What the record of the stage says of joining five tables of that many rows, in a process of its own."""
    (folder / "tables").mkdir(parents=True)
    write_tables(folder / "tables", rows, 100)
    code = "import sys; from jobs.__main__ import main; code = main(['ensemble']); print('torch' in sys.modules); sys.exit(code)"
    output = folder / "output"
    environ = {"SM_CHANNEL_SUBMISSIONS": str(folder / "tables"), "SM_OUTPUT_DATA_DIR": str(output)}
    repository = Path(__file__).parents[2]
    environ |= {"PYTHONPATH": f"{repository / 'src'}:{repository}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
    return json.loads((output / "stage.json").read_text())


@pytest.mark.slow
def test_a_million_rows_take_seconds_and_the_memory_of_a_few(tmp_path):
    small, large = measured(tmp_path / "small", 250_000), measured(tmp_path / "large", 1_000_000)
    assert large["peak_memory_mib"] < 2 * 600
    assert large["peak_memory_mib"] < small["peak_memory_mib"] + 150
    assert large["cpu_seconds"] < 2 * 2 * 8
    assert large["cpu_seconds"] < 1.5 * 4 * small["cpu_seconds"]
