"""A trained model as one file that other programs read: a student, a fold, or a whole ensemble."""

import logging
from collections.abc import Sequence

from fivefold import exporting
from fivefold.choose import choose
from fivefold.committee import find_description
from fivefold.contract.artifacts import ModelDir, find_models, locate
from fivefold.contract.files import atomic, read_json, write_json
from fivefold.contract.job import Job
from fivefold.contract.stages import ENSEMBLE, EXPORT, RAW_WEIGHTS, WEIGHTS
from fivefold.errors import DataError, SettingsError
from fivefold.inference.ensemble import check_members
from fivefold.members import load_member
from fivefold.recipe import Settings

from .outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Writes the file, and `export.json` beside it, which says what it takes and what it gives."""
    options = settings.export
    name, write = choose(exporting.FORMATS, "format", options.format)
    path = job.output() / (options.file or name)
    models = chosen(find_models(job), settings.fold)
    weights, temperature = blend_of(job, models)

    explicit = {key: getattr(settings.predict, key) for key in settings.predict.model_fields_set}
    file = {"best": WEIGHTS, "raw": RAW_WEIGHTS}[options.weights]
    members = [load_member(model, explicit, file) for model in models]
    ensemble = exporting.Ensemble(members, weights, temperature)
    path.unlink(missing_ok=True)
    with atomic(path) as temporary:
        write(temporary, ensemble)
    log.info("%s: %s, %.1f MB", path, ", ".join(model.name for model in models), path.stat().st_size / 1e6)
    facts = {"file": path.name, "format": options.format, **exporting.describe(ensemble)}
    write_json(job.output() / EXPORT, facts)
    return Outcome([path, job.output() / EXPORT], {"models": len(models), "bytes": path.stat().st_size})


def chosen(models: list[ModelDir], fold: int | None) -> list[ModelDir]:
    """All models, which must be one student or belong together; or the one of `fold`."""
    if fold is not None:
        models = [model for model in models if model.info["fold"] == fold]
        if len(models) != 1:
            raise SettingsError(
                f"FOLD={fold}: {in_words(models)} below the channel 'model'; give the model dir of one fold"
            )
    elif len(models) > 1 and models[0].info["role"] == "student":
        raise DataError(f"{in_words(models)} below the channel 'model'; give the model dir of one student")
    elif len(models) > 1:
        check_members([(model.name, model.info) for model in models])
    return models


def blend_of(job: Job, models: Sequence[ModelDir]) -> tuple[list[float], float]:
    """The weight of each model and the temperature: of the ensemble channel or beside the models, else equal systems at 1."""
    given = job.optional_channel("ensemble") is not None
    path = locate(job, "ensemble", ENSEMBLE) if given else find_description(job, models)
    if path is None:
        return exporting.equal_systems([model.system for model in models]), 1.0
    weights, temperature = exporting.read_blend(read_json(path), [model.name for model in models], str(path))
    log.info("%d models with the weights and the temperature %.4g of %s", len(models), temperature, path)
    return weights, temperature


def in_words(models: Sequence[ModelDir]) -> str:
    return f"{len(models)} models ({', '.join(model.name for model in models)})" if models else "no model"
