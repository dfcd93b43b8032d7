"""Multi-query associative recall by every mixer: how many pairs a small model of it learns to look up.

A sequence lists key-value pairs and then asks for the value of every key (Arora et al. 2023, "Zoology", section 3). A
model of a few layers of one mixer is trained from scratch for each learning rate, on the same batches for the same
number of steps with the same size of state; the best final accuracy counts. What to expect: softmax, which keeps every
token, and the delta rule (delta_net, gated_delta, kda), which overwrites one association without disturbing others,
solve it up to about as many pairs as keys have channels. Mixers that only add and decay (mamba2, simple_gla, gla,
hgrn2) need more state, and more steps, for as many pairs. Without a convolution (retention, lightning, gla, hgrn2) a
value must find its key by decay or rotation alone; linear_attention has neither, and guesses among a sequence's values.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from longtrain.bench._associations import TOKENS_PER_PAIR, Batch, associations
from longtrain.bench._report import OneOrMore, Options, Report, pick_device
from longtrain.bench._rows import print_head, print_row
from longtrain.cluster.resolve import ResolvedJob, resolve
from longtrain.comm.group import Group
from longtrain.core.errors import Refused
from longtrain.core.layout import SequenceLayout
from longtrain.core.registry import Registry, did_you_mean
from longtrain.engine.config import EngineConfig, OptimizerConfig
from longtrain.engine.replicated import ReplicatedEngine
from longtrain.model.build import build_model
from longtrain.model.model import Model
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.handle import Algorithms, ShardedSequence
from longtrain.sequence_parallel.shard import Shard
from longtrain_kernels.backend import Backend

EVALUATION_BATCHES = 4
Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Task:
    """The sizes of one measurement, the same for every mixer."""

    pairs: tuple[int, ...]
    vocabulary: int
    num_layers: int
    num_heads: int
    key_dim: int
    steps: int
    batch: int
    learning_rates: tuple[float, ...]


GPU = Task((4, 8, 16, 32, 64), 256, 2, 2, 32, 1200, 256, (3e-3, 1e-2))
CPU = Task((2, 4, 8), 32, 2, 2, 16, 800, 32, (3e-3,))


@dataclass(frozen=True)
class Config(Options):
    """Options of `longtrain bench recall`. A size that is left out is larger on a GPU than on a CPU."""

    mixers: Annotated[tuple[str, ...] | None, Field(min_length=1), OneOrMore] = None
    """None: every one."""
    pairs: Annotated[tuple[Positive, ...] | None, Field(min_length=1), OneOrMore] = None
    """Pairs of a sequence, four tokens each: training takes turns among them, and each is a column of the table."""
    vocabulary: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    key_dim: Positive | None = None
    """Of keys and values of a head, which then has a state of its square."""
    steps: Positive | None = None
    batch: Positive | None = None
    learning_rates: Annotated[tuple[Rate, ...] | None, Field(min_length=1), OneOrMore] = None
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["cuda", "cpu"] | None = None
    """None: CUDA where there is a GPU."""
    backend: Backend | None = None
    """None: by the device."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of activations. None: bfloat16 on a GPU, float32 on a CPU."""


def choices(registry: Registry) -> dict[str, list[str]]:
    """See the package."""
    return {"mixers": registry.names("mixers")}


def run(config: Config) -> int:
    """Train, print and write a row for each mixer; returns 1 if one cannot be trained.

    Raises Refused for a device that is not there, an unknown mixer, sizes that do not fit, and a file that cannot be
    written.
    """
    device = pick_device(config.device)
    if config.backend is Backend.TRITON and device.type == "cpu":
        raise Refused("backend=triton runs on GPUs, not on device=cpu; leave it out")
    task, names = choose_task(config, device), _names(config)
    report, console = Report("recall", config, device), Console(highlight=False)
    report.set("task", asdict(task) | {"precision": _precision(config, device)})
    console.print(f"accuracy after {task.steps} steps; chance is {1 / (task.vocabulary - task.vocabulary // 2):.1%}")
    titles = ["mixer", "state", *(f"{n} pairs" for n in task.pairs), "best rate", "seconds"]
    columns = [(name, 9 if position else 18) for position, name in enumerate(titles)]
    print_head(console, columns, 1)
    failed = False
    for name in names:
        with console.status(f"training {name}"):
            row = measure(name, task, config, device)
        report.add(row)
        if row["status"] == "ok":
            print_row(console, _cells(row, task), columns, 1)
        else:
            failed = True
            console.print(Text(f"{name} FAILED {row['detail']}", style="bold red"))
    report.finish()
    return int(failed)


def choose_task(config: Config, device: torch.device) -> Task:
    """The device's sizes, changed by the options. Raises Refused where they do not fit each other."""
    given = {f.name: getattr(config, f.name) for f in fields(Task)}
    task = replace(GPU if device.type == "cuda" else CPU, **{k: v for k, v in given.items() if v is not None})
    most = max(task.pairs)
    if task.vocabulary // 2 - 1 < most:
        raise Refused(f"vocabulary={task.vocabulary} has too few keys for {most} pairs; use {2 * most + 2} or more")
    return task


def _names(config: Config) -> tuple[str, ...]:
    known = choices(Registry())["mixers"]
    for name in config.mixers or ():
        if name not in known:
            raise Refused(f"mixers: there is no '{name}'{did_you_mean(name, known)}")
    return config.mixers or tuple(known)


def measure(name: str, task: Task, config: Config, device: torch.device) -> dict[str, Any]:
    """The best run over the learning rates, with all of them beside it."""
    runs: list[dict[str, Any]] = []
    try:
        job = resolve_model(name, task)
        for rate in task.learning_rates:
            begun = time.perf_counter()
            accuracy, loss = train(job, task, rate, config, device)
            seconds = time.perf_counter() - begun
            runs.append({"learning_rate": rate, "accuracy": accuracy, "loss": loss, "seconds": seconds})
    except Exception as error:  # one mixer that cannot run leaves the others their rows
        kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
        detail = " ".join(f"{kind}{error}".split())[:300]
        return {"mixer": name, "status": "error", "detail": detail, "runs": runs}
    best = max(runs, key=lambda r: sum(r["accuracy"].values()))
    seconds = sum(r["seconds"] for r in runs)
    state = getattr(job.config.mixer.options[name], "state_size", None)  # None: it keeps tokens
    return {"mixer": name, "status": "ok", "state": state} | best | {"seconds": seconds, "runs": runs}


def train(
    job: ResolvedJob, task: Task, learning_rate: float, config: Config, device: torch.device
) -> tuple[dict[int, float], float]:
    """Accuracy by number of pairs, and the last training loss."""
    mixers = job.config.mixer.options
    model = build_model(job.config.model, mixers, task.vocabulary, config.seed, job.registry).to(device)
    optimizer = OptimizerConfig("adamw", learning_rate, 0.1, task.steps // 10, (0.9, 0.95), 1e-8, 0.1, 1.0)
    settings = EngineConfig("replicated", _precision(config, device), "auto")
    engine = ReplicatedEngine(model, settings, optimizer, task.steps, Group(0, 1))
    shards = {n: _shard(n, task, device) for n in task.pairs}
    loss = torch.zeros(())
    for step, batch in enumerate(_batches(task, config.seed, task.steps, device)):
        with engine.autocast(device):
            logits = _logits(model, batch, shards, config)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.answers.flatten())
        loss.backward()
        engine.step(step)
    correct: dict[int, list[Tensor]] = {n: [] for n in task.pairs}
    with torch.no_grad(), engine.autocast(device):
        # Another seed: the pairs were never trained on.
        for batch in _batches(task, config.seed + 1, EVALUATION_BATCHES * len(task.pairs), device):
            right = _logits(model, batch, shards, config).argmax(-1) == batch.answers
            correct[batch.answers.shape[1]].append(right.float().mean())
    return {n: torch.stack(c).mean().item() for n, c in correct.items()}, loss.item()


def _precision(config: Config, device: torch.device) -> Literal["float32", "bfloat16"]:
    return config.precision or ("bfloat16" if device.type == "cuda" else "float32")


def resolve_model(name: str, task: Task) -> ResolvedJob:
    """The configuration of a model of one mixer; of the mixer's options those that size it are set."""
    width = task.num_heads * task.key_dim
    sizes = {"num_heads": task.num_heads, "num_value_heads": task.num_heads, "num_key_value_heads": task.num_heads}
    sizes |= {"key_dim": task.key_dim, "value_dim": task.key_dim, "head_dim": task.key_dim}
    options = {field.name for field in fields(Registry().load("mixers", name, ("Config",)).Config)}
    return resolve(
        [
            f"model.pattern=[{name}]",
            f"model.num_layers={task.num_layers}",
            f"model.width={width}",
            f"model.mlp_width={2 * width}",
            f"model.initializer_std={width**-0.5}",
            *(f"mixer.{name}.{key}={value}" for key, value in sizes.items() if key in options),
        ]
    )


def _batches(task: Task, seed: int, count: int, device: torch.device) -> Iterator[Batch]:
    """Batches that take turns among the numbers of pairs."""
    generator = torch.Generator(device).manual_seed(seed)
    for index in range(count):
        pairs = task.pairs[index % len(task.pairs)]
        yield associations(pairs, task.vocabulary, task.batch, generator)


def _shard(pairs: int, task: Task, device: torch.device) -> Shard:
    """A batch of whole sequences on one rank; made once, since it keeps positions on the device."""
    layout = SequenceLayout(TOKENS_PER_PAIR * pairs, 1, ((0,),) * task.batch)
    return Shard(layout, Group(0, 1), device)


def _logits(model: Model, batch: Batch, shards: dict[int, Shard], config: Config) -> Tensor:
    """[B, D, vocabulary], at the queries."""
    shard = shards[batch.answers.shape[1]]
    handle = ShardedSequence(shard, Algorithms(local.scan, local.attend), backend=config.backend)
    hidden = model(batch.tokens, handle)
    return model.head(hidden.gather(1, batch.queries.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))


def _cells(row: dict[str, Any], task: Task) -> list[str]:
    state = "tokens" if row["state"] is None else f"{row['state']:,}"
    accuracy = [f"{row['accuracy'][n]:.1%}" for n in task.pairs]
    return [row["mixer"], state, *accuracy, f"{row['learning_rate']:g}", f"{row['seconds']:.0f}"]
