"""What a journal tells of exchanges, and what becomes of their errors."""

import pytest

from longtrain.comm.journal import Exchange, Journal, list_ranks
from longtrain.core.errors import ExchangeFailed


def test_collectives_are_counted_by_group_and_transfers_are_not() -> None:
    journal = Journal()
    journal.add_group("the world")
    assert journal.standing().begun == {"the world": 0}
    for _ in range(2):
        with journal.inside("all_reduce", "the world"):
            standing = journal.standing()
            assert standing.inside
    assert standing.last == Exchange("all_reduce", "the world", 2)
    with journal.inside("receive", "sequence ranks 4 and 5", [4]):
        assert str(journal.standing().last) == "receive with rank 4 of sequence ranks 4 and 5"
    after = journal.standing()
    assert after.begun == {"the world": 2}
    assert not after.inside
    assert after.count > standing.count


# As gloo says it (torch 2.13): a late peer, a pair that was closed because of one, a peer that is gone.
@pytest.mark.parametrize(
    "reason",
    [
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete",
        "Application timeout caused pair closure",
        "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3210",
    ],
)
def test_a_late_peer_is_an_error_that_names_the_exchange_which_goes_on_being_told(reason: str) -> None:
    journal = Journal()
    said = r"^all_gather 1 of the world failed after 0 s \(.*hang_timeout_seconds$"
    with pytest.raises(ExchangeFailed, match=said), journal.inside("all_gather", "the world"):
        raise RuntimeError(reason)
    assert journal.standing().inside


def test_a_mistake_in_the_arguments_is_not_taken_for_a_late_peer() -> None:
    with pytest.raises(RuntimeError, match="contiguous"), Journal().inside("send", "the world", [1]):
        raise RuntimeError("Tensors must be contiguous")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0 and 1"),
        ([0, 1, 2, 3], "ranks 0 to 3"),
        ([0, 2, 4], "ranks 0, 2, 4"),
        ([0, 2, 4, 6, 8, 10], "ranks 0, 2, 4, 6 and 2 more"),
    ],
)
def test_ranks_are_listed_in_few_words(ranks: list[int], text: str) -> None:
    assert list_ranks(ranks) == text
