"""`submit`, `jobs`, `logs` and `stop`, over the Ray Jobs API.

A job runs `longtrain train` beside the cluster with the overrides that the user gave. Its id is `<run>-a<attempt>`; a
run that is submitted again goes on where it stopped, as the same command does without a cluster.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from longtrain.cluster.follow import follow_log
from longtrain.cluster.job_server import DEFAULT_ADDRESS, connect, patiently, refusal
from longtrain.core.errors import LongtrainError, Preempted, Refused
from longtrain.core.registry import did_you_mean

STOP_WAIT_SECONDS = 900
"""How long a stopped job may take to finish its step and its checkpoint before it is killed."""
_RUN, _ATTEMPT = "longtrain_run", "longtrain_attempt"
_PROGRAM = ("python", "-m", "longtrain")


def submit(
    overrides: Sequence[str],
    address: str | None,
    follow: bool,
    name: str,
    directory: Path,
    *,
    program: Sequence[str] = _PROGRAM,
) -> int:
    """Run `longtrain train` with `overrides` on the cluster at `address`, as the run `<directory>/<name>`.

    A job has a working directory of its own, so `directory` is absolute and means the same folder on the cluster.

    Returns the exit code of the job where its log is followed, else 0. Raises Refused where the cluster cannot be
    used, and where the run is already running.
    """
    client = connect(address)
    attempts = _attempts(client, name)
    for job in attempts:
        if not job.status.is_terminal():
            raise Refused(
                f"{name} is already running as {_id(job)}; use `longtrain logs {name}` or `longtrain stop {name}`"
            )
    attempt = 1 + max((_attempt(job) for job in attempts), default=0)
    ours = ("run.name=", "run.dir=", "cluster.address=")
    arguments = [argument for argument in overrides if not argument.startswith(ours)]
    arguments += [f"run.name={name}", f"run.dir={directory}", "cluster.address=auto"]
    try:
        job_id = client.submit_job(
            # The shell is replaced, so that a signal reaches the program and its exit code is the job's.
            entrypoint="exec " + shlex.join([*program, "train", *arguments]),
            submission_id=f"{name}-a{attempt}",
            metadata={_RUN: name, _ATTEMPT: str(attempt)},
            runtime_env={
                "env_vars": {
                    "RAY_JOB_STOP_SIGNAL": "SIGTERM",
                    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SECONDS),
                    "PYTHONUNBUFFERED": "1",
                }
            },
        )
    except RuntimeError as error:
        raise refusal(address or DEFAULT_ADDRESS, error) from error
    print(f"submitted {job_id}", file=sys.stderr)
    return _follow(client, job_id) if follow else 0


def jobs(address: str | None) -> int:
    """Print the jobs of longtrain on the cluster, oldest first."""
    found = sorted(_list(connect(address)), key=lambda job: job.start_time or 0)
    width = max((len(_id(job)) for job in found), default=0)
    for job in found:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        print(f"{_id(job):{width}}  {job.status.value:9}  {started}")
    return 0


def logs(job: str, address: str | None, follow: bool) -> int:
    """Print the log of a job, given by its id or by its run's name (the last attempt); see `submit` for the result."""
    client = connect(address)
    job_id = _id(_find(client, job))
    if follow:
        return _follow(client, job_id)
    print(client.get_job_logs(job_id), end="")
    return 0


def stop(job: str, address: str | None) -> int:
    """Ask a job to save and leave, and wait until it has. Returns 0, also where it had ended before."""
    client = connect(address)
    found = _find(client, job)
    if not found.status.is_terminal():
        client.stop_job(_id(found))
        while not (status := patiently(lambda: client.get_job_status(_id(found)))).is_terminal():
            time.sleep(0.5)
        print(f"{_id(found)} {status.value}", file=sys.stderr)
    else:
        print(f"{_id(found)} had ended before: {found.status.value}", file=sys.stderr)
    return 0


def exit_code(job: JobDetails) -> int:
    """The exit code of a job that has ended: its program's, and 75 for one that was stopped."""
    match job.status:
        case JobStatus.SUCCEEDED:
            return 0
        case JobStatus.STOPPED:
            return Preempted.exit_code
        case _:
            return job.driver_exit_code or LongtrainError.exit_code


def _follow(client: JobSubmissionClient, job_id: str) -> int:
    try:
        job = follow_log(client, job_id)
    except KeyboardInterrupt:
        print(
            f"\n{job_id} goes on; `longtrain logs {job_id}` follows it, `longtrain stop {job_id}` stops it",
            file=sys.stderr,
        )
        return 130
    if job.status is JobStatus.FAILED and job.driver_exit_code is None:
        print(f"{job_id} failed: {' '.join((job.message or 'no reason was given').split())}", file=sys.stderr)
    return exit_code(job)


def _list(client: JobSubmissionClient) -> list[JobDetails]:
    return [job for job in patiently(client.list_jobs) if _RUN in (job.metadata or {})]


def _attempts(client: JobSubmissionClient, name: str) -> list[JobDetails]:
    return [job for job in _list(client) if (job.metadata or {})[_RUN] == name]


def _find(client: JobSubmissionClient, job: str) -> JobDetails:
    known = _list(client)
    exact = [candidate for candidate in known if _id(candidate) == job]
    of_run = [candidate for candidate in known if (candidate.metadata or {})[_RUN] == job]
    if not exact and not of_run:
        raise Refused(f"there is no job '{job}'{did_you_mean(job, [_id(candidate) for candidate in known])}")
    return exact[0] if exact else max(of_run, key=_attempt)


def _attempt(job: JobDetails) -> int:
    return int((job.metadata or {}).get(_ATTEMPT, 0))


def _id(job: JobDetails) -> str:
    return job.submission_id or ""
