"""Builds a model and the sequence handles for it: the only place where a mixer meets an algorithm."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from longtrain.comm.group import Group
from longtrain.core.registry import Registry
from longtrain.model.config import ModelConfig, parse_pattern
from longtrain.model.model import Model
from longtrain.sequence_parallel import local
from longtrain.sequence_parallel.config import SequenceParallelConfig
from longtrain.sequence_parallel.handle import Algorithms, Handles
from longtrain_kernels.backend import Backend


def build_model(
    config: ModelConfig, mixer_configs: Mapping[str, Any], vocab_size: int, seed: int, registry: Registry
) -> Model:
    """A model on the CPU whose parameters depend on `seed` and the configuration alone, not on the number of ranks."""
    pattern = parse_pattern(config.pattern)
    names = pattern * (config.num_layers // len(pattern))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixers = [
            registry.load("mixers", name, ("Config", "Mixer")).Mixer(mixer_configs[name], config.width)
            for name in names
        ]
        for layer, mixer in enumerate(mixers):
            mixer.layer, mixer.num_layers = layer, len(mixers)
        return Model(config, mixers, vocab_size)


def build_handles(
    config: SequenceParallelConfig, backend: Backend, group: Group, device: torch.device, registry: Registry
) -> Handles:
    """What makes the `Sequence` handles of batches; `backend` runs the mixers' operations.

    A group of one rank uses the local algorithms. Raises Refused for an algorithm that does not exist.
    """
    algorithms = Algorithms(
        scan=registry.load("sequence_parallel.scan", config.scan, ("scan",)).scan,
        attend=registry.load("sequence_parallel.attend", config.attend, ("attend",)).attend,
        block_attention=config.block_attention,
    )
    if group.size == 1:
        algorithms = replace(algorithms, scan=local.scan, attend=local.attend)
    return Handles(algorithms, group, device, backend)
