"""The choice of a backend becomes one that runs on this rank's device, or is refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longtrain.cluster.resolve import resolve
from longtrain.comm.group import Group
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.build import sequence_maker
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.training.rank import pick_backend
from longtrain.training.resume import identity
from longtrain_kernels.backend import Backend

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [("auto", CPU, "chunked"), ("auto", GPU, "triton"), ("reference", GPU, "reference"), ("chunked", CPU, "chunked")],
)
def test_a_choice_is_kept_and_auto_goes_by_the_device(choice: str, device: torch.device, expected: str) -> None:
    assert pick_backend(choice, device, "bfloat16") is Backend(expected)


def test_float64_is_not_for_triton() -> None:
    assert pick_backend("auto", GPU, "float64") is Backend.CHUNKED
    with pytest.raises(
        Refused, match=r"mixer\.backend=triton does not compute engine\.precision=float64; use .*chunked$"
    ):
        resolve(["mixer.backend=triton", "engine.precision=float64"])


def test_triton_on_a_rank_without_a_gpu_is_refused() -> None:
    with pytest.raises(Refused, match=r"^mixer\.backend=triton runs on GPUs, but this rank has none; use .*auto$"):
        pick_backend("triton", CPU, "float32")


def test_every_sequence_states_the_backend() -> None:
    cut = SequenceParallelConfig(size=1, scan="all_gather", attend="ring", layout="contiguous")
    make_sequence = sequence_maker(cut, Backend.REFERENCE, Group(0, 1), CPU, Registry())
    assert make_sequence(SequenceLayout(5, 1, ((0,),))).backend is Backend.REFERENCE


def test_a_checkpoint_is_gone_on_from_with_another_backend() -> None:
    corpus: Any = SimpleNamespace(digest="d")
    first, other = (identity(resolve([f"mixer.backend={name}"]).config, corpus) for name in ("chunked", "reference"))
    assert first == other
    assert list(first["mixer"]) == ["simple_gla", "softmax"]
