"""Errors that reach a user, and the exit code of each.

A user's mistake is one line that says the value, the constraint and the remedy. Every class takes one string,
so that it survives pickling across Ray actors unchanged.
"""


class LongtrainError(Exception):
    """Base of all errors that the command line prints as one line, without a traceback."""

    exit_code = 1


class Refused(LongtrainError):
    """The user's input cannot be used: configuration, data, a path, a full disk. Nothing was lost.

    Example: ``cluster.workers=4 is not a multiple of sequence_parallel.size=3; use 3 or 6 workers``.
    """

    exit_code = 2


class CorruptData(Refused):
    """Stored tokens do not match their digests, or a token store is incomplete; names the file."""


class CorruptCheckpoint(Refused):
    """No usable checkpoint is left although some exist; names the files and what is wrong with each."""


class WorkerFailed(LongtrainError):
    """A worker died or raised more often than `cluster.max_failures` allows; names the rank and the cause."""


class ExchangeFailed(LongtrainError):
    """A rank waited in vain for others in a collective or a transfer; names it, its group and the seconds."""


class Diverged(LongtrainError):
    """Loss or gradient is not finite. The same step would end the same way, so it is not tried again."""


class Preempted(LongtrainError):
    """The run was asked to stop (SIGTERM, `longtrain stop`), saved a checkpoint and left."""

    exit_code = 75
