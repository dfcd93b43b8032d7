"""The delta scan's kernels on a GPU against the loop over time in float64: outputs, final state and every gradient."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longtrain_kernels.backend import Backend
from longtrain_kernels.delta_scan import DeltaScan
from longtrain_kernels.delta_scan import triton as kernels
from tests.harness.documents import awkward_starts, segment_documents

pytestmark = pytest.mark.gpu

G, H = 2, 4
# K, V, dtype, and what a sum of products of rounded operands may be off by, in parts of the largest result
WIDTHS = [
    (128, 128, torch.bfloat16, 2e-2),
    (64, 64, torch.bfloat16, 2e-2),
    (256, 256, torch.bfloat16, 2e-2),
    (32, 64, torch.bfloat16, 2e-2),
    (100, 100, torch.bfloat16, 2e-2),
    (128, 64, torch.float16, 4e-3),
    (48, 36, torch.float32, 1e-4),
]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a kernel forgets to write shows; and segments are short, so that 1000 tokens have several windows."""
    monkeypatch.setattr(kernels, "LEAST_CHUNKS", 2)
    monkeypatch.setattr(kernels, "MOST_CHUNKS", 2)
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 16)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()  # the loop in float64 keeps every state; processes beside this one need memory too


def inputs(decay: str, length: int, key: int, value: int, dtype: torch.dtype, strength: float) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    q, k = (
        torch.randn(2, length, G, key) * key**-0.5,
        torch.nn.functional.normalize(torch.randn(2, length, G, key), dim=-1),
    )
    v, gate = torch.randn(2, length, H, value), torch.randn(2, length, H, key)
    log_decay = {"none": (), "scalar": (-strength * gate[..., 0].exp(),), "vector": (-strength * gate.exp(),)}[decay]
    tensors = (q, k, v, 2 * gate[..., 1].sigmoid(), *log_decay)
    return tuple(t.to("cuda", dtype).requires_grad_() for t in tensors)


def errors(tensors: tuple[Tensor, ...], documents: Tensor, value: int) -> dict[str, float]:
    """Largest differences from the loop in float64, relative to the largest true number.

    The gradient of a log-decay is a sum of terms q dq and k dk, which may cancel: it is relative to the larger factor.
    """
    state = torch.randn(2, H, tensors[1].shape[-1], value, device="cuda", requires_grad=True)
    runs = []
    for backend, dtype in ((Backend.TRITON, None), (Backend.REFERENCE, torch.float64)):
        leaves = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in (*tensors, state))
        results = DeltaScan(*leaves[:-1], backend=backend).apply(documents, leaves[-1])
        torch.manual_seed(7)
        cotangents = [torch.randn(r.shape, dtype=torch.float64).to("cuda", r.dtype) for r in results]
        runs.append((*results, *torch.autograd.grad(results, leaves, cotangents)))
    names = (
        "output",
        "final state",
        "dq",
        "dk",
        "dv",
        "dbeta",
        *(("dlog_decay",) if len(tensors) > 4 else ()),
        "dstate",
    )
    scale = {name: true.abs().max().item() for name, true in zip(names, runs[1], strict=True)}
    scale["dlog_decay"] = max(scale.get("dlog_decay", 0.0), scale["dq"], scale["dk"])
    differences = {
        name: (mine.double() - true).abs().max().nan_to_num(float("inf")).item()
        for name, mine, true in zip(names, *runs, strict=True)
    }
    return {name: difference / max(scale[name], 1e-3) for name, difference in differences.items()}


@pytest.mark.parametrize("decay", ["none", "scalar", "vector"])
@pytest.mark.parametrize(("key", "value", "dtype", "tolerance"), WIDTHS)
def test_kernels_are_the_recurrence(decay: str, key: int, value: int, dtype: torch.dtype, tolerance: float) -> None:
    wrong = {}
    for length, strength in ((1, 0.1), (63, 1.0), (65, 0.01), (1000, 0.05), (200, 100.0)):
        tensors = inputs(decay, length, key, value, dtype, strength)
        starts = awkward_starts(length, edges=(16, 64, 512))
        documents = (segment_documents(starts, 0, length) - torch.tensor([[1], [0]])).cuda()
        found = errors(tensors, documents, value)
        wrong |= {f"{length} x {strength}: {name}": error for name, error in found.items() if not error < tolerance}
    assert not wrong


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_another_document_changes_nothing_to_the_bit(decay: str) -> None:
    first, other = (inputs(decay, length, 128, 128, torch.bfloat16, 0.1) for length in (300, 301))
    second = tuple(
        torch.cat([b[:, :75], a[:, 75:]], dim=1) for a, b in zip(first, (t[:, :300] for t in other), strict=True)
    )
    documents = segment_documents(((0, 75), (0, 75)), 0, 300).cuda()
    grads = []
    for tensors in (first, second):
        leaves = tuple(t.detach().requires_grad_() for t in tensors)
        output, state = DeltaScan(*leaves, backend=Backend.TRITON).apply(documents, None)
        grads.append((output, *torch.autograd.grad((output, state), leaves, (output.detach().cos(), state.detach()))))
    assert all(torch.equal(a[:, 75:], b[:, 75:]) for a, b in zip(*grads, strict=True))
