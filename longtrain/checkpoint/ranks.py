"""What the ranks of a collective save or load tell each other: JSON in byte tensors, so that nothing is unpickled.

`gather` and `decide` are collectives over the default process group, or plain calls where there is none. They write
into the journal of the process, so that a rank that others wait for here can be named.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from longtrain.comm.journal import Journal
from longtrain.core.errors import CorruptCheckpoint, LongtrainError, Refused

GROUP = "the world (checkpoint)"
"""Name of these collectives in a journal."""
_CROSSING = {error.__name__: error for error in (Refused, CorruptCheckpoint)}


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if _distributed() else 0


def world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    return dist.get_world_size() if _distributed() else 1


def gather(value: Any, journal: Journal) -> list[Any]:
    """The JSON value of every rank, in rank order, on every rank."""
    if not _distributed():
        return [value]
    payload = _encode(value)
    lengths = [torch.zeros(1, dtype=torch.int64, device=payload.device) for _ in range(world_size())]
    with journal.inside("all_gather", GROUP):
        dist.all_gather(lengths, torch.tensor([payload.numel()], dtype=torch.int64, device=payload.device))
    counts = [int(length) for length in lengths]
    padded = payload.new_zeros(max(counts))
    padded[: payload.numel()] = payload
    rows = [torch.empty_like(padded) for _ in counts]
    with journal.inside("all_gather", GROUP):
        dist.all_gather(rows, padded)
    return [_decode(row[:count]) for row, count in zip(rows, counts, strict=True)]


def decide(action: Callable[[], Any], journal: Journal) -> Any:
    """Run `action` on rank 0 and hand its JSON result to every rank.

    Where it raises, every rank raises: rank 0 the error itself, the others a `Refused` or `CorruptCheckpoint` with
    the same line, or RuntimeError for anything else.
    """
    if not _distributed():
        return action()
    error: Exception | None = None
    answer: dict[str, Any] = {}
    if rank() == 0:
        try:
            answer = {"result": action()}
        except Exception as caught:  # every rank must learn of it, or the others wait for ever
            error = caught
            answer = {"error": type(caught).__name__, "message": str(caught)}
    answer = _broadcast(answer, journal)
    if error is not None:
        raise error
    if "error" in answer:
        kind: type[Exception] = _CROSSING.get(answer["error"], RuntimeError)
        prefix = "" if issubclass(kind, LongtrainError) else f"rank 0: {answer['error']}: "
        raise kind(prefix + answer["message"])
    return answer["result"]


def _broadcast(value: Any, journal: Journal) -> Any:
    payload = _encode(value)
    length = torch.tensor([payload.numel()], dtype=torch.int64, device=payload.device)
    with journal.inside("broadcast", GROUP):
        dist.broadcast(length, src=0)
    if rank() != 0:
        payload = payload.new_empty(int(length))
    with journal.inside("broadcast", GROUP):
        dist.broadcast(payload, src=0)
    return _decode(payload)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _encode(value: Any) -> torch.Tensor:
    # NCCL alone carries nothing that lives in host memory.
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decode(payload: torch.Tensor) -> Any:
    return json.loads(payload.cpu().numpy().tobytes())
