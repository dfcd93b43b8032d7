"""Jobs on a Ray head with token authentication."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from longtrain.cluster import jobs
from longtrain.cluster.job_server import connect
from longtrain.core.errors import Refused
from longtrain.telemetry.records import check_ledger
from tests.harness.cli import SMALL
from tests.harness.ray_head import RayHead

STAND_IN = ("python", "-m", "tests.e2e.stand_in_job")


@pytest.fixture
def submit(ray_head: RayHead) -> Callable[..., int]:
    def submit(name: str, *overrides: str, follow: bool = True) -> int:
        return jobs.submit(overrides, ray_head.jobs, follow, name, Path("/runs"), program=STAND_IN)

    return submit


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_log_is_followed_once_to_the_end_and_the_exit_code_is_the_jobs(submit, ray_head, tmp_path, capsys):
    assert submit("followed", f"state={tmp_path}/a b", "steps=120", "exit=7", "cluster.address=elsewhere:1") == 7
    shown = capsys.readouterr()
    assert re.findall(r"^step (\d+) of 120$", shown.out, re.MULTILINE) == [str(step) for step in range(120)]
    assert shown.err == "submitted followed-a1\n"
    [job] = [job for job in connect(ray_head.jobs).list_jobs() if job.submission_id == "followed-a1"]
    # The last two are ours, whatever the user gave; nothing that is sent or stored holds the token.
    assert job.entrypoint.endswith("steps=120 exit=7 run.name=followed run.dir=/runs cluster.address=auto")
    assert ray_head.token not in str(job) + shown.out


def test_a_stopped_job_may_save_and_goes_on_when_it_is_submitted_again(submit, ray_head, tmp_path, capsys):
    state = tmp_path / "state"
    assert submit("resumed", f"state={state}", "steps=100000", "seconds=0.05", follow=False) == 0
    until(lambda: "step 3 of" in connect(ray_head.jobs).get_job_logs("resumed-a1"))
    with pytest.raises(Refused, match="already running as resumed-a1"):
        submit("resumed", f"state={state}", "steps=100000")
    assert jobs.stop("resumed", ray_head.jobs) == 0
    saved = int(state.read_text())
    assert saved >= 4
    assert jobs.logs("resumed", ray_head.jobs, follow=True) == 75
    assert f"saved {saved}" in capsys.readouterr().out
    assert submit("resumed", f"state={state}", f"steps={saved + 2}") == 0
    assert f"starts at {saved}\n" in capsys.readouterr().out
    assert jobs.jobs(ray_head.jobs) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^resumed-a1 +STOPPED ", listed, re.MULTILINE)
    assert re.search(r"^resumed-a2 +SUCCEEDED ", listed, re.MULTILINE)
    assert jobs.stop("resumed", ray_head.jobs) == 0  # nothing is left to stop


def test_a_training_is_stopped_and_resumed_beside_the_cluster(ray_head, tmp_path, capsys):
    overrides = [*SMALL[:-1], "steps=60", "checkpoint.every_steps=20"]
    run = tmp_path / "trained"
    assert jobs.submit(overrides, ray_head.jobs, False, "trained", tmp_path) == 0
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3)
    assert jobs.stop("trained", ray_head.jobs) == 0
    saved = [int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")]
    assert saved, "a stopped training saves"
    assert check_ledger(run / "ledger.jsonl", last_step=max(saved)) == []
    capsys.readouterr()
    assert jobs.submit(overrides, ray_head.jobs, True, "trained", tmp_path) == 0
    shown = capsys.readouterr().out
    assert f"step {max(saved)} of 60 is done" in shown
    assert "step 60 of 60: done" in shown
    assert check_ledger(run / "ledger.jsonl", last_step=60) == []
    assert ray_head.token not in (run / "config.yaml").read_text()


def test_an_unknown_job_is_refused_with_the_nearest(ray_head):
    with pytest.raises(Refused, match="no job 'nothing'"):
        jobs.logs("nothing", ray_head.jobs, follow=False)


@pytest.mark.parametrize("address", ["http://192.0.2.77:8265", "192.0.2.77:8265", "https://cluster.example"])
def test_beyond_this_machine_a_token_is_needed(address, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(Refused, match="there is no token for it"):
        jobs.jobs(address)


def test_a_wrong_token_a_missing_one_and_a_dead_address_get_one_line_each(ray_head, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(Refused, match="does not exist") as missing:
        jobs.jobs(ray_head.jobs)
    (tmp_path / "token").write_text("0" * 64)
    with pytest.raises(Refused, match="token was refused") as wrong:
        jobs.jobs(ray_head.jobs)
    with pytest.raises(Refused, match="cannot be reached") as dead:
        jobs.jobs("http://127.0.0.1:9")
    for refused in (missing, wrong, dead):
        assert "\n" not in str(refused.value)
