"""The error tree: one class per exit code, every message says where, what, and what is allowed."""

from __future__ import annotations


class DeftRayError(Exception):
    """Base of all errors that end a command with a message and an exit code instead of a traceback."""

    exit_code = 1


class SpecError(DeftRayError):
    """What the user asked for is wrong: nothing has been started or written.

    Args:
        faults: Every fault found, one line each (``file:line: path: what``).
    """

    exit_code = 2

    def __init__(self, faults: list[str]) -> None:
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


class SetupError(DeftRayError):
    """The surroundings are wrong: a data folder, model folder, output folder, cluster or package."""

    exit_code = 3


class BaselineError(DeftRayError):
    """At least one task has no usable baseline, so its front has nothing to be compared with."""

    exit_code = 4


class RecordsError(DeftRayError):
    """A run directory's records cannot be read."""

    exit_code = 5
