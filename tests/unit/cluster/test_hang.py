"""Who is to blame when no rank goes on, from what the ranks last said."""

import math

import pytest

from longtrain.cluster.failure import Fault
from longtrain.cluster.hang import judge
from longtrain.cluster.pulse import Pulse
from longtrain.cluster.vigil import Vigil
from longtrain.comm.journal import Exchange, Standing

PAIRS = {0: "sequence ranks 0 and 1", 1: "sequence ranks 0 and 1", 2: "sequence ranks 2 and 3"}
PAIRS[3] = PAIRS[2]


def pulse(world=5, sequence=7, inside=None, peers=(), rank=0, phase="step", phases=6, count=1):
    """In the third step of an attempt; `inside` names the operation, of the world or with `peers`."""
    begun = {"the world": world, PAIRS[rank]: sequence}
    last = Exchange(inside or "all_reduce", "the world", None if peers else world, tuple(peers))
    standing = Standing(begun, world + sequence, last, inside is not None, 1.0)
    return Pulse(phase, 2, count, phases, phases - 3, standing)


def everyone(**changed):
    """Four ranks, two sequences; `r1=pulse(...)` replaces what rank 1 says."""
    pulses = {rank: pulse(world=6, inside="all_reduce", rank=rank) for rank in range(4)}
    return pulses | {int(name[1:]): said for name, said in changed.items()}


def test_a_rank_that_has_begun_fewer_collectives_is_to_blame():
    verdict = judge(everyone(r2=pulse(world=5, rank=2)))
    assert (verdict.culprits, verdict.waiting) == ((2,), (0, 1, 3))
    assert verdict.patience == 1.0


def test_a_rank_that_waits_for_the_one_behind_is_not_to_blame():
    # 3 waits for 2 in their sequence; both keep the world waiting
    stuck, held = pulse(world=5, sequence=7, rank=2), pulse(world=5, sequence=8, inside="all_gather", rank=3)
    assert judge(everyone(r2=stuck, r3=held)).culprits == (2,)


def test_hosts_that_run_ahead_of_their_gpus_wait_although_they_are_in_no_exchange():
    ahead = {rank: pulse(world=6, rank=rank) for rank in (0, 2, 3)}
    assert judge({**ahead, 1: pulse(world=5, rank=1)}).culprits == (1,)


def test_a_chain_of_transfers_is_followed_to_its_end():
    # equal counts everywhere: a pipeline in which 0 has not sent
    chain = {rank: pulse(inside="receive", peers=[rank - 1], rank=rank) for rank in (1, 2, 3)}
    verdict = judge({0: pulse(), **chain})
    assert (verdict.culprits, verdict.waiting) == ((0,), (1, 2, 3))
    # 0 has done its part and gone on to the next collective; 1 stands still between receiving and sending
    gone_on = pulse(world=6, inside="all_reduce")
    assert judge({**chain, 0: gone_on, 1: pulse(rank=1)}).culprits == (1,)


def test_a_ring_that_waits_for_one_names_it_and_a_closed_ring_names_nobody():
    ring = {rank: pulse(inside="exchange", peers=[(rank - 1) % 4, (rank + 1) % 4], rank=rank) for rank in range(4)}
    assert judge(ring).culprits == ()
    assert judge(ring | {2: pulse(rank=2)}).culprits == (2,)


def test_a_rank_that_is_in_an_earlier_phase_is_to_blame():
    # it writes its shard; its counts are no less than the others'
    verdict = judge(everyone(r3=pulse(world=9, rank=3, phases=5, phase="checkpoint")))
    assert verdict.culprits == (3,)
    assert verdict.patience > 1.0


def test_nobody_is_to_blame_where_all_are_equally_far():
    verdict = judge(everyone())
    assert (verdict.culprits, verdict.waiting, verdict.patience) == ((), (0, 1, 2, 3), 1.0)


def test_work_for_which_nobody_waits_is_given_the_most_patience():
    local = {rank: pulse(rank=rank) for rank in range(4)}
    assert judge(local).patience == 10.0
    assert judge({0: pulse()}).patience == math.inf  # one rank has nobody to wait for
    assert judge(local | {1: pulse(rank=1, phases=7, phase="done")}, done={1}).patience == 10.0


def test_the_first_step_is_given_more_patience():
    first = {rank: pulse(world=6, inside="all_reduce", rank=rank, phases=4) for rank in range(4)}
    assert judge(first | {1: pulse(world=5, rank=1, phases=4)}).patience == 2.0


def test_a_rank_that_is_not_heard_of_comes_first_and_one_that_is_done_is_never_to_blame():
    assert judge(everyone(r2=pulse(world=5, rank=2)), silent={1}).culprits == (1,)
    over = pulse(world=4, rank=1, phase="done")
    assert judge(everyone(r1=over, r2=pulse(world=5, rank=2)), done={1}).culprits == (2,)


def name(rank):
    return f"rank {rank} (process {100 + rank} on 10.0.0.{rank})"


def watched(pulses, seconds, silent=()):
    """A vigil that has heard the same from all ranks each second, and nothing from the `silent` ones."""
    vigil = Vigil(heartbeat_timeout_seconds=60.0, hang_timeout_seconds=8.0)
    vigil.begin(len(pulses))
    vigil.look(0.0, pulses)
    for second in range(seconds):
        again = {rank: Pulse(**vars(said) | {"count": second + 2}) for rank, said in pulses.items()}
        vigil.look(1.0, {rank: said for rank, said in again.items() if rank not in silent})
    return vigil


def test_the_message_says_who_where_and_how_long_and_what_the_others_wait_in():
    pulses = everyone(r2=pulse(world=5, rank=2))
    assert watched(pulses, 8).failures(set(), name) == []
    (failure,) = watched(pulses, 9).failures(set(), name)
    assert failure.message == (
        "rank 2 (process 102 on 10.0.0.2): no progress for 9 s after all_reduce 5 of the world, step 3; it holds up "
        "ranks 0, 1, 3 in all_reduce 6 of the world, step 3 (cluster.hang_timeout_seconds=8)"
    )
    assert (failure.fault, failure.rank, failure.ranks) == (Fault.HANG, 2, (2,))
    assert failure.places["after all_reduce 5 of the world, step 3"] == [2]


def test_a_stopped_process_is_named_without_waiting_for_the_limit_of_heartbeats():
    (failure,) = watched(everyone(), 9, silent=(3,)).failures(set(), name)
    assert (failure.fault, failure.rank) == (Fault.SILENT, 3)
    assert failure.message.startswith(
        "rank 3 (process 103 on 10.0.0.3): not heard of for 9 s; it holds up ranks 0 to 2"
    )


def test_all_waiting_in_one_exchange_name_it_and_no_rank():
    (failure,) = watched(everyone(), 9).failures(set(), name)
    assert failure.rank is None
    assert "none is behind: ranks 0 to 3 in all_reduce 6 of the world" in failure.message


def test_where_nothing_is_heard_of_any_rank_no_rank_is_said_to_hang():
    assert watched(everyone(), 30, silent=(0, 1, 2, 3)).failures(set(), name) == []


@pytest.mark.parametrize("changes", [{"phases": 7}, {"exchanges": Standing({"the world": 6}, 999)}])
def test_any_sign_of_progress_on_any_rank_begins_the_wait_again(changes):
    pulses = everyone(r2=pulse(world=5, rank=2))
    vigil = watched(pulses, 7)
    vigil.look(1.0, {1: Pulse(**vars(pulses[1]) | {"count": 99} | changes)})
    vigil.look(1.0, {})
    assert vigil.failures(set(), name) == []


def test_the_only_rank_of_a_job_never_hangs_and_is_told_of_once_until_it_goes_on():
    alone = {0: Pulse("step", 2, 1, 6, 3, stack="in read")}
    assert watched(alone, 80).notice(name) is None
    vigil = watched(alone, 1000)
    assert vigil.failures(set(), name) == []
    assert vigil.notice(name) == (
        "rank 0 (process 100 on 10.0.0.0): no progress for 1000 s in step 3; no other rank waits for it, so it goes on,"
        " and incidents.jsonl has its stack"
    )
    assert vigil.notice(name) is None
    for second in range(82):
        vigil.look(1.0, {0: Pulse("step", 3, 2000 + second, 7, 4)})
        assert (vigil.notice(name) is None) == (second != 81)
    assert watched(everyone(), 1000).notice(name) is None


def test_the_only_rank_of_a_job_is_missed_when_it_is_not_heard_of():
    vigil = watched({0: Pulse("step", 2, 1, 6, 3)}, 61, silent=(0,))
    (failure,) = vigil.failures(set(), name)
    assert (failure.fault, failure.rank) == (Fault.SILENT, 0)


def test_a_driver_that_was_suspended_blames_nobody():
    vigil = watched(everyone(r2=pulse(world=5, rank=2)), 1)
    vigil.look(3600.0, {})
    assert vigil.failures(set(), name) == []
