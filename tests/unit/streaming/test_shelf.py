"""What waits for the backward pass keeps nothing else."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.streaming.shelf import DeviceShelf
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
