"""What a step that has trouble with memory tells the user."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout, mean_context
from longtrain.core.targets import Targets
from longtrain.streaming.stream import Stream
from longtrain.telemetry.events import StepDone, Warned
from longtrain.training.loop import Loop
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


def test_utilisation_counts_what_documents_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[SequenceLayout] = []
    contexts: list[float] = []
    backward = Stream.backward

    def watch(stream: Stream, tokens: Tensor, targets: Targets, layout: SequenceLayout, count: Tensor) -> Tensor:
        layouts.append(layout)
        return backward(stream, tokens, targets, layout, count)

    monkeypatch.setattr(Stream, "backward", watch)
    monkeypatch.setattr(Loop, "_mfu", lambda _, speed, context: contexts.append(context))
    (tmp_path / "source").mkdir()
    for number in range(10):
        (tmp_path / "source" / f"{number}.py").write_text("# short\n" * 10)
    train_rank(tiny_config(tmp_path, steps=1))
    assert contexts == [mean_context(layouts)]
    assert 0 < contexts[0] < layouts[0].length / 2
