"""The inference stage (reference systems): predict with all models of the channel, and write output.csv as the sample requires."""

import logging

from fivefold import predictions
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_models
from fivefold.contract.job import Job
from fivefold.contract.stage_specs import OUTPUT, PREDICTIONS
from fivefold.data.class_aliases import SameClasses
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.inference.blending import mean
from fivefold.inference.ensemble_spec import by_system, check_same
from fivefold.inference.factor_product import needs_product, product_of
from fivefold.inference.submission import check_submission
from fivefold.stages.result import Outcome

from .ensemble import Asked, in_factors, predict_each, submit, table_of

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Predict the eval channel with one model, the mean of several, or the product of models of different factors."""
    models = find_models(job.channel("model"), job.scratch)
    groups, infos = by_system(models), [model.info for model in models]
    product = product_of(groups) if needs_product(infos) else None
    if product is None:
        check_same(models, "classes", "predict different classes")
        if infos[0].get("knows"):
            log.warning(
                "inference: the models predict only %s; the answers cover no other factors",
                ", ".join(infos[0]["knows"]),
            )
    classes = product.factors.classes if product else tuple(infos[0]["classes"])
    same = SameClasses(settings.data.same_classes, settings.data.same_class)
    store = open_store(job.channel("eval"), settings.data.max_unpacked_gib)
    images = read_eval(store, settings.data.id_column, settings.data.path_column)
    images = images.answered_in("", answer=settings.ensemble.answer, positive=settings.ensemble.positive_class)
    images = in_factors(images, models, classes)
    check_submission(images, classes, same)

    explicit = settings.predict.model_dump(exclude_unset=True)
    request = Asked(store, images, settings.ensemble.unreadable == "prior", job.scratch)
    system_probs, _ = predict_each(groups, request, explicit, "mean")
    log_probs = product.join(system_probs) if product else mean(list(system_probs.values()))
    table = table_of(images, product.name if product else " + ".join(system_probs), classes, log_probs)
    output = job.output()
    written = [predictions.write(output / PREDICTIONS, table), submit(output / OUTPUT, table, images, same)]
    log.info("inference: %d images by %d models of %s: %s", len(images), len(models), table.system, output / OUTPUT)
    return Outcome(written, {"models": len(models), "images": len(images)})
