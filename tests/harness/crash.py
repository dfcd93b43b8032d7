"""Stops a process at any chosen call to the file system: by SIGKILL before, in the middle of or after it, or by errno.

calls = record(lambda: save(folder))                   # ["mkdir", "open", "write", "fsync", ...]
for point in points(calls):
    assert killed(lambda: save(folder), point)         # in a forked process, by a real SIGKILL
    ...                                                # now look at what is left
"""

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

CALLS = ("mkdir", "open", "write", "ftruncate", "fsync", "close", "rename", "unlink", "rmdir")
_WAIT_SECONDS = 30
_EXCHANGE_TIMEOUT = timedelta(seconds=10)


@dataclass(frozen=True)
class Point:
    """The `index`-th call (from 0) and what befalls it; `half` is a write of which half is done."""

    index: int
    when: Literal["before", "half", "after"]

    def __str__(self) -> str:
        return f"{self.when}-{self.index}"


def points(calls: Sequence[str]) -> list[Point]:
    """Every distinct moment between and inside these calls (after one call is before the next)."""
    found = []
    for index, name in enumerate(calls):
        found.append(Point(index, "before"))
        if name == "write":
            found.append(Point(index, "half"))
    return [*found, Point(len(calls) - 1, "after")]


def record(action: Callable[[], Any]) -> list[str]:
    """Do `action` here and return the names of its calls."""
    calls: list[str] = []
    with _intercepted(lambda name, call: (calls.append(name), call())[1]):
        action()
    return calls


@contextlib.contextmanager
def failing(index: int, number: int, names: Sequence[str] = CALLS) -> Iterator[None]:
    """Make the `index`-th call among `names` and all later ones to them raise OSError(number), as a full disk does."""
    seen = 0

    def step(name: str, call: Callable[[], Any]) -> Any:
        nonlocal seen
        if name in names:
            seen += 1
            if seen > index:
                raise OSError(number, os.strerror(number))
        return call()

    with _intercepted(step):
        yield


def killed(action: Callable[[], Any], point: Point) -> bool:
    """Do `action` in a forked process that is killed at `point`; False if it ended before it got there."""
    return wait(fork(lambda: _run_until(action, point))) == -signal.SIGKILL


def fork_ranks(actions: Sequence[Callable[[], Any]]) -> list[int]:
    """Do one action on each rank of a gloo group of forked processes; exit codes (negative: signal) in rank order."""
    with tempfile.TemporaryDirectory() as folder:

        def rank(number: int) -> None:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{Path(folder, 'store')}",
                rank=number,
                world_size=len(actions),
                timeout=_EXCHANGE_TIMEOUT,  # gloo may miss that a connection broke just as it came to wait
            )
            actions[number]()
            os._exit(0)  # the peers may be gone: no orderly end

        processes = [fork(lambda number=number: rank(number)) for number in range(len(actions))]
        return [wait(process) for process in processes]


def until(action: Callable[[], Any], point: Point) -> Callable[[], Any]:
    """`action`, killed at `point`."""
    return lambda: _run_until(action, point)


def fork(action: Callable[[], Any]) -> int:
    """Process id of a child that does `action` and exits with 0, or 1 where it raises (the traceback is printed)."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's thread pool is not in this process
        faulthandler.dump_traceback_later(_WAIT_SECONDS, exit=True)  # from its own thread: a hang in C++ ends too
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """Exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _run_until(action: Callable[[], Any], point: Point) -> None:
    seen = -1

    def step(name: str, call: Callable[..., Any]) -> Any:
        nonlocal seen
        seen += 1
        if seen != point.index:
            return call()
        if point.when == "half":
            call(half=True)
        elif point.when == "after":
            call()
        os.kill(os.getpid(), signal.SIGKILL)

    with _intercepted(step):
        action()


@contextlib.contextmanager
def _intercepted(step: Callable[[str, Callable[..., Any]], Any]) -> Iterator[None]:
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            def act(half: bool = False) -> Any:
                if half:
                    return original(args[0], args[1][: len(args[1]) // 2])
                return original(*args, **options)

            return step(name, act)

        return call

    for name, original in originals.items():
        setattr(os, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
