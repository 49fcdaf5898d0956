"""The inference stage (reference systems): predict with all models of the channel, and write output.csv as the sample requires."""

from fivefold import predictions
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import find_models
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import OUTPUT, PREDICTIONS
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.readers.eval_images import read_eval
from fivefold.data.readers.stores import open_store
from fivefold.inference.blending import mean
from fivefold.inference.ensemble_spec import check_equal_field, group_by_system
from fivefold.inference.factor_product import build_product, needs_product
from fivefold.inference.submission import check_submission
from fivefold.log import log

from .ensemble import make_table, predict_each, save_submission, with_factor_labels


def main(job: StageContext, settings: Settings) -> StageResult:
    """Predict the eval channel with one model, the mean of several, or the product of models of different factors."""
    models = find_models(job.channel("model"), job.scratch)
    groups, infos = group_by_system(models), [model.info for model in models]
    product = build_product(groups) if needs_product(infos) else None
    if product is None:
        check_equal_field(models, "classes", "predict different classes")
        if knows := infos[0].get("knows"):
            log.warning("inference: the answers cover only the factors %s", ", ".join(knows))
    classes = product.factors.classes if product else tuple(infos[0]["classes"])
    same = ClassAliases.of(settings.data)
    store = open_store(job.channel("eval"), settings.data.max_unpacked_gib)
    images = read_eval(store, settings.data.id_column, settings.data.path_column)
    images = images.with_label_column("", answer=settings.ensemble.answer, positive=settings.ensemble.positive_class)
    images = with_factor_labels(images, models, classes)
    check_submission(images, classes, same)

    system_probs, _ = predict_each(job, settings, groups, store, images)
    log_probs = product.combine(system_probs) if product else mean(list(system_probs.values()))
    table = make_table(images, product.name if product else " + ".join(system_probs), classes, log_probs)
    output = job.output()
    written = [predictions.write(output / PREDICTIONS, table), save_submission(output / OUTPUT, table, images, same)]
    log.info("inference: %d images by %d models of %s: %s", len(images), len(models), table.system, output / OUTPUT)
    return StageResult(written, {"models": len(models), "images": len(images)})
