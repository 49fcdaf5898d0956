"""Files of any origin that are systems of an ensemble, as they lie in the channel `submissions`."""

from pathlib import Path

from fivefold.contract.artifacts import roots
from fivefold.contract.files import tree_files
from fivefold.contract.job import Job
from fivefold.contract.spelling import is_sample, is_truth
from fivefold.contract.stages import FOLDS, HOLDOUT, OOF
from fivefold.errors import MissingInputError

OTHERS = ("train.csv", "test.csv", FOLDS, OOF, HOLDOUT)
"""Tables that may lie there too, beside samples and truths, and say nothing of the test images."""


def find_submissions(job: Job, tables: bool = False) -> list[Path]:
    """The submission CSVs of the channel: the file itself, or all below it, samples and truths aside; none without it.

    With `tables`, where there is no CSV, the .parquet tables of predictions: a run's folder has the same rows in both.
    """
    if job.optional_channel("submissions") is None:
        return []
    files = [path for root in roots(job.channel("submissions"), job.scratch) for path in tree_files(root)]
    files = [p for p in files if not (p.name in OTHERS or is_sample(p.name) or is_truth(p.name))]
    for suffix in (".csv", ".parquet")[: 1 + tables]:
        if found := [path for path in files if path.suffix.lower() == suffix]:
            return found
    what = "CSV or table of predictions" if tables else "CSV"
    raise MissingInputError(f"no {what} below the channel 'submissions' ({job.channel('submissions')})")
