"""The audit stage: find images and labels that may be wrong, and write tables and a page on which a person decides."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fivefold import build, predictions
from fivefold.audit import odd_images, page
from fivefold.audit.label_errors import (
    agreement,
    confused_classes,
    find_neighbours,
    find_suspects,
)
from fivefold.config.schema import Settings
from fivefold.contract.artifacts import ModelDir, check_split, find_all, find_models
from fivefold.contract.files import sha256, write_json, write_text
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import AUDIT, AUDIT_PAGE, LABELS, MODEL, ODD_IMAGES, OOF
from fivefold.csv_tables import open_csv
from fivefold.data.image_io import decode, decode_options, map_in_threads
from fivefold.data.readers.stores import ImageStore
from fivefold.data.split.assign import find_duplicates, group_codes
from fivefold.data.split.fold_table import FoldTable
from fivefold.distributed.process_group import SINGLE_PROCESS
from fivefold.errors import DataError, MissingInputError, RetryableError
from fivefold.evaluation.scored_rows import write_csv
from fivefold.log import log
from fivefold.lookup import require_packages
from fivefold.predictions import Predictions, mean_by_id
from fivefold.progress import track
from fivefold.stages import image_source
from fivefold.stages.linear_probe import LinearProbe
from fivefold.stages.training_run import probe_cache_dir, read_split, start_network
from fivefold.training.linear_probe import fit_linear

COLUMNS = (
    "id", "decision", "label", "given", "suggested", "path", "given_probability", "suggested_probability", "agreement",
    "neighbours_given", "neighbours_suggested", "issue",
)  # fmt: skip
"""The columns of labels.csv."""
FIGURES = [*COLUMNS[6:]]
"""Those that hold numbers."""
ODD_COLUMNS = ["id", "path", "label", "problem", "value", "typical"]
"""The columns of odd_images.csv."""


def main(job: StageContext, settings: Settings) -> StageResult:
    """Examine the rows of the split; return labels.csv, odd_images.csv, audit.json, audit.html, and the counts."""
    require_packages(["cleanlab"], "audit", "the stage audit")
    output = job.output()
    earlier = read_earlier(output / LABELS)
    split, table = read_split(job)
    models = read_models(job, split, table)
    store = image_source.open_split(job, table, settings)
    features, left_out = frozen_features(job, settings, table, store)
    judged = judge_rows(table, models, features, settings.seed)
    if judged is None:
        left_out.append("labels and confused classes: they need fold models (the channel model) or pretrained weights")

    suspects, confused = list_suspects(table, judged, features, settings.audit.max_suspects)
    odd = pd.DataFrame(columns=ODD_COLUMNS)
    if settings.audit.images:
        odd = list_odd_images(table, store, settings)
    suspects = keep_decisions(suspects, earlier)
    counts = {
        "rows": len(table),
        "suspects": int(suspects["issue"].eq(1).sum()),
        "confused_classes": len(confused),
        "odd_images": odd_images.count_problems(odd),
        "rare_classes": rare_classes(table),
        "not_examined": left_out,
    }
    written = [
        write_csv(output / LABELS, suspects[[*COLUMNS]]),
        write_csv(output / ODD_IMAGES, odd),
    ]
    write_json(output / AUDIT, counts)
    title = settings.run or settings.system or "data"
    page_key = sha256(split)[:16]
    write_text(output / AUDIT_PAGE, draw_page(title, page_key, table, suspects, odd, confused, counts, store, settings))
    for text in left_out:
        log.warning("audit: not examined: %s", text)
    log.info(
        "audit: %d suspicious labels, %d pairs of confused classes, %d odd images; see %s",
        *(counts["suspects"], len(confused), odd["path"].nunique(), output / AUDIT_PAGE),
    )
    return StageResult([*written, output / AUDIT, output / AUDIT_PAGE], {"suspects": counts["suspects"]})


def read_models(job: StageContext, split: Path, table: FoldTable) -> list[ModelDir]:
    """Return the models of the channel that have out-of-fold rows of all classes of this split."""
    folder = job.optional_channel("model")
    found = folder is not None and find_all(folder, job.scratch, MODEL)
    models = find_models(folder, job.scratch) if found else []
    used = [m for m in models if (m.path / OOF).is_file() and sorted(m.info["classes"]) == list(table.classes)]
    if used:
        check_split(used, split)
    return used


def frozen_features(
    job: StageContext, settings: Settings, table: FoldTable, store: ImageStore
) -> tuple[np.ndarray | None, list[str]]:
    """Return features float32 [N, F] of all rows by the backbone with initial weights; None without such weights, and why."""
    what = "neighbours in feature space: they need pretrained weights"
    if settings.audit.features == "off":
        return None, [f"{what}, and audit.features=off"]
    try:
        settings = build.resolve_inputs(settings)
        network = start_network(job, settings, len(table.classes))
    except (MissingInputError, RetryableError) as error:
        return None, [f"{what} ({error})"]
    if not network.initial_weights:
        return None, [f"{what}; set model.pretrained=auto, or recipe=photographs"]
    settings = build.resolve_precision(settings, network, SINGLE_PROCESS, None, probe_cache_dir(job))
    runtime = build.make_training_runtime(settings, SINGLE_PROCESS)
    images = build.split_dataset(store, table, np.arange(len(table)), settings, training=False)
    probe = LinearProbe(runtime.to_device(network), settings, runtime)
    return probe.features(images).mean(dim=1).float().cpu().numpy(), []


def judge_rows(
    table: FoldTable, models: Sequence[ModelDir], features: np.ndarray | None, seed: int
) -> list[Predictions] | None:
    """Return tables of out-of-fold predictions: those of the models, else of a linear head on the features; None without both."""
    if models:
        return [predictions.read(model.path / OOF).with_classes(table.classes) for model in models]
    if features is None:
        return None
    log.info("audit: no fold models; linear heads on the features judge the labels")
    inputs, targets = (
        torch.from_numpy(features)[:, None],
        build.one_hot(table.codes, len(table.classes), torch.device("cpu")),
    )
    groups, judged = group_codes(table.groups), []
    for fold in track(range(table.num_folds), table.num_folds, "linear heads"):
        rows, valid = table.train_rows(fold), table.valid_rows(fold)
        fit = fit_linear(inputs[rows], targets[rows], None if groups is None else groups[rows], seed)
        logits = inputs[valid, 0] @ fit.weight.T + fit.bias
        judged.append(
            Predictions(
                table.ids_of(valid),
                table.fold[valid],
                "linear",
                table.classes,
                logits.log_softmax(dim=1).numpy(),
                table.labels()[valid],
            )
        )
    return judged


def list_suspects(
    table: FoldTable, judged: Sequence[Predictions] | None, features: np.ndarray | None, limit: int
) -> tuple[pd.DataFrame, list[tuple[str, str, float, float]]]:
    """Return the suspects with the columns of labels.csv and the paths of neighbours, and the pairs of confused classes."""
    if judged is None:
        return pd.DataFrame(columns=[*COLUMNS, "near_given", "near_suggested"]), []
    index = pd.Index(table.ids.to_pylist())
    mean = mean_by_id(judged)
    rows = index.get_indexer(mean.ids)
    mean, rows = mean.take(rows >= 0), rows[rows >= 0]
    codes, names = table.codes[rows], np.array(table.classes, object)
    suspects = find_suspects(mean.log_probs, codes, limit)
    guesses = []
    for part in judged:
        guess = np.full(len(rows), -1)
        places = pd.Index(mean.ids).get_indexer(part.ids)
        guess[places[places >= 0]] = part.log_probs.argmax(axis=1)[places >= 0]
        guesses.append(guess)
    suspects["agreement"] = agreement(suspects, guesses)
    for name in ("neighbours_given", "neighbours_suggested"):
        suspects[name] = np.nan
    for name in ("near_given", "near_suggested"):
        suspects[name] = ""
    paths = table.paths_of(rows)
    if features is not None and len(rows) > 1 and len(suspects):
        images = find_duplicates(
            table.sha256.take(rows) if table.sha256.null_count == 0 else table.paths.take(rows)
        ).codes
        near = find_neighbours(suspects, features[rows], codes, images)
        suspects["neighbours_given"], suspects["neighbours_suggested"] = near.given_share, near.suggested_share
        suspects["near_given"] = np.where(near.nearest_given < 0, "", paths[near.nearest_given])
        suspects["near_suggested"] = np.where(near.nearest_suggested < 0, "", paths[near.nearest_suggested])
    places = suspects["row"].to_numpy()
    suspects = suspects.assign(
        id=mean.ids[places], path=paths[places], decision="", given=names[suspects["given"]],
        suggested=names[suspects["suggested"]], issue=suspects["issue"].astype(int),
    )  # fmt: skip
    suspects["label"] = suspects["suggested"]
    confused = [(names[a], names[b], ab, ba) for a, b, ab, ba in confused_classes(mean.log_probs, codes)]
    return suspects, confused


def list_odd_images(table: FoldTable, store: ImageStore, settings: Settings) -> pd.DataFrame:
    """Return the odd images with their columns `id`, `path`, `label`, `problem`, `value` and `typical`."""
    options, rows = decode_options(settings.data), np.arange(len(table))
    paths, ids, labels = table.paths_of(rows), table.ids_of(rows), table.labels()

    def measure(path: str) -> dict[str, float | str]:
        return odd_images.measure(store.read(path), path, options)

    with closing(map_in_threads(measure, paths)) as measured:
        figures = pd.DataFrame(list(track(measured, len(paths), "images")))
    odd = odd_images.find_odd(figures)
    places = odd.pop("row").to_numpy(int)
    return odd.assign(id=ids[places], path=paths[places], label=labels[places])[ODD_COLUMNS]


def read_earlier(path: Path) -> pd.DataFrame | None:
    """Return the decided rows of an earlier `labels.csv` by id; None if there is none. Raise a DataError for another table."""
    if not path.is_file():
        return None
    earlier = open_csv(path)
    if missing := [name for name in COLUMNS[:3] if name not in earlier.columns]:
        raise DataError(
            f"{path} has no column {missing[0]!r}, so its decisions cannot be kept; move it to another folder"
        )
    if not earlier.text.strip().partition("\n")[2]:  # only a header
        return None
    rows = earlier.read([name for name in COLUMNS if name in earlier.columns]).reindex(columns=COLUMNS, fill_value="")
    rows["id"] = rows["id"].where(~rows["id"].str.match(r"'[=+@\t\r-]"), rows["id"].str[1:])  # as `write_csv` quotes
    decided = rows[rows["decision"].str.strip() != ""].set_index("id", drop=False)
    return decided if len(decided) else None


def keep_decisions(suspects: pd.DataFrame, decided: pd.DataFrame | None) -> pd.DataFrame:
    """Return the suspects with the earlier decisions. Decided rows that are no suspects any more follow."""
    if decided is None:
        return suspects
    known = suspects["id"].isin(decided.index)
    for name in ("decision", "label"):
        suspects.loc[known, name] = decided.loc[suspects["id"][known], name].to_numpy()
    rest = decided[~decided.index.isin(suspects["id"])].assign(near_given="", near_suggested="")
    rest[FIGURES] = rest[FIGURES].replace("", None).astype(float)
    log.info("audit: %d earlier decisions are kept", len(decided))
    return pd.concat([suspects, rest], ignore_index=True) if len(rest) else suspects


def rare_classes(table: FoldTable) -> dict[str, int]:
    """Return the classes with fewer rows than folds, with their number of rows."""
    counts = np.bincount(table.codes, minlength=len(table.classes))
    return {name: int(n) for name, n in zip(table.classes, counts, strict=True) if n < max(2, table.num_folds)}


def draw_page(
    title: str,
    key: str,
    table: FoldTable,
    suspects: pd.DataFrame,
    odd: pd.DataFrame,
    confused: Sequence[tuple[str, str, float, float]],
    counts: Mapping[str, Any],
    store: ImageStore,
    settings: Settings,
) -> str:
    """Return the page; `key` names the data, so that the browser keeps the decisions on other data apart."""
    limit = decode_options(settings.data).max_pixels
    numbers = np.bincount(table.codes, minlength=len(table.classes)).tolist()
    cards = [
        ("Suspicious labels", f"{counts['suspects']:,}", f"of {len(table):,} images"),
        ("Confused pairs", f"{len(confused):,}", "classes that may be one"),
        ("Odd images", f"{odd['path'].nunique():,}", ", ".join(f"{n} {name}" for name, n in counts["odd_images"].items()) or "none"),
        ("Rare classes", f"{len(counts['rare_classes']):,}", "fewer images than folds"),
    ]  # fmt: skip
    return page.render(
        suspects,
        odd,
        lambda path: decode(store.read(path), path, limit, page.SIDE),
        title=title,
        key=key,
        cards=cards,
        classes=list(zip(table.classes, numbers, strict=True)),
        confused=confused,
        left_out=counts["not_examined"],
    )
