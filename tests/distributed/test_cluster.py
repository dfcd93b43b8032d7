"""Real workers on a real Ray head, with gloo ranks that die, freeze, refuse and are stopped."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import ray

from longtrain.cluster.config import ClusterConfig
from longtrain.cluster.controller import State
from longtrain.cluster.driver import execute
from longtrain.cluster.policies.restart import Config, Policy
from longtrain.cluster.session import connected
from longtrain.cluster.signals import StopSignals, listening
from longtrain.cluster.worker import Work
from longtrain.core.errors import CorruptData, Refused, WorkerFailed

STEPS = 8


class Watcher:
    """Observes a run as the driver does: the committed step comes with an event."""

    def __init__(self, signals, stop_at=None):
        self.signals, self.stop_at = signals, stop_at
        self.committed, self.incidents = [], []

    def event(self, event):
        self.committed.append(event.step)
        if self.stop_at is not None and event.step >= self.stop_at:
            self.signals.handle(signal.SIGTERM, None)

    def incident(self, kind, message, **details):
        self.incidents.append({"kind": kind, "message": message, "time": time.time(), **details})

    def committed_step(self):
        return self.committed[-1] if self.committed else None


@pytest.fixture(scope="module")
def address(ray_head):
    with connected(ray_head.gcs, 2, {"CPU": 1}):
        yield ray_head.gcs


@pytest.fixture
def run(address, tmp_path):
    """`run(fault=..., target=...)`: two workers over the stand-in training; result and what the driver saw."""

    def start(target="train", *, fault=None, stop_at=None, max_failures=3, workers=2, resources=None, **limits):
        limits = {"start_timeout_seconds": 60.0, "heartbeat_timeout_seconds": 30.0} | limits
        limits = {"hang_timeout_seconds": 30.0} | limits
        cluster = ClusterConfig(address, workers, resources or {"CPU": 1}, None, max_failures, **limits)
        tree = {"directory": str(tmp_path), "steps": STEPS, "fault": fault}
        work = Work(tree, (tmp_path,), str(tmp_path), target=f"tests.distributed.cluster_targets:{target}")
        with listening(StopSignals()) as signals:
            watcher = Watcher(signals, stop_at)
            policy = Policy(Config(name="restart", max_failures_without_progress=3, delay_seconds=0.0), max_failures)
            result = execute(
                work, cluster=cluster, size=workers, group_size=2, policy=policy, observer=watcher, signals=signals
            )
        return result, watcher

    return start


def fault_time(folder: Path) -> float:
    return float((folder / "fault-happened").read_text())


def ledger(folder: Path) -> list[tuple[int, int]]:
    return [tuple(map(int, line.split())) for line in (folder / "ledger").read_text().splitlines()]


def test_ranks_find_each_other_and_get_the_environment_of_torchrun(run, tmp_path):
    result, watcher = run("environment")
    assert result.state is State.FINISHED
    assert result.outcome.step == 2  # the sum over both ranks
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(s["RANK"], s["LOCAL_RANK"]) for s in seen] == [("0", "0"), ("1", "1")]
    for s in seen:
        assert (s["WORLD_SIZE"], s["LOCAL_WORLD_SIZE"], s["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert s["threads"] == 1
        assert s["directory"] == str(tmp_path) and s["plugins"] == [str(tmp_path)]
    assert watcher.incidents == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_noticed_at_once_and_all_ranks_go_on_from_the_last_commit(run, tmp_path, rank):
    result, watcher = run(fault={"kind": "kill", "rank": rank, "step": 5})
    assert result.state is State.FINISHED and result.outcome.step == STEPS
    died, recovered = watcher.incidents
    assert (died["kind"], died["rank"]) == ("died", rank)
    assert died["committed_step"] == 4 and died["decision"] == "restart"
    assert f"rank {rank} (process " in died["message"]
    # Measured 0.03 s. Two seconds leave room for a busy machine and are far below any timeout that could also notice.
    assert died["time"] - fault_time(tmp_path) < 2.0
    assert recovered["kind"] == "recovered" and recovered["attempt"] == 1
    assert watcher.committed == [0, 2, 4, 4, 6, 8]
    assert [step for step, _ in ledger(tmp_path)] == [0, 1, 2, 3, 4, 4, 5, 6, 7]


def test_a_frozen_worker_is_named_and_replaced(run, tmp_path):
    result, watcher = run(fault={"kind": "freeze", "rank": 1, "step": 3}, heartbeat_timeout_seconds=3.0)
    assert result.state is State.FINISHED
    silent = watcher.incidents[0]
    assert (silent["kind"], silent["rank"]) == ("silent", 1)
    # The last beat may be half a second old when the worker freezes; a look is taken every 0.2 s.
    assert 2.0 < silent["time"] - fault_time(tmp_path) < 6.0


def test_a_worker_that_loops_for_ever_is_named_with_its_place_and_replaced(run, tmp_path):
    result, watcher = run(fault={"kind": "loop", "rank": 1, "step": 3}, hang_timeout_seconds=4.0)
    assert result.state is State.FINISHED
    hang = watcher.incidents[0]
    assert (hang["kind"], hang["rank"], hang["ranks"], hang["committed_step"]) == ("hang", 1, [1], 2)
    assert hang["places"] == {
        "in all_reduce 4 of the world, step 4": [0],
        "after all_reduce 3 of the world, step 4": [1],
    }
    assert "rank 1 (process " in hang["message"] and "holds up rank 0 in all_reduce 4 of the world" in hang["message"]
    assert "in _misbehave" in hang["traceback"]
    # A look is taken every 0.2 s, and news are half a second old.
    assert 3.0 < hang["time"] - fault_time(tmp_path) < 8.0


def test_a_refusal_inside_a_worker_arrives_as_it_was_raised_and_is_not_retried(run, capfd):
    result, watcher = run(fault={"kind": "refuse", "rank": 1, "step": 1})
    assert type(result.error) is CorruptData and result.error.exit_code == 2
    assert str(result.error) == "tokens-00003.bin does not match its digest; run `longtrain prepare` again"
    assert [i["kind"] for i in watcher.incidents] == ["refused"]
    assert "Traceback" not in capfd.readouterr().err
    # The place was given back and nothing of a rank leaked into the driver.
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != 4.0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources().get("CPU") == 4.0 and "MASTER_PORT" not in os.environ


def test_a_foreign_exception_is_shown_once_with_the_workers_traceback(run, capfd):
    result, _ = run(fault={"kind": "raise", "rank": 1, "step": 1}, max_failures=0)
    assert isinstance(result.error, WorkerFailed)
    assert "rank 1" in str(result.error) and "ValueError: three is not a number" in str(result.error)
    assert "max_failures=0" in str(result.error)
    shown = capfd.readouterr().err
    assert shown.count("Traceback") == 1 and shown.count("ValueError: three is not a number of tokens") == 1
    assert "cluster_targets.py" in shown and "ray::" not in shown


def test_code_that_cannot_be_imported_is_a_failure_before_any_rank_runs(run):
    result, _ = run("no_such_function", max_failures=0)
    assert "no_such_function" in str(result.error)


def test_a_stop_lets_all_ranks_save_and_the_same_command_goes_on(run, tmp_path):
    result, _ = run(stop_at=2)
    assert result.state is State.PREEMPTED
    saved = int((tmp_path / "committed").read_text())
    assert 2 <= saved == result.outcome.step < STEPS
    result, watcher = run()
    assert result.state is State.FINISHED and watcher.committed[0] == saved
    assert [step for step, _ in ledger(tmp_path)] == list(range(STEPS))


def test_resources_that_the_cluster_lacks_are_refused_with_numbers(run):
    result, _ = run(workers=64, start_timeout_seconds=1.0)
    assert isinstance(result.error, Refused)
    assert "64 workers need CPU 64 in all; the cluster has free: CPU 4 of 4" in str(result.error)
