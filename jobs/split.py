"""The split stage: open every image once, and assign the rows to folds."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from fivefold.config.loading import hashed_settings
from fivefold.config.schema import Settings
from fivefold.contract.files import atomic, write_json
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import CLASSES, FOLDS, OVERLAP, SPLIT_SUMMARY
from fivefold.data.class_aliases import ClassAliases
from fivefold.data.image_io import decode_options
from fivefold.data.readers.eval_images import EvalImages, check_rows, read_eval
from fivefold.data.readers.stores import ImageStore, open_store
from fivefold.data.readers.training_rows import LabelledImages, read_rows
from fivefold.data.split import verify
from fivefold.data.split.assign import assign_rows, find_duplicates
from fivefold.data.split.corrections import join_groups, read_decisions
from fivefold.data.split.fold_table import FoldTable, write_folds
from fivefold.data.split.summary import FILES, SUMMARY, class_file_content, log_summary, summarise, write_parts
from fivefold.errors import DataError
from fivefold.inference.submission import check_submission
from fivefold.log import log
from fivefold.predictions import preview


def main(job: StageContext, settings: Settings) -> StageResult:
    """Split the channel's rows; return the folds, the classes and the figures."""
    split, data = settings.split, settings.data
    store = open_store(job.channel("train"), data.max_unpacked_gib)
    rows, corrections = labelled_rows(store, settings), {}
    if data.groups:
        rows, corrections["groups"] = join_groups(store, data.groups, rows)
    decisions = read_decisions(store, data.labels, rows, ClassAliases.of(settings.data)) if data.labels else None
    log.info("split: %d rows of %d classes in %s", len(rows), len(rows.classes), rows.layout)

    hashes, skipped, pictures, known = pa.nulls(len(rows), pa.string()), [], rows.paths, rows.classes
    if split.verify_images:
        opened = verify_train(store, rows, settings)
        skipped, readable = opened.failures(rows.paths), opened.readable
        rows, hashes, pictures = rows.take(readable), opened.sha256.drop_null(), opened.pixels[readable]
        decisions = None if decisions is None else decisions.take(readable)
    tested = verify_eval(job, settings, rows)
    duplicates = find_duplicates(pictures)
    fold, part = assign_rows(rows, duplicates, split)

    table = FoldTable(rows.ids, rows.paths, rows.codes, rows.classes, rows.groups, fold, part, hashes, rows.factors)
    lost, strata = sorted({*rows.lost, *known} - set(rows.classes)), rows.strata
    if decisions is not None:
        table, kept, corrections["labels"] = decisions.apply(table)
        pictures = pictures[kept] if isinstance(pictures, np.ndarray) else pictures.filter(pa.array(kept))
        strata = None if strata is None else strata.filter(pa.array(kept))
        duplicates = find_duplicates(pictures)
    used = hashed_settings(settings, job.stage.sections)
    summary = summarise(table, rows, duplicates, skipped, lost, used) | {"corrections": corrections}
    folder = job.output()
    for name in (*FILES.values(), SUMMARY, OVERLAP):  # an earlier split may have written other files
        (folder / name).unlink(missing_ok=True)
    outputs = [folder / FOLDS, folder / CLASSES, folder / SPLIT_SUMMARY]
    if tested is not None:
        images, opened = tested
        summary["eval"] = {"images": len(images), "unreadable": opened.failures(images.paths)}
        if split.verify_images:
            shared = verify.match_duplicates(opened, pictures)
            summary["eval"]["in_split"] = len(shared)
            outputs += [write_overlap(folder / OVERLAP, images, table, shared)] if shared else []
    write_folds(outputs[0], table)
    write_json(outputs[1], class_file_content(table))
    write_json(outputs[2], summary)
    if split.write_csv or strata is not None:
        outputs += write_parts(folder, table, strata, split.seed, split.ratios)
    log_summary(summary)
    return StageResult(outputs, {"rows": len(table), "classes": len(table.classes), "folds": table.num_folds})


def labelled_rows(store: ImageStore, settings: Settings) -> LabelledImages:
    """Read the rows that the settings describe; check that files exist only if an unreadable file stops the stage."""
    check_files = settings.split.verify_images and not settings.split.skip_unreadable
    rows = read_rows(store, settings.data, check_files)
    if rows.lost and not settings.split.skip_unreadable:
        raise DataError(
            f"{store.root}: no image can be read in {', '.join(rows.lost.values())}; convert or remove the files, or set "
            "split.skip_unreadable=true to split without these classes"
        )
    return ClassAliases.of(settings.data).merge_rows(rows)


def verify_train(store: ImageStore, rows: LabelledImages, settings: Settings) -> verify.VerifiedImages:
    """Open the images of the rows. Raise a DataError for unreadable ones, unless the settings leave them out."""
    opened = verify.verify_images(store, rows.paths, decode_options(settings.data))
    failures = opened.failures(rows.paths)
    if failures and not settings.split.skip_unreadable:
        reasons = "; ".join(failure["reason"] for failure in failures[: verify.MAX_LISTED])
        raise DataError(
            f"{len(failures)} of {len(rows)} images cannot be read, such as: {reasons}; repair or remove them, or set "
            "split.skip_unreadable=true to ignore them"
        )
    return opened


def verify_eval(
    job: StageContext, settings: Settings, rows: LabelledImages
) -> tuple[EvalImages, verify.VerifiedImages] | None:
    """Open the images of the eval channel, None without it, to find errors before a model trains.

    Return the test images and the results of opening them, which are empty if the split opens no image. Raise a DataError for
    unreadable images, unless they may get the class shares of the training data, and for a sample of other rows or classes.
    """
    if job.optional_channel("eval") is None:
        return None
    data = settings.data
    store = open_store(job.channel("eval"), data.max_unpacked_gib)
    images = read_eval(store, data.id_column, data.path_column)
    images = images.with_label_column("", answer=settings.ensemble.answer, positive=settings.ensemble.positive_class)
    check_rows(images)
    if rows.factors is None:  # otherwise models may predict only some factors
        check_submission(images, rows.classes, ClassAliases.of(settings.data))
    paths = images.paths if settings.split.verify_images else images.paths[:0]
    opened = verify.verify_images(store, pa.array(paths, pa.string()), decode_options(data))
    if opened.unreadable:
        problem = f"{len(opened.unreadable)} of {len(images)} test images cannot be read"
        reasons = verify.describe_failures(opened.unreadable, paths)
        if settings.ensemble.unreadable == "error" or len(opened.unreadable) == len(images):
            raise DataError(
                f"{problem}: {reasons}; repair them, or set "
                "ensemble.unreadable=prior to predict them by the class shares of the training data"
            )
        log.warning("%s; they will get the class shares of the training data: %s", problem, reasons)
    return images, opened


def write_overlap(path: Path, images: EvalImages, table: FoldTable, shared: Mapping[int, int]) -> Path:
    """Write and log the test images with the same pixels as an image of the split; `shared` maps test rows to split rows."""
    test_rows, rows = list(shared), np.array(list(shared.values()), np.int64)
    log.warning(
        "split: %d of %d test images have the pixels of an image of the split, e.g. %s: their score says nothing about new "
        "images; %s lists them, and evaluate also scores the other images separately",
        *(len(shared), len(images), preview(images.paths[test_rows]), path.name),
    )
    columns = {"id": images.ids[test_rows], "path": images.paths[test_rows], "split_path": table.paths_of(rows)}
    frame = pd.DataFrame(columns | {"label": table.labels()[rows], "part": table.part[rows]}, dtype=object)
    with atomic(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n")
    return path
