"""Rank order: neighbours stay together whatever order Ray placed the bundles in."""

import random

from longtrain.cluster.ranks import Seat, assign_ranks


def seat(index, ip, gpu=None, domain="", node=None):
    return Seat(index, node or ip, ip, domain, () if gpu is None else (str(gpu),))


def test_addresses_and_gpus_sort_by_number_and_the_placement_order_does_not_matter():
    ips = ("10.0.0.9", "10.0.0.10", "10.0.0.100")
    seats = [seat(4 * n + gpu, ip, gpu + 8) for n, ip in enumerate(ips) for gpu in range(4)]
    shuffled = random.Random(0).sample(seats, len(seats))
    for order in (seats, shuffled):
        places = assign_ranks(order, 4)
        assert [place.seat.index for place in places] == list(range(12))
        assert [place.rank for place in places] == list(range(12))
    assert places[4].visible_gpus == ("8", "9", "10", "11")
    assert [place.local_rank for place in places[4:8]] == [0, 1, 2, 3]
    assert {place.local_world_size for place in places} == {4}


def test_a_domain_comes_before_the_address():
    places = assign_ranks([seat(0, "10.0.0.1", domain="b"), seat(1, "10.0.0.2", domain="a")], 1)
    assert [place.seat.index for place in places] == [1, 0]


def test_a_surplus_does_not_shift_groups_across_a_nodes_edge():
    # Three workers on the first node, five on the second, groups of four: the second node holds one whole group.
    seats = [seat(i, "10.0.0.1", i) for i in range(3)] + [seat(3 + i, "10.0.0.2", i) for i in range(5)]
    places = assign_ranks(seats, 4)
    assert {place.seat.ip for place in places[:4]} == {"10.0.0.2"}
    assert [place.seat.ip for place in places[4:]] == ["10.0.0.1"] * 3 + ["10.0.0.2"]
    assert places[7].local_rank == 4 and places[7].visible_gpus[4] == places[7].seat.gpu_ids[0]


def test_two_nodes_with_one_address_are_told_apart():
    seats = [seat(0, "10.0.0.1", 0, node="a"), seat(1, "10.0.0.1", 0, node="b")]
    assert [(p.local_rank, p.local_world_size) for p in assign_ranks(seats, 1)] == [(0, 1), (0, 1)]


def test_the_environment_is_that_of_torchrun():
    place = assign_ranks([seat(0, "10.0.0.1"), seat(1, "10.0.0.1")], 2)[1]
    assert place.environment("10.0.0.1", 4242) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "4242",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",  # none was asked for
    }
