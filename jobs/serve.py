"""`python -m jobs serve [model=PATH] KEY=VALUE...`: a trained model that answers over HTTP, as SageMaker's hosting calls it.

The model is a fold's, a student, or a folder with a whole ensemble: model=PATH (or s3://bucket/prefix), else
SM_CHANNEL_MODEL, else SM_MODEL_DIR, else the student of run=NAME, else /opt/ml/model. It answers

    POST /invocations   an image (image/jpeg, image/png, …), or a JSON list of images in base64; ?top=N
    GET /ping           200 when it is ready, 503 while it loads and when it stops
    GET /metrics        counters for Prometheus
"""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.contract.job import base_dir, job_from
from fivefold.contract.layout import run_at
from fivefold.contract.stages import STAGES
from fivefold.contract.storage import SCRATCH
from fivefold.errors import MissingInputError
from fivefold.recipe import Settings
from fivefold.settings import Layer, describe, layers_of, load, normal_key, unused_keys
from fivefold.stopping import noted

if TYPE_CHECKING:
    from fivefold.committee import Committee

log = logging.getLogger("fivefold")

PORT, HOST = "SAGEMAKER_BIND_TO_PORT", "FIVEFOLD_HOST"
KEYS = ("recipe", "predict.device", "predict.views", "serve")
"""What is used here; otherwise each model predicts as its own recipe says."""


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Serves until it is told to stop, which is a StoppedError like any stage's."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__.strip()}\n\nkeys, as arguments or environment (SERVE__PORT=8081):\n{describe(KEYS)}")
        return 0
    path, rest = taken_apart(arguments)
    layers = [*layers_of(rest, environ), *place_layers(environ)]
    settings = load(layers)
    if unused := unused_keys(layers[0], ("predict", "serve")):
        log.info("serve does not use: %s", ", ".join(unused))
    path = path or model_path(environ, settings)
    from fivefold.serving.server import address, listen, serve
    from fivefold.serving.service import Service

    options = settings.serve
    with noted(), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        with listen(options.host, options.port) as listener:
            log.info("listens at %s, loads %s", address(listener), path)
            service = Service(options)
            serve(listener, service, lambda: model_at(path, settings, Path(scratch)), options.drain_s)
    return 0


def taken_apart(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The path of the model that the arguments name, "" if none, and the other arguments."""
    given = [argument for argument in arguments if normal_key(argument.partition("=")[0]) == "model"]
    rest = [argument for argument in arguments if argument not in given]
    return (given[-1].partition("=")[2] if given else ""), rest


def place_layers(environ: Mapping[str, str]) -> list[Layer]:
    """The port that SageMaker wants a container of several to listen at; the address that the image sets."""
    named = ((PORT, "serve.port"), (HOST, "serve.host"))
    return [Layer(name, {key: environ[name]} if environ.get(name) else {}) for name, key in named]


def model_path(environ: Mapping[str, str], settings: Settings) -> str:
    """Where the platform has put the model, else the student of the run that is named; a MissingInputError for neither."""
    hosted = base_dir(environ) / "model"
    student = f"{run_at(settings.runs, settings.run)}/distill" if settings.run else ""
    path = environ.get("SM_CHANNEL_MODEL") or environ.get("SM_MODEL_DIR") or student
    if not path and not hosted.is_dir():
        raise MissingInputError(
            f"serve needs a model: give model=PATH, or set SM_CHANNEL_MODEL (SageMaker's place, {hosted}, is not there)"
        )
    return path or str(hosted)


def model_at(path: str, settings: Settings, scratch: Path) -> "Committee":
    """The models of the path, loaded and tried on a grey image; what is at s3:// is fetched first."""
    folder = job_from(STAGES["predict"], {"SM_CHANNEL_MODEL": path}, scratch).channel("model")
    import numpy as np

    from fivefold.committee import load_committee

    committee = load_committee(folder, scratch, settings.predict.model_dump(exclude_unset=True))
    grey = committee.prepare(dict.fromkeys(committee.kinds, np.full((64, 64, 3), 128, np.uint8)))
    for size in (settings.serve.batch_size, 1):
        committee.judge([grey] * size)
    log.info("%d models of %s, %d classes", len(committee.members), path, len(committee.classes))
    return committee
