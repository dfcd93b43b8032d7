"""The sequence cut over ranks, and over time, equals the sequence on one rank: outputs and every gradient, in float64.

Every rank computes the one-rank result itself and compares; gradients of parameters are summed over ranks first, as an
engine does. The largest error is returned, relative to the largest entry of the exact tensor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtrain.comm.group import Group
from longtrain.comm.mesh import build_mesh
from longtrain.core.contracts import Recurrence
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.diagonal_scan import DiagonalScan
from tests.harness.documents import awkward_starts
from tests.harness.mixers import ATTENTION, MIXERS, RECURRENT
from tests.harness.ranks import RankPool

TOLERANCE = 1e-10  # the project's bound; errors seen are near 1e-14
VOCABULARY = 11
HYBRID = ("simple_gla", "softmax", "gated_delta", "sliding_window")
PATTERNS = [*((name,) for name in ATTENTION), HYBRID]
ATTENDS = ("ring", "all_gather")


LOCAL = Algorithms(scan=local.scan, attend=local.attend)


def algorithms(scan: str, attend: str) -> Algorithms:
    registry = Registry()
    return Algorithms(
        scan=registry.load("sequence_parallel.scan", scan).scan,
        attend=registry.load("sequence_parallel.attend", attend).attend,
    )


def run_in_chunks(
    forward: Callable[[slice, ShardedSequence], Tensor],
    layout: SequenceLayout,
    group: Group,
    chosen: Algorithms,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Apply `forward` chunk after chunk with the carries handed on; outputs [B, L, D] and the tokens they belong to."""
    outputs, index, carries, at = [], [], None, 0
    for chunk in range(layout.num_chunks):
        shard = Shard(layout, group, torch.device(device), chunk)
        handle = ShardedSequence(shard, chosen, carries)
        begin, end = shard.span
        outputs.append(forward(slice(begin, end), handle))
        index.append(shard.tokens.index)
        carries, at = handle.carries_out, at + end - begin
    return torch.cat(outputs, dim=1), torch.cat(index)


def relative_error(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().item() if want.numel() else 0.0
    return (got - want).abs().max().item() / (scale + 1e-30) if got.numel() else 0.0


def model_error(
    pattern: tuple[str, ...],
    length: int,
    packed: bool,
    scan: str,
    attend: str,
    chunk_tokens: int | None,
    device: str = "cpu",
) -> float:
    """Largest relative error of the outputs and parameter gradients of a model on this rank."""
    config = ModelConfig(
        width=12,
        num_layers=len(pattern),
        pattern=pattern,
        mlp_width=16,
        tie_embeddings=False,
        norm_epsilon=1e-6,
        initializer_std=0.5,
    )
    model = build_model(config, MIXERS, VOCABULARY, seed=3, registry=Registry()).double().to(device)
    mesh = build_mesh(torch.distributed.get_world_size())
    edges = tuple(SequenceLayout(length, mesh.sequence.size, ((0,),)).span(r, 0)[0] for r in range(mesh.sequence.size))
    starts = awkward_starts(length, edges) if packed and length > 2 else ((0,), (0,))
    torch.manual_seed(length)
    tokens = torch.randint(VOCABULARY, (2, length)).to(device)
    cotangent = torch.randn(2, length, 12, dtype=torch.float64).to(device)

    def forward(part: slice, handle: ShardedSequence) -> Tensor:
        return model(tokens[:, part], handle)

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    alone = SequenceLayout(length, 1, starts)
    exact, _ = run_in_chunks(forward, alone, Group(0, 1), LOCAL, device)
    exact_grads = gradients((exact * cotangent).sum())
    layout = SequenceLayout(length, mesh.sequence.size, starts, chunk_tokens)
    output, index = run_in_chunks(forward, layout, mesh.sequence, algorithms(scan, attend), device)
    grads = gradients((output * cotangent[:, index]).sum())
    errors = [relative_error(output, exact[:, index])]
    errors += [relative_error(mesh.sequence.all_reduce(g), e) for g, e in zip(grads, exact_grads, strict=True)]
    return max(errors)


def model_errors(pattern: tuple[str, ...], lengths: tuple[int, ...], *arguments: Any) -> list[float]:
    """`model_error` at several lengths."""
    return [model_error(pattern, length, *arguments) for length in lengths]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids="-".join)
def test_ranks_equal_one_rank(
    rank_pool: Callable[[int], RankPool], pattern: tuple[str, ...], packed: bool, attend: str, world_size: int
) -> None:
    # 2 and 3 tokens on 4 ranks: empty shards; 9: shards shorter than a convolution's 3 rows; 67: prime
    lengths = (2, 3, 9, 67)
    errors = rank_pool(world_size).run(model_errors, pattern, lengths, packed, "all_gather", attend, None)
    assert max(map(max, errors)) < TOLERANCE, f"errors by rank, at lengths {lengths}: {errors}"


@pytest.mark.parametrize("name", RECURRENT)
def test_every_recurrent_mixer_crosses_ranks(rank_pool: Callable[[int], RankPool], name: str) -> None:
    """In the middle of three layers, so that those which differ by depth do; with empty shards and with documents."""
    pattern, lengths = ("simple_gla", name, "simple_gla"), (3, 41)
    errors = rank_pool(4).run(model_errors, pattern, lengths, True, "all_gather", "ring", None)
    assert max(map(max, errors)) < TOLERANCE, f"errors by rank, at lengths {lengths}: {errors}"


@pytest.mark.parametrize("name", RECURRENT)
def test_every_recurrent_mixer_crosses_chunks(rank_pool: Callable[[int], RankPool], name: str) -> None:
    errors = rank_pool(2).run(model_error, (name,), 29, True, "all_gather", "ring", 11)
    assert max(errors) < TOLERANCE, f"errors by rank {errors}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("chunk_tokens", [2, 5, 32])
@pytest.mark.parametrize("attend", ATTENDS)
def test_chunks_of_time_equal_the_whole(
    rank_pool: Callable[[int], RankPool], attend: str, chunk_tokens: int, world_size: int
) -> None:
    """Carries between chunks, on one rank and composed with ranks: chunks of 2 tokens leave ranks empty."""
    errors = rank_pool(world_size).run(model_error, HYBRID, 37, True, "all_gather", attend, chunk_tokens)
    assert max(errors) < TOLERANCE, f"errors by rank {errors}"


def op_error(length: int, packed: bool) -> float:
    """A vector decay through the scan alone; gradients of every input on this rank."""
    mesh = build_mesh(torch.distributed.get_world_size())
    torch.manual_seed(length)
    q, k, g = (torch.randn(2, length, 3, 4, dtype=torch.float64) for _ in range(3))
    whole = [q, k, torch.randn(2, length, 3, 5, dtype=torch.float64), -g.exp()]
    cotangent = torch.randn(2, length, 3, 5, dtype=torch.float64)
    starts = awkward_starts(length, (length // 2,)) if packed else ((0,), (0,))

    def run(group: Group, chosen: Algorithms) -> tuple[Tensor, list[Tensor], slice]:
        shard = Shard(SequenceLayout(length, group.size, starts), group, torch.device("cpu"))
        part = slice(*shard.span)
        leaves = [t[:, part].clone().requires_grad_() for t in whole]
        op: Recurrence = DiagonalScan(*leaves)
        output = ShardedSequence(shard, chosen).scan(op)
        return output, list(torch.autograd.grad(output, leaves, cotangent[:, part])), part

    exact, exact_grads, _ = run(Group(0, 1), LOCAL)
    output, grads, part = run(mesh.sequence, algorithms("all_gather", "ring"))
    pairs: list[tuple[Any, Any]] = [(output, exact), *zip(grads, exact_grads, strict=True)]
    return max(relative_error(got, want[:, part]) for got, want in pairs)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_vector_decay_crosses_ranks(rank_pool: Callable[[int], RankPool], packed: bool, world_size: int) -> None:
    errors = rank_pool(world_size).run(op_error, 45, packed)
    assert max(errors) < TOLERANCE, f"errors by rank {errors}"


def isolation(attend: str) -> bool:
    """Whether changing the first document leaves the outputs and gradients of the second bit-identical."""
    mesh = build_mesh(torch.distributed.get_world_size())
    length, second = 41, 17
    config = ModelConfig(12, 4, HYBRID, 16, False, 1e-6, 0.5)
    model = build_model(config, MIXERS, VOCABULARY, seed=3, registry=Registry())
    layout = SequenceLayout(length, mesh.sequence.size, ((0, second),))
    shard = Shard(layout, mesh.sequence, torch.device("cpu"))
    begin, end = shard.span
    torch.manual_seed(0)
    x, other = torch.randn(1, length, 12), torch.randn(1, length, 12)
    other[:, second:] = x[:, second:]
    results = []
    for inputs in (x, other):
        part = inputs[:, begin:end].clone().requires_grad_()
        handle = ShardedSequence(shard, algorithms("all_gather", attend))
        output: Any = part
        for block in model.blocks:
            assert isinstance(block, nn.Module)
            output = block(output, handle)
        (grad,) = torch.autograd.grad(output.square().sum(), part)
        keep = slice(max(0, second - begin), end - begin)
        results.append((output[:, keep].detach(), grad[:, keep]))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("attend", ATTENDS)
def test_a_document_never_sees_another(rank_pool: Callable[[int], RankPool], attend: str) -> None:
    assert all(rank_pool(4).run(isolation, attend))
