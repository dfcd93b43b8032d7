"""The SLURM script, run with a stand-in for each program it calls."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "launchers" / "slurm.sbatch"
STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >"$RECORDS/scontrol"; fi',
    # The head listens, as Ray would; a worker returns at once. Both note what they were given.
    "srun": """
        case "$*" in *--head*) role=head ;; *) role=worker ;; esac
        echo "$@" >"$RECORDS/$role"
        env | grep RAY_ >"$RECORDS/$role.env"
        while [ $# -gt 0 ]; do [ "$1" != --port ] || port=$2; shift; done
        [ $role = worker ] || exec python -c "
import socket, sys, time
server = socket.create_server(('', int(sys.argv[1])))
time.sleep(30)" "$port"
    """,
    "longtrain": """
        echo "$@" >"$RECORDS/longtrain"
        ls -l "$RAY_AUTH_TOKEN_PATH" >"$RECORDS/token"
        cat "$RAY_AUTH_TOKEN_PATH" >>"$RECORDS/token"
        trap 'sleep 0.2; exit 75' TERM
        touch "$RECORDS/training"
        for _ in 1 2 3 4 5 6 7 8 9 10; do [ -z "$WAIT" ] || sleep 1; done
        exit 3
    """,
}


class Job:
    """One run of the script: `records` has what the stand-ins were given."""

    def __init__(self, folder: Path, *, wait: bool) -> None:
        self.records = folder / "records"
        self.home = folder / "home"
        for path in (self.records, self.home, folder / "bin", folder / "launchers"):
            path.mkdir()
        (folder / "launchers" / "environment.sh").write_text("")
        (folder / "bin" / "python").symlink_to(sys.executable)
        for name, body in STAND_INS.items():
            script = folder / "bin" / name
            script.write_text(f"#!/usr/bin/env bash\n{body}\n")
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        environment = {
            "HOME": str(self.home),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "RECORDS": str(self.records),
            "WAIT": "yes" if wait else "",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
        }
        self.process = subprocess.Popen(
            ["bash", SCRIPT, "steps=7"], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def finish(self) -> int:
        """Wait for the end and clean up; returns the exit code."""
        code = self.process.wait(30)
        os.killpg(self.process.pid, signal.SIGKILL)  # the stand-in for the head; SLURM ends a job's steps itself
        return code

    def record(self, name: str) -> str:
        """What a stand-in noted."""
        return (self.records / name).read_text()


def test_every_gpu_of_every_node_is_used_under_a_private_token(tmp_path: Path) -> None:
    job = Job(tmp_path, wait=False)
    assert job.finish() == 3
    assert "cluster.address=auto cluster.workers=16 cluster.resources={CPU: 1, GPU: 1} steps=7" in job.record(
        "longtrain"
    )
    assert "--nodelist=node1" in job.record("head") and "--exclude=node1" in job.record("worker")
    token = job.record("token").splitlines()
    assert token[0].startswith("-rw-------") and len(token[1]) == 64
    for role in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in job.record(f"{role}.env")
        assert token[1] not in job.record(role) + job.record(f"{role}.env")
    assert not list((job.home / ".ray").iterdir())
    assert not (job.records / "scontrol").exists()


def test_ports_and_temporary_folder_belong_to_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, wait=False)
    job.finish()
    base = 20000 + os.getpid() % 1200 * 10
    for option in (
        f"--port {base} ",
        f"--temp-dir /tmp/ray-{os.getpid()} ",
        f"--dashboard-agent-listen-port {base + 1} ",
    ):
        assert option in job.record("head")
    assert f":{base}" in job.record("worker").split("--address ")[1]


def test_a_job_that_is_stopped_and_saved_is_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, wait=True)
    deadline = time.monotonic() + 20
    while not (job.records / "training").exists():
        assert time.monotonic() < deadline and job.process.poll() is None
        time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75
    assert job.record("scontrol") == f"requeue {os.getpid()}\n"


def test_without_sbatch_it_says_what_to_do() -> None:
    ended = subprocess.run(["bash", SCRIPT], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert ended.returncode != 0 and "submit this file with sbatch" in ended.stderr
