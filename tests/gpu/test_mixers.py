"""Every recurrent mixer on a GPU with Triton against itself in float64 with chunked PyTorch: `pytest -m gpu`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.comm.group import Group
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.backend import Backend
from tests.harness.mixers import RECURRENT

pytestmark = pytest.mark.gpu

WIDTH, LENGTH = 128, 300


def results(layer: Any, x: Tensor, cotangent: Tensor, backend: Backend) -> list[Tensor]:
    """Outputs, and the gradients of the inputs and of every parameter."""
    shard = Shard(SequenceLayout(LENGTH, 1, ((0,), (0, 1, 64, 200))), Group(0, 1), x.device)
    x = x.detach().requires_grad_()
    output = layer(x, ShardedSequence(shard, Algorithms(local.scan, local.attend), backend=backend))
    grads = torch.autograd.grad(output, [x, *layer.parameters()], cotangent.to(output.dtype))
    return [t.detach().double() for t in (output, *grads)]


# float32: products in tf32x3, sums over 300 tokens; bfloat16: activations round to 2^-9 a dozen times in a row.
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("name", RECURRENT)
def test_triton_is_the_float64_layer(name: str, precision: str, tolerance: float) -> None:
    torch.manual_seed(0)
    config = replace(RECURRENT[name], key_dim=64, value_dim=64)
    layer = Registry().load("mixers", name, ("Mixer",)).Mixer(config, WIDTH).cuda()
    layer.layer, layer.num_layers = 1, 3
    x, cotangent = (torch.randn(2, LENGTH, WIDTH, device="cuda") for _ in range(2))
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        got = results(layer, x, cotangent, Backend.TRITON)
    want = results(layer.double(), x.double(), cotangent, Backend.CHUNKED)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert max(errors) < tolerance, errors
