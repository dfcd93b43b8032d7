"""Stand-ins for the training that workers of the tests run: small, but with real gloo ranks.

A target is `function(tree, plugins, listener) -> Outcome`. It keeps a committed step in a file of the run directory,
as a training would keep a checkpoint.
"""

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from longtrain.comm.journal import Journal
from longtrain.core.errors import CorruptData
from tests.distributed.cluster_events import Committed, Outcome


def environment(tree, plugins, listener):
    """Write what this rank sees of its environment."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    seen = {name: os.environ[name] for name in names} | {
        "threads": torch.get_num_threads(),
        "directory": os.getcwd(),
        "plugins": [str(plugin) for plugin in plugins],
    }
    Path(tree["directory"], f"rank-{seen['RANK']}.json").write_text(json.dumps(seen))
    distributed.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=30))
    total = torch.ones(1)
    distributed.all_reduce(total)
    return Outcome(int(total), 0, False)


def train(tree, plugins, listener):
    """Sum over the ranks once a step; commit every second step; die, stop or raise as the tree says, once."""
    directory, rank = Path(tree["directory"]), int(os.environ["RANK"])
    listener.phase("start", 0)
    distributed.init_process_group("gloo", init_method="env://", timeout=timedelta(seconds=30))
    committed = directory / "committed"
    first = int(committed.read_text()) if committed.exists() else 0
    distributed.barrier()
    journal = Journal()
    journal.add_group("the world")
    listener.watch(journal)
    if rank == 0:
        listener.event(Committed(first))
    for step in range(first, tree["steps"]):
        listener.phase("step", step)
        (directory / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(tree.get("step_seconds", 0.02))
        _misbehave(tree, directory, rank, step)
        total = torch.tensor([rank + 1.0, float(listener.stop_requested())])
        with journal.inside("all_reduce", "the world"):
            distributed.all_reduce(total)
        if rank == 0:
            with (directory / "ledger").open("a") as ledger:
                ledger.write(f"{step} {int(total[0])}\n")
        if step % 2 == 1 or total[1] > 0:
            distributed.barrier()
            if rank == 0:
                committed.write_text(str(step + 1))
                listener.event(Committed(step + 1))
        if total[1] > 0:
            return Outcome(step + 1, step + 1, True)
    listener.phase("done", tree["steps"])
    return Outcome(tree["steps"], tree["steps"], False)


def _misbehave(tree, directory, rank, step):
    fault = tree.get("fault")
    if fault is None or rank != fault["rank"] or step != fault["step"]:
        return
    marker = directory / "fault-happened"
    if marker.exists():
        return
    marker.write_text(str(time.time()))
    match fault["kind"]:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "loop":
            while True:
                pass
        case "raise":
            raise ValueError("three is not a number of tokens")
        case "refuse":
            raise CorruptData("tokens-00003.bin does not match its digest; run `longtrain prepare` again")
