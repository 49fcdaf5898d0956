"""The user's own kubectl, as a process: what is in the cluster, and what is to be there."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from fivefold.errors import FivefoldError, RetryableError, SettingsError

SECONDS_FOR_AN_ANSWER = 120
AWAY = (
    "unable to connect",
    "connection refused",
    "connection reset",
    "timeout",
    "timed out",
    "no route to host",
    "no such host",
    "eof",
    "etcdserver",
    "too many requests",
    "unavailable",
    "internal error",
)
"""What kubectl says where the cluster, and not the request, is at fault."""
OF_ITS_LOG = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")
"""How the lines of kubectl's own log begin, each of which says at more length what its last line says."""


class Kubectl:
    """kubectl of PATH, in one namespace of one cluster; empty names leave them to its own configuration.

    Raises SettingsError where there is none.
    """

    def __init__(self, namespace: str = "", context: str = "", environ: Mapping[str, str] = os.environ) -> None:
        program = shutil.which("kubectl", path=environ.get("PATH"))
        if program is None:
            raise SettingsError(
                "platform=kubernetes needs kubectl, and there is none in PATH: install it, or apply what --dry-run prints"
            )
        self.where = [*(["--context", context] if context else []), *(["--namespace", namespace] if namespace else [])]
        self._program = program

    def command(self, *arguments: str) -> list[str]:
        return [self._program, *self.where, *arguments]

    def ask(self, *arguments: str, stdin: str = "") -> str:
        """What kubectl prints; a RetryableError where the cluster is away, a SettingsError for what it refuses."""
        try:
            # a session of its own: Ctrl-C of the terminal stops no request half-way
            ended = subprocess.run(
                self.command(*arguments),
                input=stdin,
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS_FOR_AN_ANSWER,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired as error:
            raise RetryableError(f"kubectl {arguments[0]} gave no answer in {SECONDS_FOR_AN_ANSWER} s") from error
        if ended.returncode:
            raise _error(arguments[0], ended.stderr)
        return ended.stdout

    def items(self, kinds: str, selector: str) -> list[dict[str, Any]]:
        """The objects of these kinds (`jobs,pods`) that have these labels."""
        return json.loads(self.ask("get", kinds, "--selector", selector, "--output", "json"))["items"]

    def has(self, kind: str, name: str) -> bool:
        return bool(self.ask("get", kind, name, "--ignore-not-found", "--output", "name").strip())

    def apply(self, one: Mapping[str, Any]) -> None:
        self.ask("apply", "--filename", "-", stdin=json.dumps(one))

    def replace(self, one: Mapping[str, Any]) -> None:
        """Deletes what has this name, which cannot be changed any more, and makes it anew."""
        self.ask("replace", "--force", "--filename", "-", stdin=json.dumps(one))


def _error(verb: str, said: str) -> FivefoldError:
    told = [line for line in said.splitlines() if not OF_ITS_LOG.match(line)] or said.splitlines()
    words = " ".join(" ".join(told).split()) or "it said nothing"
    if any(sign in said.lower() for sign in AWAY):
        return RetryableError(
            f"the cluster does not answer, the same command may succeed later: kubectl {verb}: {words}"
        )
    return SettingsError(f"kubectl {verb} was refused: {words}")
