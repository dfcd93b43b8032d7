"""One rank of a training run, from the configuration and the env:// variables to its outcome."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from longtrain.checkpoint.store import CheckpointStore
from longtrain.comm.mesh import COLLECTIVE_TIMEOUT, Mesh, build_mesh, process_group
from longtrain.core.contracts import Objective
from longtrain.core.errors import Refused
from longtrain.core.registry import Registry
from longtrain.data.corpus import Corpus
from longtrain.data.prepare import open_corpus
from longtrain.engine.replicated import ReplicatedEngine
from longtrain.model.automatic import Batch, name_algorithms
from longtrain.model.build import build_handles, build_model
from longtrain.model.model import Model
from longtrain.sequence_parallel.choice import Choice
from longtrain.streaming.stream import Stream
from longtrain.telemetry.events import Started, Warned
from longtrain.telemetry.lock import RunLock
from longtrain.telemetry.records import RunRecords
from longtrain.training.batch import BatchReader, BatchSizes, Cut
from longtrain.training.config import TrainingConfig
from longtrain.training.listener import Listener
from longtrain.training.loop import Loop
from longtrain.training.objective import check_columns, make_objective
from longtrain.training.reference import ReferencedReader, load_reference
from longtrain.training.resume import Start, about, resume
from longtrain.training.weights import load_weights
from longtrain_kernels.backend import Backend, default_backend

LOCK_TIMEOUT_SECONDS = 30.0  # for the dying processes of a killed predecessor


@dataclass(frozen=True)
class Outcome:
    """How a rank ended."""

    step: int
    """Steps of the run that are done, in this attempt and before."""
    tokens: int
    preempted: bool
    """Whether it was asked to stop before the last step; a checkpoint of `step` is committed."""


def run_rank(config: TrainingConfig, listener: Listener, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Outcome:
    """Train, or go on training, as the rank that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Raises Refused for what the user can mend, CorruptCheckpoint and CorruptData where stored bytes are wrong, and
    ExchangeFailed where another rank is gone, or `timeout` late in an exchange.
    """
    listener.phase("start", 0)
    device = pick_device(config.engine.device)
    backend = _pick_kernels(config, device)
    registry, cut = Registry(config.plugins), config.sequence_parallel
    listener.phase("join", 0)
    with process_group(device, timeout):
        mesh = build_mesh(cut.size, timeout, cut.copy_engines)
        listener.watch(mesh.journal)
        directory = make_run_directory(config)
        with RunLock(directory).acquire(LOCK_TIMEOUT_SECONDS) if mesh.is_writer else nullcontext():
            corpus = open_corpus(config.data, registry, config.seed, config.context_length)
            objective = make_objective(config, registry)
            check_columns(config, objective, corpus.columns, registry)
            model = build_model(config.model, config.mixer.options, corpus.vocab_size, config.seed, registry)
            model.to(device)
            engine = ReplicatedEngine(model, config.engine, config.optimizer, config.steps, mesh.world)
            batch, autocast = _local_batch(config, mesh), engine.autocast(device)
            algorithms, choices = name_algorithms(cut, model, batch, mesh, device, autocast, registry)
            store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep, mesh.journal)
            records, event = (RunRecords(directory), listener.event) if mesh.is_writer else (None, None)
            listener.phase("load", 0)
            wanted = about(config, corpus, _automatic(config, choices, backend))
            start = resume(config, store, engine, wanted, records, event)
            if start.path is None and config.initial_weights is not None:
                load_weights(config.initial_weights, "initial_weights", model, config, corpus, store)
            if mesh.is_writer:
                if config.stream.offload == "host" and device.type == "cpu":
                    listener.event(Warned("stream.offload=host saves nothing on CPUs, whose memory is the host's"))
                listener.event(_started(config, start, mesh, model, corpus, objective, backend, choices))
            handles = build_handles(algorithms, backend, mesh.sequence, device, registry)
            stream = Stream(model, handles, objective, config.stream, partial(engine.autocast, device))
            batches = _reader(config, corpus, mesh, device)
            reader: BatchReader | ReferencedReader = batches
            if objective.reference is not None:
                frozen = load_reference(objective.reference, config, corpus, store, registry, device)
                reader = ReferencedReader(batches, stream.beside(frozen))
            end = Loop(
                config=config,
                mesh=mesh,
                device=device,
                model=model,
                objective=objective,
                engine=engine,
                reader=reader,
                stream=stream,
                store=store,
                records=records,
                listener=listener,
                about=wanted,
                attempt=start.attempt,
            ).run(start.step, start.tokens)
    listener.phase("done", end.step)
    return Outcome(step=end.step, tokens=end.tokens, preempted=end.step < config.steps)


def _pick_kernels(config: TrainingConfig, device: torch.device) -> Backend:
    """Of the mixers. Refuses what cannot run here."""
    check_block_attention(config.sequence_parallel.block_attention, device, config.engine.precision)
    return pick_backend(config.mixer.backend, device, config.engine.precision)


def _started(
    config: TrainingConfig, start: Start, mesh: Mesh, model: Model, corpus: Corpus, objective: Objective,
    backend: Backend, choices: Mapping[str, Choice],
) -> Started:  # fmt: skip
    return Started(
        step=start.step,
        total_steps=config.steps,
        context_length=config.context_length,
        world_size=mesh.world.size,
        sequence_parallel_size=mesh.sequence.size,
        parameters=sum(p.numel() for p in model.parameters()),
        resumed_from=start.path,
        initial_weights=None if config.initial_weights is None else str(config.initial_weights),
        unigram_entropy=corpus.unigram_entropy if objective.unit == "nats/token" else None,
        run_directory=str(make_run_directory(config)),
        backend=backend.value,
        loss_unit=objective.unit,
        choices=tuple(f"{key}={choice}" for key, choice in choices.items() if choice.estimates),
    )


def _reader(config: TrainingConfig, corpus: Corpus, mesh: Mesh, device: torch.device) -> BatchReader:
    sizes = BatchSizes(config.context_length, config.batch_size, config.micro_batch_size)
    return BatchReader(corpus, sizes, Cut(config.sequence_parallel.layout, config.stream.chunk_tokens), mesh, device)


def _automatic(config: TrainingConfig, choices: Mapping[str, Choice], backend: Backend) -> dict[str, str]:
    """What every setting that is `auto` is here, by key."""
    mixers = {"mixer.backend": backend.value} if config.mixer.backend == "auto" else {}
    return {key: choice.name for key, choice in choices.items()} | mixers


def _local_batch(config: TrainingConfig, mesh: Mesh) -> Batch:
    share = config.batch_size // mesh.data.size
    return Batch(min(share, config.micro_batch_size or share), config.context_length)


def make_run_directory(config: TrainingConfig) -> Path:
    """`<run.dir>/<run.name>`, made where it is missing. Raises Refused where the name has not been filled in."""
    if config.run.name is None:
        raise Refused("run.name is not set; give the run a name")
    directory = config.run.dir / config.run.name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def pick_device(choice: str) -> torch.device:
    """The device of this rank: its own GPU, by LOCAL_RANK among those it can see, or the CPU."""
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refused("engine.device=cuda, but this machine has no usable GPU; use engine.device=auto")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise Refused(
            f"this machine has {num_gpus} usable GPUs for more ranks than that; use fewer ranks, or engine.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def check_block_attention(choice: str, device: torch.device, precision: str) -> None:
    """Refuses a kernel that cannot compute the model's softmax layers on this rank."""
    if choice == "cudnn" and device.type != "cuda":
        raise Refused("sequence_parallel.block_attention=cudnn runs on GPUs, but this rank has none; use auto")
    if choice == "flash" and device.type == "cuda" and precision != "bfloat16":
        raise Refused(
            f"sequence_parallel.block_attention=flash does not compute engine.precision={precision} on GPUs; "
            "use auto, or bfloat16"
        )


def pick_backend(choice: str, device: torch.device, precision: str) -> Backend:
    """What runs the mixers' operations on this rank: the choice, or by the device. Refuses Triton on a CPU."""
    if choice == "auto":
        return Backend.CHUNKED if precision == "float64" else default_backend(device)
    backend = Backend(choice)
    if backend is Backend.TRITON and device.type != "cuda":
        raise Refused("mixer.backend=triton runs on GPUs, but this rank has none; use mixer.backend=auto")
    return backend
