"""Export trained models as one file for other programs: ONNX, or a plain PyTorch state dict.

The ONNX graph contains the whole prediction after reading and resizing an image: normalisation, views, models, temperature.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fivefold.contract.stage_specs import ENSEMBLE
from fivefold.data.pipeline.dataset import count_stats
from fivefold.ensemble import EnsemblePredictor
from fivefold.errors import FivefoldError, SettingsError
from fivefold.inference.tta import View, build_views
from fivefold.log import log
from fivefold.lookup import require_packages
from fivefold.models.classifier import LINKS
from fivefold.trained_model import TrainedModel

MAX_BYTES = 2_000_000_000
"""ONNX files are protobuf, which has a limit of 2 GiB."""
TOLERANCE = 1e-4
"""Maximum difference between a probability of onnxruntime and of the networks."""
CHECKED_IMAGES = 5
EXPORTABLE_BLENDS = ("mean", "weighted", "fitted", "greedy", "greedy_accuracy")
"""Blends that are convex sums of probabilities."""


def input_stats(predictor: EnsemblePredictor) -> list[str]:
    """Return the meta features that an exported file takes in addition to images."""
    return next((m.settings.model.image_stats for m in predictor.models if m.settings.model.image_stats), [])


def check_graph(predictor: EnsemblePredictor) -> None:
    """Raise a SettingsError unless one graph can contain the models: a mean, one size, one transform, the same meta features."""
    for key, blend in (("blend", predictor.ensemble.between), ("within", predictor.ensemble.within)):
        if blend not in EXPORTABLE_BLENDS:
            raise SettingsError(f"{ENSEMBLE}: {key}={blend} is not a mean of probabilities, which a graph needs")
    first, stats = predictor.models[0], input_stats(predictor)
    for other in predictor.models[1:]:
        for what, a, b in (
            ("sizes", first.settings.model.size, other.settings.model.size),
            ("augment.eval", first.settings.augment.eval, other.settings.augment.eval),
            ("filters of resizing", first.settings.model.interpolation, other.settings.model.interpolation),
            ("meta features", stats, other.settings.model.image_stats or stats),
        ):
            if a != b:
                raise SettingsError(
                    f"{first.source.name} and {other.source.name} have different {what} ({a}, {b}), "
                    "but an exported file has one: export each system separately"
                )


class PreprocessedModel(nn.Module):
    """Images [B, 3, H, W] in 0..255 to one model's mean probabilities over its views [B, C]."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.scores = LINKS[model.link]
        self.network = model.network.float().cpu().to(memory_format=torch.contiguous_format)
        for module in self.network.modules():
            if hasattr(module, "set_swish"):  # efficientnet_pytorch's default Swish cannot be traced
                module.set_swish(memory_efficient=False)
        self.register_buffer("mean", model.runtime.mean.cpu())
        self.register_buffer("std", model.runtime.std.cpu())
        self.views: list[View] = build_views(model.settings.predict.tta, black=-self.mean / self.std)
        self.takes_meta = bool(model.settings.model.image_stats)

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        normalised = (images - self.mean) / self.std
        meta_args = (meta,) if self.takes_meta else ()
        probabilities = [self.scores(self.network(view(normalised), *meta_args)).softmax(dim=1) for view in self.views]
        return torch.stack(probabilities).mean(dim=0)


class EnsembleModule(nn.Module):
    """Images float [B, 3, H, W] in 0..255, and meta features [B, M] if models take them, to probabilities [B, C]."""

    def __init__(self, predictor: EnsemblePredictor) -> None:
        super().__init__()
        self.members = nn.ModuleList(PreprocessedModel(model) for model in predictor.models)
        self.register_buffer("weights", torch.tensor(predictor.ensemble.model_weights, dtype=torch.float32))
        self.temperature = predictor.ensemble.temperature

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        probabilities = torch.stack([member(images, meta) for member in self.members], dim=-1)
        mean = (probabilities * self.weights).sum(dim=-1)
        if self.temperature == 1:
            return mean
        return (mean.clamp_min(torch.finfo(mean.dtype).tiny).log() / self.temperature).softmax(dim=1)


def describe_model(predictor: EnsemblePredictor) -> dict[str, Any]:
    """Return the metadata that a user of the file needs: ordered classes, image size, preprocessing, views, models."""
    first, (height, width) = predictor.models[0].settings, predictor.models[0].settings.model.size
    return {
        "classes": list(predictor.classes),
        "height": height,
        "width": width,
        "meta": input_stats(predictor),
        "transform": first.augment.eval,
        "interpolation": first.model.interpolation,
        "mean": first.model.mean,
        "std": first.model.std,
        "views": first.predict.tta,
        "temperature": predictor.ensemble.temperature,
        "members": [
            {"name": model.source.name, "weight": weight, "link": model.link}
            for model, weight in zip(predictor.models, predictor.ensemble.model_weights, strict=True)
        ],
    }


def write_onnx(path: Path, predictor: EnsemblePredictor) -> None:
    """Write one graph: `images` float [N, 3, H, W] in 0..255, RGB (and `meta` float [N, M]) to `probabilities` [N, C].

    N is dynamic. The metadata contain `describe_model`, each value as JSON. Raise a FivefoldError if onnxruntime disagrees
    with the networks, and a SettingsError if ONNX cannot represent them.
    """
    require_packages(["onnx", "onnxscript", "onnxruntime"], "export", "export.format=onnx")
    check_graph(predictor)
    blended = EnsembleModule(predictor).eval()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in blended.state_dict().values())
    if weights > MAX_BYTES:
        raise SettingsError(
            f"the {len(predictor.models)} networks have {weights / 1e9:.1f} GB of weights, but an ONNX file can have at "
            f"most {MAX_BYTES / 1e9:.0f} GB: export one fold (FOLD=0), or a student"
        )
    program = _trace(blended, _random_inputs(predictor, 2))
    for key, value in describe_model(predictor).items():
        program.model.metadata_props[key] = json.dumps(value, ensure_ascii=False)
    program.save(path, external_data=False)
    difference = _largest_difference(path, blended, _random_inputs(predictor, CHECKED_IMAGES))
    if not difference <= TOLERANCE:
        raise FivefoldError(
            f"the probabilities of onnxruntime differ by {difference:.2g} from the networks' (at most {TOLERANCE:g} is "
            "allowed), so the ONNX file was not saved; set export.format=pth"
        )
    log.info("onnxruntime agrees on %d random images: the largest difference is %.1e", CHECKED_IMAGES, difference)


def write_pth(path: Path, predictor: EnsemblePredictor) -> None:
    """Write the state dict of one network, which `torch.load(…, weights_only=True)` reads without running code."""
    if len(predictor.models) > 1:
        raise SettingsError(
            f"format=pth exports one network, but there are {len(predictor.models)}: set one model folder, or FOLD=0"
        )
    state = {name: tensor.contiguous().cpu() for name, tensor in predictor.models[0].network.state_dict().items()}
    with open(path, "wb") as file:  # as a handle, because torch.save would write a path's name into the file
        torch.save(state, file)


def _random_inputs(predictor: EnsemblePredictor, images: int) -> tuple[Tensor, ...]:
    """Return random images and meta features, the same on every call."""
    random, stats = torch.Generator().manual_seed(0), input_stats(predictor)
    pixels = torch.randint(0, 256, (images, 3, *predictor.models[0].settings.model.size), generator=random).float()
    return (pixels, torch.rand(images, count_stats(stats), generator=random)) if stats else (pixels,)


def _trace(blended: EnsembleModule, inputs: tuple[Tensor, ...]) -> torch.onnx.ONNXProgram:
    """Trace `blended` to a graph with a dynamic number of images, without the source locations of its nodes."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Name the dimension once: tracing infers that the second input has as many rows.
    counts = {"images": {0: torch.export.Dim("N")}, "meta": {0: torch.export.Dim.AUTO}}
    names = ["images", "meta"][: len(inputs)]
    try:
        program = torch.onnx.export(
            blended,
            inputs,
            input_names=names,
            output_names=["probabilities"],
            dynamic_shapes={name: counts[name] for name in names},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise SettingsError(f"this network cannot be exported as ONNX ({reason[0]}); set export.format=pth") from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    return program


def _largest_difference(path: Path, blended: EnsembleModule, inputs: tuple[Tensor, ...]) -> float:
    """Return the largest difference between the probabilities of onnxruntime and of the networks; NaN if any is not finite."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    with torch.inference_mode():
        expected = blended(*inputs).numpy()
    return float(np.abs(actual - expected).max())


FORMATS: dict[str, tuple[str, Callable[[Path, EnsemblePredictor], None]]] = {
    "onnx": ("model.onnx", write_onnx),
    "pth": ("model.pth", write_pth),
}
"""The default file name and the writer of each format."""
