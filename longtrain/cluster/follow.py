"""Follows the log of a job over lost connections: every character once, until the job has ended."""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Protocol

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from longtrain.cluster.job_server import UNREACHABLE, patiently

QUIET_SECONDS = 30.0
"""A tail without a word for so long is opened again: Ray's sometimes stops for good (ray-project/ray#51601)."""
_PAUSE_SECONDS = 1.0


class Writer(Protocol):
    """Where the log goes."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


def follow_log(client: JobSubmissionClient, job_id: str, out: Writer | None = None) -> JobDetails:
    """Write the log of a job to `out` (standard output) until it has ended, and return its final details.

    Raises LongtrainError where the server stays out of reach.
    """
    out = out or sys.stdout
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of every closed connection
    printed = 0

    def write(text: str, start: int) -> None:
        """Write what is new of `text`, which begins at character `start` of the log."""
        nonlocal printed
        new = text[max(0, printed - start) :]
        if new:
            out.write(new)
            out.flush()
            printed = start + len(text)

    while True:
        # A lost connection is opened again below, unless the job has ended.
        with contextlib.suppress(RuntimeError, AuthenticationError, *UNREACHABLE):
            asyncio.run(_tail(client, job_id, write))
        job = patiently(lambda: client.get_job_info(job_id))
        if job.status.is_terminal():
            write(patiently(lambda: client.get_job_logs(job_id)), 0)
            return job
        time.sleep(_PAUSE_SECONDS)


async def _tail(client: JobSubmissionClient, job_id: str, write: Callable[[str, int], None]) -> None:
    """Pass the log on from its beginning, as the server sends it, until the server ends it or falls quiet."""
    position = 0
    chunks = aiter(client.tail_job_logs(job_id))
    try:
        while True:
            chunk = await asyncio.wait_for(anext(chunks), QUIET_SECONDS)
            write(chunk, position)
            position += len(chunk)
    except (StopAsyncIteration, TimeoutError):
        return
