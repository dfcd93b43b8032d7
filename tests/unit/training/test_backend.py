"""The choice of a backend becomes one that runs on this rank's device, or is refused."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from longtrain.cluster.resolve import resolve
from longtrain.comm.group import Group
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.model.build import build_handles
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.training.rank import check_block_attention, pick_backend
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


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["engine.device=cpu"], "runs on GPUs, but engine.device=cpu; use auto, or a GPU"),
        (["cluster.resources.GPU=0"], "runs on GPUs, but cluster.resources.GPU=0; use auto, or a GPU"),
        (["engine.precision=float32"], "does not compute engine.precision=float32; use auto, or bfloat16 on GPUs"),
    ],
)
def test_cudnn_is_for_gpus_and_halves(overrides: list[str], problem: str) -> None:
    with pytest.raises(Refused, match=rf"^sequence_parallel\.block_attention=cudnn {re.escape(problem)}$"):
        resolve(["sequence_parallel.block_attention=cudnn", *overrides])


@pytest.mark.parametrize(
    ("choice", "device", "precision", "problem"),
    [
        ("cudnn", CPU, "bfloat16", "cudnn runs on GPUs, but this rank has none; use auto"),
        ("flash", GPU, "float32", "flash does not compute engine.precision=float32 on GPUs; use auto, or bfloat16"),
    ],
)
def test_a_rank_refuses_attention_that_it_cannot_compute(
    choice: str, device: torch.device, precision: str, problem: str
) -> None:
    with pytest.raises(Refused, match=rf"^sequence_parallel\.block_attention={re.escape(problem)}$"):
        check_block_attention(choice, device, precision)
    check_block_attention("auto", device, precision)
    check_block_attention("flash", CPU, "float32")


def test_every_sequence_states_the_backend() -> None:
    cut = SequenceParallelConfig(
        size=1, scan="all_gather", attend="ring", layout="contiguous", block_attention="plain", copy_engines=True
    )
    handles = build_handles(cut, Backend.REFERENCE, Group(0, 1), CPU, Registry())
    [shard] = handles.shards(SequenceLayout(5, 1, ((0,),)))
    assert handles.at(shard).backend is Backend.REFERENCE


def test_a_checkpoint_is_gone_on_from_with_another_backend() -> None:
    corpus: Any = SimpleNamespace(digest="d", columns=())
    first, other = (identity(resolve([f"mixer.backend={name}"]).config, corpus) for name in ("chunked", "reference"))
    assert first == other
    assert list(first["mixer"]) == ["simple_gla", "softmax"]
