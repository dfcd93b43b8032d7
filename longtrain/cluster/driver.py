"""One job on Ray, from connection to result; `run.py` adds configuration, data and telemetry around it."""

import sys

from longtrain.cluster.config import ClusterConfig
from longtrain.cluster.controller import Controller, Limits, Observer, Result
from longtrain.cluster.failure import FailurePolicy
from longtrain.cluster.group import RayWorkerGroup, check_resources
from longtrain.cluster.session import connected
from longtrain.cluster.signals import StopSignals
from longtrain.cluster.worker import Work
from longtrain.core.errors import Refused


def world_size(cluster: ClusterConfig, group_size: int) -> int:
    """Ranks of the job; raises Refused where they are not whole sequence-parallel groups."""
    workers = group_size if cluster.workers is None else cluster.workers
    if workers % group_size:
        near = sorted({max(1, workers // group_size) * group_size, (workers // group_size + 1) * group_size})
        remedy = " or ".join(str(count) for count in near)
        raise Refused(
            f"cluster.workers={workers} is not a multiple of sequence_parallel.size={group_size}; use {remedy} workers"
        )
    return workers


def execute(
    work: Work,
    *,
    cluster: ClusterConfig,
    group_size: int,
    policy: FailurePolicy,
    observer: Observer,
    signals: StopSignals,
) -> Result:
    """Run `work` on all ranks until it is finished, stopped or given up.

    Prints a worker's traceback to standard error, once, where the run is given up because of a foreign exception.
    Raises Refused where the cluster cannot be used.
    """
    size = world_size(cluster, group_size)
    resources = check_resources(cluster.resources)
    with connected(cluster.address, size, resources):
        signals.install()  # Ray has put its own handler for SIGTERM
        limits = Limits(cluster.start_timeout_seconds, cluster.heartbeat_timeout_seconds)
        group = RayWorkerGroup(work, size, group_size, resources)
        controller = Controller(group, policy, observer, limits)
        signals.call_on_request(controller.request_stop)
        result = controller.run()
    if result.traceback:
        print(result.traceback.rstrip(), file=sys.stderr)
    return result
