"""Kernels against this machine's ceilings, their float64 definitions and installed peers, in one run.

Every operation is first compared with its definition on a short packed sequence; one that is wrong is reported as
FAILED and not timed, and the exit code is 1. Forward means from the zero state with inputs that need gradients, as in
training; both adds the gradients of all of them from the outputs' cotangent.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PlainValidator
from torch import Tensor

from longtrain.bench._gate import BOUNDS, errors
from longtrain.bench._operations import OPERATIONS, Call, Operation, Shape, leaves, whole
from longtrain.bench._peers import peers
from longtrain.bench._report import Options, Report, one_line, pick_device
from longtrain.bench._table import Table
from longtrain.bench._timing import Ceilings, Timing, measure, measure_ceilings
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry, did_you_mean
from longtrain.core.units import parse_token_count
from longtrain_kernels.backend import Backend, default_backend

GPU_SHAPES = (Shape(1, 2**15, 16, 128), Shape(4, 2**13, 16, 128), Shape(1, 2**18, 8, 128))
CPU_SHAPES = (Shape(1, 2**10, 2, 64), Shape(2, 2**9, 2, 64))


def _names(kind: str, known: Mapping[str, Any]) -> PlainValidator:
    """One name of a mapping, or a list of them."""

    def check(value: Any) -> tuple[Any, ...]:
        names = value if isinstance(value, list) else [value]
        if not names:
            raise ValueError(f"the list of {kind}s is empty; leave the option out for all of them")
        for name in names:
            if name not in known:
                raise ValueError(f"there is no {kind} '{name}'{did_you_mean(str(name), list(known))}")
        return tuple(known[name] for name in names)

    return PlainValidator(check)


def _shapes(value: Any) -> tuple[Shape, ...]:
    """`1x32kx16x128`: sequences, tokens, heads and head width; one or a list."""
    shapes = []
    if value == []:
        raise ValueError("the list of shapes is empty; leave the option out for the usual ones")
    for text in value if isinstance(value, list) else [value]:
        parts = str(text).split("x")
        try:
            sizes = [int(parse_token_count(part)) for part in parts]
        except ValueError:
            sizes = []
        if len(sizes) != 4 or min(sizes) < 1:
            raise ValueError("expected sequences x tokens x heads x width, each 1 or more; write 1x32kx16x128")
        shapes.append(Shape(*sizes))
    return tuple(shapes)


_BACKENDS = {backend.value: backend for backend in Backend}


@dataclass(frozen=True)
class Config(Options):
    """Options of `longtrain bench kernels`."""

    ops: Annotated[tuple[str, ...], _names("operation", {name: name for name in OPERATIONS})] = tuple(OPERATIONS)
    shapes: Annotated[
        tuple[Shape, ...] | None,
        PlainValidator(_shapes),
        Field(description="sequences x tokens x heads x width such as 1x32kx16x128, one or a list"),
    ] = None
    """None: large ones on a GPU, small ones on a CPU."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the inputs. None: bfloat16 on a GPU, float32 on a CPU."""
    backends: Annotated[tuple[Backend, ...] | None, _names("backend", _BACKENDS)] = None
    """None: the device's default."""
    direction: Literal["forward", "both"] = "both"
    peers: bool = True
    device: Literal["cuda", "cpu"] | None = None
    """None: CUDA where there is a GPU."""
    repeats: Annotated[int, Field(ge=1)] = 10
    """The least number of repetitions of which a median is taken."""
    seconds: Annotated[float, Field(gt=0)] = 0.3
    """About how long a measurement repeats a call that is short."""


def choices(registry: Registry) -> dict[str, list[str]]:
    """See the package."""
    return {"ops": list(OPERATIONS), "backends": list(_BACKENDS)}


@dataclass(frozen=True)
class _Setting:
    """What every row of a run shares."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    ceilings: Ceilings
    report: Report
    table: Table


def run(config: Config, operations: Mapping[str, Operation] = OPERATIONS) -> int:
    """Measure, print and write the rows; returns 1 if one of ours is wrong or fails.

    Raises Refused for a device that is not there and for a file that cannot be written.
    """
    device = pick_device(config.device)
    if device.type == "cpu" and Backend.TRITON in (config.backends or ()):
        raise Refused("backends: triton runs on GPUs, not on the CPU; leave it out")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    report, table = Report("kernels", config, device), Table()
    ceilings = measure_ceilings(device, config.repeats, config.seconds)
    report.set("ceilings", asdict(ceilings))
    table.head(report.content["machine"], ceilings, dtype)
    setting = _Setting(config, device, dtype, ceilings, report, table)
    failed = False
    shapes = config.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    for name in config.ops:
        verdicts: dict[tuple[str, int], dict[str, Any]] = {}
        for shape in shapes:
            fastest: dict[str, float] = {}
            for implementation, call, ours in _implementations(name, operations[name], setting):
                key = (implementation, shape.width)
                if key not in verdicts:
                    verdicts[key] = _verdict(call, operations[name], shape.width, setting, ours)
                base = {"operation": name, "shape": asdict(shape), "implementation": implementation, "ours": ours}
                for row in _rows(call, operations[name], shape, setting, verdicts[key]):
                    _compare(row, fastest, ours)
                    failed |= ours and row["status"] != "ok"
                    report.add(base | row)
                    table.row(base | row)
    report.finish()
    return int(failed)


def _implementations(name: str, operation: Operation, setting: _Setting) -> Iterator[tuple[str, Call, bool]]:
    """Name, call, and whether it is ours; peers come first, because our rows are compared with them."""
    if setting.config.peers or operation.ours is None:
        for peer, call in peers(name, setting.device):
            yield peer, call, False
    if operation.ours is not None:
        for backend in setting.config.backends or (default_backend(setting.device),):
            yield backend.value, operation.ours(backend), True


def _verdict(call: Call, operation: Operation, width: int, setting: _Setting, ours: bool) -> dict[str, Any]:
    """The part of a row that says whether the call may be timed."""
    bound = BOUNDS[setting.dtype]
    try:
        found = errors(call, operation, width, setting.dtype, setting.device, ours)
    except Exception as error:  # whatever an implementation or another version of a peer raises is a result
        return {"status": "error", "detail": one_line(error), "errors": {}}
    worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    if found[worst] <= bound:
        return {"status": "ok", "detail": "", "errors": found}
    return {"status": "failed", "detail": f"{worst}: error {found[worst]:.1e}, bound {bound:.0e}", "errors": found}


def _rows(
    call: Call, operation: Operation, shape: Shape, setting: _Setting, verdict: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One row a direction, or one that says why there is none."""
    if verdict["status"] != "ok":
        yield verdict
        return
    torch.manual_seed(0)
    try:
        tensors = operation.inputs(shape, setting.dtype, setting.device)
        with_grad = {name: x.detach().requires_grad_() for name, x in leaves(operation, tensors).items()}
        tensors |= with_grad
        layout = whole(shape.batch, shape.length, setting.device)
        sample = call(tensors, layout)[0].detach()
        cotangent = torch.randn_like(sample)
        moved = sum(x.nbytes for x in tensors.values()) + sample.nbytes
        moved_both = 2 * moved + sum(x.nbytes for x in with_grad.values())
        del sample

        def forward() -> Tensor:
            return call(tensors, layout)[0]

        def both() -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), list(with_grad.values()), cotangent, materialize_grads=True)

        flops = operation.flops(shape)
        yield verdict | _figures("forward", forward, moved, flops[0], setting)
        if setting.config.direction == "both":
            yield verdict | _figures("both", both, moved_both, flops[1], setting)
    except Exception as error:  # out of memory, mostly
        yield verdict | {"status": "error", "detail": one_line(error)}


def _figures(direction: str, call: Callable[[], object], moved: int, flops: float, setting: _Setting) -> dict[str, Any]:
    """Times, and what they are of the machine's: the I/O floor reads each input and writes each result once."""
    timing: Timing = measure(call, setting.device, setting.config.repeats, setting.config.seconds)
    seconds = timing.median_ms / 1e3
    floor = moved / setting.ceilings.copy_bytes_per_second
    return {
        "direction": direction,
        **asdict(timing),
        "io_bytes": moved,
        "io_floor_ms": floor * 1e3,
        "io_fraction": floor / seconds,
        "flops": flops,
        "tflops": flops / seconds / 1e12,
    }


def _compare(row: dict[str, Any], fastest: dict[str, float], ours: bool) -> None:
    """Note the fastest peer of each direction, and how many times as fast ours is."""
    if row["status"] != "ok":
        return
    direction, median = row["direction"], row["median_ms"]
    if not ours:
        fastest[direction] = min(median, fastest.get(direction, math.inf))
    elif direction in fastest:
        row["speedup"] = fastest[direction] / median
