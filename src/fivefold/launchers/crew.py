"""The processes of one plan: which wait, which run, what they say, how they ended."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fivefold.contract.files import probe_writable
from fivefold.contract.stages import FAILURE
from fivefold.launchers.plan import Plan, Step
from fivefold.launchers.screen import Lines, Screen, bar
from fivefold.launchers.status import BY_SIGNAL, LOG, epochs_done, failure_of, write_ended, write_started

SECONDS_BETWEEN_LOOKS = 0.03
SECONDS_BETWEEN_FEET = 0.5
SECONDS_FOR_LAST_WORDS = 2.0


@dataclass
class Child:
    """A step's running process, with the thread that reads what it says."""

    step: Step
    process: subprocess.Popen[bytes]
    reader: threading.Thread
    gpu: str
    started: float = field(default_factory=time.time)


class Signals:
    """Notes SIGINT and SIGTERM while the block runs, instead of dying of them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> "Signals":
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(number)


class Crew:
    """The processes of one plan: which wait, which run, which ended how."""

    def __init__(
        self, plan: Plan, parallel: int, devices: Sequence[str], environment: Callable[[Step, str], dict[str, str]]
    ) -> None:
        """`environment(step, gpu)` are the variables of a step's process; `devices` are dealt out, one a process."""
        self.plan, self.parallel, self.devices, self.environment = plan, parallel, devices, environment
        self.waiting = list(plan.steps)
        self.running: list[Child] = []
        self.ended: dict[str, int] = {}
        self.screen = Screen()
        self._last_foot = 0.0

    def work(self, signals: Signals) -> int:
        """Runs all there is to run; 130 or 143 after a signal, which is passed on and waited for."""
        try:
            self._work(signals)
        except BaseException:
            self._pass_on(signal.SIGTERM, again=False)
            raise
        finally:
            self.screen.foot("")
        if signals.received:
            return 128 + signals.received[0]
        self._name_what_was_not_started()
        return next((code for code in self.ended.values() if code), 0)

    def _work(self, signals: Signals) -> None:
        passed_on = 0
        while self.running or (self._ready() and not signals.received):
            while not signals.received and len(self.running) < self.parallel and (ready := self._ready()):
                self._start(ready[0], alone=self.parallel == 1 or (not self.running and len(ready) == 1))
            if passed_on < len(signals.received):
                self._pass_on(signals.received[passed_on], again=passed_on > 0)
                passed_on += 1
            self._collect()
            self._show()
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _ready(self) -> list[Step]:
        return [step for step in self.waiting if all(self.ended.get(name) == 0 for name in step.needs)]

    def _start(self, step: Step, alone: bool) -> None:
        self.waiting.remove(step)
        probe_writable(step.folder)
        (step.folder / FAILURE).unlink(missing_ok=True)
        gpu = self._least_used_gpu()
        command = [sys.executable, "-m", "jobs", *step.command]
        as_terminal = alone and self.screen.terminal
        read_end, write_end = _terminal() if as_terminal else os.pipe()
        process = subprocess.Popen(
            command,
            env=self.environment(step, gpu),
            stdin=subprocess.DEVNULL,
            stdout=write_end,
            stderr=write_end,
            start_new_session=True,
        )
        os.close(write_end)
        write_started(step, process.pid)
        reader = threading.Thread(target=self._read, args=(step, read_end, as_terminal), daemon=True)
        reader.start()
        self.running.append(Child(step, process, reader, gpu))

    def _read(self, step: Step, end: int, as_terminal: bool) -> None:
        """Copies what a step says to its log and to the screen, until it says no more."""
        with open(step.folder / LOG, "a", encoding="utf-8") as file, os.fdopen(end, "rb", buffering=0) as pipe:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(step.command)}\n")

            def keep(line: str) -> None:
                file.write(line + "\n")
                file.flush()
                if not as_terminal:
                    self.screen.line(f"[{step.name}] {line}")

            lines = Lines(keep)
            while portion := _portion(pipe.fileno()):
                text = lines.feed(portion)
                if as_terminal:
                    self.screen.raw(text)
            lines.close()

    def _collect(self) -> None:
        for child in [child for child in self.running if child.process.poll() is not None]:
            child.reader.join(SECONDS_FOR_LAST_WORDS)
            code = child.process.returncode
            code = 128 - code if code < 0 else code
            write_ended(child.step, code)
            self.ended[child.step.name] = code
            self.running.remove(child)
            if code:
                where = child.step.folder / LOG
                self.screen.line(f"{child.step.name} {_ending(code)}: {failure_of(child.step)}\n  log: {where}")

    def _pass_on(self, number: int, again: bool) -> None:
        """Passes a signal to the children; the second one kills them with all that they started."""
        name = signal.Signals(number).name
        names = ", ".join(child.step.name for child in self.running)
        self.screen.line(f"{name}: {'killing' if again else 'waiting for'} {names} (again: kill)")
        for child in self.running:
            # a process may have ended since it was looked at
            with contextlib.suppress(ProcessLookupError):
                if again:
                    os.killpg(child.process.pid, signal.SIGKILL)
                else:
                    child.process.send_signal(number)

    def _show(self) -> None:
        """Keeps the terminal's status line; a process that runs alone draws its own progress."""
        if len(self.running) < 2:
            self.screen.foot("")
        elif self.screen.terminal and time.monotonic() - self._last_foot > SECONDS_BETWEEN_FEET:
            self._last_foot = time.monotonic()
            parts = [f"{len(self.ended)} of {len(self.plan.steps)} steps done", *map(_progress, self.running)]
            self.screen.foot(" | ".join(parts))

    def _least_used_gpu(self) -> str:
        used = [child.gpu for child in self.running]
        return min(self.devices, key=used.count, default="")

    def _name_what_was_not_started(self) -> None:
        for step in self.waiting:
            because = [name for name in step.needs if self.ended.get(name) != 0]
            self.screen.line(f"{step.name} was not started: it needs {', '.join(because)}")


def _progress(child: Child) -> str:
    name, epochs = child.step.name, child.step.epochs
    return f"{name} {bar(epochs_done(child.step, child.started), epochs)}" if epochs else name


def _terminal() -> tuple[int, int]:
    """The two ends of a pseudo-terminal of the size of this process's own."""
    read_end, write_end = pty.openpty()
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(write_end, termios.TIOCSWINSZ, size)
    return read_end, write_end


def _portion(end: int) -> bytes:
    """What is to be read now, waiting for it; empty at the end."""
    try:
        return os.read(end, 65_536)
    except OSError:  # a pseudo-terminal ends with EIO on Linux, not with an empty read
        return b""


def _ending(code: int) -> str:
    return f"was stopped by {BY_SIGNAL[code]} (exit code {code})" if code in BY_SIGNAL else f"failed (exit code {code})"
