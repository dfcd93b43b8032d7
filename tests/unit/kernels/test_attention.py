"""Block attention, by every kernel that runs here, against its definition in float64."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from longtrain_kernels.block_attention import BlockAttention, Span, Tokens, attention, choice, merge_into, plain
from longtrain_kernels.block_attention.kernel import Mask, Squares, Unsupported
from longtrain_kernels.block_attention.reference import attention_reference
from tests.harness.documents import awkward_starts

# float64 rounding of a softmax over at most 90 keys
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}
T = 90
CUTS = {
    "whole": ([(0, 90)], [(0, 90)]),
    "behind": ([(30, 60)], [(0, 30)]),
    "later keys": ([(0, 30)], [(60, 90)]),
    "prefix": ([(30, 61)], [(0, 61)]),
    "zigzag": ([(15, 30), (60, 75)], [(15, 30), (60, 75)]),
    "zigzag, earlier rank": ([(15, 30), (60, 75)], [(0, 15), (75, 90)]),
    "zigzag, later rank": ([(0, 15), (75, 90)], [(15, 30), (60, 75)]),
    "zigzag, all": ([(15, 30), (60, 75)], [(0, 90)]),
    "gaps": ([(3, 4), (10, 40), (50, 80)], [(0, 3), (20, 55), (70, 75)]),
    "nothing": ([(0, 30)], [(40, 40)]),
}


def tokens(spans: list[Span], packed: bool) -> Tokens:
    return Tokens(tuple(spans), awkward_starts(T, edges=(30, 60)) if packed else ((0,), (0,)))


def rows(x: Tensor, spans: list[Span]) -> Tensor:
    return torch.cat([x[:, b:e] for b, e in spans], dim=1).detach().requires_grad_()


def qkv(heads: int, kv_heads: int, value: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(heads)
    make = lambda h, d: torch.randn(2, T, h, d, dtype=torch.float64)  # noqa: E731
    return make(heads, 6), make(kv_heads, 6), make(kv_heads, value)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "TILE", 16)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("kernel", "heads", "kv_heads", "value"), [("plain", 9, 3, 4), ("flash", 4, 4, 6), ("flash", 2, 1, 6)]
)
def test_every_cut_is_the_definition(
    kernel: str, heads: int, kv_heads: int, value: int, cut: str, packed: bool
) -> None:
    queries, keys = (tokens(spans, packed) for spans in CUTS[cut])
    inputs = [
        rows(x, spans)
        for x, spans in zip(qkv(heads, kv_heads, value), (CUTS[cut][0], *[CUTS[cut][1]] * 2), strict=True)
    ]
    operation = BlockAttention(0.3, kernel=kernel)
    got, lse = operation.forward(*(x.detach() for x in inputs), queries, keys)
    want, want_lse = attention_reference(*inputs, queries, keys, 0.3)
    torch.testing.assert_close(got, want, **TOLERANCE)
    torch.testing.assert_close(lse, want_lse, **TOLERANCE)
    grad = torch.randn(got.shape, dtype=got.dtype)
    got_grads, want_grads = (torch.autograd.grad(x, inputs, grad) for x in (operation(*inputs, queries, keys), want))
    torch.testing.assert_close(got_grads, want_grads, **TOLERANCE)


@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("spans", [([(0, 90)], [(0, 90)]), ([(30, 60)], [(20, 60)]), ([(5, 60)], [(-9, 60)])])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_windows_are_the_definition(window: int, spans: tuple[list[Span], list[Span]], packed: bool) -> None:
    queries, keys = (tokens(s, packed) for s in spans)
    padded = [torch.cat([torch.full_like(x[:, :9], float("nan")), x], dim=1) for x in qkv(4, 2, 5)]
    q, k, v = (
        rows(x, [(b + 9, e + 9) for b, e in s]) for x, s in zip(padded, (spans[0], *[spans[1]] * 2), strict=True)
    )
    before = max(0, -spans[1][0][0])  # the definition has no keys before the sequence
    want, _ = attention_reference(
        q,
        k[:, before:],
        v[:, before:],
        queries,
        tokens([(max(0, spans[1][0][0]), spans[1][0][1])], packed),
        0.3,
        window,
    )
    operation = BlockAttention(0.3, window)
    got = operation(q, k, v, queries, keys)
    torch.testing.assert_close(got, want, **TOLERANCE)
    grad = torch.randn(got.shape, dtype=got.dtype)
    got_grads, want_grads = (torch.autograd.grad(x, (q, k, v), grad) for x in (got, want))
    torch.testing.assert_close(got_grads, want_grads, **TOLERANCE)


def test_merged_blocks_are_the_whole() -> None:
    q, k, v = qkv(4, 2, 6)
    operation, queries, everything = BlockAttention(0.3), tokens([(30, 60)], True), tokens([(0, T)], True)
    want, want_lse = operation.forward(q[:, 30:60], k, v, queries, everything)
    sums = output, lse = torch.zeros_like(want), torch.full_like(want_lse, float("-inf"))
    parts = [torch.zeros_like(want), torch.full_like(want_lse, float("-inf"))]
    for begin, end in ((60, 90), (0, 30), (30, 60), (60, 60)):  # first a block that nobody sees; an empty one last
        block = (q[:, 30:60], k[:, begin:end], v[:, begin:end], queries, tokens([(begin, end)], True))
        operation.merge(*sums, *block)
        part, part_lse = operation.forward(*block)
        merge_into(parts[0], parts[1].mT, part, part_lse.mT)
    torch.testing.assert_close((output, lse), (want, want_lse), **TOLERANCE)
    torch.testing.assert_close(tuple(parts), (want, want_lse), **TOLERANCE)


def test_blocks_are_as_few_as_they_can_be() -> None:
    starts = ((0,),)
    mine, other = Tokens(((15, 30), (60, 75)), starts), Tokens(((0, 15), (75, 90)), starts)
    own = mine.plan(mine, None)
    assert [(b.queries, b.keys) for b in own.squares] == [(slice(0, 30), slice(0, 30))]
    assert not own.rectangles
    cross = mine.plan(other, None)
    assert [(b.queries, b.keys) for b in cross.rectangles] == [(slice(0, 30), slice(0, 15))]
    assert not cross.squares
    assert mine.plan(other, None) is cross


class Packing(plain.Plain):
    """Takes many squares at once, one after another."""

    packs = True

    def forward_squares(
        self, q: Tensor, k: Tensor, v: Tensor, squares: Squares, window: int | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        parts = [
            self.forward(q[None, own], k[None, own], v[None, own], Mask(True, window), scale) for own in cut(squares)
        ]
        return torch.cat([o[0] for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)

    def backward_squares(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, squares: Squares,
        window: int | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        parts = [
            self.backward(
                *(x[None, own] for x in (grad, q, k, v, output)), lse[None, :, own], Mask(True, window), scale
            )
            for own in cut(squares)
        ]
        dq, dk, dv = (torch.cat([x[0] for x in xs]) for xs in zip(*parts, strict=True))
        return dq, dk, dv


def cut(squares: Squares) -> list[slice]:
    ends = squares.ends.tolist()
    assert squares.longest == max(b - a for a, b in pairwise(ends))
    return [slice(a, b) for a, b in pairwise(ends)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("length", [None, 7])
def test_squares_in_one_call_are_the_definition(monkeypatch: pytest.MonkeyPatch, cut: str, length: int | None) -> None:
    monkeypatch.setattr(choice, "_PLAIN", Packing())
    monkeypatch.setattr(attention, "PACK_FROM", 1)
    starts = ((0, 3, 20, 35, 62), (0, 16)) if length is None else (tuple(range(0, T, length)),) * 2
    queries, keys = (Tokens(tuple(spans), starts) for spans in CUTS[cut])
    inputs = [rows(x, s) for x, s in zip(qkv(4, 2, 4), (CUTS[cut][0], *[CUTS[cut][1]] * 2), strict=True)]
    operation = BlockAttention(0.3, kernel="plain")
    want, want_lse = attention_reference(*inputs, queries, keys, 0.3)
    torch.testing.assert_close(operation.forward(*inputs, queries, keys), (want, want_lse), **TOLERANCE)
    output, lse = torch.zeros_like(want), torch.full_like(want_lse, float("-inf"))
    with torch.no_grad():
        operation.merge(output, lse, *inputs, queries, keys)
    torch.testing.assert_close((output, lse), (want, want_lse), **TOLERANCE)
    grad = torch.randn(want.shape, dtype=want.dtype)
    got_grads, want_grads = (torch.autograd.grad(x, inputs, grad) for x in (operation(*inputs, queries, keys), want))
    torch.testing.assert_close(got_grads, want_grads, **TOLERANCE)


def test_a_kernel_that_cannot_compute_it_is_refused() -> None:
    q, k, v = qkv(2, 1, 4)
    everything = tokens([(0, T)], False)
    for kernel, problem in (("cudnn", "NVIDIA GPUs|cuDNN"), ("flash", "one width"), ("fastest", "choose auto, cudnn")):
        with pytest.raises(Unsupported, match=problem):
            BlockAttention(0.3, kernel=kernel).forward(q, k, v, everything, everything)
