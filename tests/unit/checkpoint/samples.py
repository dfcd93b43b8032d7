"""Checkpoints to test with."""

from pathlib import Path

import torch

from longtrain.checkpoint.store import CheckpointStore

METADATA = {"tokens": 4096, "ledger": [{"step": 1, "loss": (5.25).hex()}], "ratio": 0.1}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """All element types a run has, 0-dim, empty and strided tensors; small, so that tests may try every byte."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "model.weight": torch.nn.Parameter(matrix),
        "model.strided": torch.randn(4, 6, generator=generator).t(),
        "model.half": matrix.to(torch.bfloat16),
        "optimizer.precise": matrix.double()[0],
        "optimizer.step": torch.tensor(seed, dtype=torch.int64),
        "optimizer.scale": torch.tensor(0.1, dtype=torch.float64),
        "optimizer.none": torch.empty(0, 3),
        "random.bytes": torch.arange(5, dtype=torch.uint8),
        "mask": torch.tensor([True, False]),
    }


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names in the same order, types, shapes and bits."""

    def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return list(left) == list(right) and all(bits(left[name]) == bits(right[name]) for name in left)


def store_with(directory: Path, steps: tuple[int, ...], keep: int = 9) -> CheckpointStore:
    """A store with a checkpoint of `state(step)` for each step."""
    store = CheckpointStore(directory, keep)
    for step in steps:
        store.save(step, state(step), METADATA)
    return store


def damage(path: Path, offset: int = 0) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def visible(directory: Path) -> list[str]:
    """Names of the checkpoints, and of anything hidden, sorted."""
    return sorted(path.name for path in directory.iterdir())
