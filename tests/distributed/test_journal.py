"""What ranks write down of their exchanges: equal counts on all of them, and who is waited for in vain."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longtrain.comm.group import Group
from longtrain.comm.journal import Standing
from longtrain.core.errors import ExchangeFailed
from longtrain.training.config import TrainingConfig
from longtrain.training.rank import run_rank
from tests.harness.ranks import RankPool
from tests.harness.training import Recorder, tiny_config, with_ranks


def standing_after(config: TrainingConfig) -> Standing:
    recorder = Recorder()
    run_rank(config, recorder)
    return recorder.journal.standing()


@pytest.mark.parametrize(
    ("scan", "attend"), [("all_gather", "all_gather"), ("pipeline", "ring"), ("ring", "token_ring"), ("ulysses", "usp")]
)
def test_all_ranks_begin_the_same_number_of_collectives(
    tmp_path: Path, rank_pool: Callable[[int], RankPool], scan: str, attend: str
) -> None:
    # Who is behind is told by these counts, so they must not depend on the rank's place in its sequence.
    config = with_ranks(tiny_config(tmp_path, steps=2, context_length=53), 2)
    cut = replace(config.sequence_parallel, scan=scan, attend=attend)
    found = rank_pool(4).run(standing_after, replace(config, sequence_parallel=cut))
    assert [set(s.begun) for s in found[:2]] == [
        {"the world", "the world (checkpoint)", "sequence ranks 0 and 1", f"data ranks {rank}, {rank + 2}"}
        for rank in (0, 1)
    ]
    assert len({tuple(s.begun[name] for name in sorted(s.begun)) for s in found}) == 1
    assert found[0].begun["the world"] > 0
    assert not any(s.inside for s in found)


def waits(use: str) -> str | None:
    """Rank 1 does not come; what rank 0 raises."""
    handle = dist.new_group([0, 1], timeout=timedelta(seconds=1))
    group = Group(dist.get_rank(), 2, handle, name="sequence ranks 6 and 7", members=(6, 7))
    if group.rank == 1:
        time.sleep(2.5)
        return None
    with pytest.raises(ExchangeFailed) as failed:
        if use == "all_gather":
            group.all_gather(torch.ones(3))
        else:
            group.exchange([], [(1, torch.ones(3))])
    assert group.journal.standing().inside
    return str(failed.value)


@pytest.mark.parametrize(
    ("use", "named"),
    [
        ("all_gather", "all_gather 1 of sequence ranks 6 and 7"),
        ("exchange", "exchange with rank 7 of sequence ranks 6 and 7"),
    ],
)
def test_a_rank_that_waits_in_vain_says_in_what(rank_pool: Callable[[int], RankPool], use: str, named: str) -> None:
    message = rank_pool(2).run(waits, use)[0]
    assert message.startswith(f"{named} failed after 1 s (")
