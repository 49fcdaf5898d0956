from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import read_json, write_json
from fivefold.data.readers.stores import open_store
from fivefold.ensemble import EnsemblePredictor
from fivefold.errors import DataError
from fivefold.export import EnsembleModule
from fivefold.inference.ensemble_spec import EnsembleSpec
from fivefold.trained_model import ImageList, load_model
from random_models import draw_images, predict_pipeline, read_pixels, save_model_dir


def test_model_trained_with_bce_predicts_and_is_exported_with_sigmoids(tmp_path):
    folder, images = save_model_dir(tmp_path / "model", None, loss="bce"), draw_images(tmp_path / "images")
    model = load_model(open_model_dir(folder), {})
    assert read_json(folder / "model.json")["link"] == "sigmoid"
    pixels = torch.from_numpy(read_pixels(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        odds = model.network(model.runtime.images(pixels)).sigmoid()
    expected = (odds / odds.sum(dim=1, keepdim=True)).numpy()
    predictor = EnsemblePredictor(EnsembleSpec({"a": [model.source]}, (1.0,)), [model])
    listed = ImageList(open_store(images), sorted(path.name for path in images.iterdir()))
    np.testing.assert_allclose(np.exp(predictor.predict(listed).log_probs), expected, atol=1e-5)
    with torch.inference_mode():
        exported = EnsembleModule(predictor).eval()(pixels.float())  # `write_onnx` compares each file with this module
    np.testing.assert_allclose(exported, expected, atol=1e-5)
    softmax = np.exp(predict_pipeline([save_model_dir(tmp_path / "other", None)], images, [1.0]))
    assert np.abs(exported.numpy() - softmax).max() > 0.01, "softmax predicts otherwise with the same weights"
    write_json(folder / "model.json", read_json(folder / "model.json") | {"link": "probit"})
    with pytest.raises(DataError, match=r"model\.json"):
        load_model(open_model_dir(folder), {})


def assert_rejected(folder: Path, message: str, section: str, **changes: object) -> None:
    info = read_json(folder / "model.json")
    info["settings"][section] |= changes
    write_json(folder / "model.json", info)
    with pytest.raises(DataError, match=f"^[^\n]*{message}[^\n]*$"):
        load_model(open_model_dir(folder), {})


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir", "weights"])
def test_model_json_that_names_other_weights_is_rejected(option, tmp_path):
    folder = save_model_dir(tmp_path / "model", None)
    assert_rejected(folder, option, "model", backbone_kwargs={option: str(tmp_path / "w.pth")})


def test_a_model_of_another_version_is_refused_in_one_line_that_names_its_settings(tmp_path):
    folder = save_model_dir(tmp_path / "model", None)
    assert_rejected(folder, r"train\.clip.*train\.keep_raw", "train", clip=1.0, keep_raw=False)
    assert_rejected(folder, r"train\.epochs", "train", epochs=0)
