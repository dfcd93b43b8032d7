"""`longtrain train`: one job from its resolved configuration to its exit code."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.checkpoint.commit import checkpoints_in
from longtrain.cluster.config import JobConfig, check_job, num_workers
from longtrain.cluster.controller import State
from longtrain.cluster.driver import execute
from longtrain.cluster.observer import RunObserver
from longtrain.cluster.signals import StopSignals, listening
from longtrain.cluster.worker import Work, named
from longtrain.comm.journal import Journal
from longtrain.config.load import load_config
from longtrain.core.errors import Preempted, Refused
from longtrain.core.registry import Registry
from longtrain.data.prepare import prepare
from longtrain.telemetry.events import Event
from longtrain.telemetry.progress import Progress
from longtrain.telemetry.tracker import Tracker
from longtrain.training.objective import check_data, make_objective
from longtrain.training.weights import check_weights

_TARGET = "longtrain.cluster.target:train"
_SAY_EVERY_SECONDS = 10.0


def run_job(tree: dict[str, Any], plugins: tuple[Path, ...], *, target: str = _TARGET) -> int:
    """Run the job that `tree` describes; returns 0, or 75 where it was asked to stop and has saved.

    `target` is what a rank runs, `module:function` (see `Work`). Raises Refused for what the user can mend, and
    WorkerFailed, or the error of longtrain that a worker raised, where the run was given up.
    """
    registry = Registry(plugins)
    config = load_config(JobConfig, tree, registry)
    check_job(config, registry)
    if config.run.name is None:
        raise Refused("run.name is not set; give the run a name")
    # A worker's working directory need not be this one.
    root = Path(os.path.abspath(config.run.dir.expanduser()))
    tree = tree | {"run": {"name": config.run.name, "dir": str(root)}}
    directory = root / config.run.name
    objective = make_objective(config, registry)
    if objective.reference is not None:
        check_weights(objective.reference, "objective.reference", config)
    if config.initial_weights is not None and not checkpoints_in(directory / "checkpoints"):
        check_weights(config.initial_weights, "initial_weights", config)
    prepare(config.data, registry, _say_progress())
    check_data(config, registry)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"run directory {directory} cannot be made ({error.strerror}); set run.dir") from error
    work = Work(tree, plugins, os.getcwd(), target)
    if config.cluster.address == "env":
        return _run_as_rank(config, work, directory)
    return _run_on_ray(config, work, directory, registry)


def _run_on_ray(config: JobConfig, work: Work, directory: Path, registry: Registry) -> int:
    policies = registry.load("cluster.policies", config.cluster.failure_policy.name, ("Config", "Policy"))
    policy = policies.Policy(config.cluster.failure_policy, config.cluster.max_failures)
    with (
        Progress() as progress,
        listening(StopSignals(before_quit=progress.close)) as signals,
        closing(_tracker(config, work, directory, progress)) as tracker,
    ):
        result = execute(
            work,
            cluster=config.cluster,
            size=num_workers(config),
            group_size=config.sequence_parallel.size,
            policy=policy,
            observer=RunObserver(directory, work.tree, progress, tracker),
            signals=signals,
        )
    if result.error is not None:
        raise result.error
    return Preempted.exit_code if result.state is State.PREEMPTED else 0


@dataclass(frozen=True)
class _RankListener:
    """The listener of a rank that this process itself is."""

    handle: Callable[[Event], None]
    signals: StopSignals

    def event(self, event: Event) -> None:
        self.handle(event)

    def phase(self, name: str, step: int) -> None:
        """Nobody watches: the launcher that started this process sees whether it lives."""

    def watch(self, journal: Journal) -> None:
        """Nobody watches; a rank that waits for too long raises and says in what."""

    def stop_requested(self) -> bool:
        return self.signals.requested


def _run_as_rank(config: JobConfig, work: Work, directory: Path) -> int:
    set_by_launcher = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in set_by_launcher if name not in os.environ]
    if 0 < len(missing) < len(set_by_launcher):
        raise Refused(f"cluster.address=env, but {missing[0]} is not set; start with torchrun, or use local")
    # Without a launcher this process is the only rank.
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    expected = num_workers(config)
    if ranks != expected:
        raise Refused(
            f"cluster.address=env: {ranks} {'rank was' if ranks == 1 else 'ranks were'} started, but the configuration "
            f"asks for {expected}; start {expected} with torchrun, or set sequence_parallel.size and cluster.workers"
        )
    run_rank = named(work.target)
    with listening(StopSignals()) as signals:
        if rank != 0:
            outcome = run_rank(work.tree, work.plugins, _RankListener(lambda event: None, signals))
        else:
            with Progress() as progress, closing(_tracker(config, work, directory, progress)) as tracker:
                observer = RunObserver(directory, work.tree, progress, tracker)
                outcome = run_rank(work.tree, work.plugins, _RankListener(observer.event, signals))
    return Preempted.exit_code if outcome.preempted else 0


def _tracker(config: JobConfig, work: Work, directory: Path, progress: Progress) -> Tracker:
    return Tracker(config.telemetry, directory, directory.name, work.tree, progress.event)


def _say_progress() -> Callable[[int, int], None]:
    """Reports the preparation of data on standard error now and then, where it takes long."""
    said = time.monotonic()

    def say(documents: int, tokens: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_EVERY_SECONDS:
            said = time.monotonic()
            print(f"preparing the data: {documents:,} documents, {tokens:,} tokens", file=sys.stderr)

    return say
