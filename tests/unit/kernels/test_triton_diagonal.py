"""The diagonal scan's kernels, in Triton's interpreter, against the definition in float64."""

import weakref
from functools import partial

import pytest
import torch

from longtrain_kernels.backend import Backend
from longtrain_kernels.diagonal_scan import DiagonalScan
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


def test_backward_drops_what_the_scan_kept() -> None:
    inputs = scan_inputs("vector", (1, 9, 1, 1, 16, 16), torch.float32, KERNEL_DEVICE)
    keys = inputs["keys"] * 1.0  # of which nothing but the scan keeps hold
    kept = weakref.ref(keys)
    op = TRITON(**(inputs | {"keys": keys}))
    del keys
    output, _ = op.apply(torch.zeros(1, 9, dtype=torch.int64, device=KERNEL_DEVICE), None)
    del op
    loss = output.sum()
    assert kept() is not None
    loss.backward(retain_graph=True)
    assert kept() is None
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
