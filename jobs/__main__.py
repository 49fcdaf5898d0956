"""`python -m jobs STAGE KEY=VALUE...`: runs a stage or a command; the entrypoint of the image.

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
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

from fivefold.config import loading as settings_
from fivefold.config.recipes import shipped_recipes
from fivefold.config.schema import Settings
from fivefold.contract.failure import report_failure, to_known_error
from fivefold.contract.job import StageContext, channels_from_env, context_from_env, output_data, output_dir
from fivefold.contract.record import CacheKey, compute_key, output_roots, record_path, rerun_reason, write_record
from fivefold.contract.run_layout import env_for_run, run_path
from fivefold.contract.s3.sync import SCRATCH, with_urls
from fivefold.contract.stage_specs import FAILURE, STAGES, Stage
from fivefold.distributed.ranks import PARENT
from fivefold.errors import FivefoldError, SettingsError, StoppedError
from fivefold.log import log
from fivefold.lookup import choose
from fivefold.signals import defer_signals, raise_if_stopped
from fivefold.stages import rank_control
from fivefold.system import die_with_parent, limit_threads

REFERENCE_STAGES = ("train", "inference", "evaluation")
"""Stages that exist for the command lines of the reference systems."""
COMMANDS = {
    "submit": (".submit", "run a recipe's stages in order on a platform"),
    "status": (".status", "show the state of each step of a run"),
    "serve": (".serve", "serve a trained model over HTTP, compatible with SageMaker's hosting"),
    "demo": (".demo", "run the whole pipeline on scikit-learn's scanned digits"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the stage or command that `arguments` name; return the exit code."""
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
    """Run one stage as its container would; return the exit code. If it is not 0, the failure file is written."""
    stage = STAGES[name]
    start_log(environ)
    # cuBLAS needs this for reproducible bits; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if {"-h", "--help"} & set(arguments):
        print(stage_help(stage))
        return 0
    try:
        if stage.path_arguments:
            arguments, environ = extract_paths(stage, arguments, environ)
        settings_once = cache(lambda: load_settings(stage, arguments, environ))
        code = rank_control.launch_ranks(stage, arguments, environ, settings_once)
        if code is not None:
            return code
        limit_threads(os.environ)
        parent = environ.get(PARENT, "")
        die_with_parent(parent)
        with defer_signals(at_once=not parent, watched=True), tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
            settings = settings_once()
            if settings.run:
                environ = env_for_run(stage, environ, run_path(settings.runs, settings.run), settings.fold)
            job = context_from_env(stage, environ, Path(scratch))
            with rank_control.process_group(job), job.remote:
                (run_stage if job.rank.is_main else run_stage_as_worker)(job, settings)
            raise_if_stopped()
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return fail(error, environ)


def extract_paths(
    stage: Stage, arguments: Sequence[str], environ: Mapping[str, str]
) -> tuple[list[str], Mapping[str, str]]:
    """Move `CHANNEL=PATH` and `output=PATH` from the arguments to the environment variables that they stand for.

    Without an output it is `test_result/run_YYYYMMDD_HHMMSS_<id8>`.
    """
    variables = {name: f"SM_CHANNEL_{name.upper()}" for name in (*stage.channels, *stage.optional)}
    variables["output"] = "SM_OUTPUT_DATA_DIR"
    paths = {variables[name]: path for name, _, path in (a.partition("=") for a in arguments) if name in variables}
    rest = [argument for argument in arguments if argument.partition("=")[0] not in variables]
    environ = {**environ, **paths}
    if output_data(environ) is None:
        from fivefold.launchers.plan import new_run_name

        environ["SM_OUTPUT_DATA_DIR"] = str(Path("test_result") / new_run_name())
    return rest, environ


def run_stage(job: StageContext, settings: Settings) -> None:
    """Skip the stage if its record matches; otherwise run it, and write the record last."""
    started = time.monotonic()
    job.check_channels()
    folder = job.record_dir()
    key = compute_key(job, settings_.hashed_settings(settings, job.stage.sections))
    reason = (
        "always run, since it prints its result"
        if job.stage.never_skipped
        else rerun_reason(folder, key, output_roots(job), settings.on_version_change)
    )
    if job.output_dir is not None:
        (job.output_dir / FAILURE).unlink(missing_ok=True)
    if not rank_control.broadcast_decision(job, settings, reason is not None):
        log.info(
            "%s: nothing to do: inputs, settings and outputs match %s", job.stage.name, record_path(folder, key.stage)
        )
        return
    log.info("%s runs: %s", job.stage.name, reason)
    record_path(folder, key.stage).unlink(missing_ok=True)
    job.remote.delete_previous(key.stage)
    job.remove_stale_files()
    if job.stage.writes_model:
        job = with_checkpoint_folder(job, key)
    raise_if_stopped()
    outcome = import_module(job.stage.module, __package__).main(job, settings)
    raise_if_stopped()
    write_record(folder, job, key, outcome.outputs, outcome.metrics, started)
    job.remote.publish(key.stage, record_path(folder, key.stage), outcome.outputs)
    if job.stage.writes_model:
        if job.remote.checkpoints:
            job.remote.checkpoints.delete(job.checkpoints())
        shutil.rmtree(job.checkpoints(), ignore_errors=True)


def run_stage_as_worker(job: StageContext, settings: Settings) -> None:
    """Run the stage on a rank other than 0: train, but write no files."""
    job.check_channels()
    if rank_control.broadcast_decision(job, settings, False):
        import_module(job.stage.module, __package__).main(job, settings)


def with_checkpoint_folder(job: StageContext, key: CacheKey) -> StageContext:
    """Return the job with the checkpoint folder of this key; log the checkpoints of other keys, which stay untouched."""
    keyed = replace(job, checkpoint_dir=job.checkpoints() / key.digest()[:16])
    others = {path.name for path in job.checkpoints().iterdir() if path.is_dir()}
    keyed.checkpoints().mkdir(exist_ok=True)
    if job.remote.checkpoints:
        others |= job.remote.checkpoints.restore(keyed.checkpoints())
    if others := sorted(others - {keyed.checkpoints().name}):
        log.info("keeping checkpoints of other settings, data or classes: %s", ", ".join(others))
    return keyed


def load_settings(stage: Stage, arguments: Sequence[str], environ: Mapping[str, str]) -> Settings:
    """Load the settings of this process: arguments override environment, hyperparameters and the recipe, in this order."""
    layers = settings_.collect_layers(arguments, environ)
    settings = settings_.load(layers)
    if unused := settings_.unused_keys(layers[0], stage.sections):
        log.info("%s does not use: %s", stage.name, ", ".join(unused))
    return settings


def stage_name(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """Return the stage or command to run and its arguments. For `train`, or without a name, STAGE decides.

    `train` without STAGE is train-fold if there is a folds channel, otherwise the stage `train`.
    """
    first = arguments[0] if arguments and "=" not in arguments[0] and not arguments[0].startswith("-") else None
    rest = list(arguments[1:] if first else arguments)
    name = first
    if first in (None, "train"):
        layers = settings_.collect_layers([argument for argument in rest if "=" in argument], environ)
        if chosen := next((layer.values["stage"] for layer in layers if layer.values.get("stage")), None):
            name = settings_.parse_value(str, chosen)
        elif first and "folds" in channels_from_env(environ):
            name = "train-fold"
    if not name:
        raise SettingsError(f"no stage: name one of {', '.join(STAGES)}, or set STAGE; see --help")
    name = name.strip().lower().replace("_", "-")
    choose({**STAGES, **COMMANDS}, "stage", name)
    return name, rest


def fail(error: BaseException, environ: Mapping[str, str]) -> int:
    """Report an error on stderr and in the failure file; return its exit code."""
    if isinstance(error, BrokenPipeError):
        sys.stdout.flush()  # raises again if the reader of our own output has gone
    error = to_known_error(error)
    if isinstance(error, StoppedError):  # not a failure: the next run resumes
        log.warning("%s", error)
        return error.exit_code
    report_failure(output_dir(environ), error)
    if isinstance(error, FivefoldError):
        log.error("%s", error)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        log.error("interrupted")
        return 130
    log.error("internal error (please report): %s", type(error).__name__, exc_info=error)
    return 1


def start_log(environ: Mapping[str, str]) -> None:
    level, rank = environ.get("SM_LOG_LEVEL", "20"), environ.get("RANK", "0")
    follows = rank != "0"  # in a process group only rank 0 logs below WARNING
    logging.getLogger("fivefold").setLevel(logging.WARNING if follows else logging.NOTSET)
    logging.basicConfig(
        level=int(level) if level.isdigit() else logging.INFO,
        format=f"%(asctime)s %(levelname)-7s {f'[rank {rank}] ' if follows else ''}%(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(rewrite_log_line)
    for chatty in ("matplotlib", "PIL", "h5py", "fontTools", "onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def rewrite_log_line(line: logging.LogRecord) -> bool:
    """Replace local folders of URLs in a log line by the URLs, and remove passwords from URLs."""
    line.msg, line.args = with_urls(line.getMessage()), None
    if line.exc_info:
        line.exc_text = with_urls(logging.Formatter().formatException(line.exc_info))
    return True


def overview() -> str:
    lines = {name: f"  {name:12} {stage.summary}" for name, stage in STAGES.items()}
    stages = "\n".join(line for name, line in lines.items() if name not in REFERENCE_STAGES)
    commands = "\n".join(f"  {name:12} {summary}" for name, (_, summary) in COMMANDS.items())
    reference = "\n".join(lines[name] for name in REFERENCE_STAGES)
    return (
        f"{__doc__.strip()}\n\nStages:\n{stages}\n\nCommands:\n{commands}\n\n"
        f"Commands of the reference systems:\n{reference}\n\nShipped recipes: {', '.join(shipped_recipes())}\n\n"
        "`python -m jobs STAGE --help` shows the channels and keys of a stage. All keys:\n"
        + settings_.describe_keys(list(Settings.model_fields))
    )


def stage_help(stage: Stage) -> str:
    def variables(names: Sequence[str]) -> str:
        return " ".join(f"SM_CHANNEL_{name.upper()}" for name in names) or "none"

    keys = ("recipe", *stage.sections)
    paths = " ".join(f"{name}=PATH" for name in (*stage.channels, *stage.optional))
    return (
        f"python -m jobs {stage.name} KEY=VALUE...\n\n{stage.summary}\n\n"
        f"Required channels: {variables(stage.channels)}\nOptional channels: {variables(stage.optional)}\n"
        + (f"Also as arguments: {paths} output=PATH\n" if stage.path_arguments else "")
        + f"Output:            {'SM_MODEL_DIR, SM_OUTPUT_DATA_DIR' if stage.writes_model else 'SM_OUTPUT_DATA_DIR'}\n"
        + "Each is a folder or s3://bucket/prefix (AWS_ENDPOINT_URL_S3 selects another store).\n\n"
        + "Keys, as arguments, environment variables (SECTION__KEY), hyperparameters or in a recipe:\n"
        + settings_.describe_keys(keys)
    )


def command_line() -> None:
    """Run the console command `fivefold`; if its reader has gone (`| head`), end with the exit code of SIGPIPE."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's flush at exit
        code = 128 + signal.SIGPIPE
    sys.exit(code)


if __name__ == "__main__":
    command_line()
