"""What one rank's process does: join the process group, then answer cases until its pipe closes."""

import faulthandler
import os
import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Longer than any case: the pool's own timeout names the case, gloo's would not. It bounds orphans.
GLOO_TIMEOUT = timedelta(seconds=600)


@dataclass(frozen=True)
class Settings:
    """One rank's place. `folder` is shared by the ranks of a pool: file store and stack dumps."""

    rank: int
    world_size: int
    folder: str
    master_port: int
    process_group: bool


def main(settings: Settings, connection: Connection) -> None:
    """Entry point of the process."""
    with Path(settings.folder, f"rank-{settings.rank}.stacks").open("w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        _reply(connection, _join, settings)
        while True:
            try:
                path, case = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            sys.path[:] = path
            _reply(connection, _call, case)


def _join(settings: Settings) -> None:
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host name need not resolve on a test machine
    torch.set_num_threads(1)
    if settings.process_group:
        store = dist.FileStore(str(Path(settings.folder, "store")), settings.world_size)
        dist.init_process_group(
            "gloo", store=store, rank=settings.rank, world_size=settings.world_size, timeout=GLOO_TIMEOUT
        )
    else:
        os.environ.update(
            RANK=str(settings.rank),
            LOCAL_RANK=str(settings.rank),
            WORLD_SIZE=str(settings.world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(settings.master_port),
        )


def _call(case: bytes) -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    function, args = pickle.loads(case)
    return function(*args)


def _reply(connection: Connection, function: Any, *args: Any) -> None:
    try:
        message = pickle.dumps((True, function(*args)))
    except BaseException as error:
        message = pickle.dumps((False, (_portable(error), traceback.format_exc())))
    connection.send_bytes(message)


def _portable(error: BaseException) -> BaseException:
    """The error itself where it survives pickling, else a RuntimeError with its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__qualname__}: {error}")
    return error
