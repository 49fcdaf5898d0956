"""`python -m jobs STAGE KEY=VALUE...`: the image's entrypoint, and the one door to every stage.

python -m jobs train-fold FOLD=2 recipe=demo
python -m jobs submit platform=local recipe=demo train=DATA eval=TEST run=first
STAGE=train-fold FOLD=2 python -m jobs train        as SageMaker calls it
python -m jobs train                                without STAGE: train-fold, or split and fold 0 in one
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

from fivefold import settings as settings_
from fivefold.choose import choose
from fivefold.contract.failure import explained, report_failure, report_termination
from fivefold.contract.job import Job, given_channels, job_from, output_data, output_dir
from fivefold.contract.layout import in_run, run_at
from fivefold.contract.record import Key, Stopwatch, key_of, output_roots, record_path, why_run, write_record
from fivefold.contract.stages import FAILURE, STAGES, Stage
from fivefold.contract.storage import SCRATCH, shown
from fivefold.distributed.place import PARENT
from fivefold.errors import FivefoldError, SettingsError, StoppedError
from fivefold.machine import end_with, start_no_more_threads
from fivefold.recipe import Settings
from fivefold.recipes import shipped_recipes
from fivefold.stopping import noted, poll
from fivefold.values import value_of

from . import company

log = logging.getLogger("fivefold")

RESULTS = "test_result"
"""Where the results of a stage lie that is run by hand and told no place."""
COMMANDS = {
    "submit": (".submit", "run a recipe's stages in order on a platform"),
    "status": (".status", "what of a run is done, running, failed"),
    "trace": (".trace", "where an artifact came from, back to the images; --check takes every digest again"),
    "serve": (".serve", "answer with a trained model over HTTP, as SageMaker's hosting asks for it"),
    "demo": (".demo", "the whole pipeline on scikit-learn's scanned digits"),
}


def main(arguments: Sequence[str]) -> int:
    """Runs the stage or command that `arguments` name; the exit code."""
    start_log(os.environ)
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    try:
        name, rest = stage_name(arguments, os.environ)
        if name in COMMANDS:
            return import_module(COMMANDS[name][0], __package__).main(rest)
    except (KeyboardInterrupt, Exception) as error:
        return fail(error, os.environ)
    return run(name, rest)


def run(name: str, arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Runs one stage as its container would; the exit code, with the failure file written if it is not 0."""
    stage = STAGES[name]
    start_log(environ)
    # What cuBLAS asks for to give the same bits each time; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if {"-h", "--help"} & set(arguments):
        print(stage_help(stage))
        return 0
    try:
        if stage.by_argument:
            arguments, environ = paths_given(stage, arguments, environ)
        settings_once = cache(lambda: settings_of(stage, arguments, environ))
        code = company.run_by_others(stage, arguments, environ, settings_once)
        if code is not None:
            return code
        start_no_more_threads(os.environ)
        parent = environ.get(PARENT, "")
        end_with(parent)
        with noted(at_once=not parent, watched=True), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            settings = settings_once()
            if settings.run:
                environ = in_run(stage, environ, run_at(settings.runs, settings.run), settings.fold)
            job = job_from(stage, environ, Path(scratch))
            with company.joined(job), job.remote:
                (run_stage if job.place.leads else company.follow)(job, settings)
            poll()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return fail(error, environ)


def paths_given(
    stage: Stage, arguments: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], Mapping[str, str]]:
    """Arguments without `CHANNEL=PATH` and `output=PATH`, and the environment with the variables that these stand for.

    Where nothing names an output it is `test_result/run_YYYYMMDD_HHMMSS_<id8>`.
    """
    variables = {name: f"SM_CHANNEL_{name.upper()}" for name in (*stage.channels, *stage.optional)}
    variables["output"] = "SM_OUTPUT_DATA_DIR"
    given = {variables[name]: path for name, _, path in (a.partition("=") for a in arguments) if name in variables}
    rest = [argument for argument in arguments if argument.partition("=")[0] not in variables]
    environ = {**environ, **given}
    if output_data(environ) is None:
        from fivefold.launchers.plan import new_run_name

        environ["SM_OUTPUT_DATA_DIR"] = str(Path(RESULTS) / new_run_name())
    return rest, environ


def run_stage(job: Job, settings: Settings) -> None:
    """Skips the stage if its record matches; else runs it, and writes the record last."""
    clock = Stopwatch()
    job.probe()
    folder = job.record_dir()
    key = key_of(job, settings_.key_settings(settings, job.stage.sections))
    reason = "it prints its result" if job.stage.always else why_run(folder, key, output_roots(job), settings.reuse)
    if job.output_dir is not None:
        (job.output_dir / FAILURE).unlink(missing_ok=True)
    if not company.decided(job, settings, reason is not None):
        log.info(
            "%s: nothing to do, inputs, settings and outputs match %s", job.stage.name, record_path(folder, key.stage)
        )
        return
    log.info("%s runs: %s", job.stage.name, reason)
    record_path(folder, key.stage).unlink(missing_ok=True)
    job.remote.begin(key.stage)
    job.clean()
    if job.stage.writes_model:
        job = with_own_checkpoints(job, key)
    poll()
    outcome = import_module(job.stage.module, __package__).main(job, settings)
    poll()
    write_record(folder, job, key, outcome.outputs, outcome.metrics, clock)
    job.remote.publish(key.stage, record_path(folder, key.stage), outcome.outputs)
    if job.stage.writes_model:
        job.remote.forget(job.checkpoints())
        shutil.rmtree(job.checkpoints(), ignore_errors=True)


def with_own_checkpoints(job: Job, key: Key) -> Job:
    """The job with the folder of this key's checkpoints; others' are left alone, and named."""
    own = job.of_key(key.digest())
    others = {path.name for path in job.checkpoints().iterdir() if path.is_dir()}
    own.checkpoints().mkdir(exist_ok=True)
    others |= job.remote.restore(own.checkpoints())
    if others := sorted(others - {own.checkpoints().name}):
        log.info("checkpoints of other settings, data or classes are left alone: %s", ", ".join(others))
    return own


def settings_of(stage: Stage, arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """The settings of this process: arguments over environment over hyperparameters over the recipe."""
    layers = settings_.layers_of(arguments, environ)
    settings = settings_.load(layers)
    if unused := settings_.unused_keys(layers[0], stage.sections):
        log.info("%s does not use: %s", stage.name, ", ".join(unused))
    return settings


def stage_name(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The stage or command to run and its arguments; `train` and no name at all stand for STAGE.

    `train` without STAGE is train-fold where a folds channel is given, and otherwise the stage of its own name.
    """
    first = arguments[0] if arguments and "=" not in arguments[0] and not arguments[0].startswith("-") else None
    rest = list(arguments[1:] if first else arguments)
    name = first
    if first in (None, "train"):
        layers = settings_.layers_of([argument for argument in rest if "=" in argument], environ)
        given = next((layer.values["stage"] for layer in layers if layer.values.get("stage")), None)
        name = (
            value_of(str, given)
            if given
            else first and ("train-fold" if "folds" in given_channels(environ) else "train")
        )
    if not name:
        raise SettingsError(f"no stage: give one of {', '.join(STAGES)}, or set STAGE; see --help")
    name = name.strip().lower().replace("_", "-")
    choose({**STAGES, **COMMANDS}, "stage", name)
    return name, rest


def fail(error: BaseException, environ: Mapping[str, str]) -> int:
    """Says what went wrong, on stderr and in the failure file; the exit code of the error."""
    if isinstance(error, BrokenPipeError):
        sys.stdout.flush()  # raises another where it is our own reader that is gone
    error = explained(error)
    if isinstance(error, StoppedError):  # no failure: it goes on
        log.warning("%s", error)
        return error.exit_code
    report_failure(output_dir(environ), error)
    report_termination(environ, error)
    if isinstance(error, FivefoldError):
        log.error("%s", error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted")
        return 130
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return 1


def start_log(environ: Mapping[str, str]) -> None:
    level, rank = environ.get("SM_LOG_LEVEL", "20"), environ.get("RANK", "0")
    follows = rank != "0"  # the first of several processes that train together speaks for all
    logging.getLogger("fivefold").setLevel(logging.WARNING if follows else logging.NOTSET)
    logging.basicConfig(
        level=int(level) if level.isdigit() else logging.INFO,
        format=f"%(asctime)s %(levelname)-7s {f'[rank {rank}] ' if follows else ''}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(with_urls)
    for chatty in ("matplotlib", "PIL", "h5py", "fontTools", "onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def with_urls(line: logging.LogRecord) -> bool:
    """Has a line of the log speak of URLs, not of the folders that stand for them, and of no passwords in URLs."""
    line.msg, line.args = shown(line.getMessage()), None
    if line.exc_info:
        line.exc_text = shown(logging.Formatter().formatException(line.exc_info))
    return True


def overview() -> str:
    stages = "\n".join(f"  {stage.name:12} {stage.summary}" for stage in STAGES.values())
    commands = "\n".join(f"  {name:12} {summary}" for name, (_, summary) in COMMANDS.items())
    recipes = ", ".join(shipped_recipes())
    every = settings_.describe(list(Settings.model_fields))
    return (
        f"{__doc__.strip()}\n\nstages:\n{stages}\n\ncommands:\n{commands}\n\nshipped recipes: {recipes}\n\n"
        f"python -m jobs STAGE --help shows a stage's channels and keys. All keys:\n{every}"
    )


def stage_help(stage: Stage) -> str:
    def variables(names: Sequence[str]) -> str:
        return " ".join(f"SM_CHANNEL_{name.upper()}" for name in names) or "none"

    keys = ("recipe", *stage.sections)
    paths = " ".join(f"{name}=PATH" for name in (*stage.channels, *stage.optional))
    return (
        f"python -m jobs {stage.name} KEY=VALUE...\n\n{stage.summary}\n\n"
        f"channels:  {variables(stage.channels)}\noptional:  {variables(stage.optional)}\n"
        + (f"as arguments too: {paths} output=PATH\n" if stage.by_argument else "")
        + f"writes to: {'SM_MODEL_DIR, SM_OUTPUT_DATA_DIR' if stage.writes_model else 'SM_OUTPUT_DATA_DIR'}\n"
        + "each a folder, or s3://bucket/prefix (AWS_ENDPOINT_URL_S3 names another store)\n\n"
        + f"keys, as arguments, environment (SECTION__KEY), hyperparameters or in a recipe:\n{settings_.describe(keys)}"
    )


def command_line() -> None:
    """The console command `fivefold`; where nobody reads its output any more (`| head`), it ends as SIGPIPE would have it."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush
        code = 128 + signal.SIGPIPE
    sys.exit(code)


if __name__ == "__main__":
    command_line()
