"""What a benchmark leaves: a JSON file that is complete after every row, with all that is needed to repeat it."""

import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import BeforeValidator

from longtrain.core.errors import Refused
from longtrain.core.paths import GivenPath


def _one_or_more(value: Any) -> Any:
    if value is None:
        return None
    return tuple(value) if isinstance(value, list) else (value,)


OneOrMore = BeforeValidator(_one_or_more)
"""Of an option that takes a list, or one value; null is left to the type."""


@dataclass(frozen=True)
class Options:
    """What every benchmark's `Config` starts with."""

    out: GivenPath | None = None
    """JSON file for the results; None: the screen only."""


def pick_device(asked: str | None) -> torch.device:
    """cuda or cpu; None: CUDA where there is a GPU. Raises Refused for one that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise Refused("device=cuda: there is no GPU here; leave it out or write device=cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def one_line(error: BaseException) -> str:
    """Kind and message, cut to what a table holds."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Report:
    """The results so far. `add` writes the file anew, so that a benchmark killed halfway leaves its finished rows.

    Raises Refused where the file cannot be written.
    """

    def __init__(self, benchmark: str, options: Options, device: torch.device) -> None:
        self._out = None if options.out is None else options.out.expanduser().absolute()
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "command": shlex.join(sys.argv),
            "started": _now(),
            "finished": None,
            "revision": _revision(),
            "machine": machine(device),
            "settings": json.loads(json.dumps(asdict(options), default=str)),
            "rows": [],
        }
        self._write()

    def set(self, key: str, value: Any) -> None:
        """Add a section beside the rows."""
        self.content[key] = value
        self._write()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row of results."""
        self.content["rows"].append(row)
        self._write()

    def finish(self) -> None:
        """Note that every row is there."""
        self.set("finished", _now())

    def _write(self) -> None:
        if self._out is None:
            return
        partial = self._out.with_name(f".{self._out.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, self._out)
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); name a file in a folder that exists"
            raise Refused(f"out={self._out}: {problem}") from None


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory
        if cuda
        else psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "flash_linear_attention": installed("fla-core") or installed("flash-linear-attention"),
    }


def installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit that the code is at, with `+changes` where the working tree differs; None outside a repository."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if status.strip() else commit


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
