"""Readers accept any file content or raise a FivefoldError; no bytes cause a traceback.

Hypothesis changes valid files in a few places, which reaches deeper code than random bytes.
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
from fivefold.contract.job import hyperparameters_from_env
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

MAX_EXAMPLES = int(os.environ.get("FIVEFOLD_EXAMPLES", "20"))
EXAMPLES = settings(
    max_examples=MAX_EXAMPLES, database=None, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
KEYS = sorted(flatten(Settings()))
CELLS = st.one_of(
    st.sampled_from(["", "a", "1", "0.5", "-1", "nan", "inf", "1e999", "../x", "a/b.png", "\ufeff", '"', "=1+1"]),
    st.text(max_size=8),
)


@st.composite
def mutated(draw, original: bytes) -> bytes:
    """Overwrite, remove or insert bytes in up to four places, or truncate them."""
    content = bytearray(original)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([0, 1, 1, 2, 8, 64]))
        content[start : start + length] = draw(st.binary(max_size=8))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 4)) == 0 else content)


def assert_handled(read: Callable[[Path], object], content: bytes, name: str) -> None:
    """Write the file and read it: reading must succeed or raise an error that maps to a FivefoldError with a message."""
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


def make_image(form: str, mode: str) -> bytes:
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (9, 11, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, form)
    return file.getvalue()


def make_table(header: list[str], rows: list[list[object]]) -> bytes:
    return "\n".join(",".join(map(str, row)) for row in [header, *rows]).encode("utf-8-sig")


def make_predictions() -> bytes:
    log_probs = np.log(np.full((6, 2), 0.5, np.float32))
    table = Predictions(np.array([*"abcdef"], object), np.arange(6) % 2, "s", ("a", "b"), log_probs)
    with tempfile.TemporaryDirectory() as folder:
        return predictions.write(Path(folder) / "p.parquet", table).read_bytes()


def make_archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zip_file:
        for name in ("a/1.png", "b/2.png", "사진/3.png"):
            zip_file.writestr(name, make_image("PNG", "RGB"))
    return file.getvalue()


def read_archive(path: Path) -> None:
    store = open_store(path)
    for name in store.names():
        store.read(name)


def read_image(path: Path) -> None:
    image = decode(path.read_bytes(), "x", max_pixels=1e6)
    assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def read_hyperparameters(path: Path) -> dict[str, object]:
    return hyperparameters_from_env({"SAGEMAKER_BASE_DIR": str(path.parents[2])})


HYPERPARAMETERS = "input/config/hyperparameters.json"
RECIPE = b'{"train": {"epochs": 3, "lr": 0.1}, "augment": {"train": ["resize", {"name": "rotation"}]}}'


def make_checkpoint(zipped: bool) -> bytes:
    file, model = io.BytesIO(), {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)}
    content = {"model": model, "args": argparse.Namespace(lr=np.float64(0.1))}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


MODEL = b'{"format": 1, "role": "fold", "system": "s", "seed": 1, "fold": 0, "folds": 2, "classes": ["a", "b"]}'
RECORD = (
    b'{"stage": "split", "key": "k", "sources": {}, "roots": {"output": "."}, "inputs": {}, "settings": {}, '
    b'"outputs": {"output/a": "1"}, "metrics": {}, "code": "1", "packages": {}}'
)
READERS: dict[str, tuple[Callable[[Path], object], bytes, str]] = {
    **{
        name: (read_image, make_image(*name.split()), "x")
        for name in ("JPEG RGB", "JPEG CMYK", "PNG RGBA", "PNG P", "GIF P", "WEBP RGB", "BMP RGB", "TIFF RGB")
    },
    **{
        f"recipe {name}": (lambda path: read_recipe(str(path)), shipped_recipes()[name].read_bytes(), "mine.toml")
        for name in ("demo", "car_efficientnet_b5")
    },
    "recipe in JSON": (lambda path: read_recipe(str(path)), RECIPE, "mine.json"),
    "hyperparameters": (read_hyperparameters, b'{"train.epochs": "3", "FOLD": "1"}', HYPERPARAMETERS),
    "predictions": (predictions.read, make_predictions(), "predictions.parquet"),
    "folds": (read_folds, make_predictions(), "folds.parquet"),
    "submission": (read_submission, make_table(["ID", "a", "b"], [[n, 0.5, 0.5] for n in range(4)]), "s.csv"),
    "answers": (read_submission, make_table(["ID", "image_path", "target"], [[n, f"{n}.png", n % 2] for n in range(4)]), "s.csv"),
    "ground truth": (read_ground_truth, make_table(["ID", "label"], [[n, "ab"[n % 2]] for n in range(4)]), "gt.csv"),
    "user images": (read_user_images, make_table(["image_path", "true_class"], [[f"{n}.png", "a"] for n in range(4)]), "batch.csv"),
    "archive": (read_archive, make_archive(), "images.zip"),
    "record": (lambda path: rerun_reason(path.parent, CacheKey("split", {}, {}), {"output": path.parent}), RECORD, "stage.json"),
    "weights": (read_weights, safetensors.torch.save({"a.weight": torch.ones(3, 2)}), "w.safetensors"),
    "checkpoint": (read_weights, make_checkpoint(zipped=True), "w.pth"),
    "legacy checkpoint": (read_weights, make_checkpoint(zipped=False), "w.pth"),
    "model": (lambda path: find_models(path.parent, path.parent), MODEL, "model.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_readers_handle_corrupt_files(name):
    read, original, file = READERS[name]

    @EXAMPLES
    @given(mutated(original))
    def check(content: bytes) -> None:
        assert_handled(read, content, file)

    check()


@EXAMPLES
@given(st.dictionaries(st.sampled_from([*KEYS, "lr", "sagemaker_x", "TRAIN__EPOCHS"]), CELLS, max_size=4))
def test_settings_handle_invalid_values(texts):
    def read(path: Path) -> None:
        values = {normalize_key(name): value for name, value in read_hyperparameters(path).items()}
        load([Layer("hyperparameters", values)])

    assert_handled(read, json.dumps(texts).encode(), HYPERPARAMETERS)
    assert_handled(lambda _: load([arguments_layer([f"{name}={value}" for name, value in texts.items()])]), b"", "x")


@EXAMPLES
@given(
    st.sampled_from([[], ["image_path", "target"], ["ID", "img_path", "label"]]),
    st.lists(st.lists(CELLS, min_size=1, max_size=5), max_size=5),
)
def test_table_readers_handle_unusual_cells(header, rows):
    rows = [header, *(row[: len(header)] for row in rows)] if header else rows
    content = "\n".join(",".join(row) for row in rows).encode()
    for read in (
        read_ground_truth,
        read_submission,
        read_user_images,
        lambda path: read_rows(open_store(path.parent), Data()),
    ):
        assert_handled(read, content, "train.csv")
