"""Folders with models of random weights, as a training stage saves them, and the probabilities of their exported files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fivefold.build import build_classifier, make_training_runtime, seed_everything
from fivefold.config.schema import Augment, Model, Predict, Settings, Train
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import write_json
from fivefold.data.readers.stores import open_store
from fivefold.inference.blending import arithmetic
from fivefold.trained_model import ImageList, SharedEvalImages, load_model, save_model
from fivefold.training.trainer import BestCheckpoint
from toy_data import draw, run_stage

CLASSES = ["fold", "id", "빨강 차"]
SIZE = (10, 12)
NET = Model(backbone="fivefold/small_net", backbone_kwargs={"widths": [8, 16], "stem": 8}, image_size=list(SIZE), mean=[0.5, 0.4, 0.3])  # fmt: skip


def save_model_dir(folder: Path, fold: int | None, seed: int = 1, system: str = "a", **changes) -> Path:
    """Save a model folder as a stage does, with random weights and BatchNorm statistics."""
    settings = Settings(
        system=system,
        seed=seed,
        model=NET.model_copy(update=changes.get("model", {})),
        augment=Augment(train=[], eval=changes.get("eval", ["resize"])),
        train=Train(precision="fp32", ema_decay=0.9, num_workers=0, loss=changes.get("loss", "cross_entropy")),
        predict=Predict(batch_size=4, tta=changes.get("views", ["plain"])),
    )
    best = {}
    for name in ("ema", "raw"):
        seed_everything(100 * seed + 10 * (fold or 0) + (name == "raw"))
        network = build_classifier(settings.model, len(CLASSES))
        meta = [torch.rand(16, 4)] if settings.model.image_stats else []
        network.train()(torch.randn(16, 3, *settings.model.size), *meta)
        with torch.no_grad():
            for parameter in network.head.parameters():
                parameter.mul_(20)  # so that probabilities differ
        best[name] = BestCheckpoint("logloss", 1, {"logloss": 1.0}, network.state_dict())
    facts = {"fold": fold, "folds": 2, "classes": CLASSES, "split": "x", "shares": [1 / len(CLASSES)] * len(CLASSES)}
    save_model(folder, "student" if fold is None else "fold", best, settings, make_training_runtime(settings), facts)
    write_json(folder / "stage.json", {})
    return folder


def draw_images(folder: Path) -> Path:
    """Draw seven images in the input size of the models."""
    random = np.random.default_rng(0)
    for number in range(7):
        draw(folder / f"{number}.png", random, number % 3, size=SIZE)
    return folder


def export_model(model: Path, output: Path, *arguments: str, **channels: object) -> int:
    defaults = {"MODEL": model, "SM_OUTPUT_DATA_DIR": output, "SM_OUTPUT_DIR": output}
    return run_stage(model, "export", output, *arguments, **{**defaults, **channels})


def read_pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def predict_onnx(path: Path, folder: Path, **more: np.ndarray) -> np.ndarray:
    """Return the probabilities [N, C] of one batch of all images; assert that single images give the same."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = {"images": read_pixels(folder).transpose(0, 3, 1, 2).astype(np.float32), **more}
    (probs,) = session.run(["probabilities"], batch)
    alone = [session.run(None, {name: value[n : n + 1] for name, value in batch.items()})[0] for n in range(len(probs))]
    np.testing.assert_allclose(np.concatenate(alone), probs, atol=1e-6)
    return probs


def predict_pipeline(models: list[Path], folder: Path, weights: list[float]) -> np.ndarray:
    """Return the blended log-probabilities [N, C], computed by the code of the ensemble stage."""
    images = ImageList(open_store(folder), sorted(path.name for path in folder.iterdir()))
    loaded = [load_model(open_model_dir(path), {}) for path in models]
    return arithmetic([model.predict_cached(SharedEvalImages(images), "") for model in loaded], np.array(weights))
