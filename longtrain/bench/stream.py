"""Streamed backpropagation: time and peak memory of a step's gradients against the context, for each way of streaming.

A step is forward and backward of one sequence of random tokens through a model with random weights, on one device,
without an optimizer. Before anything is timed, loss and gradients of every mode are compared with those of plain
backpropagation at a short length (`_stream_gate`); a mode that is wrong is reported as FAILED and not timed, and the
exit code is 1. A mode goes to longer and longer sequences; where memory ends, a row says so, and ends the mode.

The modes are settings of `stream.*`:

- `plain`: one graph of everything, with the logits of all tokens.
- `checkpointing`: inputs of layers are kept, each layer is computed again, with the logits of all tokens;
  `checkpointing-streamed-head`: without these.
- `block1`, `block4` or any other number, `recurrent`, `all`: that for `stream.block_layers`, in chunks of time.
- `-offload` behind any but `plain`: what waits for the backward pass is in the host's memory.

Peak memory is what PyTorch's allocator has given out on the GPU at most during the step, parameters and gradients with
it; "rest" is less both of these. Model operations are counted once, however often a mode computes them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PlainValidator

from longtrain.bench._report import OneOrMore, Options, Report, one_line, pick_device
from longtrain.bench._stream_fit import fit, slope
from longtrain.bench._stream_gate import judge
from longtrain.bench._stream_modes import CHECKPOINTING, MODES, Mode, parse_mode
from longtrain.bench._stream_step import Precision, Workload, free, is_out_of_memory, make_workload, measure
from longtrain.bench._stream_table import Table
from longtrain.cluster.resolve import resolve
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.core.units import TokenCount

GATE_TOKENS = 2048


def _modes(value: Any) -> tuple[str, ...]:
    """Names of modes, a list or one."""
    names = value if isinstance(value, list) else [value]
    if not names:
        raise ValueError("the list of modes is empty; leave the option out for the usual ones")
    return tuple(parse_mode(str(name)).name for name in names)


@dataclass(frozen=True)
class Config(Options):
    """Options of `longtrain bench stream`. A size that is left out is larger on a GPU than on a CPU."""

    model: str | None = None
    """A model of `conf/model/`. None: `llama_1b` on a GPU, `hybrid_tiny` on a CPU."""
    tokens: Annotated[tuple[TokenCount, ...] | None, Field(min_length=1), OneOrMore] = None
    """Lengths of the sequence. None: powers of two, from 8k to 128k on a GPU."""
    modes: Annotated[tuple[str, ...], PlainValidator(_modes)] = tuple(MODES)
    """In this order; a block may have any number of layers, and all but `plain` may offload."""
    chunk_tokens: TokenCount | None = None
    """Of a chunk of time. None: 16k on a GPU."""
    logit_tokens: TokenCount = 4096
    """Whose logits exist at once, where the head is streamed."""
    vocabulary: TokenCount | None = None
    """None: 128k on a GPU, 1k on a CPU."""
    precision: Precision | None = None
    """bfloat16: activations, by autocast, over float32 parameters, as in training; bfloat16-parameters: these too, with
    gradients summed in float32. None: bfloat16 on a GPU, float32 on a CPU."""
    gate_tokens: TokenCount | None = None
    """Length at which modes are compared with plain backpropagation, in at least five chunks. None: the shortest of
    `tokens`, 2k at most, of which the float32 run has room for beside the gradients."""
    device: Literal["cuda", "cpu"] | None = None
    """None: CUDA where there is a GPU."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Steps of which the median is taken, after one that is not counted because it compiles."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """A first step that takes longer is not repeated: it is the measurement."""
    seed: Annotated[int, Field(ge=0)] = 0


def choices(registry: Registry) -> dict[str, list[str]]:
    """See the package."""
    return {"modes": [*MODES, "block2", "all-offload", "block4-offload"]}


@dataclass(frozen=True)
class Sizes:
    """What a device's defaults fill in."""

    model: str
    tokens: tuple[int, ...]
    chunk_tokens: int
    vocabulary: int
    precision: Precision


GPU = Sizes("llama_1b", tuple(2**n for n in range(13, 18)), 2**14, 2**17, "bfloat16")
CPU = Sizes("hybrid_tiny", (2**8, 2**9, 2**10), 2**7, 2**10, "float32")

Step = Callable[[Workload, Mode, int, int, int], float]


def step(workload: Workload, mode: Mode, tokens: int, chunk_tokens: int, logit_tokens: int) -> float:
    """Gradients of a sequence of so many tokens; returns the loss."""
    return workload.gradients(workload.batch(tokens), mode.config(tokens, chunk_tokens, logit_tokens))


def run(config: Config, step: Step = step) -> int:
    """Measure, print and write the rows; returns 1 if a mode is wrong or fails for anything but memory.

    Raises Refused for a device that is not there, an unknown model, a mode that the device does not have, a length at
    which the gate does not fit, and a file that cannot be written.
    """
    device, modes = pick_device(config.device), [parse_mode(name) for name in config.modes]
    if device.type == "cpu" and any(mode.offload == "host" for mode in modes):
        raise Refused("modes: on a CPU everything is in the host's memory; leave -offload out")
    sizes = choose_sizes(config, device)
    job = resolve([f"model={sizes.model}"])
    report, table = Report("stream", config, device), Table(device.type == "cuda")
    report.set("sizes", asdict(sizes))
    workload = make_workload(job, sizes.vocabulary, sizes.precision, config.seed, device)
    memory = device_memory(device)
    held = {"parameter_bytes": workload.parameter_bytes, "gradient_bytes": workload.gradient_bytes}
    report.set("held", held | {"device_bytes": memory})
    table.head(report.content["machine"], asdict(sizes) | {"logit_tokens": config.logit_tokens}, workload)
    right = _gate(workload, modes, config, sizes, report, table)
    failed, checkpointing, fits = len(right) < len(modes), dict[int, float](), list[dict[str, Any]]()
    table.rows()
    for mode in right:
        rows = []
        for row in measure_mode(workload, mode, config, sizes, step):
            if mode == CHECKPOINTING and row["status"] == "ok":
                checkpointing[row["tokens"]] = row["seconds"]
            if row["tokens"] in checkpointing and row["status"] == "ok":
                row["of_checkpointing"] = row["seconds"] / checkpointing[row["tokens"]]
            failed |= row["status"] == "error"
            rows.append(row)
            report.add(row)
            table.row(row)
        if memory is not None:
            fits += extrapolate(mode, rows, memory)
            report.set("fits", fits)
    if memory is not None:
        table.fits(fits, memory)
    report.finish()
    return int(failed)


def choose_sizes(config: Config, device: torch.device) -> Sizes:
    """The device's, changed by the options; lengths ascend."""
    usual = GPU if device.type == "cuda" else CPU
    return Sizes(
        model=config.model or usual.model,
        tokens=tuple(sorted(set(config.tokens or usual.tokens))),
        chunk_tokens=config.chunk_tokens or usual.chunk_tokens,
        vocabulary=config.vocabulary or usual.vocabulary,
        precision=config.precision or usual.precision,
    )


def measure_mode(workload: Workload, mode: Mode, config: Config, sizes: Sizes, step: Step) -> Iterator[dict[str, Any]]:
    """A row for each length, up to the first that fails."""
    before: tuple[int, int] | None = None
    for tokens in sizes.tokens:
        row: dict[str, Any] = {"mode": mode.name, "tokens": tokens, "status": "ok", "detail": ""}
        try:
            call = partial(step, workload, mode, tokens, sizes.chunk_tokens, config.logit_tokens)
            figures = measure(call, workload, config.repeats, config.seconds)
        except Exception as error:  # whatever ends a mode leaves the others their rows
            row |= {"status": "out of memory" if is_out_of_memory(error) else "error", "detail": one_line(error)}
        finally:
            workload.model.zero_grad(set_to_none=True)
        free()  # here, where no traceback keeps the step's tensors any more
        if row["status"] != "ok":
            yield row
            return
        flops = workload.model.flops_per_token(tokens / 2) * tokens
        row |= asdict(figures) | {
            "tokens_per_second": tokens / figures.seconds,
            "model_tflops": flops / figures.seconds / 1e12,
            "rest_bytes": None,
            "bytes_per_token": None,
            "of_checkpointing": None,
        }
        if figures.peak_bytes is not None:
            now = (tokens, figures.peak_bytes)
            row["rest_bytes"] = figures.peak_bytes - workload.parameter_bytes - workload.gradient_bytes
            row["bytes_per_token"], before = slope(before, now), now
        yield row


def extrapolate(mode: Mode, rows: Sequence[dict[str, Any]], memory_bytes: int) -> list[dict[str, Any]]:
    """Bytes a token of a mode and the longest context that would fit; nothing where there are too few lengths."""
    measured = [row for row in rows if row["status"] == "ok"]
    found = fit([(row["tokens"], row["peak_bytes"]) for row in measured])
    if found is None:
        return []
    longest = found.longest(memory_bytes)
    bounded = longest != float("inf")
    pinned = [(row["tokens"], row["host_bytes"]) for row in measured if row["host_bytes"] is not None]
    host = fit(pinned) if mode.offload == "host" else None
    return [
        {
            "mode": mode.name,
            **asdict(found),
            "longest_tokens": longest if bounded else None,
            "host_bytes_per_token": None if host is None else host.bytes_per_token,
            "host_bytes_then": None if host is None or not bounded else host.at(longest),
        }
    ]


def device_memory(device: torch.device) -> int | None:
    """What this process has of the device's memory and can still get; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _gate(
    workload: Workload, modes: Sequence[Mode], config: Config, sizes: Sizes, report: Report, table: Table
) -> list[Mode]:
    """Those that are right."""
    tokens = config.gate_tokens or min(sizes.tokens[0], GATE_TOKENS)
    verdicts = []
    for verdict in judge(workload, modes, tokens, sizes.chunk_tokens, config.logit_tokens):
        verdicts.append(verdict)
        report.set("gate", {"tokens": tokens, "verdicts": [asdict(v) for v in verdicts]})
        table.verdict(verdict, tokens)
    free()
    wrong = {verdict.mode for verdict in verdicts if verdict.status != "ok"}
    return [mode for mode in modes if mode.name not in wrong]
