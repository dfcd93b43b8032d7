"""`sequence_parallel.scan=auto` and `attend=auto`: names what the model's layers are served by, and says why."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from longtrain.comm.group import Group
from longtrain.comm.links import measure_links
from longtrain.comm.mesh import Mesh
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.model import Model
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.choice import AUTO, Choice, Demand, DemandingSequence, choose
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.sequence_parallel.cost import BACKWARD, AttendShape, Machine
from longtrain.sequence_parallel.handle import Algorithms
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.backend import Backend
from longtrain_kernels.block_attention import BlockAttention, Tokens

_TIMED_TOKENS = {"cuda": 4096, "cpu": 256}
_REPEATS = 5


@dataclass(frozen=True)
class Batch:
    """The sequences of a step on one group of ranks."""

    sequences: int
    length: int


def name_algorithms(
    config: SequenceParallelConfig,
    model: Model,
    batch: Batch,
    mesh: Mesh,
    device: torch.device,
    autocast: AbstractContextManager[object],
    registry: Registry,
) -> tuple[SequenceParallelConfig, tuple[str, ...]]:
    """The configuration with every `auto` replaced, and a line for each choice.

    A collective call, with the same result on all ranks of the job. One rank exchanges nothing, and measures nothing.
    """
    group = mesh.sequence
    asked = [verb for verb in ("scan", "attend") if getattr(config, verb) == AUTO]
    if not asked:
        return config, ()
    demand = Demand([], []) if group.size == 1 else demand_of(model, batch, group.size, device, autocast)
    choices: dict[str, Choice] = {}
    if group.size > 1:
        machine = Machine(
            ranks=group.size,
            node_size=group.node_size,
            links=measure_links(group, device, mesh.world),
            attention_flops=_attention_flops(demand.attends, config.block_attention, mesh.world, device),
            zigzag=config.layout == "zigzag",
        )
        if "scan" in asked and demand.scans:
            choices["scan"] = choose("scan", demand.scans, machine, registry)
        if "attend" in asked and demand.attends:
            choices["attend"] = choose("attend", demand.attends, machine, registry)
    first = {verb: registry.names(f"sequence_parallel.{verb}")[0] for verb in asked}  # where it does not matter
    names = first | {verb: choice.name for verb, choice in choices.items()}
    chosen = replace(config, scan=names.get("scan", config.scan), attend=names.get("attend", config.attend))
    return chosen, tuple(f"sequence_parallel.{verb}={choice}" for verb, choice in choices.items())


def demand_of(
    model: Model, batch: Batch, ranks: int, device: torch.device, autocast: AbstractContextManager[object]
) -> Demand:
    """What the layers ask for, seen by running them on two tokens."""
    shard = Shard(SequenceLayout(2, 1, ((0,),)), Group(0, 1), device)
    sequence = DemandingSequence(
        shard, Algorithms(scan=local.scan, attend=local.attend), backend=Backend.CHUNKED, batch=batch.sequences,
        tokens=-(-batch.length // ranks),
    )  # fmt: skip
    with torch.no_grad(), autocast:
        model(torch.zeros(1, 2, dtype=torch.int64, device=device), sequence)
    return sequence.demand


def _attention_flops(shapes: list[AttendShape], kernel: str, everyone: Group, device: torch.device) -> float:
    """A second, of forward and backward of a causal square; the slowest rank's."""
    if not shapes:
        return 1.0
    shape, length = shapes[0], _TIMED_TOKENS[device.type]
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.itemsize]
    q, k, v = (
        torch.zeros(1, length, heads, width, device=device, dtype=dtype)
        for heads, width in ((shape.heads, shape.key), (shape.key_heads, shape.key), (shape.key_heads, shape.value))
    )
    tokens, attention = Tokens(((0, length),), ((0,),)), BlockAttention(1.0, kernel=kernel)
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        output, lse = attention.forward(q, k, v, tokens, tokens)
        attention.backward(output, q, k, v, output, lse, tokens, tokens)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    operations = (1 + BACKWARD) * 2 * (shape.key + shape.value) * shape.heads * length**2 / 2
    rate = torch.tensor([operations / min(times[1:])], dtype=torch.float64, device=device)
    return min(float(other) for other in everyone.all_gather(rate))
