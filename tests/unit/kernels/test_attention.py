"""Tiled block attention and the short convolution against their definitions, in float64."""

import pytest
import torch
from torch import Tensor

from longtrain.core.layout import SequenceLayout
from longtrain_kernels.block_attention import Tokens, attention, attention_forward, merge, tiled
from longtrain_kernels.block_attention.reference import attention_reference
from tests.harness.documents import awkward_starts

# float64 rounding of a softmax over at most 90 keys
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}
T = 90


def tokens(begin: int, end: int) -> Tokens:
    index = torch.arange(begin, end)
    return Tokens(index, SequenceLayout(T, 1, awkward_starts(T, edges=(30, 60))).documents(index))


def qkv(heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(heads)
    make = lambda h, d: torch.randn(2, T, h, d, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return make(heads, 6), make(kv_heads, 6), make(kv_heads, 4)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "TILE", 16)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (2, 1)])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_attention_is_the_definition(heads: int, kv_heads: int, window: int | None) -> None:
    q, k, v = qkv(heads, kv_heads)
    got = attention(q, k, v, tokens(0, T), tokens(0, T), 0.3, window)
    want, _ = attention_reference(q, k, v, tokens(0, T), tokens(0, T), 0.3, window)
    torch.testing.assert_close(got, want, **TOLERANCE)
    grad = torch.randn(got.shape, dtype=got.dtype)
    got_grads, want_grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (got, want))
    torch.testing.assert_close(got_grads, want_grads, **TOLERANCE)


@pytest.mark.parametrize("window", [None, 25])
def test_merged_blocks_are_the_whole(window: int | None) -> None:
    q, k, v = (x.detach() for x in qkv(4, 2))
    queries = tokens(30, 60)
    want = attention_forward(q[:, 30:60], k, v, queries, tokens(0, T), 0.3, window)
    got = None
    for begin, end in ((60, 90), (0, 30), (30, 60), (60, 60)):  # first a block that nobody sees; an empty one last
        part = attention_forward(
            q[:, 30:60], k[:, begin:end], v[:, begin:end], queries, tokens(begin, end), 0.3, window
        )
        got = part if got is None else merge(*got, *part)
    torch.testing.assert_close(got, want, **TOLERANCE)


def test_a_query_that_sees_nothing_gets_zero() -> None:
    q, k, v = (x.detach() for x in qkv(2, 1))
    output, lse = attention_forward(q[:, :30], k[:, 60:], v[:, 60:], tokens(0, 30), tokens(60, T), 1.0)
    assert output.abs().max() == 0
    assert (lse == float("-inf")).all()
