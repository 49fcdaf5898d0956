"""Exceptions that a user can cause or fix, each with the exit code of its process.

    FivefoldError            1   an internal error (please report)
    ├── SettingsError       64   a setting is unknown, of the wrong type, or cannot work
    ├── DataError           65   the data is broken or contradicts itself
    ├── MissingInputError   66   a channel, file or folder is not there
    ├── RetryableError      75   storage, network, a full disk: the same command may succeed later
    │   └── PeerLostError   75   a process that trains with this one is gone
    └── StoppedError   143, 130   stopped by SIGTERM or SIGINT: the same command resumes

A message states the problem, its location and the remedy.
"""

import signal


class FivefoldError(Exception):
    exit_code = 1


class SettingsError(FivefoldError):
    exit_code = 64


class DataError(FivefoldError):
    exit_code = 65


class MissingInputError(FivefoldError):
    exit_code = 66


class RetryableError(FivefoldError):
    exit_code = 75


class PeerLostError(RetryableError):
    """Another process of the training is gone. Its own error, if it could report one, is the cause."""


class StoppedError(FivefoldError):
    """The process received the signal `number`, and has saved its state."""

    exit_code = 143

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command resumes from here")
