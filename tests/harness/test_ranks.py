"""The harness reports what happens on a rank, and one bad case does not spoil the next."""

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.harness.ranks import RankDied, RankPool, RankTimeout, run_ranks

Pools = Callable[[int], RankPool]


def total(values: torch.Tensor) -> torch.Tensor:
    result = values * (dist.get_rank() + 1)
    dist.all_reduce(result)
    return result


def environment() -> tuple[bool, str, str]:
    return dist.is_initialized(), os.environ["RANK"], os.environ["WORLD_SIZE"]


def process_id() -> int:
    return os.getpid()


def rank_one_raises() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the case's own error")
    dist.barrier()


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def raises_unpicklable() -> None:
    raise Unpicklable(1, 2)


def rank_one_dies() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def rank_one_sleeps() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)


def returns_unpicklable() -> object:
    return lambda: None


def sets_global_state() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(12345)


def global_state() -> tuple[str, int]:
    return str(torch.get_default_dtype()), torch.initial_seed()


def check_usable(pool: RankPool) -> None:
    for result in pool.run(total, torch.tensor([1.0, 2.0])):
        torch.testing.assert_close(result, torch.tensor([3.0, 6.0]), rtol=0, atol=0)


def test_results_come_back_in_rank_order_from_processes_that_stay(rank_pool: Pools) -> None:
    pool = rank_pool(2)
    check_usable(pool)
    first = pool.run(process_id)
    assert len(set(first)) == 2 and os.getpid() not in first
    assert pool.run(process_id) == first


def test_state_of_one_case_does_not_reach_the_next(rank_pool: Pools) -> None:
    rank_pool(2).run(sets_global_state)
    assert rank_pool(2).run(global_state) == [("torch.float32", 0)] * 2


def test_a_rank_that_raises_is_reported_with_its_own_error(rank_pool: Pools) -> None:
    with pytest.raises(KeyError, match="the case's own error") as caught:
        rank_pool(2).run(rank_one_raises)
    assert "rank 1 of 2" in "".join(caught.value.__notes__)
    assert "in rank_one_raises" in str(caught.value.__cause__)
    check_usable(rank_pool(2))


def test_a_rank_that_dies_is_blamed_rather_than_its_peers(rank_pool: Pools) -> None:
    with pytest.raises(RankDied, match=r"rank_one_dies: rank 1 of 2 ended .* \(killed by SIGKILL\)"):
        rank_pool(2).run(rank_one_dies)
    check_usable(rank_pool(2))


def test_a_rank_that_hangs_is_named_with_its_stack(rank_pool: Pools) -> None:
    with pytest.raises(RankTimeout, match=r"rank_one_sleeps: no result after 1 s from ranks 1 of 2") as caught:
        rank_pool(2).run(rank_one_sleeps, timeout=1)
    assert "in rank_one_sleeps" in str(caught.value)
    check_usable(rank_pool(2))


def test_errors_and_results_that_cannot_be_pickled_are_reported_as_text() -> None:
    with RankPool(1) as pool:
        with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
            pool.run(raises_unpicklable)
        with pytest.raises(Exception, match=r"(?i)pickle"):
            pool.run(returns_unpicklable)


def test_processes_without_a_group_get_the_environment_of_a_rank() -> None:
    assert run_ranks(environment, 2, process_group=False) == [(False, "0", "2"), (False, "1", "2")]


def test_a_function_that_processes_cannot_import_is_refused_here(rank_pool: Pools) -> None:
    with pytest.raises(Exception, match=r"(?i)pickle"):
        rank_pool(2).run(lambda: None)
    check_usable(rank_pool(2))
