"""Run a plan on this machine: each step in a separate process, several in parallel.

A step gets the user's environment without the variables of the container contract, plus its
own SM_* variables. Its output goes to `<step>/log.txt` and to the terminal.
"""

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from fivefold.config.loading import ENVIRONMENT_KEYS
from fivefold.config.schema import SECTIONS
from fivefold.contract.files import atomic, check_writable
from fivefold.contract.run_layout import CACHES, GROUND_TRUTH, find_ground_truth, pick_ground_truth
from fivefold.contract.s3.urls import is_url
from fivefold.contract.stage_specs import FAILURE
from fivefold.data.readers.stores import open_store
from fivefold.errors import MissingInputError, RetryableError, SettingsError
from fivefold.launchers.plan import LINEAR, Inputs, Plan, Step
from fivefold.launchers.run_clock import RunClock
from fivefold.launchers.scheduler import Scheduler
from fivefold.launchers.status import (
    LOG,
    describe_failure,
    read_results,
    read_step_record,
    record_end,
    record_start,
    running_pid,
)
from fivefold.launchers.terminal import format_title, write_line, write_output
from fivefold.system import DEADLINE, GLIBC_TUNABLES, count_cores, free_memory

POLL_INTERVAL_S = 0.03
DROPPED_VARIABLES = {"JOB_COMPLETION_INDEX", "SAGEMAKER_BASE_DIR"}
KEPT_VARIABLES = {"SM_LOG_LEVEL"}
FOLD_MEMORY_BYTES = 6 << 30
"""Assumed memory in bytes of a fold on CPU cores: a conservative estimate, because the network is not known here."""


def launch(plan: Plan, parallel: int = 0, environ: Mapping[str, str] = os.environ) -> int:
    """Run the plan's steps, at most `parallel` at a time (0: `default_parallelism` decides). Return the exit code of the first failed step.

    Return 130 or 143 after SIGINT or SIGTERM, which are forwarded to the steps; then wait for the steps.
    Raise a SettingsError if the run's time ends before it has a result.
    """
    for step in plan.steps:
        if (pid := running_pid(step)) is not None:
            raise RetryableError(f"{step.folder} is in use by process {pid}: wait for it, or stop it")
        if step.folder.exists():
            check_writable(step.folder)
    devices = list_gpus(environ)
    parallel = parallel or default_parallelism(plan, devices)
    # the same number for every fold, however many run: another number of threads changes the last bits of results
    fold_threads = 0 if devices or parallel == 1 else max(1, count_cores() // parallel)

    clock = RunClock(plan)

    def environment(step: Step, gpu: str) -> dict[str, str]:
        threads = fold_threads if step.stage == "train-fold" and not step.all_cores else 0
        deadline = clock.deadline(step, parallel, len(devices) or count_cores())
        limit = {DEADLINE: f"{deadline:.1f}"} if step.timed and deadline < math.inf else {}
        return {**step_environment(step, environ, gpu, threads), **shared_cache(plan), **limit}

    backend = LocalBackend(devices if parallel > 1 else [], environment)
    scheduler = Scheduler(plan.steps, backend, parallel, POLL_INTERVAL_S, clock)
    try:
        code = scheduler.run()
    finally:
        clock.save(at_once=True)
    scored = [step for step in plan.steps if step.stage in ("ensemble", "evaluate")]
    if scheduler.left_out and scored and not any(map(read_step_record, scored)):
        first = next(iter(scheduler.left_out))
        raise SettingsError(
            f"{plan.settings.limit_words} is too short: the run has no result yet, and has used {clock.used:.0f} s when "
            f"{first} ended; set a longer time= with run={plan.run} to go on"
        )
    return code


def check_machine(plan: Plan) -> None:
    """Do nothing: a plan of local processes needs no other software."""


def describe(plan: Plan, parallel: int = 0) -> str:
    """Return the plan as shell commands: comments, and each step's command with its variables."""
    blocks = [f"# run {plan.run} in {plan.folder}", *(f"# {note}" for note in plan.notes)]
    for step in plan.steps:
        after = f", after {', '.join(step.needs)}" if step.needs else ""
        variables = [f"{name}={shlex.quote(value)}" for name, value in step.environment.items()]
        command = shlex.join([sys.executable, "-m", "fivefold.jobs", *step.command])
        blocks.append(f"\n# {step.name}{after}\n" + " \\\n  ".join([*variables, command]))
    return "\n".join(blocks)


results = read_results


@dataclass
class StepProcess:
    """A step's running process, and its log from the first byte that is not yet on the screen."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    gpu: str
    partial_line: bytes = b""

    def read_new_lines(self) -> list[str]:
        """Return the complete lines that the process has written since the last call, and of a progress bar its last state."""
        *lines, self.partial_line = (self.partial_line + self.log.read()).split(b"\n")
        return [line.rstrip().rpartition(b"\r")[2].decode(errors="replace") for line in lines]


class LocalBackend:
    """Run each step as a process of this machine that writes to its log, and forward signals to all of them."""

    def __init__(self, devices: Sequence[str], environment: Callable[[Step, str], dict[str, str]]) -> None:
        """`environment(step, gpu)` returns the variables of a step's process. Each process gets one of `devices`."""
        self.devices, self.environment = devices, environment
        self.children: dict[str, StepProcess] = {}

    def start(self, step: Step) -> None:
        check_writable(step.folder)
        (step.folder / FAILURE).unlink(missing_ok=True)
        used = [child.gpu for child in self.children.values()]
        gpu = min(self.devices, key=used.count, default="")
        with open(step.folder / LOG, "ab", buffering=0) as log:
            log.write(format_title(" ".join(step.command)).encode())
            end_of_title = log.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "fivefold.jobs", *step.command],
                env=self.environment(step, gpu),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        output = open(step.folder / LOG, "rb")  # noqa: SIM115
        output.seek(end_of_title)
        self.children[step.name] = StepProcess(process, output, gpu)
        record_start(step, process.pid)

    def poll(self, running: Sequence[Step]) -> dict[str, int]:
        codes = {}
        for step in running:
            child = self.children[step.name]
            code = child.process.poll()
            write_output(step.name, child.read_new_lines())
            if code is not None:
                codes[step.name] = 128 - code if code < 0 else code
                record_end(step, codes[step.name])
                child.log.close()
                del self.children[step.name]
        return codes

    def stop(self, running: Sequence[Step], number: int, again: bool) -> bool:
        """Forward a signal to the processes. The second signal kills them and their child processes."""
        names = ", ".join(step.name for step in running)
        write_line(
            f"{signal.Signals(number).name}: {'killing' if again else 'waiting for'} {names} (send again to kill)"
        )
        for child in self.children.values():
            # a process may have ended since the last poll
            with contextlib.suppress(ProcessLookupError):
                if again:
                    os.killpg(child.process.pid, signal.SIGKILL)
                else:
                    child.process.send_signal(number)
        return True

    describe = staticmethod(describe_failure)


def shared_cache(plan: Plan) -> dict[str, str]:
    """Return the variable with the shared image cache beside the runs, if data.cache=auto."""
    return {"DATA__CACHE": str(plan.folder.parent / CACHES)} if plan.settings.data.cache == "auto" else {}


def default_parallelism(plan: Plan, devices: Sequence[str]) -> int:
    """Return the number of parallel folds: one per GPU; on CPU the fastest number, within the memory (FOLD_MEMORY_BYTES each).

    The threads of one fold wait for one another at each layer. With a small network on two cores,
    two folds of one thread did 1.33 times the steps of one fold of two threads. Of five folds on two cores
    three run first, then two, because with two, two and one the last fold would leave a core idle.
    """
    return fold_parallelism(sum(step.stage == "train-fold" for step in plan.steps), devices)


def fold_parallelism(folds: int, devices: Sequence[str]) -> int:
    """Return `default_parallelism` for so many folds."""
    if devices:
        return len(devices)
    cores = count_cores()
    limit = max(1, min(folds, free_memory() // FOLD_MEMORY_BYTES))

    def duration(at_once: int) -> float:
        """Return how long all folds take, each on at most one core, in units of one fold's time."""
        full, rest = divmod(folds, at_once)
        return full * max(1.0, at_once / cores) + (max(1.0, rest / cores) if rest else 0.0)

    return min(range(min(cores, limit), limit + 1), key=duration)


def step_environment(step: Step, environ: Mapping[str, str], gpu: str = "", threads: int = 0) -> dict[str, str]:
    """Return `environ` without the variables of the contract, and with the step's variables.

    `gpu` is the only visible GPU ("": all), `threads` the number of threads
    (0: all cores), unless the user has set these.
    """
    return {**process_variables(environ, gpu, threads), "PYTHONUNBUFFERED": "1", **step.environment}


def process_variables(environ: Mapping[str, str], gpu: str = "", threads: int = 0) -> dict[str, str]:
    """Return the variables of a process that computes: those of `environ` that no stage reads, its GPU and its threads.

    For `gpu` and `threads` see `step_environment`.
    """
    variables = {name: value for name, value in environ.items() if not _is_contract_variable(name)}
    variables |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    variables = {"OMP_NUM_THREADS": str(threads), **variables} if threads else variables
    # Waiting threads that spin for long block the cores for the threads they wait for: beside another process a
    # small network took 10 s per epoch instead of 1.3 s. Sleeping at once (PASSIVE) cost 30 % on an idle machine;
    # a short spin cost nothing there.
    variables.setdefault("GOMP_SPINCOUNT", "20000")
    variables.setdefault("GLIBC_TUNABLES", GLIBC_TUNABLES)
    return variables


def settings_variables(environ: Mapping[str, str]) -> list[str]:
    """Return the variables that a stage would read as settings. The steps of a run do not get them."""
    return sorted(name for name in environ if _is_contract_variable(name) and not name.startswith("SM_"))


def list_gpus(environ: Mapping[str, str]) -> list[str]:
    """Return the GPUs from CUDA_VISIBLE_DEVICES or nvidia-smi, without importing torch."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if program is None:
        return []
    listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False).stdout
    return [str(index) for index in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def check_inputs(inputs: Inputs, run_folder: Path) -> Inputs:
    """Check that the inputs exist, and return them; if no ground truth is set, add the one beside eval's test.csv.

    If eval is a .zip, the ground truth is a file in `run_folder`, which `unpack_ground_truth` writes. Inputs may be at
    s3://; a .zip there is not opened.
    Raise a MissingInputError if an input does not exist.
    """
    for name, path in inputs.paths():
        if not is_url(path) and not Path(path).exists():
            raise MissingInputError(f"{name}={path}: this folder or file does not exist")
    if inputs.ground_truth or not inputs.eval:
        return inputs
    if zipfile.is_zipfile(inputs.eval):
        return replace(inputs, ground_truth=str(run_folder / GROUND_TRUTH) if _packed_truth(inputs.eval) else None)
    return replace(inputs, ground_truth=find_ground_truth(inputs.eval))


def unpack_ground_truth(inputs: Inputs, run_folder: Path) -> None:
    """Copy the ground truth from an eval that is a .zip to the path that `check_inputs` returned."""
    if inputs.eval and inputs.ground_truth == str(run_folder / GROUND_TRUTH) and (name := _packed_truth(inputs.eval)):
        with atomic(Path(inputs.ground_truth)) as temporary:
            temporary.write_bytes(open_store(Path(inputs.eval)).read(name))


def _packed_truth(eval_: str) -> str | None:
    """Return the name of the ground truth in a local .zip, or None if there is none or `eval_` is not a .zip."""
    if not zipfile.is_zipfile(eval_):
        return None
    with zipfile.ZipFile(eval_) as archive:
        return pick_ground_truth(archive.namelist())


def _is_contract_variable(name: str) -> bool:
    section, joined, _ = name.lower().partition("__")
    if name.lower() in ENVIRONMENT_KEYS or (joined and section in SECTIONS) or name in DROPPED_VARIABLES:
        return True
    return name.startswith("SM_") and name not in KEPT_VARIABLES


def check_no_foreign_models(plan: Plan) -> None:
    """Raise a SettingsError if the run's folder contains fold models that are not part of this plan.

    The ensemble uses every fold model below the run, so models of another seed or split would enter it.
    """
    known = {step.folder for step in plan.steps}
    models = [
        path.parent.parent for folder in (".", LINEAR) for path in plan.folder.glob(f"{folder}/fold-*/model/model.json")
    ]
    unknown = sorted(str(folder.relative_to(plan.folder)) for folder in models if folder not in known)
    if unknown:
        raise SettingsError(
            f"{plan.folder} contains models that are not in this plan: {', '.join(unknown)}; "
            "remove them, use the same seeds= and split.folds, or use another run="
        )
