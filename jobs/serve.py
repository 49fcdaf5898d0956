"""`python -m jobs serve [model=PATH] KEY=VALUE...`: serve a trained model over HTTP, compatible with SageMaker's hosting.

The model is a fold model, a student, or a folder with a whole ensemble. It is read from model=PATH (or
s3://bucket/prefix), else SM_CHANNEL_MODEL, else SM_MODEL_DIR, else the student of run=NAME, else /opt/ml/model.

    POST /invocations   an image (image/jpeg, image/png, …), or a JSON list of images in base64; ?top=N
    GET /ping           200 when the server is ready, 503 while it loads or stops
    GET /metrics        counters for Prometheus
"""

import asyncio
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.config.loading import Layer, collect_layers, describe_keys, load, normalize_key, unused_keys
from fivefold.config.schema import Settings
from fivefold.contract.job import base_dir, context_from_env
from fivefold.contract.run_layout import run_path
from fivefold.contract.s3.sync import SCRATCH
from fivefold.contract.stage_specs import STAGES
from fivefold.errors import MissingInputError
from fivefold.log import log
from fivefold.signals import defer_signals

if TYPE_CHECKING:
    from fivefold.ensemble import EnsemblePredictor

KEYS = ("recipe", "predict.device", "predict.tta", "serve")
"""The settings that serve uses; otherwise each model predicts with its own recipe."""


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Serve until a signal raises StoppedError, as in any stage."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nKeys, as arguments or environment variables (SERVE__PORT=8081):\n{describe_keys(KEYS)}")
        return 0
    models = [argument for argument in arguments if normalize_key(argument.partition("=")[0]) == "model"]
    rest = [argument for argument in arguments if argument not in models]
    layers = [*collect_layers(rest, environ), *platform_layers(environ)]
    settings = load(layers)
    if unused := unused_keys(layers[0], ("predict", "serve")):
        log.info("serve does not use: %s", ", ".join(unused))
    path = (models[-1].partition("=")[2] if models else "") or model_path(environ, settings)
    from fivefold.serving.server import address, listen, serve
    from fivefold.serving.service import Service

    with defer_signals(), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        with listen(settings.serve.host, settings.serve.port) as listener:
            log.info("listens at %s, loading %s", address(listener), path)
            load_model = partial(load_served_model, path, settings, Path(scratch))
            asyncio.run(serve(listener, Service(settings.serve), load_model))
    return 0


def platform_layers(environ: Mapping[str, str]) -> list[Layer]:
    """Return layers for the port that SageMaker assigns in a multi-container endpoint, and for the address that the image sets."""
    variables = (("SAGEMAKER_BIND_TO_PORT", "serve.port"), ("FIVEFOLD_HOST", "serve.host"))
    return [Layer(name, {key: environ[name]} if environ.get(name) else {}) for name, key in variables]


def model_path(environ: Mapping[str, str], settings: Settings) -> str:
    """Return the platform's model path, else the student of the run; raise a MissingInputError for neither."""
    hosted = base_dir(environ) / "model"
    student = f"{run_path(settings.runs, settings.run)}/distill" if settings.run else ""
    path = environ.get("SM_CHANNEL_MODEL") or environ.get("SM_MODEL_DIR") or student
    if not path and not hosted.is_dir():
        raise MissingInputError(f"serve needs a model: set model=PATH or SM_CHANNEL_MODEL; {hosted} does not exist")
    return path or str(hosted)


def load_served_model(path: str, settings: Settings, scratch: Path) -> "EnsemblePredictor":
    """Load the models of a path or s3:// URL, and test them on a grey image."""
    folder = context_from_env(STAGES["predict"], {"SM_CHANNEL_MODEL": path}, scratch).channel("model")
    import numpy as np

    from fivefold.ensemble import load_ensemble

    ensemble = load_ensemble(folder, scratch, settings.predict.model_dump(exclude_unset=True))
    grey = ensemble.prepare(dict.fromkeys(ensemble.decode_options, np.full((64, 64, 3), 128, np.uint8)))
    for size in (settings.serve.batch_size, 1):
        ensemble.predict_prepared([grey] * size)
    log.info("%d models of %s, %d classes", len(ensemble.models), path, len(ensemble.classes))
    return ensemble
