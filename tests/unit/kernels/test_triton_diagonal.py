"""The diagonal scan's kernels, in Triton's interpreter, against the definition in float64."""

from functools import partial
from typing import Any

import pytest
import torch

from longtrain_kernels.backend import Backend
from longtrain_kernels.diagonal_scan import DiagonalScan
from longtrain_kernels.diagonal_scan.launch import Operand
from tests.harness.scans import KERNEL_DEVICE, packed_documents, scan_errors, scan_inputs

# The interpreter takes seconds a case; no and constant decays run the scalar kernels.
CASES = [
    *((kind, length) for kind in ("scalar", "vector") for length in (1, 31, 65, 200)),
    ("none", 65),
    ("constant", 65),
]
# float32 sums of a few hundred terms
TOLERANCE = 1e-5
TRITON = partial(DiagonalScan, backend=Backend.TRITON)
REFERENCE = partial(DiagonalScan, backend=Backend.REFERENCE)


@pytest.mark.parametrize(("kind", "length"), CASES)
def test_kernels_are_the_recurrence(kind: str, length: int) -> None:
    inputs = scan_inputs(kind, (2, length, 1, 2, 20, 9), torch.float32, KERNEL_DEVICE)
    errors = scan_errors(TRITON, REFERENCE, inputs, packed_documents(2, length).to(KERNEL_DEVICE))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("decay_scale", [8.0, 80.0])
def test_decays_that_one_anchor_does_not_reach(decay_scale: float) -> None:
    # 32 tokens decay by exp(-128) and exp(-1280): such segments go a token at a time
    inputs = scan_inputs("vector", (1, 75, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE, decay_scale)
    errors = scan_errors(TRITON, REFERENCE, inputs, packed_documents(1, 75).to(KERNEL_DEVICE))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_gradients_of_the_final_state_alone(kind: str) -> None:
    inputs = scan_inputs(kind, (1, 40, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE)
    documents = torch.zeros(1, 40, dtype=torch.int64, device=KERNEL_DEVICE)
    names = ("keys", "values", "log_decay")
    got, want = (
        torch.autograd.grad(op(**inputs).apply(documents, None)[1].sum(), [inputs[name] for name in names])
        for op in (TRITON, REFERENCE)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_constant_decay_where_little_cancels() -> None:
    # elsewhere it is compared with its terms, many times as large as their sum
    inputs = scan_inputs("constant", (1, 70, 1, 2, 16, 16), torch.float32, KERNEL_DEVICE)
    documents = torch.zeros(1, 70, dtype=torch.int64, device=KERNEL_DEVICE)
    got, want = (
        torch.autograd.grad(op(**inputs).apply(documents, None)[0].square().sum(), inputs["log_decay"])
        for op in (TRITON, REFERENCE)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)


def test_backward_drops_what_the_scan_kept() -> None:
    inputs = scan_inputs("vector", (1, 9, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE)
    output, _ = TRITON(**inputs).apply(torch.zeros(1, 9, dtype=torch.int64, device=KERNEL_DEVICE), None)
    loss = output.sum()
    passes: Any = output.grad_fn.passes  # type: ignore[union-attr]
    assert passes.k.tensor.shape == inputs["keys"].shape
    loss.backward(retain_graph=True)
    assert not any(isinstance(value, torch.Tensor | Operand) for value in vars(passes).values())
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_a_document_leaves_another_as_it_is_to_the_bit(kind: str) -> None:
    length, second = 75, 40
    documents = (torch.arange(length) >= second).long().expand(1, -1).to(KERNEL_DEVICE)
    inputs = scan_inputs(kind, (1, length, 1, 2, 16, 16), torch.float32, KERNEL_DEVICE)
    changed = {
        name: torch.cat([tensor[:, :second] * 1.5, tensor[:, second:]], 1).detach().requires_grad_()
        for name, tensor in inputs.items()
    }
    results = []
    for tensors in (inputs, changed):
        output, _ = TRITON(**tensors).apply(documents, None)
        results.append([output, *torch.autograd.grad(output.sum(), list(tensors.values()))])
    assert all(torch.equal(a[:, second:], b[:, second:]) for a, b in zip(*results, strict=True))


def test_a_scalar_decay_that_underflows_leaves_the_others_exact() -> None:
    inputs = scan_inputs("scalar", (1, 67, 1, 2, 16, 16), torch.float32, KERNEL_DEVICE)
    inputs["log_decay"].data[:, 3::5] = -1e30
    documents = torch.zeros(1, 67, dtype=torch.int64, device=KERNEL_DEVICE)
    # sums of decays reach 2^11 and float32 rounds them to 2^-13, several in a row
    errors = scan_errors(TRITON, REFERENCE, inputs, documents)
    assert max(errors.values()) < 2**-11, errors


def test_inputs_changed_before_the_backward_pass_are_noticed() -> None:
    inputs = scan_inputs("scalar", (1, 9, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE)
    values = inputs["values"] * 1.0
    output, _ = TRITON(**inputs | {"values": values}).apply(
        torch.zeros(1, 9, dtype=torch.int64, device=KERNEL_DEVICE), None
    )
    values.mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_no_sequences_are_no_error(kind: str) -> None:
    tensors = scan_inputs(kind, (1, 8, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE)
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    output, state = TRITON(**empty).apply(torch.zeros(0, 8, dtype=torch.int64, device=KERNEL_DEVICE), None)
    assert output.shape == (0, 8, 1, 16)
    assert state.shape == (0, 1, 16, 16)


def test_inference_mode_runs() -> None:
    with torch.inference_mode():
        inputs = {
            name: tensor * 1.0 for name, tensor in scan_inputs("scalar", (1, 9, 1, 1, 16, 16), torch.float32).items()
        }
        inputs = {name: tensor.to(KERNEL_DEVICE) for name, tensor in inputs.items()}
        documents = torch.zeros(1, 9, dtype=torch.int64, device=KERNEL_DEVICE)
        got, want = (op(**inputs).apply(documents, None) for op in (TRITON, REFERENCE))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
