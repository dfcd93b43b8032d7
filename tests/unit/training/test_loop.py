"""What a step that has trouble with memory tells the user."""

from pathlib import Path

import pytest
import torch

from longtrain.core.errors import Refused
from longtrain.streaming.stream import Stream
from longtrain.telemetry.events import StepDone, Warned
from tests.harness.training import tiny_config, train_rank


def test_a_gpu_without_memory_is_told_with_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and not another start that would not fit either."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.81 GiB."
        )

    monkeypatch.setattr(Stream, "backward", fail)
    with pytest.raises(Refused, match=r"^step 1: CUDA out of memory; .*stream\.chunk_tokens.*last checkpoint$") as told:
        train_rank(tiny_config(tmp_path))
    assert "\n" not in str(told.value)


def test_waiting_for_the_host_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter((0.0, 100.0, 200.0))
    monkeypatch.setattr(Stream, "host_wait_seconds", lambda _: next(waits))
    events = train_rank(tiny_config(tmp_path, steps=3))
    assert [event.host_wait_seconds for event in events if isinstance(event, StepDone)] == [0.0, 100.0, 200.0]
    [warned] = [event.message for event in events if isinstance(event, Warned)]
    assert warned.startswith("step 2: GPUs waited 100.0 of ") and "stream.offload" in warned
