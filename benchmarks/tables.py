"""Large tables: seconds and peak of memory of whole processes, imports included.

`split` reads a CSV of paths and classes, of which it opens no image (`split.open_images=false`). `ensemble` joins five
tables of log-probabilities of 100 classes, of a tenth as many rows, and writes the blend and a submission. The peak is
that of the process, as the kernel counts it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.options import Options
from benchmarks.pairs import Ended, Spread, repeated, run
from benchmarks.results import Finding
from fivefold.contract.files import atomic, check_space
from fivefold.predictions import ROWS_A_GROUP
from fivefold.progress import track

TABLES = 5
CLASSES = 100
LESS = 10
"""How many times fewer rows the tables of an ensemble have."""
MB = 1e6


def measure(options: Options) -> Iterator[Finding]:
    """Seconds and memory of each kind."""
    for name in options.chosen(KINDS):
        yield from KINDS[name](options)


def of_split(options: Options) -> list[Finding]:
    folder = options.folder("tables", f"csv-{options.rows}")
    if not (folder / "train.csv").is_file():
        write_csv(folder / "train.csv", options.rows)

    def once() -> Ended:
        channels = {"SM_CHANNEL_TRAIN": str(folder), "SM_OUTPUT_DATA_DIR": str(options.fresh("runs", "split"))}
        return run(["-m", "jobs", "split", "split.open_images=false"], options.cores, channels)

    return seconds_and_memory("split", repeated(once, options.pairs, "split"))


def of_ensemble(options: Options) -> list[Finding]:
    joined = joining(options, options.rows // LESS)
    return seconds_and_memory("ensemble", repeated(joined, options.pairs, "ensemble of tables"))


def seconds_and_memory(name: str, ended: Sequence[Ended]) -> list[Finding]:
    cpu = Spread.of([each.cpu_seconds for each in ended]).as_json()
    return [
        Finding(name, Spread.of([each.seconds for each in ended]), {"cpu_seconds": cpu}),
        Finding(f"{name}_memory", Spread.of([each.peak_bytes / MB for each in ended])),
    ]


def joining(options: Options, rows: int) -> Callable[[], Ended]:
    """What runs `ensemble` once on TABLES tables of so many rows, which are written first where they are not there."""
    folder = options.folder("tables", f"predictions-{rows}")
    for number in track(range(TABLES), TABLES, f"tables of {rows} rows"):
        path = folder / f"system_{number}.parquet"
        if not path.is_file():
            check_space(folder, rows * CLASSES * 4 * (TABLES - number))
            write_predictions(path, rows, number)

    def once() -> Ended:
        channels = {
            "SM_CHANNEL_SUBMISSIONS": str(folder),
            "SM_OUTPUT_DATA_DIR": str(options.fresh("runs", "ensemble-of-tables")),
        }
        return run(["-m", "jobs", "ensemble", "ensemble.blend=mean"], options.cores, channels)

    return once


def write_csv(path: Path, rows: int) -> None:
    """`image_path,target`: paths that are not there, in 100 classes of unequal size."""
    codes = (CLASSES * np.random.default_rng(0).random(rows) ** 2).astype(np.int64)
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("image_path,target\n")
        for start in range(0, rows, ROWS_A_GROUP):
            some = enumerate(codes[start : start + ROWS_A_GROUP].tolist(), start=start)
            file.write("".join(f"images/{number:07}.jpg,class-{code:02}\n" for number, code in some))


def write_predictions(path: Path, rows: int, seed: int) -> None:
    """A table of predictions as the project writes them, a row group at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    with atomic(path) as temporary:
        for batch in groups(rows, seed):
            writer = writer or pq.ParquetWriter(temporary, batch.schema, compression="none", use_dictionary=False)
            writer.write_table(pa.Table.from_batches([batch]))
        writer.close()


def groups(rows: int, seed: int) -> Iterator:
    """Row groups of ids, fold, system and log-probabilities."""
    import pyarrow as pa

    random = np.random.default_rng(seed)
    for start in range(0, rows, ROWS_A_GROUP):
        count = min(ROWS_A_GROUP, rows - start)
        logits = random.standard_normal((count, CLASSES), np.float32) * 2
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        columns = {
            "id": pa.array([f"{number:07}" for number in range(start, start + count)]),
            "fold": pa.array(np.full(count, -1, np.int16)),
            "system": pa.array([f"system_{seed}"] * count),
        }
        columns |= {f"p/class-{code:02}": pa.array(log_probs[:, code].copy()) for code in range(CLASSES)}
        yield pa.RecordBatch.from_pydict(columns)


KINDS = {"split": of_split, "ensemble": of_ensemble}
