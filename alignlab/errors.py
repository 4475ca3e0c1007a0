"""What can go wrong, by the exit code a user's script sees.

Every error that a user can cause or mend is an :class:`AlignlabError`; its message is one line that names the
place (file, line, key) and what to do.  Anything else that escapes is our bug and exits with 70.
"""

from __future__ import annotations


class AlignlabError(Exception):
    """An error with an exit code of its own; the message is for the user."""

    exit_code = 70


class CheckFailed(AlignlabError):
    """A check that the user asked for said no."""

    exit_code = 1


class ConfigError(AlignlabError):
    """The configuration cannot be used as it stands."""

    exit_code = 2


class DataError(AlignlabError):
    """The data cannot be used as it stands."""

    exit_code = 2


class NumericsError(AlignlabError):
    """A loss or a gradient is not finite."""

    exit_code = 3


class StorageError(AlignlabError):
    """A file could not be written, or what was read is damaged."""

    exit_code = 4


class HangError(AlignlabError):
    """A rank was lost or did not answer in time."""

    exit_code = 5


class BusyError(AlignlabError):
    """Another process owns the run folder."""

    exit_code = 6


class OutOfMemoryError(AlignlabError):
    """A micro-batch did not fit."""

    exit_code = 7


class Preempted(AlignlabError):
    """The run was asked to stop and has saved; the same command goes on from there."""

    exit_code = 75
