"""One job on Ray, from connection to result; `run.py` adds configuration, data and telemetry around it."""

import sys
from collections.abc import Mapping

import ray

from longtrain.cluster.config import ClusterConfig
from longtrain.cluster.controller import Controller, Limits, Observer, Result
from longtrain.cluster.failure import FailurePolicy
from longtrain.cluster.group import RayWorkerGroup, check_resources
from longtrain.cluster.session import connected
from longtrain.cluster.signals import StopSignals
from longtrain.cluster.worker import Work
from longtrain.telemetry.events import Warned


def _where_there_are(resources: Mapping[str, float | None], size: int, observer: Observer) -> dict[str, float]:
    """One of each resource that is left open, where the cluster has one for every worker."""
    have = ray.cluster_resources()
    granted: dict[str, float] = {}
    for name in (name for name, amount in resources.items() if amount is None):
        granted[name] = 1.0 if have.get(name, 0) >= size else 0.0
        if 0 < have.get(name, 0) < size:
            observer.event(
                Warned(f"{size} workers, but {have[name]:g} {name}: none is used; cluster.workers={have[name]:g} would")
            )
    return granted


def execute(
    work: Work,
    *,
    cluster: ClusterConfig,
    size: int,
    group_size: int,
    policy: FailurePolicy,
    observer: Observer,
    signals: StopSignals,
) -> Result:
    """Run `work` on `size` ranks, in groups of `group_size` neighbours, until it is finished, stopped or given up.

    Prints a worker's traceback to standard error, once, where the run is given up because of a foreign exception.
    Raises Refused where the cluster cannot be used.
    """
    asked = {name: amount for name, amount in cluster.resources.items() if amount is not None}
    with connected(cluster.address, size, check_resources(asked)):
        resources = check_resources(asked | _where_there_are(cluster.resources, size, observer))
        signals.install()  # Ray has put its own handler for SIGTERM
        limits = Limits(cluster.start_timeout_seconds, cluster.heartbeat_timeout_seconds, cluster.hang_timeout_seconds)
        group = RayWorkerGroup(work, size, group_size, resources)
        controller = Controller(group, policy, observer, limits)
        signals.call_on_request(controller.request_stop)
        result = controller.run()
    if result.traceback:
        print(result.traceback.rstrip(), file=sys.stderr)
    return result
