"""What waits for the backward pass keeps nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.attend import all_gather
from longtrain.sequence_parallel.call import AttendCall
from longtrain.sequence_parallel.lift import Coming, Lift
from longtrain.sequence_parallel.rows import HostRows
from longtrain.sequence_parallel.shard import Rows, Shard
from longtrain.streaming.shelf import DeviceShelf, HostShelf
from tests.harness.mixers import MIXERS
from tests.harness.streaming import LOCAL, StreamCase, problem_of, stream_gradients


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_what_crosses_chunks_keeps_no_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[Tensor] = []
    put = DeviceShelf.put

    def watch(shelf: DeviceShelf, chunk: int, tensors: Sequence[Tensor]) -> None:
        put(shelf, chunk, tensors)
        waiting.extend(shelf.look(chunk))

    monkeypatch.setattr(DeviceShelf, "put", watch)
    case = StreamCase((name,), "all", chunk_tokens=13)
    stream_gradients(case, problem_of(case), Group(0, 1), LOCAL, torch.device("cpu"))
    assert waiting
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in waiting)


def test_gradients_take_the_place_of_inputs_at_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[int] = []
    down = Lift.down

    def watch(lift: Lift, x: Tensor, there: Tensor | None = None) -> Tensor:
        found = down(lift, x, there)
        places.append(found.data_ptr())
        return found

    monkeypatch.setattr(Lift, "down", watch)
    shelf = HostShelf(Lift(torch.device("cpu")))
    for chunk in range(3):
        shelf.put(chunk, [torch.full((2,), chunk)])
    for chunk in (2, 1, 0):
        [found] = shelf.take(chunk)
        shelf.put(chunk, [-found])
    assert places[3:] == places[2::-1]
    assert [shelf.take(chunk)[0].tolist() for chunk in (2, 1, 0)] == [[-2, -2], [-1, -1], [0, 0]]


@pytest.mark.parametrize("attend", [local.attend, all_gather.attend])
@pytest.mark.parametrize("block_layers", [1, 3, "recurrent", "all"])
def test_keys_and_values_are_on_their_way_before_they_are_wanted_and_no_others(
    block_layers: int | Literal["recurrent", "all"],
    attend: Callable[[AttendCall, Shard], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last chunk is shorter than the others. `all_gather` saves what it has gathered, and reads nothing again."""
    hits: list[bool] = []
    fetched: list[int] = []
    get, fetch = HostRows._get, HostRows._fetch

    def watch(store: HostRows, count: int, room: int) -> Tensor:
        hits.append(store._soon is not None and store._soon[0] == (count, room))
        return get(store, count, room)

    def watch_fetch(store: HostRows, count: int, room: int) -> Coming:
        fetched.append(count)
        return fetch(store, count, room)

    monkeypatch.setattr(HostRows, "_get", watch)
    monkeypatch.setattr(HostRows, "_fetch", watch_fetch)
    case = StreamCase(("softmax", "simple_gla", "softmax", "softmax"), block_layers, 5, 28, offload="host")
    algorithms = replace(LOCAL, attend=attend)
    stream_gradients(case, problem_of(case), Group(0, 1), algorithms, torch.device("cpu"))
    assert hits
    assert all(hits)
    assert len(fetched) == len(hits)


def test_what_was_fetched_in_vain_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[tuple[int, ...]] = []
    wait = Coming.wait

    def watch(coming: Coming) -> Tensor:
        found = wait(coming)
        waited.append(tuple(found.shape))
        return found

    monkeypatch.setattr(Coming, "wait", watch)
    store = HostRows(Lift(torch.device("cpu")))
    x = torch.arange(6.0).view(1, 6, 1)
    store.write(Rows(0, 3, 6, alone=False), x[:, :3])
    store.prefetch(3, 6)
    store.write(Rows(3, 4, 6, alone=False), x[:, 3:4])
    assert torch.equal(store.read(4), x[:, :4])
    assert waited == [(1, 6, 1), (1, 4, 1)]
