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
from PIL import Image
from torch import nn

from fivefold.build import build_classifier, make_training_runtime, seed_everything
from fivefold.config.schema import Augment, Model, Predict, Settings, Train
from fivefold.contract.artifacts import open_model_dir
from fivefold.contract.files import atomic, read_json, write_json
from fivefold.data.pipeline.dataset import image_stats
from fivefold.data.readers.stores import open_store
from fivefold.ensemble import EnsemblePredictor
from fivefold.errors import DataError, FivefoldError
from fivefold.evaluation.metrics import apply_temperature
from fivefold.export import write_onnx
from fivefold.inference.blending import arithmetic
from fivefold.inference.ensemble_spec import EnsembleSpec
from fivefold.trained_model import ImageList, load_model, save_model
from fivefold.training.trainer import BestCheckpoint
from toy_data import draw, failure, run_stage

CLASSES = ["fold", "id", "빨강 차"]
SIZE = (10, 12)
NET = Model(backbone="fivefold/small_net", backbone_kwargs={"widths": [8, 16], "stem": 8}, image_size=list(SIZE), mean=[0.5, 0.4, 0.3])  # fmt: skip


def save_model_dir(folder: Path, fold: int | None, seed: int = 1, system: str = "a", **changes) -> Path:
    """Save a model dir as a stage does, with random weights and normalization statistics that are not the initial ones."""
    settings = Settings(
        system=system,
        seed=seed,
        model=NET.model_copy(update=changes.get("model", {})),
        augment=Augment(train=[], eval=changes.get("eval", ["resize"])),
        train=Train(
            precision="fp32",
            channels_last=True,
            ema_decay=0.9,
            save_raw_weights=True,
            num_workers=0,
            loss=changes.get("loss", "cross_entropy"),
        ),
        predict=Predict(batch_size=4, tta=changes.get("views", ["plain"])),
    )
    best = {}
    for name in ("ema", "raw"):
        seed_everything(100 * seed + 10 * (fold or 0) + (name == "raw"))
        network = build_classifier(settings.model, len(CLASSES))
        network.train()(
            torch.randn(16, 3, *settings.model.size), *([torch.rand(16, 4)] if settings.model.image_stats else [])
        )
        with torch.no_grad():
            for parameter in network.head.parameters():
                parameter.mul_(20)  # so that probabilities differ
        best[name] = BestCheckpoint("logloss", 1, {"logloss": 1.0}, network.state_dict())
    facts = {"fold": fold, "folds": 2, "classes": CLASSES, "split": "x", "shares": [1 / len(CLASSES)] * len(CLASSES)}
    save_model(folder, "student" if fold is None else "fold", best, settings, make_training_runtime(settings), facts)
    write_json(folder / "stage.json", {})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Return a folder with seven images in the input size of the models."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(7):
        draw(folder / f"{number}.png", random, number % 3, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def model_root(tmp_path_factory) -> Path:
    """Return a folder with two systems of two fold models each, and a student."""
    root = tmp_path_factory.mktemp("world")
    for fold in range(2):
        views = ["flip", {"name": "shift", "x": 2}, {"name": "rotate", "degrees": 20}]
        save_model_dir(root / "folds" / f"a{fold}", fold, views=views)
        save_model_dir(root / "folds" / f"b{fold}", fold, seed=2, system="b")
    save_model_dir(root / "student", None)
    return root


def export_model(model: Path, output: Path, *arguments: str, **channels: object) -> int:
    defaults = {"MODEL": model, "SM_OUTPUT_DATA_DIR": output, "SM_OUTPUT_DIR": output}
    return run_stage(model, "export", output, *arguments, **{**defaults, **channels})


def read_pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def predict_onnx(path: Path, folder: Path, **more: np.ndarray) -> np.ndarray:
    """Return the probabilities [N, C] of one batch of all images; assert that single images give the same."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    batch = {"images": read_pixels(folder).transpose(0, 3, 1, 2).astype(np.float32), **more}
    (probs,) = session.run(["probabilities"], batch)
    alone = [session.run(None, {name: value[n : n + 1] for name, value in batch.items()})[0] for n in range(len(probs))]
    np.testing.assert_allclose(np.concatenate(alone), probs, atol=1e-6)
    return probs


def predict_pipeline(models: list[Path], folder: Path, weights: list[float]) -> np.ndarray:
    """Return the blended log-probabilities [N, C], computed by the code of the ensemble stage."""
    names = sorted(path.name for path in folder.iterdir())
    loaded = [load_model(open_model_dir(path), {}) for path in models]
    return arithmetic([model.predict(open_store(folder), names, "test") for model in loaded], np.array(weights))


@pytest.mark.slow
def test_onnx_export_puts_weights_views_and_temperature_of_an_ensemble_in_one_graph(model_root, images, tmp_path):
    weights = {"a": 0.7, "b": 0.3}
    members = [
        {"system": system, "model": f"fold {fold} of {system}, seed {seed}", "weight": weight / 2}
        for (system, weight), seed in zip(weights.items(), (1, 2), strict=True)
        for fold in range(2)
    ]
    blend = {"members": members, "weights": weights, "temperature": 1.7}
    write_json(tmp_path / "given" / "ensemble.json", blend)
    assert export_model(model_root / "folds", tmp_path / "out", ENSEMBLE=tmp_path / "given") == 0
    with_blends = tmp_path / "beside"
    shutil.copytree(model_root / "folds", with_blends / "models")
    write_json(with_blends / "both" / "ensemble.json", blend)
    write_json(with_blends / "one" / "ensemble.json", blend | {"members": members[:2]})  # of other models: ignored
    assert export_model(with_blends, tmp_path / "again") == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    probs = predict_onnx(tmp_path / "out" / "model.onnx", images)
    models = sorted((model_root / "folds").iterdir())
    log_probs = predict_pipeline(models, images, [member["weight"] for member in members])
    np.testing.assert_allclose(probs, np.exp(apply_temperature(log_probs, 1.7)), atol=1e-5)
    assert np.abs(probs - np.exp(log_probs)).max() > 0.01  # the temperature has an effect
    assert probs.std(axis=0).max() > 0.01  # and so do the images

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {key: described[key] for key in metadata} == metadata
    assert (metadata["classes"], metadata["height"], metadata["width"]) == (CLASSES, *SIZE)
    assert [member["weight"] for member in metadata["members"]] == [pytest.approx(m["weight"]) for m in members]
    assert (metadata["temperature"], metadata["mean"]) == (1.7, [0.5, 0.4, 0.3])
    assert (session.get_inputs()[0].shape, session.get_inputs()[0].type) == (["N", 3, *SIZE], "tensor(float)")
    assert str(Path.cwd()).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()


def test_export_without_an_ensemble_record_weights_all_systems_equally(model_root, images, tmp_path):
    assert export_model(model_root / "folds", tmp_path, "predict.tta=plain") == 0
    models = [load_model(open_model_dir(path), {"tta": ["plain"]}) for path in sorted((model_root / "folds").iterdir())]
    names = sorted(path.name for path in images.iterdir())
    probs = [np.exp(model.predict(open_store(images), names, "test")) for model in models]
    np.testing.assert_allclose(predict_onnx(tmp_path / "model.onnx", images), np.mean(probs, axis=0), atol=1e-5)


def test_onnx_export_takes_meta_features_as_a_second_input(images, tmp_path):
    folder = save_model_dir(tmp_path / "model", None, model={"image_stats": ["aspect", "color_mean"]})
    assert export_model(folder, tmp_path / "out") == 0
    meta = np.stack([image_stats(image, ["aspect", "color_mean"]) for image in read_pixels(images)])
    probs = predict_onnx(tmp_path / "out" / "model.onnx", images, meta=meta)
    np.testing.assert_allclose(probs, np.exp(predict_pipeline([folder], images, [1.0])), atol=1e-5)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["meta"] == ["aspect", "color_mean"]


def test_pth_export_writes_a_plain_state_dict_to_the_requested_file(model_root, images, tmp_path):
    names = {"best": "best_model_ema.pth", "raw": "best_model.pth"}
    for weights, name in names.items():
        arguments = ["export.format=pth", f"export.file={name}", f"export.weights={weights}", "FOLD=1"]
        folder = model_root / "folds" / "a1"
        assert export_model(folder, tmp_path, *arguments) == 0
        network = build_classifier(load_model(open_model_dir(folder), {}).settings.model, len(CLASSES))
        network.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        inputs = torch.rand(2, 3, *SIZE)
        file = {"best": "model.safetensors", "raw": "model_raw.safetensors"}[weights]
        expected = load_model(open_model_dir(folder), {}, file).network
        torch.testing.assert_close(network.eval()(inputs), expected(inputs))
    assert (tmp_path / names["best"]).read_bytes() != (tmp_path / names["raw"]).read_bytes()


@pytest.mark.parametrize("form", ["onnx", "pth"])
def test_exports_of_the_same_model_have_the_same_bytes(form, model_root, tmp_path):
    for folder in ("one", "two"):
        assert export_model(model_root / "student", tmp_path / folder, f"export.format={form}", "export.file=x") == 0
    assert (tmp_path / "one" / "x").read_bytes() == (tmp_path / "two" / "x").read_bytes()


def make_unexportable(model_root: Path, folder: Path, case: str) -> dict[str, Path]:
    """Return the channels of a case that cannot be exported."""
    models, blend = folder / "models", folder / "blend"
    shutil.copytree(
        model_root / "folds", models, ignore=lambda _, names: [name for name in names if name.startswith("b")]
    )
    members = [{"system": "a", "model": f"fold {fold} of a, seed 1", "weight": 1 / 2} for fold in range(2)]
    content = {"members": members, "weights": {"a": 1.0}, "temperature": 1.0}
    others = {
        "size": {"b": {"model": {"image_size": 16}}},
        "eval": {"b": {"eval": ["centre_crop"]}},
        "meta": {
            "b": {"model": {"image_stats": ["color_mean", "aspect"]}},
            "c": {"model": {"image_stats": ["aspect", "color_mean"]}},
        },
    }
    for (system, changes), fold in product(others.get(case, {}).items(), range(2)):
        save_model_dir(models / f"{system}{fold}", fold, seed=2, system=system, **changes)
    if case == "incomplete":
        save_model_dir(models / "b0", 0, seed=2, system="b")
    elif case == "students":
        shutil.rmtree(models)
        save_model_dir(models / "one", None, seed=1)
        save_model_dir(models / "two", None, seed=2)
    elif case == "no raw weights":
        (models / "a1" / "model_raw.safetensors").unlink()
    elif case == "strangers":
        members[0]["model"] = "file other.csv"
    elif case == "rank":
        content["blend"] = "rank"
    elif case == "no members":
        content.pop("members")
    write_json(blend / "ensemble.json", content)
    with_blend = case in ("strangers", "rank", "no members")
    return {"MODEL": models} | ({"ENSEMBLE": blend} if with_blend else {})


@pytest.mark.parametrize(
    ("case", "arguments", "code", "message"),
    [
        ("", ["export.format=onyx"], 64, "unknown format 'onyx'; did you mean 'onnx'?"),
        ("", ["export.file=../model.onnx"], 64, "'../model.onnx'"),
        ("", ["export.format=pth"], 64, "format=pth"),
        ("", ["FOLD=2"], 64, "FOLD=2: no model below the channel 'model'"),
        ("size", [], 64, "different sizes ((10, 12), (16, 16))"),
        ("size", ["FOLD=1"], 64, "FOLD=1: 2 models (fold 1 of a, seed 1, fold 1 of b, seed 2)"),
        ("eval", [], 64, "different augment.eval"),
        ("meta", [], 64, "takes other meta features"),
        ("incomplete", [], 65, "system 'b' with seed 2 lacks fold 1 of 2"),
        ("students", [], 65, "several students"),
        ("no raw weights", ["export.weights=raw"], 66, "model_raw.safetensors"),
        ("strangers", [], 65, "fold 0 of a"),
        ("rank", [], 64, "blend=rank"),
        ("no members", [], 65, "does not describe an ensemble"),
        ("", ["predict.tta=flop"], 64, "did you mean 'flip'"),
    ],
)
def test_failed_export_reports_the_reason_and_leaves_no_files(case, arguments, code, message, model_root, tmp_path):
    output = tmp_path / "out"
    channels = make_unexportable(model_root, tmp_path, case)
    assert export_model(tmp_path, output, *arguments, **channels) == code
    assert message in failure(output)
    assert [path.name for path in output.iterdir()] == ["failure"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_error_names_the_extra_and_pth_export_needs_none(package, model_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks a module that cannot be imported
    assert export_model(model_root / "student", tmp_path / "onnx") == 64
    assert f"export.format=onnx needs {package}, " in failure(tmp_path / "onnx")
    assert "'fivefold[export]'" in failure(tmp_path / "onnx")
    assert export_model(model_root / "student", tmp_path / "pth", "export.format=pth") == 0


class DriftingNetwork(nn.Module):
    """A network that returns a different result at each call, which a graph cannot do."""

    calls = count(1)

    def forward(self, images):
        return images.mean(dim=(2, 3)) * 0 + images.new_tensor([next(self.calls), 0.0, 0.0])


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


BACKBONES = ("timm/resnet18", "timm/caformer_s18", "timm/efficientnet_b0", "torchvision/convnext_tiny", "torchvision/vgg11_bn",
            "efficientnet_pytorch/efficientnet-b0")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_onnx_export_supports_backbone_families(backbone, tmp_path):
    changes = {"backbone": backbone, "backbone_kwargs": {}, "image_size": 64, "pretrained": False}
    assert (
        export_model(save_model_dir(tmp_path / "model", None, model=changes, views=["plain", "flip"]), tmp_path / "out")
        == 0
    )


def test_model_trained_with_bce_predicts_and_is_exported_with_sigmoids(images, tmp_path):
    folder = save_model_dir(tmp_path / "model", None, loss="bce")
    model, names = load_model(open_model_dir(folder), {}), sorted(path.name for path in images.iterdir())
    assert read_json(folder / "model.json")["link"] == "sigmoid"
    with torch.inference_mode():
        odds = model.network(model.runtime.images(torch.from_numpy(read_pixels(images)).permute(0, 3, 1, 2))).sigmoid()
    expected = (odds / odds.sum(dim=1, keepdim=True)).numpy()
    probs = np.exp(predict_pipeline([folder], images, [1.0]))
    np.testing.assert_allclose(probs, expected, atol=1e-5)
    result = EnsemblePredictor(EnsembleSpec({"a": [model.source]}, (1.0,)), [model]).predict(
        ImageList(open_store(images), names)
    )
    np.testing.assert_allclose(np.exp(result.log_probs), expected, atol=1e-5)
    assert export_model(folder, tmp_path / "out") == 0
    np.testing.assert_allclose(predict_onnx(tmp_path / "out" / "model.onnx", images), expected, atol=1e-5)
    softmax = np.exp(predict_pipeline([save_model_dir(tmp_path / "other", None)], images, [1.0]))
    assert np.abs(probs - softmax).max() > 0.01, "softmax predicts otherwise with the same weights"
    for link in ("probit", None):
        write_json(folder / "model.json", read_json(folder / "model.json") | {"link": link})
        with pytest.raises(DataError, match=r"model\.json"):
            load_model(open_model_dir(folder), {})


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir", "weights"])
def test_model_json_that_names_other_weights_is_rejected(option, tmp_path):
    folder = save_model_dir(tmp_path / "model", None)
    info = read_json(folder / "model.json")
    info["settings"]["model"]["backbone_kwargs"][option] = str(tmp_path / "w.pth")
    write_json(folder / "model.json", info)
    with pytest.raises(DataError, match=option):
        load_model(open_model_dir(folder), {})


def test_a_model_of_another_version_is_refused_in_one_line_that_names_a_setting(tmp_path):
    folder = save_model_dir(tmp_path / "model", None)
    info = read_json(folder / "model.json")
    info["settings"]["train"] |= {"clip": 1.0, "keep_raw": False}
    write_json(folder / "model.json", info)
    with pytest.raises(DataError, match=r"train\.clip.*and 1 more") as caught:
        load_model(open_model_dir(folder), {})
    assert "\n" not in str(caught.value)
    info["settings"]["train"] = {"epochs": 0}
    write_json(folder / "model.json", info)
    with pytest.raises(DataError, match=r"train\.epochs"):
        load_model(open_model_dir(folder), {})
