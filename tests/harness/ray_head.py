"""A Ray head of its own for tests: odd ports, its own session folder, token authentication, quick health checks."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_START_SECONDS = 90.0
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_kill_worker_timeout_milliseconds": "500",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class RayHead:
    """A running head."""

    gcs: str
    """HOST:PORT to join."""
    jobs: str
    """URL of the job server."""
    environment: Mapping[str, str]
    """What lets a client in, beside RAY_AUTH_MODE=token, which Ray reads once, when it is imported."""
    token: str
    process: subprocess.Popen[bytes]
    folder: Path

    def stop(self) -> None:
        """End the head and all that it started; the processes are found below the one that was started here."""
        started = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        self.process.terminate()
        psutil.wait_procs(started[1:], timeout=10)
        for process in started[1:]:
            if isinstance(process, psutil.Process) and process.is_running():
                process.kill()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_ray_head(num_cpus: int = 4) -> RayHead:
    """Start a head and wait until its job server answers."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's Unix sockets are below it, and end at 107 characters
    token = "f1d0" * 16
    (folder / "token").write_text(token)
    (folder / "token").chmod(0o600)
    client = {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    # `python` of an entrypoint is found on the head's PATH, and modules of tests below the repository's root.
    paths = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    gcs_port, jobs_port = _free_port(), _free_port()
    arguments = [
        *("--head", "--block", f"--port={gcs_port}", f"--num-cpus={num_cpus}", "--disable-usage-stats"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}"),
        *(f"--temp-dir={folder / 'ray'}", f"--object-store-memory={80 * 2**20}", "--node-ip-address=127.0.0.1"),
    ]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments],
            env={**os.environ, **_QUIET, **client, **paths, "RAY_AUTH_MODE": "token"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = RayHead(f"127.0.0.1:{gcs_port}", f"http://127.0.0.1:{jobs_port}", client, token, process, folder)
    deadline = time.monotonic() + _START_SECONDS
    while not _listens(jobs_port):
        if process.poll() is not None or time.monotonic() > deadline:
            head.process.send_signal(signal.SIGKILL)
            raise RuntimeError(f"the Ray head did not start:\n{(folder / 'head.log').read_text()}")
        time.sleep(0.2)
    return head


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
