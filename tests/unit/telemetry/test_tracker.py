"""wandb for real, offline; and what happens when it fails. Each in its own process: wandb starts services."""

import json
import subprocess
import sys
from pathlib import Path

from longtrain.telemetry.config import TelemetryConfig
from longtrain.telemetry.events import StepDone, Warned
from longtrain.telemetry.tracker import Tracker, hide_secrets

OFFLINE = """
import json, sys
from pathlib import Path
from longtrain.telemetry.config import TelemetryConfig
from longtrain.telemetry.events import Started, StepDone
from longtrain.telemetry.tracker import Tracker

directory, mode = Path(sys.argv[1]), sys.argv[2]
warned = []
settings = {"steps": 2, "hub_token": "canary-secret", "data": {"path": "https://me:canary-secret@example.org/x"}}
tracker = Tracker(TelemetryConfig(wandb=mode, wandb_project="longtrain"), directory, "tiny", settings, warned.append)
tracker.event(Started(0, 2, 16, 1, 1, 10, None, 3.2, str(directory), "chunked"))
for step in (1, 2):
    tracker.event(StepDone(step, step * 16, 2.5, {}, 1.0, 1e-3, 0.5, 32.0, 1000, 0.0, None))
tracker.close()
print(json.dumps({"warned": [w.message for w in warned], "imported": "wandb" in sys.modules}))
"""


def track(directory: Path, mode: str, **environment: str) -> dict:
    """Run the script above; standard output must hold nothing but its result."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(directory), mode, "--password", "canary-secret"],
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(directory), "PATH": "/usr/bin:/bin", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


def test_offline_for_real(tmp_path: Path) -> None:
    assert track(tmp_path, "offline") == {"warned": [], "imported": True}
    logs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == 1 and logs[0].stat().st_size > 500
    assert logs[0].stem == "run-" + (tmp_path / "wandb.id").read_text().strip()
    content = logs[0].read_bytes()
    assert b"tokens_per_second" in content and b"tiny" in content
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if b"canary-secret" in path.read_bytes()], "nor the command line's arguments"
    assert track(tmp_path, "offline")["warned"] == []
    assert len({log.stem for log in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}) == 1, "one identity"


def test_a_failure_is_one_warning(tmp_path: Path) -> None:
    (tmp_path / "wandb.id").mkdir()
    result = track(tmp_path, "offline")
    assert len(result["warned"]) == 1 and "\n" not in result["warned"][0]
    assert result["warned"][0].startswith("wandb is off for the rest of this run: start failed: ")


def test_online_without_a_login_is_one_warning(tmp_path: Path) -> None:
    warned = track(tmp_path, "online", WANDB_BASE_URL="http://127.0.0.1:9")["warned"]
    assert len(warned) == 1 and "\n" not in warned[0]


def test_disabled_imports_nothing(tmp_path: Path) -> None:
    assert track(tmp_path, "disabled") == {"warned": [], "imported": False}
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A run whose service went away."""

    def log(self, *args: object, **options: object) -> None:
        raise ConnectionError("gone\naway")


def test_a_failing_log_is_told_once(tmp_path: Path) -> None:
    warned: list[Warned] = []
    tracker = Tracker(TelemetryConfig("disabled", "p"), tmp_path, "tiny", {}, warned.append)
    tracker._run = Broken()
    for step in (1, 2):
        tracker.event(StepDone(step, 16, 2.5, {}, 1.0, 1e-3, 0.5, 32.0, 1000, 0.0, None))
    tracker.close()
    assert warned == [Warned("wandb is off for the rest of this run: log failed: gone away")]


def test_hidden_values() -> None:
    tree = {
        "api_key": "x",
        "key_dim": 32,
        "num_key_value_heads": 2,
        "hub.token": "x",
        "PASSWORD": None,
        "aws-secret": ["x", "y"],
        "chunk_tokens": 64,
        "tokenizer": "bytes",
        "urls": ["https://u:p@h/x", "https://h/x"],
        "deep": {"Auth": {"user": "me"}, "token": 7},
    }
    assert hide_secrets(tree) == {
        "api_key": "***",
        "key_dim": 32,
        "num_key_value_heads": 2,
        "hub.token": "***",
        "PASSWORD": None,
        "aws-secret": "***",
        "chunk_tokens": 64,
        "tokenizer": "bytes",
        "urls": ["https://***@h/x", "https://h/x"],
        "deep": {"Auth": {"user": "me"}, "token": "***"},
    }
