"""What each rank of `longtrain bench stream` does: compare modes with the gate's, then measure those that are right.

Every rank walks the same list. Where rank 0 works alone the others wait for it at their store, not in a collective.
"""

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from longtrain.bench._ranks import joined_rank
from longtrain.bench._report import one_line
from longtrain.bench._stream_gate import Gate, Short, Verdict
from longtrain.bench._stream_modes import Mode
from longtrain.bench._stream_peers import peers
from longtrain.bench._stream_plan import Plan, share
from longtrain.bench._stream_step import Workload, device_memory, free, is_out_of_memory, make_workload, measure
from longtrain.bench._world import World
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout, mean_context

Row = dict[str, Any]


def main(rank: int, plan: Plan, port: int, connection: Connection) -> None:
    """Entry point of a rank's process."""
    with joined_rank(rank, plan, port, connection) as (world, send):
        for kind, content in events(plan, world):
            send(kind, content)


def events(plan: Plan, world: World) -> Generator[tuple[str, Any], None, None]:
    """What is found, as soon as it is, for rank 0 to tell; a collective call.

    `held`: what the model holds of a device. `refused`: why the gate refuses. `verdict`: of a mode. `right`: the names
    of the modes and peers that are measured. `row`: see `_row`.
    """
    sizes = plan.sizes
    alone = make_workload(plan.job, sizes.vocabulary, sizes.precision, plan.seed, world.device)
    alone = replace(alone, document_tokens=plan.document_tokens)
    cut = replace(
        plan.job.config.sequence_parallel, size=plan.ranks, scan=plan.scan, attend=plan.attend, layout=plan.layout
    )
    together = alone.among(world.group, cut, plan.job.registry)
    memory = world.gather(device_memory(world.device))
    yield (
        "held",
        {
            "parameters": sum(p.numel() for p in alone.model.parameters()),
            "parameter_bytes": alone.parameter_bytes,
            "gradient_bytes": alone.gradient_bytes,
            "device_bytes": None if None in memory else min(memory),
        },
    )
    try:
        gate = Gate(alone, world, Short(plan.gate_mode, plan.gate_tokens, sizes.chunk_tokens, plan.logit_tokens))
    except Refused as refusal:  # on all ranks
        yield "refused", str(refusal)
        return
    yield "verdict", asdict(gate.own)
    right: list[tuple[Mode, Workload]] = []
    for mode, workload in (*((mode, together) for mode in plan.modes), *peers(plan, alone)):
        if isinstance(workload, str):
            verdict: Verdict | None = Verdict(mode.name, plan.gate_mode.name, 1, "error", workload)
        else:
            verdict = gate.verdict(workload, mode)
        if verdict is not None:
            yield "verdict", asdict(verdict)
        if not isinstance(workload, str) and (verdict or gate.own).status == "ok":
            right.append((mode, workload))
    del gate
    free()
    yield "right", [mode.name for mode, _ in right]
    for mode, workload in right:
        for row in _rows(plan, world, alone, workload, mode):
            yield "row", row


def _rows(plan: Plan, world: World, alone: Workload, together: Workload, mode: Mode) -> Iterator[Row]:
    """For each length, up to the first that fails: of one rank with its share, where there are several, and of all."""
    ranks, chunk = plan.ranks, plan.sizes.chunk_tokens
    for tokens in plan.sizes.tokens:
        if ranks > 1:
            single: Row = {}
            if world.group.rank == 0:
                own = World.alone(world.device)
                single = _row(plan, own, alone, mode, share(tokens, ranks), share(chunk, ranks))
            single = world.share(single)
            yield single
            if single["status"] != "ok":
                return
        row = _row(plan, world, together, mode, tokens, chunk)
        yield row
        if row["status"] != "ok":
            return


def _row(plan: Plan, world: World, workload: Workload, mode: Mode, tokens: int, chunk_tokens: int) -> Row:
    """One measurement, by all ranks of the world. What ends one of several ranks ends it with an exception."""
    ranks = world.group.size
    row: Row = {"mode": mode.name, "tokens": tokens, "ranks": ranks, "status": "ok", "detail": ""}
    try:
        step = partial(workload.gradients, tokens, mode.config(tokens, chunk_tokens, plan.logit_tokens))
        figures = measure(step, workload, world, plan.repeats, plan.seconds)
    except Exception as error:  # whatever ends a mode leaves the others their rows
        if ranks > 1:  # but others wait for this rank in a collective
            raise
        with suppress(RuntimeError):  # of a device that is lost
            world.synchronize()  # copies may be under way, in memory that goes with the traceback
        row |= {"status": "out of memory" if is_out_of_memory(error) else "error", "detail": one_line(error)}
    finally:
        workload.clear()
    free()  # here, where no traceback keeps the step's tensors any more
    if row["status"] != "ok":
        return row
    context = mean_context([SequenceLayout(tokens, 1, (workload.starts(tokens),))])
    flops = workload.model.flops_per_token(context) * tokens
    held = workload.parameter_bytes + workload.gradient_bytes
    return (
        row
        | asdict(figures)
        | {
            "tokens_per_second": tokens / figures.seconds,
            "model_tflops": flops / figures.seconds / ranks / 1e12,
            "rest_bytes": None if figures.peak_bytes is None else figures.peak_bytes - held,
        }
    )
