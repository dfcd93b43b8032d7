"""The diagonal scan's kernels, in Triton's interpreter, against the definition in float64."""

from functools import partial

import pytest
import torch

from longtrain_kernels.backend import Backend
from longtrain_kernels.diagonal_scan import DiagonalScan
from tests.harness.scans import packed_documents, scan_errors, scan_inputs

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
    inputs = scan_inputs(kind, (2, length, 1, 2, 20, 9), torch.float32)
    errors = scan_errors(TRITON, REFERENCE, inputs, packed_documents(2, length))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("decay_scale", [8.0, 80.0])
def test_decays_that_one_anchor_does_not_reach(decay_scale: float) -> None:
    # 32 tokens decay by exp(-128) and exp(-1280): such segments go a token at a time
    inputs = scan_inputs("vector", (1, 75, 1, 1, 16, 16), torch.float32, decay_scale=decay_scale)
    errors = scan_errors(TRITON, REFERENCE, inputs, packed_documents(1, 75))
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("kind", ["scalar", "vector"])
def test_gradients_of_the_final_state_alone(kind: str) -> None:
    inputs = scan_inputs(kind, (1, 40, 1, 1, 16, 16), torch.float32)
    documents = torch.zeros(1, 40, dtype=torch.int64)
    names = ("keys", "values", "log_decay")
    got, want = (
        torch.autograd.grad(op(**inputs).apply(documents, None)[1].sum(), [inputs[name] for name in names])
        for op in (TRITON, REFERENCE)
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
