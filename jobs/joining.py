"""Tables of predictions as one ensemble, read and written a block of rows at a time: no model, and no table as a whole."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from fivefold.arrow import pa
from fivefold.contract.files import atomic, write_json
from fivefold.contract.job import Job
from fivefold.contract.stages import ENSEMBLE, PREDICTIONS
from fivefold.contract.streamed import Streamed
from fivefold.data.evals import EvalTable, Submission, read_eval
from fivefold.data.store import open_store
from fivefold.errors import DataError
from fivefold.inference.submission import SubmissionWriter, check_columns
from fivefold.inference.systems import Rule, System, weigh
from fivefold.inference.tables import Block, check_classes, joined
from fivefold.machine import keep_freed_memory
from fivefold.predictions import ROWS_A_GROUP, TableFile, TableWriter, open_table, sample
from fivefold.progress import track
from fivefold.recipe import Settings

from .description import description
from .outcome import Outcome

log = logging.getLogger("fivefold")

ID_COLUMN = "ID"
"""What the submission calls its ids where no test table does."""


def main(job: Job, settings: Settings, files: Mapping[str, Path]) -> Outcome:
    """Blends tables, each by the name of its system; the table, the submission, and what they are made of.

    Rows are those that the eval channel asks for where it is given, and otherwise the first table's.
    """
    keep_freed_memory()
    options = settings.ensemble
    tables = {name: open_table(path) for name, path in files.items()}
    first = next(iter(tables.values()))
    check_classes(list(tables.values()))
    wanted = submission_wanted(job, settings, first)
    check_columns(wanted.classes, first.classes)
    weights, _ = weigh([System(name, 1, 1, None, None) for name in tables], Rule(options.blend, options.weights))
    log.info(
        "%s: %d tables of %d rows and %d classes", ", ".join(tables), len(tables), len(wanted.ids), len(first.classes)
    )

    output = job.output()
    written = [output / PREDICTIONS, output / options.submission]
    with (
        atomic(written[0]) as table,
        atomic(written[1]) as submission,
        Streamed(table) as rows,
        Streamed(submission) as text,
    ):
        with TableWriter(rows, " + ".join(tables), first.classes, labelled=False) as writer:
            blocks = joined(list(tables.values()), weights, wanted.ids, job.scratch)
            total = -(-len(wanted.ids) // ROWS_A_GROUP)
            write_blocks(track(blocks, total, "ensemble"), writer, SubmissionWriter(text, wanted, first.classes))
    facts = {"submission": options.submission, "id_column": wanted.id_column}
    facts |= {"within": options.within, "blend": options.blend}
    write_json(output / ENSEMBLE, facts | description({}, files, weights, 1.0, []))
    figures = {"models": 0, "images": len(wanted.ids), "temperature": 1.0}
    return Outcome(
        [*written, output / ENSEMBLE], figures, dict(zip(written, (rows.sha256(), text.sha256()), strict=True))
    )


def submission_wanted(job: Job, settings: Settings, first: TableFile) -> Submission:
    """The columns and the ids (an Arrow array) of the submission: as the eval channel has them, or the first table."""
    options, channel = settings.ensemble, job.optional_channel("eval")
    if channel is None:
        ids = first.ids()
        images = EvalTable(ID_COLUMN, ids, ids, None)
    else:
        images = read_eval(open_store(channel), settings.data.id_column, settings.data.path_column)
    images = images.answered_in(options.answer_column, options.number_column)
    wanted = images.sample or Submission(images.id_column, tuple(sorted(first.classes)), images.ids)
    if wanted.ids is not images.ids and (lacking := sorted(set(images.ids) - set(wanted.ids))):
        raise DataError(f"the sample submission lacks {len(lacking)} ids of the test table: {sample(lacking)}")
    return replace(wanted, ids=pa.array(wanted.ids, pa.string()))


def write_blocks(blocks: Iterator[Block], table: TableWriter, submission: SubmissionWriter) -> None:
    """Writes each block to both files, side by side, while the next one is read."""
    with ThreadPoolExecutor(2) as pool:
        waiting = []
        for block in blocks:
            for future in waiting:
                future.result()
            fold = np.full(len(block.ids), -1, np.int16)
            waiting = [
                pool.submit(table.write, block.ids, fold, block.log_probs),
                pool.submit(submission.write, block.ids, block.log_probs),
            ]
        for future in waiting:
            future.result()
