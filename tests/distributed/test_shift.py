"""What goes round the ranks of a group comes whole, whoever is late; tests/gpu/test_nccl.py runs the same on GPUs."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.comm.group import Group
from tests.harness.ranks import RankPool

ROWS = [3, 0, 5, 2]


def mistakes_of_shifts(group: Group, device: torch.device, scale: int) -> list[str]:
    """Shifts on two lanes, of tensors that grow, with one rank after another late; what came wrong on this rank."""
    wrong = []
    for turn in range(12):
        by, rows = 1 + turn % (group.size - 1), [n * scale * (1 + turn // 4) for n in ROWS[: group.size]]
        if device.type == "cuda" and turn % group.size == group.rank:
            torch.cuda._sleep(20_000_000)
        sent = numbers(group.rank, rows, turn, device)
        coming = group.shift([x.float() for x in sent], rows, by, lane="one")
        other = group.shift([x[..., ::2].bfloat16() for x in sent], rows, -by, lane="other")
        for kind, pending, source in (("one", coming, by), ("other", other, -by)):
            want = numbers((group.rank - source) % group.size, rows, turn, device)
            want = [x.float() for x in want] if kind == "one" else [x[..., ::2].bfloat16() for x in want]
            if not all(map(torch.equal, pending.wait(), want)):
                wrong.append(f"turn {turn}, lane {kind}")
    return wrong


def numbers(rank: int, rows: list[int], turn: int, device: torch.device) -> list[Tensor]:
    """Two tensors [2, rows, ...] of a rank; small whole numbers, which bfloat16 has."""
    count = 2 * rows[rank] * 4
    whole = (torch.arange(count, device=device) + 31 * rank + 7 * turn) % 113
    return [whole.view(2, rows[rank], 4), whole.flip(0).view(2, rows[rank], 2, 2)]


def shifts_on_cpu() -> list[str]:
    """As ranks of the pool run it."""
    group = Group(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    return mistakes_of_shifts(group, torch.device("cpu"), 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_everyone_gets_what_was_sent_to_it(rank_pool: Callable[[int], RankPool], ranks: int) -> None:
    assert rank_pool(ranks).run(shifts_on_cpu) == [[]] * ranks
