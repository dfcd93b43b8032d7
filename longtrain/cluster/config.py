"""Where a run executes and what it survives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from longtrain.core.component import component
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry, did_you_mean
from longtrain.model.config import parse_pattern
from longtrain.training.config import RESUME_WORDS, TrainingConfig
from longtrain.training.objective import check_objective

ADDRESS_WORDS = ("local", "auto", "env")
Seconds = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ClusterConfig:
    """`conf/cluster/*.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    address: str
    """`local` starts Ray in this process; `auto` or `HOST:PORT` joins a cluster; `env`: this process is already one
    rank of a job (torchrun) and reads RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT."""
    workers: Annotated[int, Field(ge=1)] | None
    """Ranks in all, a multiple of `sequence_parallel.size`; null: one sequence-parallel group."""
    resources: dict[str, float | None]
    """Ray resources of one worker, such as `{CPU: 1, GPU: 1}`. Null: 1 where the cluster has one for every worker, else
    none."""
    failure_policy: Annotated[Any, component("cluster.policies")]
    """What to do when a worker fails: a module of `cluster/policies/`."""
    max_failures: Annotated[int, Field(ge=0)]
    """Restarts from the last committed checkpoint before the run is given up."""
    start_timeout_seconds: Seconds
    """How long to wait for the cluster to provide the workers."""
    heartbeat_timeout_seconds: Seconds
    """A worker that has not been heard of for so long is treated as failed."""
    hang_timeout_seconds: Seconds
    """Ranks of which none has gone on for so long are treated as hanging: twice as long in an attempt's first step,
    while loading and saving; ten times where no rank waits for another. Work between two exchanges may take so long.
    The only rank of a job waits for nobody and is never treated so: after ten times as long a line says where it is."""


@dataclass(frozen=True)
class JobConfig(TrainingConfig):
    """Root of the resolved configuration: what is trained, and where."""

    cluster: ClusterConfig


def num_workers(config: JobConfig) -> int:
    """Ranks in all: `cluster.workers`, or one sequence-parallel group."""
    return config.cluster.workers or config.sequence_parallel.size


def check_job(config: JobConfig, registry: Registry) -> None:
    """Check what involves several sections. Raises Refused: value, constraint and remedy in one line."""
    size, workers = config.sequence_parallel.size, num_workers(config)
    if workers % size:
        near = _nearest_multiples(workers, size)
        raise Refused(
            f"cluster.workers={workers} is not a multiple of sequence_parallel.size={size}; use {near} workers"
        )
    replicas = workers // size
    if config.batch_size % replicas:
        near = _nearest_multiples(config.batch_size, replicas)
        raise Refused(
            f"batch_size={config.batch_size} is not a multiple of {replicas} data-parallel ranks "
            f"(cluster.workers={workers} / sequence_parallel.size={size}); use {near}"
        )
    if config.micro_batch_size is not None and config.micro_batch_size > config.batch_size:
        raise Refused(
            f"micro_batch_size={config.micro_batch_size} is more than the batch_size={config.batch_size} sequences of "
            f"a step; use {config.batch_size} or fewer, or null for all"
        )
    _check_words(config)
    check_objective(config, registry)
    names = parse_pattern(config.model.pattern)
    pattern = f"model.pattern=[{', '.join(config.model.pattern)}]"
    if config.model.num_layers % len(names):
        near = _nearest_multiples(config.model.num_layers, len(names))
        raise Refused(
            f"model.num_layers={config.model.num_layers} is not a multiple of the {len(names)} layers of {pattern}; "
            f"use {near}"
        )
    for name in names:
        if name not in config.mixer.options:
            raise Refused(f"{pattern}: mixer.{name} is missing{did_you_mean(name, sorted(config.mixer.options))}")
    _check_backend(config)
    _check_block_attention(config)
    for verb in ("scan", "attend"):
        algorithm, known = getattr(config.sequence_parallel, verb), registry.names(f"sequence_parallel.{verb}")
        if algorithm not in (*known, "auto"):
            raise Refused(
                f"sequence_parallel.{verb}={algorithm}: there is no such algorithm{did_you_mean(algorithm, known)}"
            )
        for name in known if algorithm == "auto" else (algorithm,):
            registry.load(f"sequence_parallel.{verb}", name, (verb,))  # refuses a broken one before workers start


def _check_backend(config: JobConfig) -> None:
    """Triton needs GPUs and computes in float32; what a rank's device is with `auto`, the rank itself finds out."""
    if config.mixer.backend != "triton":
        return
    for key, value in (("engine.device", config.engine.device), ("cluster.resources.GPU", _gpus(config))):
        if value in ("cpu", 0):
            raise Refused(f"mixer.backend=triton runs on GPUs, but {key}={value}; use mixer.backend=auto, or a GPU")
    if config.engine.precision == "float64":
        raise Refused("mixer.backend=triton does not compute engine.precision=float64; use mixer.backend=chunked")


def _check_block_attention(config: JobConfig) -> None:
    """cuDNN's attention is for GPUs and halves; what a rank's device is with `auto`, the rank itself finds out."""
    if config.sequence_parallel.block_attention != "cudnn":
        return
    for key, value in (("engine.device", config.engine.device), ("cluster.resources.GPU", _gpus(config))):
        if value in ("cpu", 0):
            raise Refused(
                f"sequence_parallel.block_attention=cudnn runs on GPUs, but {key}={value}; use auto, or a GPU"
            )
    if config.engine.precision != "bfloat16":
        raise Refused(
            f"sequence_parallel.block_attention=cudnn does not compute engine.precision={config.engine.precision}; "
            "use auto, or bfloat16 on GPUs"
        )


def _gpus(config: JobConfig) -> float | None:
    gpus = config.cluster.resources.get("GPU")
    return gpus if gpus is None or gpus % 1 else int(gpus)


def _check_words(config: JobConfig) -> None:
    """`resume` and `cluster.address` are a word or a path, a word or an address."""
    resume, address = config.resume, config.cluster.address
    if resume not in RESUME_WORDS and "/" not in resume:
        raise Refused(f"resume={resume} is no checkpoint's path{did_you_mean(resume, RESUME_WORDS)}")
    if resume not in RESUME_WORDS and not Path(resume).expanduser().is_dir():
        words = ", ".join(RESUME_WORDS)
        raise Refused(f"resume={resume} does not exist; give a checkpoint's folder, or one of {words}")
    if config.initial_weights is not None and resume not in RESUME_WORDS:
        raise Refused(f"initial_weights and resume={resume} both say what a new run starts from; give one of them")
    if address not in ADDRESS_WORDS and ":" not in address:
        raise Refused(f"cluster.address={address} is no HOST:PORT{did_you_mean(address, ADDRESS_WORDS)}")


def _nearest_multiples(value: int, factor: int) -> str:
    below = max(value // factor, 1) * factor
    return f"{below} or {below + factor}"
