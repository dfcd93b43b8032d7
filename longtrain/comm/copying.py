"""Transfers between GPUs of one node by their copy engines, beside kernels that take every multiprocessor.

NCCL's transfers are kernels. One that is ready together with a kernel that fills the GPU runs after it, or takes
multiprocessors from it; a copy engine needs none. Every rank lets the others write into a buffer of its own, and
streams wait for each other by numbers in it (CUDA driver API, "Stream Memory Operations"), so that no host waits.
"""

import ctypes
import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory

from longtrain.core.errors import Refused

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

# Of the driver's header: CU_STREAM_WAIT_VALUE_FLUSH, and the device attribute that allows it.
_FLUSH, _CAN_FLUSH_REMOTE_WRITES = 1 << 30, 98
_ALIGNMENT = 256  # bytes, of every tensor in a buffer
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same for all processes of a machine, and for no others


def node_number(size: int, device: torch.device) -> int:
    """The same for all ranks of a machine, and for no others; 0 where the GPU does not reach so many ranks' memory."""
    others = [i for i in range(torch.cuda.device_count()) if i != device.index]
    reached = [other for other in others if torch.cuda.can_device_access_peer(device, other)]
    if len(reached) < size - 1 or not _BOOT_ID.exists():
        return 0
    digest = hashlib.sha256(_BOOT_ID.read_bytes()).digest()
    return int.from_bytes(digest[:7], "little") + 1


def open_lanes(rank: int, handle: dist.ProcessGroup, device: torch.device, nodes: Sequence[int]) -> "Lanes | None":
    """Between the ranks of a group with these `node_number`s; None where copy engines cannot serve all of them."""
    if 0 in nodes or len(set(nodes)) > 1:
        logger.warning(
            "NCCL makes the transfers of %d ranks: they are not GPUs of a node that reach each other", len(nodes)
        )
        return None
    return Lanes(rank, len(nodes), handle, device)


@dataclass(frozen=True)
class Lanes:
    """Of one group. Transfers of a lane follow each other; those of different lanes may pass each other."""

    rank: int
    size: int
    handle: dist.ProcessGroup
    device: torch.device
    _lanes: "dict[str, _Lane]" = field(default_factory=dict)

    def shift(
        self, lane: str, tensors: Sequence[Tensor], shapes: Sequence[Shape], by: int, most_bytes: int
    ) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        """Begin to send tensors to the rank `by` after; returns what comes from the rank `by` before, and when.

        `shapes` are of what comes. No rank sends more than `most_bytes`, one tensor after another, see `room_for`.
        Raises Refused where memory cannot be shared.
        """
        if lane not in self._lanes or self._lanes[lane].slot_bytes < most_bytes:
            # Peers may still write into the old buffer; when all have come here and their copies are done, none does.
            torch.cuda.synchronize(self.device)
            old = self._lanes.pop(lane, None)
            stream = old.stream if old is not None else torch.cuda.Stream(self.device, priority=-1)
            del old
            torch.cuda.empty_cache()  # symmetric memory is not taken from what the allocator keeps
            try:
                self._lanes[lane] = _Lane.open(self.rank, self.size, self.handle, stream, most_bytes)
            except RuntimeError as error:  # such as containers of one machine that share no memory
                if isinstance(error, dist.DistError):  # a rank that is late or gone: another start may do better
                    raise
                reason = str(error).strip().splitlines()[0]
                raise Refused(
                    f"sequence_parallel.copy_engines=true: GPUs cannot share {most_bytes:,} bytes ({reason}); "
                    "use sequence_parallel.copy_engines=false"
                ) from error
        return self._lanes[lane].shift(tensors, shapes, by)

    @property
    def nbytes(self) -> int:
        """Of all buffers on this device."""
        return sum(lane.buffers[self.rank].nbytes for lane in self._lanes.values())


def room_for(shapes: Sequence[Shape], itemsizes: Sequence[int]) -> int:
    """Bytes of tensors one after another in a buffer."""
    return sum(_aligned(math.prod(shape) * size) for shape, size in zip(shapes, itemsizes, strict=True))


@dataclass
class _Lane:
    """A buffer on every rank: two slots, which transfers take in turn, and before them two numbers for every rank."""

    rank: int
    size: int
    slot_bytes: int
    stream: torch.cuda.Stream
    buffers: list[Tensor]
    """[bytes] uint8 of every rank, as this rank reaches them."""
    begun: int = 0

    @classmethod
    def open(
        cls, rank: int, size: int, handle: dist.ProcessGroup, stream: torch.cuda.Stream, slot_bytes: int
    ) -> "_Lane":
        """A collective call."""
        device = stream.device
        length = _flag_bytes(size) + 2 * _aligned(slot_bytes)
        own = _symmetric_memory.empty(length, dtype=torch.uint8, device=device)
        own[: _flag_bytes(size)].zero_()
        torch.cuda.synchronize(device)
        reached = _symmetric_memory.rendezvous(own, handle)
        dist.barrier(handle, device_ids=[device.index])  # nobody writes before the numbers are zero
        buffers = [own if r == rank else reached.get_buffer(r, (length,), torch.uint8) for r in range(size)]
        return cls(rank, size, _aligned(slot_bytes), stream, buffers)

    def shift(
        self, tensors: Sequence[Tensor], shapes: Sequence[Shape], by: int
    ) -> tuple[tuple[Tensor, ...], torch.cuda.Event]:
        """See `Lanes.shift`. What came stays until the second call after this one."""
        to, source = (self.rank + by) % self.size, (self.rank - by) % self.size
        slot, number = self.begun % 2, self.begun + 1
        self.begun += 1
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        _write(self.stream, self._clear(source, self.rank), number)
        _wait(self.stream, self._clear(self.rank, to), number)
        with torch.cuda.stream(self.stream):
            for there, tensor in zip(self._views(to, slot, tensors, [t.shape for t in tensors]), tensors, strict=True):
                there.copy_(tensor, non_blocking=True)
        _write(self.stream, self._arrived(to, self.rank), number)
        _wait(self.stream, self._arrived(self.rank, source), number)
        return tuple(self._views(self.rank, slot, tensors, shapes)), self.stream.record_event()

    def _views(self, rank: int, slot: int, like: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        views, at = [], _flag_bytes(self.size) + slot * self.slot_bytes
        for tensor, shape in zip(like, shapes, strict=True):
            nbytes = math.prod(shape) * tensor.element_size()
            views.append(self.buffers[rank][at : at + nbytes].view(tensor.dtype).view(shape))
            at += _aligned(nbytes)
        return views

    def _clear(self, rank: int, of: int) -> int:
        """Address on `rank` of how many transfers the rank `of` has had room for, of those that `rank` sends it."""
        return self.buffers[rank].data_ptr() + 4 * of

    def _arrived(self, rank: int, source: int) -> int:
        """Address on `rank` of the number of the last transfer that has come from `source`."""
        return self.buffers[rank].data_ptr() + 4 * (self.size + source)


def _flag_bytes(size: int) -> int:
    return _aligned(2 * 4 * size)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _write(stream: torch.cuda.Stream, address: int, number: int) -> None:
    """When the stream has come here, and what it wrote before can be seen."""
    _call("cuStreamWriteValue32_v2", stream, address, number)


def _wait(stream: torch.cuda.Stream, address: int, number: int) -> None:
    """The stream goes on when the number at the address is as large, and sees what was written before it."""
    _call("cuStreamWaitValue32_v2", stream, address, number, _FLUSH if _can_flush(stream.device_index) else 0)


@cache
def _can_flush(device: int) -> bool:
    found = ctypes.c_int(0)
    code = _driver().cuDeviceGetAttribute(ctypes.byref(found), _CAN_FLUSH_REMOTE_WRITES, device)
    return code == 0 and found.value == 1


def _call(function: str, stream: torch.cuda.Stream, address: int, number: int, flags: int = 0) -> None:
    # PyTorch waits for numbers in memory by kernels only, which would need a multiprocessor.
    code = getattr(_driver(), function)(
        ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address), ctypes.c_uint32(number), ctypes.c_uint(flags)
    )
    if code:
        raise RuntimeError(f"{function} failed with CUDA driver error {code}")


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
