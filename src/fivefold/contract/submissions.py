"""Find the submission files in the channel `submissions`; each is a system of an ensemble."""

from pathlib import Path

from fivefold.contract.artifacts import roots
from fivefold.contract.filenames import is_sample, is_truth
from fivefold.contract.files import tree_files
from fivefold.contract.job import Job
from fivefold.contract.stage_specs import FOLDS, HOLDOUT, OOF
from fivefold.errors import MissingInputError

NOT_SUBMISSIONS = ("train.csv", "test.csv", FOLDS, OOF, HOLDOUT)
"""Tables in the same folder that are not submissions, besides sample submissions and ground truth."""


def find_submissions(job: Job, tables: bool = False) -> list[Path]:
    """Return the submission CSVs of the channel: the file itself, or all below it. Without the channel return none.

    Sample submissions and ground truth do not count. With `tables`, return the .parquet tables of predictions if there
    is no CSV: a run's folder has the same rows in both. Raise MissingInputError if the channel has no such file.
    """
    if job.optional_channel("submissions") is None:
        return []
    files = [path for root in roots(job.channel("submissions"), job.scratch) for path in tree_files(root)]
    files = [p for p in files if not (p.name in NOT_SUBMISSIONS or is_sample(p.name) or is_truth(p.name))]
    for suffix in (".csv", ".parquet")[: 1 + tables]:
        if matches := [path for path in files if path.suffix.lower() == suffix]:
            return matches
    kind = "CSV or table of predictions" if tables else "CSV"
    raise MissingInputError(f"no {kind} below the channel 'submissions' ({job.channel('submissions')})")
