"""The sequence cut over ranks equals the sequence on one rank: outputs and every gradient, in float64.

Every rank computes the one-rank result itself and compares; gradients of parameters are summed over ranks first, as an
engine does. The largest error is returned, relative to the largest entry of the exact tensor.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from longtrain.comm.group import Group
from longtrain.comm.mesh import build_mesh
from longtrain.core.contracts import Recurrence
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.build import build_model
from longtrain.model.config import ModelConfig
from longtrain.model.model import Model
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.attend.usp import neighbours
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.diagonal_scan import DiagonalScan
from tests.harness.documents import awkward_starts
from tests.harness.mixers import ATTENTION, MIXERS, RECURRENT
from tests.harness.ranks import RankPool

TOLERANCE = 1e-10  # the project's bound; errors seen are near 1e-14
VOCABULARY = 11
HYBRID = ("simple_gla", "softmax", "gated_delta", "sliding_window")
SCANS = Registry().names("sequence_parallel.scan")
ATTENDS = Registry().names("sequence_parallel.attend")
LAYOUTS: tuple[LayoutKind, ...] = get_args(LayoutKind)


@dataclass(frozen=True)
class Case:
    """A model and how its sequence is cut."""

    pattern: tuple[str, ...] = HYBRID
    length: int = 41
    packed: bool = True
    scan: str = "all_gather"
    attend: str = "ring"
    layout: LayoutKind = "contiguous"
    kernel: str = "auto"


LOCAL = Algorithms(scan=local.scan, attend=local.attend)


def algorithms(scan: str, attend: str, kernel: str = "auto") -> Algorithms:
    registry = Registry()
    return Algorithms(
        scan=registry.load("sequence_parallel.scan", scan).scan,
        attend=registry.load("sequence_parallel.attend", attend).attend,
        block_attention=kernel,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    scale = want.abs().max().item() if want.numel() else 0.0
    return (got - want).abs().max().item() / (scale + 1e-30) if got.numel() else 0.0


@dataclass(frozen=True)
class Exact:
    """A model on one rank: what its cut sequences are compared with."""

    model: Model
    tokens: Tensor
    cotangent: Tensor
    output: Tensor
    grads: list[Tensor]

    def forward(self, index: Tensor, handle: ShardedSequence) -> Tensor:
        return self.model(self.tokens[:, index], handle)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.model.parameters()), materialize_grads=True))


@cache  # algorithms and numbers of ranks share it
def exact(pattern: tuple[str, ...], length: int, starts: tuple[tuple[int, ...], ...], device: str) -> Exact:
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
    torch.manual_seed(length)
    tokens = torch.randint(VOCABULARY, (2, length)).to(device)
    cotangent = torch.randn(2, length, 12, dtype=torch.float64).to(device)
    alone = Exact(model, tokens, cotangent, cotangent, [])
    shard = Shard(SequenceLayout(length, 1, starts), Group(0, 1), torch.device(device))
    output = alone.forward(shard.index, ShardedSequence(shard, LOCAL))
    return replace(alone, output=output.detach(), grads=alone.gradients((output * cotangent).sum()))


def model_error(case: Case, device: str = "cpu") -> float:
    """Largest relative error of the outputs and parameter gradients of a model on this rank."""
    mesh = build_mesh(torch.distributed.get_world_size())
    edges = [span[0] for r in range(mesh.sequence.size) for span in layout_of(case, mesh.sequence.size).spans(r, 0)]
    starts = awkward_starts(case.length, tuple(edges)) if case.packed and case.length > 2 else ((0,), (0,))
    want = exact(case.pattern, case.length, starts, device)
    shard = Shard(layout_of(case, mesh.sequence.size, starts), mesh.sequence, torch.device(device))
    index = shard.index
    output = want.forward(index, ShardedSequence(shard, algorithms(case.scan, case.attend, case.kernel)))
    grads = want.gradients((output * want.cotangent[:, index]).sum())
    # One sum over ranks for all parameters: most of a case's time would be their exchanges.
    sums = mesh.sequence.all_reduce(torch.cat([g.flatten() for g in grads])).split([g.numel() for g in grads])
    errors = [relative_error(output, want.output[:, index])]
    errors += [relative_error(g.view_as(e), e) for g, e in zip(sums, want.grads, strict=True)]
    return max(errors)


def layout_of(case: Case, ranks: int, starts: tuple[tuple[int, ...], ...] = ((0,),)) -> SequenceLayout:
    return SequenceLayout(case.length, ranks, starts, kind=case.layout)


def wrong(cases: list[Case], device: str = "cpu") -> dict[Case, float]:
    """The cases whose error on this rank is beyond the tolerance."""
    errors = {case: model_error(case, device) for case in cases}
    return {case: error for case, error in errors.items() if not error < TOLERANCE}


def check(pool: RankPool, cases: list[Case]) -> None:
    """On every rank; the processes run one case after another."""
    for rank, found in enumerate(pool.run(wrong, cases, timeout=240)):
        assert not found, f"rank {rank}: {found}"


WORLDS = pytest.mark.parametrize("world_size", [2, 3, 4])
CUTS = pytest.mark.parametrize("layout", LAYOUTS)


@WORLDS
@CUTS
@pytest.mark.parametrize("name", RECURRENT)
def test_every_scan_of_every_recurrent_mixer(
    rank_pool: Callable[[int], RankPool], name: str, layout: LayoutKind, world_size: int
) -> None:
    # In the middle of three layers, so that mixers which differ by depth do; 3 tokens on 4 ranks leave one empty.
    three, sizes = ("simple_gla", name, "simple_gla"), {2: [(31, False)], 3: [(41, True)], 4: [(3, True), (38, True)]}
    cases = [
        Case((name,) if world_size < 4 else three, length, packed, scan=scan, layout=layout)
        for scan in SCANS
        for length, packed in sizes[world_size]
    ]
    check(rank_pool(world_size), cases)


@WORLDS
@CUTS
@pytest.mark.parametrize("attend", ATTENDS)
def test_every_attention(
    rank_pool: Callable[[int], RankPool], attend: str, layout: LayoutKind, world_size: int
) -> None:
    # 2 and 3 tokens on 4 ranks: empty shards; 9: shards shorter than a convolution's 3 rows; 67: prime
    cases = [
        Case(pattern, length, packed, attend=attend, layout=layout)
        for pattern in [*((name,) for name in ATTENTION), HYBRID]
        for length, packed in ((2, False), (3, True), (9, True), (67, False), (67, True))
    ]
    # PyTorch's own attention returns tensors in another order of memory than the one that CPUs use by default.
    cases += [Case(("softmax",), 67, packed, attend=attend, layout=layout, kernel="plain") for packed in (False, True)]
    check(rank_pool(world_size), cases)


def op_error(length: int, packed: bool, scan: str, kind: LayoutKind) -> float:
    """A vector decay through the scan alone; gradients of every input on this rank."""
    mesh = build_mesh(torch.distributed.get_world_size())
    torch.manual_seed(length)
    q, k, g = (torch.randn(2, length, 3, 4, dtype=torch.float64) for _ in range(3))
    whole = [q, k, torch.randn(2, length, 3, 5, dtype=torch.float64), -g.exp()]
    cotangent = torch.randn(2, length, 3, 5, dtype=torch.float64)
    starts = awkward_starts(length, (length // 2,)) if packed else ((0,), (0,))

    def run(group: Group, chosen: Algorithms) -> tuple[Tensor, list[Tensor], Tensor]:
        shard = Shard(SequenceLayout(length, group.size, starts, kind=kind), group, torch.device("cpu"))
        index = shard.index
        leaves = [t[:, index].clone().requires_grad_() for t in whole]
        op: Recurrence = DiagonalScan(*leaves)
        output = ShardedSequence(shard, chosen).scan(op)
        return output, list(torch.autograd.grad(output, leaves, cotangent[:, index])), index

    exact, exact_grads, _ = run(Group(0, 1), LOCAL)
    output, grads, index = run(mesh.sequence, algorithms(scan, "ring"))
    pairs: list[tuple[Any, Any]] = [(output, exact), *zip(grads, exact_grads, strict=True)]
    return max(relative_error(got, want[:, index]) for got, want in pairs)


@WORLDS
@CUTS
@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_a_vector_decay_crosses_ranks(
    rank_pool: Callable[[int], RankPool], packed: bool, scan: str, layout: LayoutKind, world_size: int
) -> None:
    errors = rank_pool(world_size).run(op_error, 45, packed, scan, layout)
    assert max(errors) < TOLERANCE, f"errors by rank {errors}"


def usp_error(layout: LayoutKind, key_heads: int, local_sizes: tuple[int, ...]) -> tuple[float, int]:
    """Attention on nodes of these numbers of ranks: largest error of output and gradients, and ranks that exchange."""
    world = torch.distributed.get_world_size()
    os.environ["LOCAL_WORLD_SIZE"] = str(local_sizes[torch.distributed.get_rank()])
    try:
        group = build_mesh(world).sequence
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    torch.manual_seed(2)
    whole = [torch.randn(2, 45, heads, 4, dtype=torch.float64) for heads in (2 * key_heads, key_heads, key_heads)]
    cotangent = torch.randn(2, 45, 2 * key_heads, 4, dtype=torch.float64)
    starts = awkward_starts(45, (22,))

    def run(group: Group, chosen: Algorithms) -> tuple[list[Tensor], Tensor]:
        shard = Shard(SequenceLayout(45, group.size, starts, kind=layout), group, torch.device("cpu"))
        leaves = [x[:, shard.index].clone().requires_grad_() for x in whole]
        output = ShardedSequence(shard, chosen).attend(*leaves)
        return [output, *torch.autograd.grad(output, leaves, cotangent[:, shard.index])], shard.index

    exact, _ = run(Group(0, 1), LOCAL)
    got, index = run(group, algorithms("all_gather", "usp"))
    return max(relative_error(a, x[:, index]) for a, x in zip(got, exact, strict=True)), neighbours(
        world, group.node_size, key_heads
    )


@CUTS
@pytest.mark.parametrize(
    ("key_heads", "local_sizes", "exchanging"), [(2, (4, 4, 4, 4), 2), (4, (2, 2, 1, 1), 1), (4, (2, 2, 2, 2), 2)]
)
def test_usp_in_two_dimensions_and_on_uneven_nodes(
    rank_pool: Callable[[int], RankPool],
    layout: LayoutKind,
    key_heads: int,
    local_sizes: tuple[int, ...],
    exchanging: int,
) -> None:
    for error, ranks in rank_pool(4).run(usp_error, layout, key_heads, local_sizes):
        assert error < TOLERANCE
        assert ranks == exchanging


def isolation(scan: str, attend: str, kind: LayoutKind) -> bool:
    """Whether changing the first document leaves the outputs and gradients of the second bit-identical."""
    mesh = build_mesh(torch.distributed.get_world_size())
    length, second = 41, 17
    config = ModelConfig(12, 4, HYBRID, 16, False, 1e-6, 0.5)
    model = build_model(config, MIXERS, VOCABULARY, seed=3, registry=Registry())
    layout = SequenceLayout(length, mesh.sequence.size, ((0, second),), kind=kind)
    shard = Shard(layout, mesh.sequence, torch.device("cpu"))
    index = shard.index
    torch.manual_seed(0)
    x, other = torch.randn(1, length, 12), torch.randn(1, length, 12)
    other[:, second:] = x[:, second:]
    results = []
    for inputs in (x, other):
        part = inputs[:, index].clone().requires_grad_()
        handle = ShardedSequence(shard, algorithms(scan, attend))
        output: Any = part
        for block in model.blocks:
            assert isinstance(block, nn.Module)
            output = block(output, handle)
        (grad,) = torch.autograd.grad(output.square().sum(), part)
        results.append((output[:, index >= second].detach(), grad[:, index >= second]))
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@CUTS
@pytest.mark.parametrize(
    ("scan", "attend"), [*((scan, "ring") for scan in SCANS), *(("all_gather", attend) for attend in ATTENDS)]
)
def test_a_document_never_sees_another(
    rank_pool: Callable[[int], RankPool], scan: str, attend: str, layout: LayoutKind
) -> None:
    assert all(rank_pool(4).run(isolation, scan, attend, layout))
