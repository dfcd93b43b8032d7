"""Which layers are streamed together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from longtrain.core.contracts import Sequence as SequenceHandle
from longtrain.model.model import Model
from longtrain.streaming.config import StreamConfig


def cut(config: StreamConfig, growing: Sequence[bool]) -> list[range]:
    """The blocks of layers, of which some have a carry that grows with the context."""
    count, size = len(growing), config.block_layers
    if size == "all":
        return [range(count)]
    if size == "recurrent":
        starts = [0, *(layer for layer in range(1, count) if growing[layer])]
        return [range(first, end) for first, end in zip(starts, [*starts[1:], count], strict=True)]
    return [range(first, min(first + max(size, 1), count)) for first in range(0, count, max(size, 1))]


@dataclass(frozen=True)
class LayerBlock:
    """Some layers of a model; the first block begins with the embedding."""

    model: Model
    layers: range

    def __call__(self, x: Tensor, sequence: SequenceHandle) -> Tensor:
        """[B, L] tokens or [B, L, D] hidden states -> [B, L, D]. No graph of what nobody wants gradients of."""
        for module in self._modules():
            with torch.set_grad_enabled(torch.is_grad_enabled() and (x.requires_grad or _trains(module))):
                x = module(x) if isinstance(module, nn.Embedding) else module(x, sequence)
        return x

    @property
    def name(self) -> str:
        """Which layers it has."""
        first, last = self.layers.start, self.layers.stop - 1
        return f"layer {first}" if first == last else f"layers {first}-{last}"

    @cached_property
    def trainable(self) -> list[nn.Parameter]:
        """Its parameters that are not frozen."""
        return trainable(self._modules())

    def _modules(self) -> list[nn.Module]:
        layers: list[nn.Module] = [*self.model.layers[self.layers.start : self.layers.stop]]
        return [self.model.embedding, *layers] if self.layers.start == 0 else layers


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def trainable(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of modules that are not frozen, each once."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def blocks_of(model: Model, config: StreamConfig) -> list[LayerBlock]:
    """In order; see `cut`."""
    return [LayerBlock(model, layers) for layers in cut(config, [block.mixer.keeps_prefix for block in model.layers])]
