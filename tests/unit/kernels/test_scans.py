"""The chunked scans against the loop over time, in float64: outputs, final state and every gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from longtrain_kernels.affine import accumulator_dtype
from longtrain_kernels.backend import Backend
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.delta_scan.reference import delta_scan_reference
from longtrain_kernels.diagonal_scan import DiagonalScan
from longtrain_kernels.diagonal_scan.reference import diagonal_scan_reference
from tests.harness.documents import awkward_starts, segment_documents
from tests.harness.scans import scan_errors, scan_inputs

# float64 rounding of sums over at most 130 tokens
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
KINDS = ("scalar", "vector", "delta", "delta vector")
H, K, V = 3, 5, 4


def inputs(kind: str, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    q, k = torch.randn(2, length, H, K), torch.randn(2, length, H, K)
    v, gate = torch.randn(2, length, H, V), torch.randn(2, length, H, K)
    tensors = {
        "scalar": (q, k, v, -gate[..., 0].exp()),
        "vector": (q, k, v, -gate.exp()),
        "delta vector": (q, torch.nn.functional.normalize(k, dim=-1), v, gate[..., 1].sigmoid(), -gate.exp()),
        "delta": (q, torch.nn.functional.normalize(k, dim=-1), v, 2 * gate[..., 1].sigmoid(), -gate[..., 0].exp()),
    }[kind]
    return tuple(t.to(dtype).requires_grad_() for t in tensors)


def op(kind: str, tensors: tuple[Tensor, ...]) -> DiagonalScan | DeltaScan:
    return DeltaScan(*tensors) if kind.startswith("delta") else DiagonalScan(*tensors)


def reference(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return delta_scan_reference if kind.startswith("delta") else diagonal_scan_reference


def gradients(results: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    cotangents = [torch.randn(r.shape, dtype=torch.float64).to(r.dtype) for r in results]
    return torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 130])
def test_apply_is_the_recurrence(kind: str, length: int) -> None:
    tensors = inputs(kind, length)
    state = torch.randn(2, H, K, V, dtype=torch.float64, requires_grad=True)
    starts = awkward_starts(length, edges=(16, 64))
    # The second segment of a sequence: its first token continues the carry's document in row 0.
    documents = segment_documents(starts, 0, length) - torch.tensor([[1], [0]])
    got = op(kind, tensors).apply(documents, state)
    want = reference(kind)(*tensors, documents, state)
    torch.testing.assert_close(got, want, **TOLERANCE)
    leaves = (*tensors, state)
    torch.testing.assert_close(gradients(got, leaves), gradients(want, leaves), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 17, 65])
@pytest.mark.parametrize("packed", [False, True])
def test_a_segment_corrected_by_its_carry_is_the_recurrence_from_it(kind: str, length: int, packed: bool) -> None:
    tensors = inputs(kind, length)
    state = torch.randn(2, H, K, V, dtype=torch.float64, requires_grad=True)
    documents = torch.zeros(2, length, dtype=torch.int64)
    if packed and length:
        documents = segment_documents(awkward_starts(length, edges=(16,)), 0, length) - torch.tensor([[1], [0]])
    segment = op(kind, tensors).summarize(documents)
    transition = segment.transition if kind.startswith("delta") else segment.transition[..., None]
    carried = transition @ state if kind.startswith("delta") else transition * state
    got = (segment.correct(state), carried + segment.state)
    want = reference(kind)(*tensors, documents, state)
    torch.testing.assert_close(got, want, **TOLERANCE)
    leaves = (*tensors, state)
    torch.testing.assert_close(gradients(got, leaves), gradients(want, leaves), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_segment_is_the_identity_and_stays_in_the_graph(kind: str) -> None:
    tensors = inputs(kind, 0)
    segment = op(kind, tensors).summarize(torch.zeros(2, 0, dtype=torch.int64))
    identity = torch.eye(K, dtype=torch.float64).expand(2, H, -1, -1) if kind.startswith("delta") else torch.ones(())
    torch.testing.assert_close(segment.transition, identity.to(torch.float64).expand_as(segment.transition))
    assert segment.state.abs().max() == 0
    assert all(t.requires_grad for t in (segment.output, segment.readout, segment.transition, segment.state))


@pytest.mark.parametrize("kind", KINDS)
def test_another_document_changes_nothing_to_the_bit(kind: str) -> None:
    first, second = inputs(kind, 40), inputs(kind, 40)
    second = tuple(
        torch.cat([b[:, :17], a[:, 17:]], dim=1).detach() for a, b in zip(first, inputs(kind, 41)[:], strict=True)
    )
    documents = segment_documents(((0, 17), (0, 17)), 0, 40)
    got, other = (op(kind, t).apply(documents, None)[0][:, 17:] for t in (first, second))
    assert torch.equal(got, other)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_inputs_keep_a_float32_state(kind: str) -> None:
    tensors = inputs(kind, 65, torch.bfloat16)
    output, state = op(kind, tensors).apply(torch.zeros(2, 65, dtype=torch.int64), None)
    exact, exact_state = reference(kind)(*(t.double() for t in tensors), torch.zeros(2, 65, dtype=torch.int64), None)
    assert output.dtype == torch.bfloat16
    assert state.dtype == accumulator_dtype(torch.bfloat16) == torch.float32
    # bfloat16 rounds the output to 2^-9; the state is float32 throughout
    torch.testing.assert_close(output.double(), exact, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-4, atol=1e-4)


def test_strong_decay_underflows_to_zero_without_nan() -> None:
    q, k, v, _ = inputs("scalar", 130, torch.float32)
    decay = torch.full((2, 130, H), -200.0, requires_grad=True)
    documents = segment_documents(((0,), (0, 17, 120)), 0, 130)
    output, state = DiagonalScan(q, k, v, decay).apply(documents, None)
    grads = torch.autograd.grad((output, state), (q, k, v, decay), (torch.ones_like(output), torch.ones_like(state)))
    assert all(torch.isfinite(t).all() for t in (output, state, *grads))


def delta_inputs(decay: str, length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Two key heads for four value heads, beta in (0, 2), decay "none", "scalar" or "vector"."""
    torch.manual_seed(length)
    q, k = torch.randn(2, length, 2, K), torch.nn.functional.normalize(torch.randn(2, length, 2, K), dim=-1)
    v, gate = torch.randn(2, length, 4, V), torch.randn(2, length, 4, K)
    log_decay = {"none": (), "scalar": (-gate[..., 0].exp(),), "vector": (-gate.exp(),)}[decay]
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, v, 2 * gate[..., 1].sigmoid(), *log_decay))


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CHUNKED])
@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize("length", [1, 67])
def test_key_heads_of_the_delta_scan_serve_several_value_heads(backend: Backend, decay: str, length: int) -> None:
    tensors = delta_inputs(decay, length)
    documents = segment_documents(awkward_starts(length, edges=(16, 64)), 0, length) - torch.tensor([[1], [0]])
    state = torch.randn(2, 4, K, V, dtype=torch.float64, requires_grad=True)
    got = DeltaScan(*tensors, backend=backend).apply(documents, state)
    q, k = (t.repeat_interleave(2, dim=2) for t in tensors[:2])
    log_decay = tensors[4] if decay != "none" else torch.zeros_like(tensors[3])
    want = delta_scan_reference(q, k, *tensors[2:4], log_decay, documents, state)
    torch.testing.assert_close(got, want, **TOLERANCE)
    leaves = (*tensors, state)
    torch.testing.assert_close(gradients(got, leaves), gradients(want, leaves), **TOLERANCE)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_decays_that_underflow_leave_the_delta_scan_exact(decay: str) -> None:
    # One sum over a chunk would lose the decays of a few after one of 1e30: only those of later tokens count.
    *tensors, log_decay = delta_inputs(decay, 67, torch.float32)
    strong = torch.arange(67) % 5 == 3
    log_decay = torch.where(strong.view(67, *(1,) * (log_decay.dim() - 2)), -1e30, log_decay).detach().requires_grad_()
    log_decay.data[:, 40:44] = -200.0
    leaves = (*tensors, log_decay)
    documents = segment_documents(((0,), (0, 17, 50)), 0, 67)
    got = DeltaScan(*leaves, backend=Backend.CHUNKED).apply(documents, None)
    exact = tuple(t.detach().double().requires_grad_() for t in leaves)
    want = DeltaScan(*exact, backend=Backend.REFERENCE).apply(documents, None)
    # sums of decays reach 2^11 and float32 rounds them to 2^-13, several in a row
    close = {"rtol": 2**-11, "atol": 2**-11, "check_dtype": False}
    torch.testing.assert_close(got, want, **close)
    torch.testing.assert_close(gradients(got, leaves), gradients(want, exact), **close)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_decays_that_underflow_leave_the_diagonal_scan_exact(decay: str) -> None:
    tensors = scan_inputs(decay, (2, 67, 2, 2, 4, 5), torch.float32)
    strong = (torch.arange(67) % 5 == 3).view(67, *(1,) * (tensors["log_decay"].dim() - 2))
    tensors["log_decay"] = torch.where(strong, -1e30, tensors["log_decay"]).detach().requires_grad_()
    documents = segment_documents(((0,), (0, 17, 50)), 0, 67)
    chunked, reference = (partial(DiagonalScan, backend=b) for b in (Backend.CHUNKED, Backend.REFERENCE))
    errors = scan_errors(chunked, reference, tensors, documents)
    # sums of decays reach 2^11 and float32 rounds them to 2^-13, several in a row
    assert max(errors.values()) < 2**-11, errors


@pytest.mark.parametrize("wrong", [{"queries": (2, 8, 3, 4)}, {"values": (2, 7, 3, 4)}, {"log_decay": (2, 8)}])
def test_mismatched_shapes_are_named(wrong: dict[str, tuple[int, ...]]) -> None:
    shapes = {"queries": (2, 8, 3, 5), "keys": (2, 8, 3, 5), "values": (2, 8, 3, 4), "log_decay": (2, 8, 3)} | wrong
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        DiagonalScan(**{name: torch.zeros(shape) for name, shape in shapes.items()})


SCAN = {"queries": (2, 8, 3, 5), "keys": (2, 8, 3, 5), "values": (2, 8, 3, 4)}


@pytest.mark.parametrize(
    ("documents", "state", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), None, r"documents \(2, 7\)"),
        (torch.zeros(8, dtype=torch.int64), None, r"documents \(8,\)"),
        (torch.zeros(2, 8), None, "integers"),
        (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 3, 4, 5), r"state \(2, 3, 4, 5\)"),
    ],
)
def test_what_does_not_fit_a_scan_is_named(documents: Tensor, state: Tensor | None, message: str) -> None:
    scan = DiagonalScan(**{name: torch.zeros(shape) for name, shape in SCAN.items()})
    with pytest.raises(ValueError, match=message):
        scan.apply(documents, state)


def test_inputs_of_a_scan_are_floats_of_four_dimensions() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SCAN.items()}
    with pytest.raises(ValueError, match="values"):
        DiagonalScan(**tensors | {"values": tensors["values"].long()})
    with pytest.raises(ValueError, match="keys"):
        DiagonalScan(**tensors | {"keys": tensors["keys"][0]})


def test_a_backend_may_be_named_and_must_exist() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SCAN.items()}
    documents = torch.zeros(2, 8, dtype=torch.int64)
    assert DiagonalScan(**tensors, backend="reference").apply(documents, None)[0].shape == (2, 8, 3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="junk"):
        DiagonalScan(**tensors, backend="junk").apply(documents, None)  # type: ignore[arg-type]
