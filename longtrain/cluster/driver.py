"""One job on Ray, from connection to result; `run.py` adds configuration, data and telemetry around it."""

import sys

from longtrain.cluster.config import ClusterConfig
from longtrain.cluster.controller import Controller, Limits, Observer, Result
from longtrain.cluster.failure import FailurePolicy
from longtrain.cluster.group import RayWorkerGroup, check_resources
from longtrain.cluster.session import connected
from longtrain.cluster.signals import StopSignals
from longtrain.cluster.worker import Work


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
