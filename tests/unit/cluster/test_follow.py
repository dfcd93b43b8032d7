"""A followed log is complete and nothing in it is there twice, however often the connection breaks."""

import io
from types import SimpleNamespace

import aiohttp
import pytest
from ray.job_submission import JobStatus

from longtrain.cluster import follow, job_server
from longtrain.cluster.follow import follow_log
from longtrain.cluster.jobs import exit_code
from longtrain.core.errors import LongtrainError

LINES = [f"line {number}\n" for number in range(9)]


class FlakyClient:
    """Sends the log from its beginning on every connection, and loses connections after a few lines."""

    def __init__(self, lengths, broken_answers=0):
        self.lengths = list(lengths)
        self.broken_answers = broken_answers

    async def tail_job_logs(self, job_id):
        for line in LINES[: self.lengths[0]]:
            yield line
        if self.lengths.pop(0) % 2:
            raise aiohttp.ClientError("connection lost")

    def get_job_info(self, job_id):
        if self.broken_answers:
            self.broken_answers -= 1
            raise ConnectionError("not now")
        return SimpleNamespace(status=JobStatus.RUNNING if self.lengths else JobStatus.SUCCEEDED)

    def get_job_logs(self, job_id):
        return "".join(LINES)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(follow, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("lengths", [[9], [3, 2, 5, 0, 7], [0], [4, 4]])
def test_every_line_once(lengths):
    out = io.StringIO()
    job = follow_log(FlakyClient(lengths), "job", out)
    assert out.getvalue() == "".join(LINES)
    assert job.status is JobStatus.SUCCEEDED


def test_a_server_that_comes_back_is_asked_again_and_one_that_does_not_is_given_up(monkeypatch):
    monkeypatch.setattr(job_server.time, "sleep", lambda seconds: None)
    out = io.StringIO()
    follow_log(FlakyClient([9], broken_answers=3), "job", out)
    assert out.getvalue() == "".join(LINES)
    monkeypatch.setattr(job_server, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(LongtrainError, match="did not answer"):
        follow_log(FlakyClient([9], broken_answers=3), "job", io.StringIO())


@pytest.mark.parametrize(
    ("status", "driver_exit_code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.STOPPED, None, 75),
        (JobStatus.FAILED, 75, 75),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, None, 1),
    ],
)
def test_the_exit_code_is_the_jobs(status, driver_exit_code, expected):
    assert exit_code(SimpleNamespace(status=status, driver_exit_code=driver_exit_code)) == expected
