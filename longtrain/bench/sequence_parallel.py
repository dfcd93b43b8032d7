"""Sequence parallelism: every algorithm on several ranks against one, with its traffic and what of it is exposed.

The command starts the ranks itself: a GPU each with NCCL, or processes on a CPU with gloo. Each case is first compared
with the same computation on one rank, outputs and every gradient, within the bounds of `bench kernels` for the dtype;
one that is wrong is reported as FAILED and not timed, and the exit code is 1. Then come these figures:

- The time of a repetition is the slowest rank's, from a barrier; the median counts. One rank alone is measured in the
  same run by rank 0, with nothing to exchange. Strong scaling shares the same tokens among the ranks; weak scaling
  gives every rank as many. `_sequence_parallel_cases.scaled` defines speed-up and efficiency.
- Sent bytes are the payload that the busiest rank sends in one call.
- Exposed communication is the time less that of the same call on a group that sends nothing and never waits. It
  includes waiting for a rank that computes longer, and small negative values are noise.
- A layer is a whole mixer, with the gradients of its parameters on each rank; the sum of these over ranks, which data
  parallelism does as well, is not timed.
- On a CPU every rank has its share of the threads, and one rank alone has no more.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from longtrain.bench._ranks import Entry, check_gpus, known_algorithms, known_names, launch, threads_of_a_rank
from longtrain.bench._report import OneOrMore, Options, Report
from longtrain.bench._sequence_parallel_cases import Candidate, Case, Kind, Plan, Scaling, operation_cases
from longtrain.bench._sequence_parallel_peers import candidates, inventory
from longtrain.bench._sequence_parallel_problems import SCANS, is_recurrent, layer_of
from longtrain.bench._sequence_parallel_projection import project
from longtrain.bench._sequence_parallel_rank import main
from longtrain.bench._sequence_parallel_table import Table
from longtrain.bench._world import links_of
from longtrain.comm.links import Link
from longtrain.config.compose import plugin_folders
from longtrain.core.kinds import LayoutKind
from longtrain.core.registry import Registry
from longtrain.core.units import TokenCount
from longtrain.sequence_parallel.scan.pipeline import BLOCKS

Names = Annotated[tuple[str, ...], OneOrMore]


@dataclass(frozen=True)
class Config(Options):
    """Options of `longtrain bench sequence-parallel`. A size that is left out is larger on a GPU than on a CPU."""

    ranks: Annotated[int, Field(ge=2)] | None = None
    """None: as many as there are GPUs, or 2 on a CPU."""
    ops: Names = ("scalar", "vector", "gated")
    """Recurrences, as in `bench kernels`."""
    scan: Names | None = None
    """Algorithms for them. None: every one; [] for none."""
    attend: Names | None = None
    """Algorithms for softmax attention, likewise."""
    plugins: Annotated[tuple[str, ...], OneOrMore, Field(description="folders laid out like the project")] = ()
    """Whose algorithms and mixers are measured as well."""
    layers: Names = ("gla", "gated_delta")
    """Recurrent mixers to be measured whole, with every algorithm of `scan`."""
    layouts: Annotated[tuple[LayoutKind, ...] | None, Field(min_length=1), OneOrMore] = None
    """None: both for softmax, and contiguous for scans, whose work is the same everywhere."""
    packed: Annotated[tuple[bool, ...] | None, Field(min_length=1), OneOrMore] = None
    """Whether a sequence is six documents of seeded lengths, or one. None: both on GPUs, packed on a CPU."""
    scaling: Annotated[tuple[Scaling, ...] | None, Field(min_length=1), OneOrMore] = None
    """Of single operations. None: both on GPUs, strong on a CPU; a layer is always measured under weak scaling."""
    tokens: TokenCount | None = None
    """Of the one rank's sequence; P ranks share them under strong scaling, and have P times as many under weak."""
    heads: Annotated[int, Field(ge=1)] | None = None
    width: Annotated[int, Field(ge=1)] | None = None
    """Of one head; a layer is heads x width wide."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of the inputs. None: bfloat16 on a GPU, float32 on a CPU."""
    direction: Literal["forward", "both"] = "both"
    peers: bool = True
    device: Literal["cuda", "cpu"] | None = None
    """None: CUDA where there is a GPU."""
    repeats: Annotated[int, Field(ge=1)] | None = None
    """The least number of repetitions of which a median is taken."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """About how long a measurement repeats a call that is short."""
    slow_bandwidth: Annotated[float, Field(gt=0)] = 25e9
    """Bytes a second of the link for which exchanges are projected."""
    slow_latency: Annotated[float, Field(ge=0)] = 10e-6
    """Seconds of a message on it."""


@dataclass(frozen=True)
class _Sizes:
    tokens: int
    heads: int
    width: int
    dtype: str
    repeats: int
    seconds: float


GPU = _Sizes(2**15, 16, 128, "bfloat16", 10, 0.2)
CPU = _Sizes(512, 4, 16, "float32", 3, 0.02)


def choices(registry: Registry) -> dict[str, list[str]]:
    """See the package."""
    mixers = {name: registry.load("mixers", name, ("Config",)) for name in registry.names("mixers")}
    return {
        "ops": list(SCANS),
        "scan": registry.names("sequence_parallel.scan"),
        "attend": registry.names("sequence_parallel.attend"),
        "layers": [name for name, module in mixers.items() if is_recurrent(module.Config)],
    }


def run(config: Config, entry: Entry[Plan] = main) -> int:
    """Start the ranks, print and write their rows; returns 1 if an algorithm of ours is wrong or fails.

    Raises Refused for GPUs that are not there, an unknown name, sizes that do not fit and a file that cannot be
    written; WorkerFailed for a rank that dies.
    """
    plan = make_plan(config)
    report, table = Report("sequence-parallel", config, torch.device(plan.device)), Table()
    peers = inventory(plan.device) if config.peers else {}
    report.set("peers", peers)
    report.set("plan", {k: v for k, v in asdict(plan).items() if k not in ("cases", "plugins")})
    table.head(report.content["machine"], plan, peers)
    failed, slow = False, Link(config.slow_latency, config.slow_bandwidth)
    for kind, content in launch(plan, entry):
        if kind == "links":
            links = links_of(content)
            report.set("links", content)
            projection = project(
                config.ops, plan.heads, plan.width, BLOCKS, {"slow": (slow, slow), "measured here": links}
            )
            report.set("projection", projection)
            table.links(links)
        else:
            failed |= content["status"] != "ok" and not content["peer"]
            report.add(content)
            table.row(content)
    table.projection(report.content["projection"], plan.heads, plan.width, BLOCKS)
    report.finish()
    return int(failed)


def make_plan(config: Config) -> Plan:
    """The configuration with the device's sizes, and the cases that it asks for. Raises Refused."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device: Literal["cuda", "cpu"] = config.device or ("cuda" if gpus else "cpu")
    ranks = config.ranks or (gpus if device == "cuda" else 2)
    check_gpus(device, max(ranks, 2))
    sizes = GPU if device == "cuda" else CPU
    tokens = config.tokens or sizes.tokens
    heads, width = config.heads or sizes.heads, config.width or sizes.width
    plugins = tuple(plugin_folders(config.plugins).values())
    for name in config.layers:
        layer_of(name, heads, width, plugins)  # refuses here what no rank could build
    return Plan(
        ranks=ranks,
        device=device,
        dtype=config.dtype or sizes.dtype,
        heads=heads,
        width=width,
        directions=("forward", "both") if config.direction == "both" else ("forward",),
        repeats=config.repeats or sizes.repeats,
        seconds=config.seconds or sizes.seconds,
        threads=threads_of_a_rank(ranks),
        plugins=plugins,
        cases=tuple(_cases(config, Registry(plugins), tokens, ranks, device)),
    )


def _cases(config: Config, registry: Registry, tokens: int, ranks: int, device: str) -> Iterator[Case]:
    scans = known_algorithms("scan", config.scan, registry)
    attends = known_algorithms("attend", config.attend, registry)
    ops = known_names("ops", config.ops, list(SCANS))
    usual: tuple[LayoutKind, ...] = ("contiguous",)
    scan_layouts, attend_layouts = config.layouts or usual, config.layouts or (*usual, "zigzag")

    cuda = device == "cuda"
    scaling = config.scaling or (("strong", "weak") if cuda else ("strong",))
    packed = config.packed or ((False, True) if cuda else (True,))

    def asked(operation: str, names: tuple[str, ...], layouts: tuple[LayoutKind, ...]) -> list[Candidate]:
        others = candidates(operation, layouts, device) if config.peers and names else ()
        return [*(Candidate(name, layouts) for name in names), *others]

    def cases(kind: Kind, found: dict[str, list[Candidate]]) -> Iterator[Case]:
        return operation_cases(kind, found, tokens, ranks, packed, scaling)

    yield from cases("scan", {name: asked(name, scans, scan_layouts) for name in ops})
    yield from cases("attend", {"softmax": asked("softmax", attends, attend_layouts)})
    layers = {name: [Candidate(scan, scan_layouts) for scan in scans] for name in config.layers}
    yield from operation_cases("layer", layers, tokens, ranks, (False,), ("weak",))
