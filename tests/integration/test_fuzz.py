"""Whatever stands in a file, it is read or refused with one of our errors: nothing of foreign bytes ends in a traceback.

Files that are whole are changed in a few places (which gets deeper than bytes at random), by hypothesis.
"""

import argparse
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fivefold import predictions
from fivefold.config.loading import Layer, arguments_layer, flatten, load, normalize_key, read_recipe
from fivefold.config.recipes import shipped_recipes
from fivefold.config.schema import Data, Settings
from fivefold.contract.artifacts import find_models
from fivefold.contract.failure import to_known_error
from fivefold.contract.job import hyperparameters
from fivefold.contract.lineage import read_record
from fivefold.contract.record import CacheKey, rerun_reason
from fivefold.data.image_io import decode
from fivefold.data.readers.stores import open_store
from fivefold.data.readers.training_rows import read_rows
from fivefold.data.readers.user_images import read_user_images
from fivefold.data.split.fold_table import read_folds
from fivefold.errors import FivefoldError
from fivefold.evaluation.ground_truth import read_ground_truth
from fivefold.inference.submission_reader import read_submission
from fivefold.models.weights import read_weights
from fivefold.predictions import Predictions

MOST = int(os.environ.get("FIVEFOLD_EXAMPLES", "60"))
"""Of each test; more of them find more."""
EXAMPLES = settings(
    max_examples=MOST, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
KEYS = sorted(flatten(Settings()))
CELLS = st.one_of(
    st.sampled_from(["", "a", "1", "0.5", "-1", "nan", "inf", "1e999", "../x", "a/b.png", "\ufeff", '"', "=1+1"]),
    st.text(max_size=8),
)


@st.composite
def changed(draw, whole: bytes) -> bytes:
    """The bytes with up to four places overwritten, taken out or filled with others, or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 64]))
        content[start : start + length] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 4)) == 0 else content)


def survives(read: Callable[[Path], object], content: bytes, name: str) -> None:
    """Writes the file and reads it: a result, or an error of ours (or what amounts to one) with words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            read(path)
        except Exception as raised:
            error = to_known_error(raised)
            assert isinstance(error, FivefoldError), f"{type(error).__name__}: {error}"
            assert str(error).strip()


def image(form: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (9, 11, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, form)
    return file.getvalue()


def table(header: list[str], rows: list[list[object]]) -> bytes:
    return "\n".join(",".join(map(str, row)) for row in [header, *rows]).encode("utf-8-sig")


def parquet() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        ids, fold = np.array([f"r{n}" for n in range(6)], object), np.arange(6).astype(np.int16) % 2
        log_probs = np.log(np.full((6, 2), 0.5, np.float32))
        predictions.write(Path(folder) / "p.parquet", Predictions(ids, fold, "s", ("a", "b"), log_probs))
        return (Path(folder) / "p.parquet").read_bytes()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in ("a/1.png", "b/2.png", "사진/3.png"):
            made.writestr(name, image("PNG"))
    return file.getvalue()


def read_archive(path: Path) -> None:
    store = open_store(path)
    for name in store.names():
        store.read(name)


def read_image(path: Path) -> None:
    found = decode(path.read_bytes(), "x")
    assert (found.dtype, found.ndim, found.shape[2]) == (np.uint8, 3, 3)


def read_hyperparameters(path: Path) -> dict[str, object]:
    return hyperparameters({"SAGEMAKER_BASE_DIR": str(path.parents[2])})


HYPERPARAMETERS = "input/config/hyperparameters.json"
RECIPE = b'{"train": {"epochs": 3, "lr": 0.1}, "augment": {"train": ["resize", {"name": "rotation"}]}}'


def checkpoint(zipped: bool) -> bytes:
    saved = io.BytesIO()
    content = {
        "model": {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)},
        "args": argparse.Namespace(lr=np.float64(0.1)),
    }
    torch.save(content, saved, _use_new_zipfile_serialization=zipped)
    return saved.getvalue()


MODEL = b'{"format": 1, "role": "fold", "system": "s", "seed": 1, "fold": 0, "folds": 2, "classes": ["a", "b"]}'
EARLIER = b'{"stage": "split", "inputs": {"train": "x"}, "settings": {}, "outputs": {"output/a": "1"}, "packages": {}}'
READERS: dict[str, tuple[Callable[[Path], object], bytes, str]] = {
    **{
        f"{form} {mode}": (read_image, image(form, mode), "x")
        for form, mode in (
            *(("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P")),
            *(("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("TIFF", "RGB")),
        )
    },
    **{
        f"recipe {name}": (lambda path: read_recipe(str(path)), shipped_recipes()[name].read_bytes(), "mine.toml")
        for name in ("demo", "car_efficientnet_b5")
    },
    "recipe in JSON": (lambda path: read_recipe(str(path)), RECIPE, "mine.json"),
    "hyperparameters": (read_hyperparameters, b'{"train.epochs": "3", "FOLD": "1"}', HYPERPARAMETERS),
    "predictions": (predictions.read, parquet(), "predictions.parquet"),
    "folds": (read_folds, parquet(), "folds.parquet"),
    "submitted": (read_submission, table(["ID", "a", "b"], [[n, 0.5, 0.5] for n in range(4)]), "s.csv"),
    "answers": (read_submission, table(["ID", "image_path", "target"], [[n, f"{n}.png", n % 2] for n in range(4)]), "s.csv"),
    "truth": (read_ground_truth, table(["ID", "label"], [[n, "ab"[n % 2]] for n in range(4)]), "gt.csv"),
    "batch": (read_user_images, table(["image_path", "true_class"], [[f"{n}.png", "a"] for n in range(4)]), "batch.csv"),
    "archive": (read_archive, archive(), "images.zip"),
    "record": (read_record, b'{"stage": "split", "sources": {}, "roots": {}}', "stage.json"),
    "earlier record": (lambda path: rerun_reason(path.parent, CacheKey("split", {}, {}), {"output": path.parent}), EARLIER, "stage.json"),
    "weights": (read_weights, safetensors.torch.save({"a.weight": torch.ones(3, 2)}), "w.safetensors"),
    "checkpoint": (read_weights, checkpoint(zipped=True), "w.pth"),
    "checkpoint of an old torch": (read_weights, checkpoint(zipped=False), "w.pth"),
    "model": (lambda path: find_models(path.parent, path.parent), MODEL, "model.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_files_that_are_read(name):
    read, whole, file = READERS[name]

    @EXAMPLES
    @given(changed(whole))
    def check(content: bytes) -> None:
        survives(read, content, file)

    check()


@EXAMPLES
@given(st.dictionaries(st.sampled_from([*KEYS, "lr", "sagemaker_x", "TRAIN__EPOCHS"]), CELLS, max_size=4))
def test_hyperparameters_and_arguments(found):
    def read(path: Path) -> None:
        values = {normalize_key(name): value for name, value in read_hyperparameters(path).items()}
        load([Layer("hyperparameters", values)])

    survives(read, json.dumps(found).encode(), HYPERPARAMETERS)
    survives(lambda _: load([arguments_layer([f"{name}={value}" for name, value in found.items()])]), b"", "x")


@EXAMPLES
@given(
    st.sampled_from([[], ["image_path", "target"], ["ID", "img_path", "label"]]),
    st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=5),
)
def test_tables_of_odd_cells(header, rows):
    rows = [header, *(row[: len(header)] for row in rows)] if header else rows
    content = "\n".join(",".join(row) for row in rows).encode()
    for read in (
        read_ground_truth,
        read_submission,
        read_user_images,
        lambda path: read_rows(open_store(path.parent), Data()),
    ):
        survives(read, content, "train.csv")
