"""A step that does not fit ends the run with one line, and not with another start that would not fit either."""

from pathlib import Path

import pytest
import torch

from longtrain.core.errors import Refused
from longtrain.streaming.stream import Stream
from tests.harness.training import tiny_config, train_rank


def test_a_gpu_without_memory_is_told_with_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB."
        )

    monkeypatch.setattr(Stream, "backward", fail)
    with pytest.raises(Refused, match=r"^step 1: CUDA out of memory; .*stream\.chunk_tokens.*last checkpoint$") as told:
        train_rank(tiny_config(tmp_path))
    assert "\n" not in str(told.value)
