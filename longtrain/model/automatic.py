"""`auto` for `sequence_parallel.scan`, `.attend` and `.block_attention`: what serves the model's layers, and why."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

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
) -> tuple[SequenceParallelConfig, dict[str, Choice]]:
    """The configuration with the algorithms named, and every choice that was to be made, by key of the configuration.

    A collective call, with the same algorithms on all ranks of the job; one rank exchanges nothing, and needs none.
    `block_attention` remains `auto`, which every layer asks for itself; its choice is what this rank's first softmax
    layer gets for a sequence of one document.
    """
    group = mesh.sequence
    asked = [verb for verb in ("scan", "attend") if getattr(config, verb) == AUTO]
    if AUTO not in (config.scan, config.attend, config.block_attention):
        return config, {}
    demand = demand_of(model, batch, group.size, device, autocast)
    choices: dict[str, Choice] = {}
    if group.size > 1 and asked:
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
    if config.block_attention == AUTO and demand.attends:
        choices["block_attention"] = Choice(_attention_kernel(demand.attends[0], device))
    return chosen, {f"sequence_parallel.{key}": choice for key, choice in choices.items()}


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
    q, k, v = _operands(shape, length, device)
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


def _attention_kernel(shape: AttendShape, device: torch.device) -> str:
    """The name of what `block_attention=auto` is for sequences of one document."""
    attention = BlockAttention(1.0)
    return attention.choose(*_operands(shape, 2, device), Tokens(((0, 2),), ((0,),))).name


def _operands(shape: AttendShape, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros: queries, keys and values of one sequence."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[shape.itemsize]
    sizes = ((shape.heads, shape.key), (shape.key_heads, shape.key), (shape.key_heads, shape.value))
    q, k, v = (torch.zeros(1, length, heads, width, device=device, dtype=dtype) for heads, width in sizes)
    return q, k, v
