"""The delta scan's kernels in Triton's interpreter against the loop over time: outputs, states and every gradient."""

import pytest
import torch
from torch import Tensor

from longtrain_kernels.affine import advance
from longtrain_kernels.backend import Backend
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.delta_scan import triton as kernels
from tests.harness.documents import awkward_starts, segment_documents
from tests.harness.scans import KERNEL_DEVICE

G, H, K, V = 1, 2, 20, 36
DECAYS = ("none", "scalar", "vector")


def inputs(
    decay: str, length: int, dtype: torch.dtype = torch.float32, strength: float = 1.0, batch: int = 2
) -> tuple[Tensor, ...]:
    """Rows of wider tensors, so that strides are not those of contiguous ones; beta in (0, 2)."""
    torch.manual_seed(length)
    qk, v = torch.randn(batch, length, G, 2 * K), torch.randn(batch, length, H, V + 3)[..., :V]
    q, k = qk[..., :K], torch.nn.functional.normalize(qk, dim=-1)[..., K:] * 2**0.5
    gate = torch.randn(batch, length, H, K)
    log_decay = {"none": (), "scalar": (-strength * gate[..., 0].exp(),), "vector": (-strength * gate.exp(),)}[decay]
    return tuple(t.to(KERNEL_DEVICE, dtype).requires_grad_() for t in (q, k, v, 2 * gate[..., 1].sigmoid(), *log_decay))


def results(
    tensors: tuple[Tensor, ...], documents: Tensor, state: Tensor, backend: Backend
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, final state and transition; and every gradient, with cotangents for outputs and final state."""
    documents, state = documents.to(KERNEL_DEVICE), state.to(KERNEL_DEVICE)
    segment = DeltaScan(*tensors, backend=backend).summarize(documents)
    outputs, final = segment.correct(state), advance(segment.transition, state) + segment.state
    torch.manual_seed(7)
    cotangents = [torch.randn(r.shape, dtype=torch.float64).to(r) for r in (outputs, final)]
    grads = torch.autograd.grad((outputs, final), (*tensors, state), cotangents)
    return (outputs.detach(), final.detach(), segment.transition.detach()), grads


def assert_equal_to_the_reference(tensors: tuple[Tensor, ...], documents: Tensor, rounding: float) -> None:
    state = torch.randn(documents.shape[0], H, K, V, requires_grad=True)
    exact = tuple(t.detach().double().requires_grad_() for t in tensors)
    exact_state = state.detach().double().requires_grad_()
    got = results(tensors, documents, state, Backend.TRITON)
    want = results(exact, documents, exact_state, Backend.REFERENCE)
    for mine, true in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert torch.isfinite(mine).all()
        # Relative to the largest: sums round in proportion to their terms, not to themselves. Those of the gradient of
        # a log-decay are q dq and k dk, of order one at least, which may cancel.
        scale = max(true.abs().max().item(), 1.0)
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=rounding * scale)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of one chunk, gradients two at a time: as many of both as a test's few tokens allow."""
    monkeypatch.setattr(kernels, "LEAST_CHUNKS", 1)
    monkeypatch.setattr(kernels, "MOST_CHUNKS", 1)
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 8)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 130])
def test_kernels_are_the_recurrence(decay: str, length: int) -> None:
    # The second segment of a sequence: its first token continues the carry's document in row 0.
    documents = segment_documents(awkward_starts(length, edges=(16, 64)), 0, length) - torch.tensor([[1], [0]])
    # float32 sums of up to 130 terms
    assert_equal_to_the_reference(inputs(decay, length), documents, rounding=2e-5)


def test_slow_vector_decays() -> None:
    # Chunks of one document whose decays are split between operands, and one whose documents share it.
    tensors = inputs("vector", 200, strength=0.1, batch=1)
    documents = segment_documents(((0, 64, 130),), 0, 200)
    # float32 sums of up to 200 terms
    assert_equal_to_the_reference(tensors, documents, rounding=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision(decay: str) -> None:
    # The interpreter multiplies the bit patterns of bfloat16 matrices; those are tested on GPUs.
    tensors = inputs(decay, 66, torch.float16, batch=1)
    # float16 rounds operands and results to 2^-11; a few such roundings follow each other
    assert_equal_to_the_reference(tensors, torch.zeros(1, 66, dtype=torch.int64), rounding=4e-3)


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_decays_may_underflow(decay: str) -> None:
    tensors = inputs(decay, 70, strength=100.0, batch=1)
    documents = segment_documents(((0, 20, 50),), 0, 70)
    # sums of decays reach 2^13, where float32 has steps of 2^-10
    assert_equal_to_the_reference(tensors, documents, rounding=2e-3)


@pytest.mark.parametrize("decay", DECAYS)
def test_an_empty_segment_is_the_identity_and_stays_in_the_graph(decay: str) -> None:
    tensors = inputs(decay, 0)
    state = torch.randn(2, H, K, V, requires_grad=True)
    (outputs, final, transition), grads = results(tensors, torch.zeros(2, 0, dtype=torch.int64), state, Backend.TRITON)
    assert outputs.shape == (2, 0, H, V)
    assert torch.equal(final, state.to(final)) and torch.equal(transition, torch.eye(K).to(final).expand_as(transition))
    assert [g.shape for g in grads] == [t.shape for t in (*tensors, state)]


@pytest.mark.parametrize("decay", DECAYS[1:])
def test_another_document_changes_nothing_to_the_bit(decay: str) -> None:
    first, other = inputs(decay, 66, batch=1), inputs(decay, 67, batch=1)
    second = tuple(
        torch.cat([b[:, :21], a[:, 21:]], dim=1).detach().requires_grad_() for a, b in zip(first, other, strict=True)
    )
    documents = segment_documents(((0, 21),), 0, 66)
    state = torch.randn(1, H, K, V, requires_grad=True)
    (outputs, final, _), grads = results(first, documents, state, Backend.TRITON)
    (outputs_too, final_too, _), grads_too = results(second, documents, 2 * state, Backend.TRITON)
    assert torch.equal(outputs[:, 21:], outputs_too[:, 21:]) and torch.equal(final, final_too)
    assert all(torch.equal(a[:, 21:], b[:, 21:]) for a, b in zip(grads[:-1], grads_too[:-1], strict=True))


def test_float64_is_refused_by_name() -> None:
    tensors = tuple(t.double() for t in inputs("none", 4))
    with pytest.raises(ValueError, match="float64"):
        DeltaScan(*tensors, backend=Backend.TRITON).summarize(
            torch.zeros(2, 4, dtype=torch.int64, device=KERNEL_DEVICE)
        )
