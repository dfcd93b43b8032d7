"""Runs a function on several ranks: real processes joined by gloo, one torch thread each.

    def sums() -> float:                                   # module level: the processes import it by name
        value = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(value)
        return value.item()

    assert run_ranks(sums, 3) == [3.0, 3.0, 3.0]           # processes of its own
    assert rank_pool(3).run(sums) == [3.0, 3.0, 3.0]       # fixture: processes shared by the whole session

Starting a process costs seconds (`import torch`), so most tests use the pool. Arguments and results are pickled:
tensors travel by value. Before each case the process seeds torch with 0 and restores the default dtype.
A rank that raises, dies or hangs ends the case: its error is raised here, every process is killed, and the pool starts
fresh ones for the next case.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from tests.harness import worker

START_TIMEOUT_SECONDS = 180  # `import torch` in four processes on two busy cores
CASE_TIMEOUT_SECONDS = 60
_BLAME_SECONDS = 0.5  # between a process's death and the moment this process hears of it


class RankDied(RuntimeError):
    """A process ended in the middle of a case; says which rank and how."""


class RankTimeout(RuntimeError):
    """Not every rank finished in time; says which ones, with the stacks of all their threads."""


class RankTraceback(Exception):
    """Cause of an error raised on a rank: the traceback as that process printed it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class RankPool:
    """`world_size` processes that stay alive from case to case, with their process group.

    `process_group=False` leaves torch.distributed uninitialised and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT instead, for code that initialises it itself.
    """

    def __init__(self, world_size: int, *, process_group: bool = True) -> None:
        self.world_size = world_size
        self._process_group = process_group
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CASE_TIMEOUT_SECONDS) -> list[Any]:
        """Call `function(*args)` on every rank and return the results in rank order.

        `function` is a module-level function; it asks torch.distributed for its rank. Raises the first failing rank's
        own error, RankDied, or RankTimeout after `timeout` seconds (the start of the processes not counted).
        """
        case = pickle.dumps((function, args))
        name = f"{function.__module__}.{function.__qualname__}"
        try:
            if not self._processes:
                self._start()
            for connection in self._connections:
                connection.send_bytes(pickle.dumps((sys.path, case)))
            return self._collect(name, time.monotonic() + timeout, timeout)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End all processes at once; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        context = multiprocessing.get_context("spawn")
        port = _free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            settings = worker.Settings(rank, self.world_size, self._folder.name, port, self._process_group)
            process = context.Process(target=worker.main, args=(settings, theirs), daemon=True, name=f"rank-{rank}")
            process.start()
            theirs.close()  # so that the process's death is an end of file here
            self._processes.append(process)
            self._connections.append(ours)
        self._collect("start of the ranks", time.monotonic() + START_TIMEOUT_SECONDS, START_TIMEOUT_SECONDS)

    def _collect(self, name: str, deadline: float, timeout: float) -> list[Any]:
        """One reply of every rank, in rank order."""
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = {c: rank for rank, c in enumerate(self._connections) if rank not in results}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankTimeout(self._describe_hang(name, timeout, sorted(waiting.values())))
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]  # wait() is typed for sockets and handles too
                try:
                    succeeded, payload = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    self._raise_death(name, rank)
                if not succeeded:
                    self._raise_failure(name, rank, *payload)
                results[rank] = payload
        return [results[rank] for rank in range(self.world_size)]

    def _raise_failure(self, name: str, rank: int, error: BaseException, traceback: str) -> None:
        # A rank whose peer died often reports a broken connection before the death itself is noticed.
        ranks = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        for sentinel in wait(list(ranks), _BLAME_SECONDS):
            self._raise_death(name, ranks[sentinel])  # type: ignore[index]
        error.add_note(f"raised on rank {rank} of {self.world_size} in {name}")
        raise error from RankTraceback(traceback)

    def _raise_death(self, name: str, rank: int) -> None:
        self._processes[rank].join(_BLAME_SECONDS)
        cause = _describe_exit(self._processes[rank].exitcode)
        raise RankDied(f"{name}: rank {rank} of {self.world_size} ended without a result ({cause})")

    def _describe_hang(self, name: str, timeout: float, ranks: list[int]) -> str:
        assert self._folder is not None
        stacks = []
        for rank in ranks:
            pid = self._processes[rank].pid
            if pid is not None and self._processes[rank].is_alive():
                os.kill(pid, signal.SIGUSR1)
        time.sleep(_BLAME_SECONDS)
        for rank in ranks:
            dump = Path(self._folder.name, f"rank-{rank}.stacks")
            text = dump.read_text() if dump.exists() else ""
            stacks.append(f"--- rank {rank}\n{text or 'no stack: it never started'}")
        listed = ", ".join(map(str, ranks))
        return f"{name}: no result after {timeout:g} s from ranks {listed} of {self.world_size}\n" + "\n".join(stacks)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = CASE_TIMEOUT_SECONDS,
    process_group: bool = True,
) -> list[Any]:
    """`RankPool.run` in processes that are started for this call and ended after it."""
    with RankPool(world_size, process_group=process_group) as pool:
        return pool.run(function, *args, timeout=timeout)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "its pipe is closed"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
