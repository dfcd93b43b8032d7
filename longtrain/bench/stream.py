"""Streamed backpropagation: time and peak memory of a step's gradients against the context, for each way of streaming.

A step is forward and backward of one sequence of random tokens through a model with random weights, without an
optimizer. Before anything is timed, loss and gradients of every mode are compared with those of one, `gate_mode`, at a
short length (`_stream_gate`); a mode that is wrong is reported as FAILED and not timed, and the exit code is 1. A mode
goes to longer and longer sequences; where memory ends, a row says so, and ends the mode.

The modes are settings of `stream.*`:

- `plain`: one graph of everything, with the logits of all tokens.
- `checkpointing`: inputs of layers are kept, each layer is computed again, with the logits of all tokens;
  `checkpointing-streamed-head`: without these.
- `block1`, `block4` or any other number, `recurrent`, `all`: that for `stream.block_layers`, in chunks of time.
- `-offload` behind any but `plain`, on a GPU: what waits for the backward pass is in the host's memory.

Beside them `streambp`, where it is installed, computes the same weights' gradients (`_stream_peers`); it is compared
like a mode, and what is wrong with it is told without failing the benchmark.

Peak memory is what PyTorch's allocator has given out on the GPU at most during the step, parameters and gradients with
it; "rest" is less both of these. What it is made of is told for the longest row of each mode, and each phase of a step,
forward or the backward pass of a block, has its own line into contexts that were not measured (`_stream_memory`). "host
waits" is how long the GPU stood still in the last step for copies to and from the host's memory. Model operations are
counted once, however often a mode computes them.

`ranks=P` shares the sequence among P ranks, a GPU each or processes on a CPU, which the command starts itself. Then:

- The gate's run is one rank's alone, and what the ranks find together, summed over them, is compared with it.
- Before each length T of a mode, rank 0 alone measures its share of it, T/P tokens in chunks of a Pth.
- The time of a repetition is the slowest rank's, from a barrier; summing gradients over ranks is part of the step.
- Peak memory is the most of any rank, with what ranks write into each other's memory; TFLOP/s are those of each rank.
- "/ 1 rank" is the time against that of one rank with its share, and "FLOP/s / 1" the same for each rank's operations a
  second: softmax has more to do for a token of a longer sequence.
- A rank that fails or runs out of memory where others wait for it ends the benchmark.
"""

import math
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, PlainValidator

from longtrain.bench._ranks import Entry, check_gpus, known_algorithms, launch, threads_of_a_rank
from longtrain.bench._report import OneOrMore, Options, Report, installed, pick_device
from longtrain.bench._stream_gate import Verdict
from longtrain.bench._stream_measure import events, main
from longtrain.bench._stream_modes import MODES, PLAIN, Mode, parse_mode
from longtrain.bench._stream_peers import STREAMBP, missing
from longtrain.bench._stream_plan import Plan, Sizes
from longtrain.bench._stream_rows import Rows
from longtrain.bench._stream_step import Precision
from longtrain.bench._stream_table import Table
from longtrain.bench._world import World
from longtrain.cluster.resolve import ResolvedJob, resolve
from longtrain.config.compose import options_of
from longtrain.core.errors import Refused
from longtrain.core.kinds import LayoutKind
from longtrain.core.registry import Registry
from longtrain.core.units import TokenCount

GATE_TOKENS = 2048


def _modes(value: Any) -> tuple[str, ...]:
    """Names of modes, a list or one."""
    names = value if isinstance(value, list) else [value]
    if not names:
        raise ValueError("the list of modes is empty; leave the option out for the usual ones")
    modes = tuple(parse_mode(str(name)).name for name in names)
    twice = next((mode for mode in modes if modes.count(mode) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is listed twice; list it once")
    return modes


@dataclass(frozen=True)
class Config(Options):
    """Options of `longtrain bench stream`. A size that is left out is larger on a GPU than on a CPU."""

    model: str | None = None
    """One of `conf/model/`. None: `llama_1b` on a GPU, `hybrid_tiny` on a CPU."""
    tokens: Annotated[tuple[TokenCount, ...] | None, Field(min_length=1), OneOrMore] = None
    """Lengths of the sequence, over all its ranks; 2 at least: the last token has no label. None: powers of two, from
    8k to 128k for each GPU."""
    document_tokens: TokenCount | None = None
    """Of each document, where several are packed in the sequence; less where modes are compared, so that there are
    some. None: it is one document."""
    modes: Annotated[tuple[str, ...], PlainValidator(_modes)] = tuple(MODES)
    """In this order; a block may have any number of the model's layers, and all but `plain` may offload from a GPU."""
    chunk_tokens: TokenCount | None = None
    """Of a chunk of time, over all ranks. None: 16k for each GPU."""
    logit_tokens: TokenCount = 4096
    """Of a rank, whose logits exist at once, where the head is streamed."""
    vocabulary: Annotated[TokenCount, Field(ge=2)] | None = None
    """At least 2. None: 128k on a GPU, 1k on a CPU."""
    precision: Precision | None = None
    """bfloat16: activations, by autocast, over float32 parameters, as in training; bfloat16-parameters: these too, with
    gradients summed in float32. None: bfloat16 on a GPU, float32 on a CPU."""
    gate_mode: Annotated[str, AfterValidator(lambda name: parse_mode(name).name)] = PLAIN.name
    """What the others are compared with; one that keeps less has room for more `gate_tokens`."""
    gate_tokens: TokenCount | None = None
    """Length at which they are compared, in at least five chunks. None: the shortest of `tokens`, 2k at most, of which
    the float32 run has room for beside the parameters."""
    ranks: Annotated[int, Field(ge=1)] = 1
    """That share the sequence."""
    scan: str = "all_gather"
    """Algorithm of recurrent layers on several ranks."""
    attend: str = "ring"
    """Algorithm of softmax layers on several ranks."""
    layout: LayoutKind = "zigzag"
    """Which tokens each of several ranks holds."""
    peers: bool = True
    """Whether StreamBP is measured as well, where it is installed, for softmax alone and one rank."""
    device: Literal["cuda", "cpu"] | None = None
    """None: CUDA where there is a GPU."""
    repeats: Annotated[int, Field(ge=1)] = 3
    """Steps of which the median is taken, after one that is not counted because it compiles."""
    seconds: Annotated[float, Field(gt=0)] = 10.0
    """A first step that takes longer is not repeated: it is the measurement."""
    seed: Annotated[int, Field(ge=0)] = 0


def choices(registry: Registry) -> dict[str, list[str]]:
    """See the package."""
    modes = [*MODES, "block2", "all-offload", "block4-offload"]
    algorithms = {verb: registry.names(f"sequence_parallel.{verb}") for verb in ("scan", "attend")}
    return {"model": options_of("model"), "modes": modes, "gate_mode": modes, **algorithms}


GPU = Sizes("llama_1b", tuple(2**n for n in range(13, 18)), 2**14, 2**17, "bfloat16")
CPU = Sizes("hybrid_tiny", (2**8, 2**9, 2**10), 2**7, 2**10, "float32")
"""For one rank."""


def run(config: Config, entry: Entry[Plan] = main) -> int:
    """Measure, print and write the rows; returns 1 if a mode is wrong or fails for anything but memory.

    `entry` is what each of several ranks does.

    Raises Refused for devices that are not there, an unknown model or algorithm, a mode that the device does not have,
    a length at which the gate does not fit, and a file that cannot be written; WorkerFailed for a rank that dies.
    """
    plan = make_plan(config)
    report, table = Report("stream", config, torch.device(plan.device)), Table(plan.device == "cuda", plan.ranks)
    report.set("sizes", asdict(plan.sizes))
    source = launch(plan, entry) if plan.ranks > 1 else events(plan, World.alone(torch.device(plan.device)))
    with closing(source):
        failed = _tell(source, plan, report, table)
    report.finish()
    return int(failed)


def make_plan(config: Config) -> Plan:
    """The configuration with the device's sizes. Raises Refused."""
    device, modes = pick_device(config.device).type, tuple(parse_mode(name) for name in config.modes)
    gate_mode = parse_mode(config.gate_mode)
    check_gpus(device, config.ranks)
    sizes, registry = choose_sizes(config, device), Registry()
    job, gate_tokens = resolve([f"model={sizes.model}"]), config.gate_tokens or min(sizes.tokens[0], GATE_TOKENS)
    for option, mode in (*(("modes", mode) for mode in modes), ("gate_mode", gate_mode)):
        _check_mode(option, mode, device, job)
    # One rank is measured with its share of the tokens.
    for option, length, least in (("tokens", sizes.tokens[0], config.ranks + 1), ("gate_tokens", gate_tokens, 2)):
        if length < least:
            raise Refused(f"{option}={length}: a sequence needs 2 tokens, as does a rank's share; use {least} or more")
    [scan], [attend] = (
        known_algorithms(verb, (name,), registry) for verb, name in (("scan", config.scan), ("attend", config.attend))
    )
    return Plan(
        ranks=config.ranks,
        device=device,
        threads=threads_of_a_rank(config.ranks),
        job=job,
        sizes=sizes,
        logit_tokens=config.logit_tokens,
        modes=modes,
        gate_mode=gate_mode,
        gate_tokens=gate_tokens,
        scan=scan,
        attend=attend,
        peers=config.peers,
        layout=config.layout,
        document_tokens=config.document_tokens,
        repeats=config.repeats,
        seconds=config.seconds,
        seed=config.seed,
    )


def _check_mode(option: str, mode: Mode, device: str, job: ResolvedJob) -> None:
    """Raises Refused where the device or the model does not have it."""
    if device == "cpu" and mode.offload == "host":
        raise Refused(f"{option}={mode.name}: device=cpu has all in the host's memory; drop -offload, or use a GPU")
    size, layers = mode.block_layers, job.config.model.num_layers
    usual = {mode.block_layers for mode in MODES.values()}  # of any model
    if isinstance(size, int) and size > layers and size not in usual:
        raise Refused(f"{option}={mode.name}: the model has {layers} layers; use all, or fewer in a block")


def choose_sizes(config: Config, device: str) -> Sizes:
    """The device's for so many ranks, changed by the options; lengths ascend."""
    usual = GPU if device == "cuda" else CPU
    return Sizes(
        model=config.model or usual.model,
        tokens=tuple(sorted(set(config.tokens or (tokens * config.ranks for tokens in usual.tokens)))),
        chunk_tokens=config.chunk_tokens or usual.chunk_tokens * config.ranks,
        vocabulary=config.vocabulary or usual.vocabulary,
        precision=config.precision or usual.precision,
    )


def _tell(source: Generator[tuple[str, Any], None, None], plan: Plan, report: Report, table: Table) -> bool:
    """Print and write what is found; returns whether a mode is wrong or has failed."""
    failed, memory, rows, verdicts = False, None, Rows(plan.ranks), list[dict[str, Any]]()
    parameters = 0
    ours, modes = {mode.name for mode in plan.modes}, (*plan.modes, STREAMBP)
    for kind, content in source:
        match kind:
            case "held":
                memory, parameters = content["device_bytes"], content["parameter_bytes"]
                report.set("held", content)
                absent = missing(plan) if plan.peers else "not asked for"
                report.set("peers", {STREAMBP.name: {"version": installed(STREAMBP.name), "missing": absent}})
                table.head(report.content["machine"], plan, content, absent)
            case "verdict":
                verdicts.append({name: _in_json(value) for name, value in content.items()})
                report.set("gate", {"mode": plan.gate_mode.name, "tokens": plan.gate_tokens, "verdicts": verdicts})
                table.verdict(Verdict(**content), plan.gate_tokens)
            case "refused":
                raise Refused(content)
            case "right":
                failed |= any(name not in content for name in ours)
                table.rows()
            case "row":
                failed |= content["status"] == "error" and content["mode"] in ours
                row = rows.add(content)
                if memory is not None:
                    report.set("fits", rows.fits(modes, memory))
                report.add(row)
                table.row(row)
    if memory is not None:
        table.fits(rows.fits(modes, memory), memory)
        table.classes(rows.longest(modes), parameters)
    return failed


def _in_json(value: Any) -> Any:
    """Which has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
