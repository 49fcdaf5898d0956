"""The export stage: write a student, a fold model or a whole ensemble as one file for other programs."""

from fivefold import export
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_all, find_models, find_one
from fivefold.contract.files import atomic, write_json
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import ENSEMBLE, EXPORT, RAW_WEIGHTS, WEIGHTS
from fivefold.ensemble import EnsemblePredictor
from fivefold.errors import SettingsError
from fivefold.inference.ensemble_spec import find_ensemble
from fivefold.log import log
from fivefold.lookup import choose
from fivefold.trained_model import load_model


def main(job: StageContext, settings: Settings) -> StageResult:
    """Write the file, and `export.json` beside it, which describes its inputs and outputs."""
    options = settings.export
    name, write = choose(export.FORMATS, "format", options.format)
    path = job.output() / (options.file or name)
    models = find_models(job.channel("model"), job.scratch)
    if settings.fold is not None:
        models = [model for model in models if model.info["fold"] == settings.fold]
        if len(models) != 1:
            names = ", ".join(model.name for model in models) or "no model"
            raise SettingsError(f"FOLD={settings.fold}: {names} below the channel 'model'; one is needed")
    if job.optional_channel("ensemble") is None:
        ensemble = find_ensemble(models, find_all(job.channel("model"), job.scratch, ENSEMBLE))
    else:
        ensemble = find_ensemble(models, [find_one(job, "ensemble", ENSEMBLE)], required=True)

    explicit = settings.predict.model_dump(exclude_unset=True)
    file = {"best": WEIGHTS, "raw": RAW_WEIGHTS}[options.weights]
    predictor = EnsemblePredictor(ensemble, [load_model(model, explicit, file) for model in ensemble.models])
    path.unlink(missing_ok=True)
    with atomic(path) as temporary:
        write(temporary, predictor)
    log.info("%s: %s, %.1f MB", path, ", ".join(model.name for model in models), path.stat().st_size / 1e6)
    facts = {"file": path.name, "format": options.format, **export.describe_model(predictor)}
    write_json(job.output() / EXPORT, facts)
    return StageResult([path, job.output() / EXPORT], {"models": len(models), "bytes": path.stat().st_size})
