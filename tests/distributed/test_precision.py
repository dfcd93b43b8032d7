"""Attention in bfloat16 over several ranks is as exact as on one: partial sums are float32, however many there are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.comm.mesh import build_mesh
from longtrain.core.kinds import LayoutKind
from longtrain.core.layout import SequenceLayout
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from tests.distributed.test_parity import ATTENDS, LAYOUTS, LOCAL, algorithms
from tests.harness.ranks import RankPool

LENGTH = 203


def errors(attend: str, kind: LayoutKind, heads: tuple[int, int]) -> list[tuple[float, float]]:
    """Relative error norms of this rank's output, dq, dk and dv: on all ranks, and on one."""
    group = build_mesh(torch.distributed.get_world_size()).sequence
    torch.manual_seed(1)
    whole = [torch.randn(1, LENGTH, n, 16).to(torch.bfloat16) for n in (*heads, heads[1])]
    cotangent = torch.randn(1, LENGTH, heads[0], 16).to(torch.bfloat16)

    def run(dtype: torch.dtype, group: Group, chosen: Algorithms) -> tuple[list[Tensor], Tensor]:
        shard = Shard(SequenceLayout(LENGTH, group.size, ((0,),), kind=kind), group, torch.device("cpu"))
        leaves = [x[:, shard.index].to(dtype).requires_grad_() for x in whole]
        output = ShardedSequence(shard, chosen).attend(*leaves)
        grads = torch.autograd.grad(output, leaves, cotangent[:, shard.index].to(dtype))
        return [output.detach(), *grads], shard.index

    exact, _ = run(torch.float64, Group(0, 1), LOCAL)
    one, _ = run(torch.bfloat16, Group(0, 1), LOCAL)
    several, index = run(torch.bfloat16, group, algorithms("all_gather", attend))
    norm = lambda x, true: ((x.double() - true).norm() / true.norm()).item()  # noqa: E731
    return [(norm(a, x[:, index]), norm(b[:, index], x[:, index])) for a, b, x in zip(several, one, exact, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("heads", [(8, 4), (6, 1)])  # one key head for four ranks is copied, and its gradients summed
def test_errors_do_not_grow_with_the_number_of_ranks(
    rank_pool: Callable[[int], RankPool], attend: str, layout: LayoutKind, heads: tuple[int, int]
) -> None:
    for by_tensor in rank_pool(4).run(errors, attend, layout, heads):
        # A part is rounded once before it is summed, beside the roundings of operands and results that one rank has.
        assert all(several < 1.5 * one for several, one in by_tensor), by_tensor
