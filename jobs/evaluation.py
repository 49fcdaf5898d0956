"""The evaluation stage (reference systems): accuracy and macro F1 of output.csv against gt.csv, as one line of JSON."""

import json

from fivefold.config.schema import Settings
from fivefold.contract.job import StageContext, StageResult
from fivefold.contract.stage_specs import OUTPUT
from fivefold.csv_tables import open_csv
from fivefold.errors import MissingInputError
from fivefold.evaluation.ground_truth import find_ground_truth_file, read_ground_truth, score_labels
from fivefold.inference.submission_reader import read_submission
from fivefold.log import log


def main(job: StageContext, settings: Settings) -> StageResult:
    """Score the answers in the output folder (or in the predictions channel) and print the figures."""
    file = (job.optional_channel("predictions") or job.output()) / OUTPUT
    truth = find_ground_truth_file(job.channel("ground_truth"))
    log.info("evaluation: %s against %s", file, truth)
    if not file.is_file():
        raise MissingInputError(f"no answers at {file}; run inference first, with the same output folder")
    ids, options = open_csv(file).columns[0], settings.ensemble
    labels = read_ground_truth(truth, ids, open_csv(file).read([ids])[ids])
    table = read_submission(
        file, likely=sorted({*labels.values()}), answer=options.answer, positive=options.positive_class
    )
    guesses = table.log_probs.argmax(axis=1)
    answers = {name: table.classes[code] for name, code in zip(table.ids, guesses, strict=True)}
    scores = score_labels(answers, labels, truth)
    print(json.dumps(scores), flush=True)
    return StageResult([], scores)
