"""Exported files give the predictions of the pipeline for the same images; cases that cannot be exported are rejected."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import count, product
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fivefold.build import build_classifier
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import atomic, read_json, write_json
from fivefold.data.pipeline.dataset import image_stats
from fivefold.ensemble import EnsemblePredictor
from fivefold.errors import FivefoldError
from fivefold.evaluation.metrics import apply_temperature
from fivefold.export import write_onnx
from fivefold.inference.ensemble_spec import EnsembleSpec
from fivefold.trained_model import load_model
from random_models import (
    CLASSES,
    SIZE,
    draw_images,
    export_model,
    predict_onnx,
    predict_pipeline,
    read_pixels,
    save_model_dir,
)
from toy_data import failure


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return draw_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def model_root(tmp_path_factory) -> Path:
    """Return a folder with two fold models of a system, and a student."""
    root = tmp_path_factory.mktemp("models")
    for fold in range(2):
        save_model_dir(root / "folds" / f"a{fold}", fold)
    save_model_dir(root / "student", None)
    return root


@pytest.mark.slow
def test_onnx_export_puts_weights_and_temperature_of_an_ensemble_in_one_graph(model_root, images, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(model_root / "folds", models)
    save_model_dir(models / "b0", 0, seed=2, system="b")
    save_model_dir(models / "b1", 1, seed=2, system="b")
    weights = [0.35, 0.35, 0.15, 0.15]
    names = ["fold 0 of a, seed 1", "fold 1 of a, seed 1", "fold 0 of b, seed 2", "fold 1 of b, seed 2"]
    members = [
        {"system": name[10], "model": name, "weight": weight} for name, weight in zip(names, weights, strict=True)
    ]
    blend = {"members": members, "weights": {"a": 0.7, "b": 0.3}, "temperature": 1.7}
    write_json(tmp_path / "both" / "ensemble.json", blend)
    write_json(tmp_path / "one" / "ensemble.json", blend | {"members": members[:2]})  # of other models: ignored
    output = tmp_path / "out"
    assert export_model(tmp_path, output) == 0
    probs = predict_onnx(output / "model.onnx", images)
    log_probs = predict_pipeline(sorted(models.iterdir()), images, weights)
    np.testing.assert_allclose(probs, np.exp(apply_temperature(log_probs, 1.7)), atol=1e-5)
    assert np.abs(probs - np.exp(log_probs)).max() > 0.01  # the temperature has an effect
    assert probs.std(axis=0).max() > 0.01  # and so do the images

    session = onnxruntime.InferenceSession(str(output / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    described = read_json(output / "export.json")
    assert {key: described[key] for key in metadata} == metadata
    assert (metadata["classes"], metadata["height"], metadata["width"]) == (CLASSES, *SIZE)
    assert [member["weight"] for member in metadata["members"]] == pytest.approx(weights)
    assert (metadata["temperature"], metadata["mean"]) == (1.7, [0.5, 0.4, 0.3])
    assert (session.get_inputs()[0].shape, session.get_inputs()[0].type) == (["N", 3, *SIZE], "tensor(float)")


@pytest.mark.slow
def test_onnx_export_contains_views_and_meta_features_and_always_has_the_same_bytes(images, tmp_path):
    stats, views = ["aspect", "color_mean"], ["flip", {"name": "shift", "x": 2}, {"name": "rotate", "degrees": 20}]
    folder = save_model_dir(tmp_path / "model", None, model={"image_stats": stats}, views=views)
    outputs = tmp_path / "first" / "model.onnx", tmp_path / "second" / "model.onnx"
    assert [export_model(folder, output.parent) for output in outputs] == [0, 0]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    meta = np.stack([image_stats(image, stats) for image in read_pixels(images)])
    probs = predict_onnx(outputs[0], images, meta=meta)
    np.testing.assert_allclose(probs, np.exp(predict_pipeline([folder], images, [1.0])), atol=1e-5)
    assert read_json(outputs[0].parent / "export.json")["meta"] == stats


def test_pth_export_writes_a_plain_state_dict_to_the_requested_file(model_root, tmp_path):
    folder = model_root / "folds" / "a1"
    for weights, name, source in (
        ("best", "best_model_ema.pth", "model.safetensors"),
        ("raw", "best_model.pth", "model_raw.safetensors"),
    ):
        arguments = ["export.format=pth", f"export.file={name}", f"export.weights={weights}", "FOLD=1"]
        assert export_model(folder, tmp_path / "first", *arguments) == export_model(folder, tmp_path, *arguments) == 0
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / name).read_bytes()
        network = build_classifier(load_model(open_model_dir(folder), {}).settings.model, len(CLASSES))
        network.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        inputs = torch.rand(2, 3, *SIZE)
        expected = load_model(open_model_dir(folder), {}, source).network
        torch.testing.assert_close(network.eval()(inputs), expected(inputs))
    assert (tmp_path / "best_model_ema.pth").read_bytes() != (tmp_path / "best_model.pth").read_bytes()


def make_unexportable(model_root: Path, folder: Path, case: str) -> dict[str, Path]:
    """Return the channels of a case that cannot be exported."""
    models, blend = folder / "models", folder / "blend"
    shutil.copytree(model_root / "folds", models)
    members = [{"system": "a", "model": f"fold {fold} of a, seed 1", "weight": 1 / 2} for fold in range(2)]
    content = {"members": members, "weights": {"a": 1.0}, "temperature": 1.0}
    stats = ["color_mean", "aspect"]
    others = {
        "size": {"b": {"model": {"image_size": 16}}},
        "eval": {"b": {"eval": ["centre_crop"]}},
        "meta": {"b": {"model": {"image_stats": stats}}, "c": {"model": {"image_stats": stats[::-1]}}},
    }
    for (system, changes), fold in product(others.get(case, {}).items(), range(2)):
        save_model_dir(models / f"{system}{fold}", fold, seed=2, system=system, **changes)
    if case == "no raw weights":
        (models / "a1" / "model_raw.safetensors").unlink()
    elif case == "strangers":
        members[0]["model"] = "file other.csv"
    elif case == "rank":
        content["blend"] = "rank"
    write_json(blend / "ensemble.json", content)
    return {"MODEL": models} | ({"ENSEMBLE": blend} if case in ("strangers", "rank") else {})


@pytest.mark.parametrize(
    ("case", "arguments", "code", "message"),
    [
        ("", ["export.format=onyx"], 64, "unknown format 'onyx'; did you mean 'onnx'?"),
        ("", ["export.file=../model.onnx"], 64, "'../model.onnx'"),
        ("", ["export.format=pth"], 64, "format=pth"),
        ("", ["FOLD=2"], 64, "FOLD=2: no model below"),
        ("size", [], 64, "((10, 12), (16, 16))"),
        ("size", ["FOLD=1"], 64, "fold 1 of a, seed 1, fold 1 of b, seed 2 below"),
        ("eval", [], 64, "different augment.eval"),
        ("meta", [], 64, "different meta features"),
        ("no raw weights", ["export.weights=raw"], 66, "model_raw.safetensors"),
        ("strangers", [], 65, "fold 0 of a"),
        ("rank", [], 64, "blend=rank"),
    ],
)
def test_failed_export_reports_the_reason_and_leaves_no_files(case, arguments, code, message, model_root, tmp_path):
    output = tmp_path / "out"
    channels = make_unexportable(model_root, tmp_path, case)
    assert export_model(tmp_path, output, *arguments, **channels) == code
    assert message in failure(output)
    assert [path.name for path in output.iterdir()] == ["failure"]


def test_missing_package_error_names_the_extra_and_pth_export_needs_none(model_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as Python itself marks a module that cannot be imported
    assert export_model(model_root / "student", tmp_path / "onnx") == 64
    assert "fivefold[export]" in failure(tmp_path / "onnx")
    assert export_model(model_root / "student", tmp_path / "pth", "export.format=pth") == 0


class DriftingNetwork(nn.Module):
    """A network that returns a different result at each call, which a graph cannot do."""

    calls = count(1)

    def forward(self, images):
        return images.mean(dim=(2, 3)) * 0 + images.new_tensor([next(self.calls), 0.0, 0.0])


@pytest.mark.slow
def test_graph_that_differs_from_the_networks_is_not_kept(model_root, tmp_path):
    model = load_model(open_model_dir(model_root / "student"), {"tta": ["plain"]})
    ensemble = EnsemblePredictor(
        EnsembleSpec({"a": [model.source]}, (1.0,)), [replace(model, network=DriftingNetwork())]
    )
    with pytest.raises(FivefoldError, match=r"from the networks' \(at most 0.0001 is allowed\)") as caught:
        with atomic(tmp_path / "model.onnx") as temporary:
            write_onnx(temporary, ensemble)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["timm/caformer_s18", "efficientnet_pytorch/efficientnet-b0"])
def test_onnx_export_supports_the_most_unusual_backbones(backbone, tmp_path):
    changes = {"backbone": backbone, "backbone_kwargs": {}, "image_size": 64}
    assert export_model(save_model_dir(tmp_path / "model", None, model=changes), tmp_path / "out") == 0
