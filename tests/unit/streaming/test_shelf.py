"""What waits for the backward pass keeps nothing else."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.sequence_parallel.lift import Lift
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
