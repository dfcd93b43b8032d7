"""The diagonal scan's kernels on a GPU against the definition in float64: `pytest -m gpu`."""

from functools import partial

import pytest
import torch

from longtrain_kernels.backend import Backend
from longtrain_kernels.diagonal_scan import DiagonalScan
from tests.harness.scans import packed_documents, scan_errors, scan_inputs

pytestmark = pytest.mark.gpu

TRITON = partial(DiagonalScan, backend=Backend.TRITON)
REFERENCE = partial(DiagonalScan, backend=Backend.REFERENCE)
# Relative error norms. bfloat16 operands round to 2^-9, and gradients pass through several; float16 inputs are
# multiplied as tf32 with its 10 bits; float32 as three tf32 products.
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 2e-3, torch.float32: 2e-5}
KINDS = ("none", "constant", "scalar", "vector")


def excess(kind: str, shape: tuple[int, ...], dtype: torch.dtype, packed: bool, decay_scale: float = 1.0) -> list[str]:
    """Errors beyond their tolerance."""
    batch, length, *_ = shape
    inputs = scan_inputs(kind, shape, dtype, "cuda", decay_scale)  # type: ignore[arg-type]
    documents = packed_documents(batch, length) if packed else torch.zeros(batch, length, dtype=torch.int64)
    errors = scan_errors(TRITON, REFERENCE, inputs, documents.cuda())
    # that of decays adds up the errors of many tokens
    bounds = dict.fromkeys(errors, TOLERANCES[dtype]) | {"d_log_decay": 6 * TOLERANCES[dtype]}
    return [f"{name}: {error:.1e}" for name, error in errors.items() if not error < bounds[name]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 63, 65, 1000])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_bfloat16_lengths(kind: str, length: int, packed: bool) -> None:
    assert not excess(kind, (2, length, 2, 2, 128, 128), torch.bfloat16, packed)


@pytest.mark.parametrize("kind", ["scalar", "vector"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("width", "columns"), [(32, 64), (64, 64), (100, 36), (128, 64), (256, 256)])
def test_widths_and_types(kind: str, dtype: torch.dtype, width: int, columns: int) -> None:
    assert not excess(kind, (1, 200, 2, 4, width, columns), dtype, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decay_scale", [5.0, 60.0])
def test_decays_that_leave_the_range_of_one_anchor(dtype: torch.dtype, decay_scale: float) -> None:
    # 64 tokens decay by exp(-160) and exp(-1900): such segments go a token at a time
    assert not excess("vector", (1, 300, 2, 2, 64, 64), dtype, True, decay_scale)
