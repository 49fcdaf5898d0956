"""Exported files against the pipeline's own predictions of the same images, and what is not exported."""

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
from fivefold.inference.ensemble_spec import Ensemble
from fivefold.trained_model import ImageList, load_model, save_model
from fivefold.training.trainer import BestCheckpoint
from toy_data import draw, failure, run_stage

CLASSES = ["fold", "id", "빨강 차"]
SIZE = (10, 12)
NET = Model(backbone="fivefold/small_net", backbone_kwargs={"widths": [8, 16], "stem": 8}, image_size=list(SIZE), mean=[0.5, 0.4, 0.3])  # fmt: skip


def save(folder: Path, fold: int | None, seed: int = 1, system: str = "a", **changes) -> Path:
    """A model dir as a stage leaves it, with weights that were drawn and averages of no layer at its start."""
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
                parameter.mul_(20)  # probabilities that are not all alike
        best[name] = BestCheckpoint("logloss", 1, {"logloss": 1.0}, network.state_dict())
    facts = {"fold": fold, "folds": 2, "classes": CLASSES, "split": "x", "shares": [1 / len(CLASSES)] * len(CLASSES)}
    save_model(folder, "student" if fold is None else "fold", best, settings, make_training_runtime(settings), facts)
    write_json(folder / "stage.json", {})
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Seven images at the size that the models take."""
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(7):
        draw(folder / f"{number}.png", random, number % 3, size=SIZE)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two systems of two folds, and a student."""
    root = tmp_path_factory.mktemp("world")
    for fold in range(2):
        views = ["flip", {"name": "shift", "x": 2}, {"name": "rotate", "degrees": 20}]
        save(root / "folds" / f"a{fold}", fold, views=views)
        save(root / "folds" / f"b{fold}", fold, seed=2, system="b")
    save(root / "student", None)
    return root


def export(model: Path, output: Path, *arguments: str, **channels: object) -> int:
    own = {"MODEL": model, "SM_OUTPUT_DATA_DIR": output, "SM_OUTPUT_DIR": output}
    return run_stage(model, "export", output, *arguments, **{**own, **channels})


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def by_onnx(path: Path, folder: Path, **more: np.ndarray) -> np.ndarray:
    """The file's probabilities [N, C] of all images at once, after those of each one alone gave the same."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"images": pixels(folder).transpose(0, 3, 1, 2).astype(np.float32), **more}
    (found,) = session.run(["probabilities"], given)
    alone = [session.run(None, {name: value[n : n + 1] for name, value in given.items()})[0] for n in range(len(found))]
    np.testing.assert_allclose(np.concatenate(alone), found, atol=1e-6)
    return found


def by_pipeline(models: list[Path], folder: Path, weights: list[float]) -> np.ndarray:
    """The blended log-probabilities [N, C], by the code of the ensemble stage."""
    names = sorted(path.name for path in folder.iterdir())
    members = [load_model(open_model_dir(path), {}) for path in models]
    return arithmetic([member.predict(open_store(folder), names, "test") for member in members], np.array(weights))


@pytest.mark.slow
def test_an_ensemble_is_one_graph_with_its_weights_views_and_temperature(world, images, tmp_path):
    weights = {"a": 0.7, "b": 0.3}
    members = [
        {"system": system, "model": f"fold {fold} of {system}, seed {seed}", "weight": weight / 2}
        for (system, weight), seed in zip(weights.items(), (1, 2), strict=True)
        for fold in range(2)
    ]
    blend = {"members": members, "weights": weights, "temperature": 1.7}
    write_json(tmp_path / "given" / "ensemble.json", blend)
    assert export(world / "folds", tmp_path / "out", ENSEMBLE=tmp_path / "given") == 0
    beside = tmp_path / "beside"
    shutil.copytree(world / "folds", beside / "models")
    write_json(beside / "both" / "ensemble.json", blend)
    write_json(beside / "one" / "ensemble.json", blend | {"members": members[:2]})  # of other models: says nothing
    assert export(beside, tmp_path / "again") == 0
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (tmp_path / "out" / "model.onnx").read_bytes()
    found = by_onnx(tmp_path / "out" / "model.onnx", images)
    models = sorted((world / "folds").iterdir())
    log_probs = by_pipeline(models, images, [member["weight"] for member in members])
    np.testing.assert_allclose(found, np.exp(apply_temperature(log_probs, 1.7)), atol=1e-5)
    assert np.abs(found - np.exp(log_probs)).max() > 0.01  # the temperature does something
    assert found.std(axis=0).max() > 0.01  # and so do the images

    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    described = json.loads((tmp_path / "out" / "export.json").read_text())
    assert {key: described[key] for key in metadata} == metadata
    assert (metadata["classes"], metadata["height"], metadata["width"]) == (CLASSES, *SIZE)
    assert [member["weight"] for member in metadata["members"]] == [pytest.approx(m["weight"]) for m in members]
    assert (metadata["temperature"], metadata["mean"]) == (1.7, [0.5, 0.4, 0.3])
    assert (session.get_inputs()[0].shape, session.get_inputs()[0].type) == (["N", 3, *SIZE], "tensor(float)")
    assert str(Path.cwd()).encode() not in (tmp_path / "out" / "model.onnx").read_bytes()


def test_without_its_record_all_systems_count_the_same(world, images, tmp_path):
    assert export(world / "folds", tmp_path, "predict.tta=plain") == 0
    models = [load_model(open_model_dir(path), {"tta": ["plain"]}) for path in sorted((world / "folds").iterdir())]
    names = sorted(path.name for path in images.iterdir())
    each = [np.exp(member.predict(open_store(images), names, "test")) for member in models]
    np.testing.assert_allclose(by_onnx(tmp_path / "model.onnx", images), np.mean(each, axis=0), atol=1e-5)


def test_meta_features_are_a_second_input(images, tmp_path):
    folder = save(tmp_path / "model", None, model={"image_stats": ["aspect", "color_mean"]})
    assert export(folder, tmp_path / "out") == 0
    meta = np.stack([image_stats(one, ["aspect", "color_mean"]) for one in pixels(images)])
    found = by_onnx(tmp_path / "out" / "model.onnx", images, meta=meta)
    np.testing.assert_allclose(found, np.exp(by_pipeline([folder], images, [1.0])), atol=1e-5)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["meta"] == ["aspect", "color_mean"]


def test_a_state_dict_is_plain_and_under_the_name_that_is_asked_for(world, images, tmp_path):
    names = {"best": "best_model_ema.pth", "raw": "best_model.pth"}
    for weights, name in names.items():
        arguments = ["export.format=pth", f"export.file={name}", f"export.weights={weights}", "FOLD=1"]
        folder = world / "folds" / "a1"
        assert export(folder, tmp_path, *arguments) == 0
        network = build_classifier(load_model(open_model_dir(folder), {}).settings.model, len(CLASSES))
        network.load_state_dict(torch.load(tmp_path / name, weights_only=True))
        inputs = torch.rand(2, 3, *SIZE)
        file = {"best": "model.safetensors", "raw": "model_raw.safetensors"}[weights]
        expected = load_model(open_model_dir(folder), {}, file).network
        torch.testing.assert_close(network.eval()(inputs), expected(inputs))
    assert (tmp_path / names["best"]).read_bytes() != (tmp_path / names["raw"]).read_bytes()


@pytest.mark.parametrize("form", ["onnx", "pth"])
def test_the_same_model_gives_the_same_bytes(form, world, tmp_path):
    for folder in ("one", "two"):
        assert export(world / "student", tmp_path / folder, f"export.format={form}", "export.file=x") == 0
    assert (tmp_path / "one" / "x").read_bytes() == (tmp_path / "two" / "x").read_bytes()


def spoilt(world: Path, folder: Path, what: str) -> dict[str, Path]:
    """The channels of a case that cannot be exported."""
    models, blend = folder / "models", folder / "blend"
    shutil.copytree(world / "folds", models, ignore=lambda _, names: [name for name in names if name.startswith("b")])
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
    for (system, changes), fold in product(others.get(what, {}).items(), range(2)):
        save(models / f"{system}{fold}", fold, seed=2, system=system, **changes)
    if what == "incomplete":
        save(models / "b0", 0, seed=2, system="b")
    elif what == "students":
        shutil.rmtree(models)
        save(models / "one", None, seed=1)
        save(models / "two", None, seed=2)
    elif what == "no raw weights":
        (models / "a1" / "model_raw.safetensors").unlink()
    elif what == "strangers":
        members[0]["model"] = "file other.csv"
    elif what == "rank":
        content["blend"] = "rank"
    elif what == "no members":
        content.pop("members")
    write_json(blend / "ensemble.json", content)
    with_blend = what in ("strangers", "rank", "no members")
    return {"MODEL": models} | ({"ENSEMBLE": blend} if with_blend else {})


@pytest.mark.parametrize(
    ("what", "arguments", "code", "message"),
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
def test_what_cannot_be_exported_is_told_and_leaves_nothing(what, arguments, code, message, world, tmp_path):
    output = tmp_path / "out"
    channels = spoilt(world, tmp_path, what)
    assert export(tmp_path, output, *arguments, **channels) == code
    assert message in failure(output)
    assert [path.name for path in output.iterdir()] == ["failure"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_an_absent_package_names_the_extra_and_pth_needs_none(package, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # as Python itself marks a module that cannot be imported
    assert export(world / "student", tmp_path / "onnx") == 64
    assert f"export.format=onnx needs {package}, " in failure(tmp_path / "onnx")
    assert "'fivefold[export]'" in failure(tmp_path / "onnx")
    assert export(world / "student", tmp_path / "pth", "export.format=pth") == 0


class Drifting(nn.Module):
    """A network that gives something else at each call, which a graph cannot."""

    calls = count(1)

    def forward(self, images):
        return images.mean(dim=(2, 3)) * 0 + images.new_tensor([next(self.calls), 0.0, 0.0])


def test_a_graph_that_disagrees_with_the_networks_is_not_kept(world, tmp_path):
    member = load_model(open_model_dir(world / "student"), {"tta": ["plain"]})
    committee = EnsemblePredictor(Ensemble({"a": [member.source]}, (1.0,)), [replace(member, network=Drifting())])
    with pytest.raises(FivefoldError, match=r"from the networks' \(at most 0.0001 is allowed\)") as caught:
        with atomic(tmp_path / "model.onnx") as temporary:
            write_onnx(temporary, committee)
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


FAMILIES = ("timm/resnet18", "timm/caformer_s18", "timm/efficientnet_b0", "torchvision/convnext_tiny", "torchvision/vgg11_bn",
            "efficientnet_pytorch/efficientnet-b0")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_the_families_can_be_exported(backbone, tmp_path):
    model = {"backbone": backbone, "backbone_kwargs": {}, "image_size": 64, "pretrained": False}
    assert export(save(tmp_path / "model", None, model=model, views=["plain", "flip"]), tmp_path / "out") == 0


def test_a_model_that_was_trained_by_sigmoids_predicts_and_is_exported_by_them(images, tmp_path):
    folder = save(tmp_path / "model", None, loss="bce")
    member, names = load_model(open_model_dir(folder), {}), sorted(path.name for path in images.iterdir())
    assert read_json(folder / "model.json")["link"] == "sigmoid"
    with torch.inference_mode():
        odds = member.network(member.runtime.images(torch.from_numpy(pixels(images)).permute(0, 3, 1, 2))).sigmoid()
    expected = (odds / odds.sum(dim=1, keepdim=True)).numpy()
    found = np.exp(by_pipeline([folder], images, [1.0]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    verdict = EnsemblePredictor(Ensemble({"a": [member.source]}, (1.0,)), [member]).predict(
        ImageList(open_store(images), names)
    )
    np.testing.assert_allclose(np.exp(verdict.log_probs), expected, atol=1e-5)
    assert export(folder, tmp_path / "out") == 0
    np.testing.assert_allclose(by_onnx(tmp_path / "out" / "model.onnx", images), expected, atol=1e-5)
    softmax = np.exp(by_pipeline([save(tmp_path / "other", None)], images, [1.0]))
    assert np.abs(found - softmax).max() > 0.01, "it is another prediction of the same weights"
    for link in ("probit", None):
        write_json(folder / "model.json", read_json(folder / "model.json") | {"link": link})
        with pytest.raises(DataError, match=r"model\.json"):
            load_model(open_model_dir(folder), {})


@pytest.mark.parametrize("option", ["checkpoint_path", "pretrained_cfg_overlay", "cache_dir", "weights"])
def test_a_model_json_names_no_other_weights(option, tmp_path):
    folder = save(tmp_path / "model", None)
    info = read_json(folder / "model.json")
    info["settings"]["model"]["backbone_kwargs"][option] = str(tmp_path / "w.pth")
    write_json(folder / "model.json", info)
    with pytest.raises(DataError, match=option):
        load_model(open_model_dir(folder), {})


def test_a_model_of_another_version_is_refused_in_one_line_that_names_a_setting(tmp_path):
    folder = save(tmp_path / "model", None)
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
