"""Every error that a user can cause or mend, each with the exit code of its process.

    FivefoldError            1   something of ours went wrong
    ├── SettingsError       64   a setting is unknown, of the wrong type, or cannot work
    ├── DataError           65   the data is broken or contradicts itself
    ├── MissingInputError   66   a channel, file or folder is not there
    ├── RetryableError      75   storage, network, a full disk: the same command may succeed later
    │   └── LostError       75   a process that trains with this one is gone
    └── StoppedError   143, 130   told to stop by SIGTERM or SIGINT: the same command goes on

A message says what was found, where, and what to do about it.
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


class LostError(RetryableError):
    """A consequence: what went wrong is told by the process that is gone, if it could."""


class StoppedError(FivefoldError):
    """The process was sent the signal `number`, and has kept what it had."""

    exit_code = 143

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}: the same command goes on from here")
