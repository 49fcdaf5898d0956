"""Accuracy and macro F1 of the answers in output.csv against gt.csv, as one line of JSON."""

import json
import logging

from fivefold.contract.job import Job
from fivefold.contract.stages import OUTPUT
from fivefold.evaluation.truth import read_answers, read_cells, read_truth, score_answers, truth_file
from fivefold.recipe import Settings

from .outcome import Outcome

log = logging.getLogger("fivefold")


def main(job: Job, settings: Settings) -> Outcome:
    """Scores the output folder's answers (or the predictions channel's) and prints the figures."""
    file = (job.optional_channel("predictions") or job.output()) / OUTPUT
    truth = truth_file(job.channel("ground_truth"))
    log.info("evaluation: %s against %s", file, truth)
    answers = read_answers(file)
    scores = score_answers(answers, read_truth(truth, read_cells(file, 1)[0][0], answers), truth)
    print(json.dumps(scores), flush=True)
    return Outcome([], scores)
