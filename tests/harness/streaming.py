"""Gradients of a streamed step against plain backpropagation on one rank, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.contracts import Objective
from longtrain.core.kinds import LayoutKind
from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.core.targets import Targets
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.model.model import Model
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, Handles, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.stream import Stream
from longtrain.streaming.waiting import Watch
from tests.harness.documents import awkward_starts
from tests.harness.mixers import MIXERS
from tests.harness.objectives import OBJECTIVES, make_targets, plain_figures, together

TOLERANCE = 1e-10  # the project's bound; errors seen are near 1e-14
HYBRID = ("simple_gla", "softmax", "gated_delta", "sliding_window", "softmax")
VOCABULARY = 11
SEQUENCES = 3
LOCAL = Algorithms(scan=local.scan, attend=local.attend)


@dataclass(frozen=True)
class StreamCase:
    """A model, a batch of packed sequences with masked labels, and how their backpropagation is cut."""

    pattern: tuple[str, ...] = HYBRID
    block_layers: int | Literal["recurrent", "all"] = "all"
    chunk_tokens: int | None = 5
    length: int = 29
    packed: bool | Literal["short"] = True
    """With awkward documents in one of the sequences, or with short ones in all, which no chunk sees for long."""
    tied: bool = False
    frozen: tuple[str, ...] = ()
    """Beginnings of names of parameters."""
    micro_batch_size: int = SEQUENCES
    scan: str = "all_gather"
    attend: str = "ring"
    layout: LayoutKind = "contiguous"
    offload: Literal["none", "host"] = "none"
    objective: str = "next_token"
    """See `tests.harness.objectives`."""


@dataclass(frozen=True)
class Problem:
    """What is computed, and what comes out of plain backpropagation."""

    objective: Objective
    model: Model
    tokens: Tensor
    rows: list[Targets]
    """Of each sequence alone."""
    count: Tensor
    starts: tuple[tuple[int, ...], ...]
    figures: Tensor
    """Sums of the loss and of the objective's metrics."""
    grads: dict[str, Tensor]


@cache  # cuts of the same share it
def problem(
    pattern: tuple[str, ...],
    length: int,
    packed: bool | Literal["short"],
    tied: bool,
    frozen: tuple[str, ...],
    objective: str,
    device: str,
) -> Problem:
    """Plain backpropagation of the whole batch."""
    config = ModelConfig(12, len(pattern), pattern, 16, tied, 1e-6, 0.5)
    model = build_model(config, MIXERS, VOCABULARY, seed=3, registry=Registry()).double().to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    torch.manual_seed(length)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, length)).to(device)
    labels = torch.randint(VOCABULARY, (SEQUENCES, length)).to(device)
    labels[0, length // 3 : length // 2], labels[-1, -1] = IGNORED_LABEL, IGNORED_LABEL
    starts: tuple[tuple[int, ...], ...] = ((0,),) * SEQUENCES
    if packed == "short":
        starts = tuple(tuple(range(0, length, size)) for size in (4, 7, 9))
    elif packed:
        starts = *awkward_starts(length, (length // 2,)), (0,)
    shard = Shard(SequenceLayout(length, 1, starts), Group(0, 1), torch.device(device))
    rows = make_targets(objective, labels)
    logits = model.head(model(tokens, ShardedSequence(shard, LOCAL)))
    figures, count = plain_figures(objective, logits, together(rows))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(figures[0] / count, list(trained.values()), materialize_grads=True)
    found = dict(zip(trained, grads, strict=True))
    return Problem(OBJECTIVES[objective], model, tokens, rows, count, starts, figures.detach(), found)


def problem_of(case: StreamCase, device: str = "cpu") -> Problem:
    """Shared by cases that cut the same."""
    return problem(case.pattern, case.length, case.packed, case.tied, case.frozen, case.objective, device)


def stream_error(case: StreamCase, group: Group, chosen: Algorithms = LOCAL, device: str = "cpu") -> float:
    """Largest error, relative to the largest entry of the exact tensor, of the loss, of metrics and of every gradient.

    Losses and gradients are summed over ranks, as a loop and an engine do. Every parameter that is not frozen must be
    given its gradient once, the others never.
    """
    exact = problem_of(case, device)
    with count_deliveries(exact) as deliveries:
        found = stream_gradients(case, exact, group, chosen, torch.device(device))
    assert deliveries == dict.fromkeys(exact.grads, 1), f"{case}: {deliveries}"
    figures = group.all_reduce(found[0].clone()) - exact.figures
    errors = (figures.abs() / (exact.figures.abs() + 1e-30)).tolist()
    # One sum over ranks for all parameters: most of a case's time would be their exchanges.
    assert found[1].keys() == exact.grads.keys()
    parts = group.all_reduce(torch.cat([found[1][name].flatten() for name in exact.grads]))
    for want, got in zip(exact.grads.values(), parts.split([g.numel() for g in exact.grads.values()]), strict=True):
        errors.append(((got.view_as(want) - want).abs().max() / (want.abs().max() + 1e-30)).item())
    return max(errors)


def stream_gradients(
    case: StreamCase,
    exact: Problem,
    group: Group,
    chosen: Algorithms,
    device: torch.device,
    watch: Watch | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's sums of losses and metrics, and the gradients that it has."""
    config = StreamConfig(case.block_layers, case.chunk_tokens, logit_tokens=7, offload=case.offload)
    stream = Stream(exact.model, Handles(chosen, group, device), exact.objective, config, nullcontext, watch=watch)
    losses = []
    for first in range(0, SEQUENCES, case.micro_batch_size):
        some = slice(first, first + case.micro_batch_size)
        layout = SequenceLayout(case.length, group.size, exact.starts[some], case.chunk_tokens, case.layout)
        index = torch.cat([shard.index for shard in stream_shards(layout, group, device)])
        targets = together(exact.rows[some])
        own = replace(
            targets,
            labels=targets.labels[:, index],
            columns={name: column[:, index] for name, column in targets.columns.items()},
        )
        losses.append(stream.backward(exact.tokens[some][:, index], own, layout, exact.count))
    stream.deliver()
    grads = {name: parameter.grad for name, parameter in exact.model.named_parameters()}
    exact.model.zero_grad(set_to_none=True)
    return torch.stack(losses).sum(0), {name: grad for name, grad in grads.items() if grad is not None}


def stream_shards(layout: SequenceLayout, group: Group, device: torch.device) -> list[Shard]:
    """Of all chunks."""
    return [Shard(layout, group, device, chunk) for chunk in range(layout.num_chunks)]


def log_prob_error(case: StreamCase, group: Group, chosen: Algorithms = LOCAL) -> float:
    """Largest error of the log-probabilities of this rank's labels, in nats."""
    exact, device = problem_of(case), torch.device("cpu")
    whole = Shard(SequenceLayout(case.length, 1, exact.starts), Group(0, 1), device)
    config = StreamConfig(case.block_layers, case.chunk_tokens, logit_tokens=7, offload=case.offload)
    stream = Stream(exact.model, Handles(chosen, group, device), exact.objective, config, nullcontext)
    layout = SequenceLayout(case.length, group.size, exact.starts, case.chunk_tokens, case.layout)
    index = torch.cat([shard.index for shard in stream_shards(layout, group, device)])
    labels = together(exact.rows).labels
    found = stream.log_probs(exact.tokens[:, index], labels[:, index], layout)
    with torch.no_grad():
        logits = exact.model.head(exact.model(exact.tokens, ShardedSequence(whole, LOCAL)))
    want = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    want = torch.where(labels == IGNORED_LABEL, 0, want)[:, index]
    assert found.shape == want.shape
    return (found - want).abs().max().item() if want.numel() else 0.0


@contextmanager
def count_deliveries(exact: Problem) -> Iterator[dict[str, int]]:
    """How often each parameter that is not frozen is given a gradient meanwhile."""
    counts = dict.fromkeys(exact.grads, 0)

    def count(name: str) -> None:
        counts[name] += 1

    hooks = [
        exact.model.get_parameter(name).register_post_accumulate_grad_hook(lambda _, name=name: count(name))  # type: ignore[misc]
        for name in counts
    ]
    yield counts
    for hook in hooks:
        hook.remove()
