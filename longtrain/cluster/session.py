"""The connection to Ray: embedded in this process, or to a running cluster."""

import logging
import math
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import ray
import ray._private.services

from longtrain.core.errors import Refused

OBJECT_STORE_BYTES = 80 * 2**20
"""Just above Ray's minimum of 75 MiB; only heartbeats and events travel through Ray, the ranks use sockets."""
_CONNECT_SECONDS = 5.0
_KILL_MILLISECONDS = 500
"""A stopped process (SIGSTOP) does not obey Ray's request to exit; it is killed after this, by default after 5 s."""


@contextmanager
def connected(address: str, workers: int, resources: Mapping[str, float]) -> Iterator[None]:
    """An initialised Ray inside the block.

    `local` starts one in this process, with as many CPUs as the workers ask for. `auto` and `HOST:PORT` join.
    Raises Refused where the address cannot be used, and where this machine can never hold the workers.
    """
    if ray.is_initialized():
        yield
        return
    # Ray prints the raylet's ten lines about a dead worker, which our incident says in one; 2.60 has no switch for it.
    ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
    if address != "local":
        _join(address)
        try:
            yield
        finally:
            ray.shutdown()
        return
    _start_embedded(math.ceil(workers * resources.get("CPU", 0)))
    watch = _watch_agents()
    try:
        _check_fits(workers, resources)
        yield
    finally:
        ray.shutdown()
        watch.kill()
        watch.wait()


def _start_embedded(num_cpus: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _own_process_groups():
        ray.init(
            address="local",
            num_cpus=num_cpus + 1,  # Ray starts as many processes in advance; the mailbox takes one, and no CPU
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _system_config={"kill_worker_timeout_milliseconds": _KILL_MILLISECONDS},
        )


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """Ray's processes leave this one's group: `timeout`, a shell or a batch system signals the whole group, and with
    Ray gone at once the ranks could neither save nor report. 2.60 guards against SIGINT alone and has no option."""
    services = ray._private.services
    plain = services.ConsolePopen

    class OwnGroup(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, process_group=0)

    services.ConsolePopen = OwnGroup  # type: ignore[misc]
    try:
        yield
    finally:
        services.ConsolePopen = plain  # type: ignore[misc]


def _watch_agents() -> subprocess.Popen[bytes]:
    """A shell that ends the agents of the embedded Ray when this process dies, however it dies.

    All else dies with this process, but the agents first try for a minute to report to a server that is gone too. The
    shell waits for the end of its input, which is held open by this process alone, outside of the terminal's group.
    """
    below = psutil.Process().children(recursive=True)
    agents = [str(process.pid) for process in below if "Agent" in " ".join(process.cmdline()[:1])]
    command = ["/bin/sh", "-c", 'read -r _; [ $# -eq 0 ] || kill -9 "$@"', "sh", *agents]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)


def _join(address: str) -> None:
    if address != "auto":
        host, _, port = address.rpartition(":")
        if "://" in address or not host or not port.isdigit():
            raise Refused(f"cluster.address={address} is not an address; use local, auto, env or HOST:PORT")
        check_reachable("cluster.address", address, host, int(port))
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if "Authentication" in f"{error} {error.__cause__}":
            remedy = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
            raise Refused(f"cluster.address={address}: the token is missing or wrong; {remedy}") from error
        reason = str(error).strip().splitlines()[0]
        raise Refused(f"cluster.address={address}: {reason}; check the address, or use local") from error


def check_reachable(setting: str, address: str, host: str, port: int) -> None:
    """Raises Refused within seconds where nothing listens; Ray's own clients wait for minutes."""
    try:
        socket.create_connection((host.strip("[]"), port), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise Refused(
            f"{setting}={address} cannot be reached ({reason}); check the address, or start a head"
        ) from error


def _check_fits(workers: int, resources: Mapping[str, float]) -> None:
    have = ray.cluster_resources()
    for name, amount in resources.items():
        if amount * workers > have.get(name, 0):
            raise Refused(
                f"cluster.workers={workers} with cluster.resources.{name}={amount:g} each needs {amount * workers:g}, "
                f"this machine has {have.get(name, 0):g}; use fewer workers or another cluster.address"
            )
