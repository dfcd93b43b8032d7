"""Exact backpropagation, streamed over blocks of layers and chunks of time.

Forward, a block runs over the chunks in order without a graph; what is kept of it is its inputs, and what crosses from
chunk to chunk (its carries: states, rows of convolutions and windows) at every boundary. Backward, from the last block
and the last chunk, a chunk is computed again with a graph, from leaf copies of its input and its incoming carries, and
differentiated with the cotangents of its output and of its outgoing carries. Softmax layers keep keys and values
besides, while their block is worked on (`sequence_parallel.prefix`). One block and one chunk is plain backpropagation.

Sources: StreamBP (Luo et al. 2025) and ALST (Bekman et al. 2025) for one layer at a time; SeCO (Li et al. 2025) for
chunks through all layers. Passes forward: 2 less that of the last chunk of the last block; a block with softmax layers
that is not the last needs keys and values again, which for one layer is a projection.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrain.core.contracts import Objective
from longtrain.core.layout import SequenceLayout
from longtrain.model.model import Model
from longtrain.sequence_parallel.handle import Handles
from longtrain.sequence_parallel.lift import Lift
from longtrain.sequence_parallel.prefix import Filled, Prefixes
from longtrain.sequence_parallel.shard import Shard
from longtrain.streaming.blocks import LayerBlock, blocks_of
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.head import Head
from longtrain.streaming.shelf import DeviceShelf, Shelf, make_shelf
from longtrain.streaming.sums import GradientSums

GradOf = Callable[[Tensor, int], Tensor]
"""The gradient of the loss by a block's output for a chunk."""


@dataclass
class _Kept:
    """Of a block, for its backward pass; shelves are by chunk."""

    inputs: Shelf
    """Tokens [B, L] of the first block, hidden states [B, L, D] of the others."""
    carries: Shelf
    """What came into a chunk; nothing for the first one."""
    prefixes: Prefixes


class Stream:
    """Makes the gradients of a step. A collective: every rank of a sequence calls it alike."""

    def __init__(
        self,
        model: Model,
        handles: Handles,
        objective: Objective,
        config: StreamConfig,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._blocks = blocks_of(model, config)
        self._handles, self._autocast = handles, autocast
        self._lift = Lift(handles.device) if config.offload == "host" else None
        self._sums = GradientSums(model.parameters())
        self._head = Head(model, objective, config.logit_tokens, self._sums, autocast)

    def backward(self, tokens: Tensor, labels: Tensor, layout: SequenceLayout, count: Tensor) -> Tensor:
        """Add the gradients of loss_sum / count to the sums, for the tokens and labels [B, L] that this rank holds.

        `tokens` are in ascending order of chunks, and in a chunk of slots. May be called for several batches.

        Returns:
            The sum of this rank's losses, a float64 scalar.
        """
        shards = self._handles.shards(layout)
        parts = [slice(shard.own_rows.begin, shard.own_rows.end) for shard in shards]
        kept = self._forward_all([tokens[:, part] for part in parts], shards)
        losses: list[Tensor] = []

        def score(output: Tensor, chunk: int) -> Tensor:
            loss, grad = self._head.backward(output, labels[:, parts[chunk]], count)
            losses.append(loss)
            return grad

        grad_of: GradOf = score
        for number in reversed(range(len(self._blocks))):
            block, of_block = self._blocks[number], kept.pop()
            self._refill(block, of_block, shards)
            grads = self._backward(block, of_block, shards, grad_of, into_inputs=self._trains_below(number))
            if grads is None:
                break
            grad_of = _taken(grads)
        return torch.stack(losses).sum()

    def deliver(self) -> None:
        """Hand the sums over to the parameters' `grad`, once, and begin anew."""
        self._sums.deliver()
        if self._lift is not None:
            self._lift.settle()

    def _trains_below(self, number: int) -> bool:
        """Whether anything of the blocks before this one is not frozen."""
        return any(block.trainable for block in self._blocks[:number])

    def _forward_all(self, tokens: list[Tensor], shards: list[Shard]) -> list[_Kept]:
        inputs: Shelf = DeviceShelf()
        for chunk, some in enumerate(tokens):
            inputs.put(chunk, [some])
        kept = []
        for number, block in enumerate(self._blocks):
            of_block, outputs = self._nothing_kept(inputs), self._shelf()
            self._forward(block, of_block, shards, None if block is self._blocks[-1] else outputs)
            differentiated = block.trainable or self._trains_below(number) or block is self._blocks[-1]
            kept.append(of_block if differentiated else self._nothing_kept(DeviceShelf()))
            inputs = outputs
        return kept

    def _nothing_kept(self, inputs: Shelf) -> _Kept:
        return _Kept(inputs, self._shelf(), Prefixes(self._lift))

    @torch.no_grad()
    def _forward(self, block: LayerBlock, kept: _Kept, shards: list[Shard], outputs: Shelf | None) -> None:
        """Fill what is kept, and `outputs` if there is a block above, which needs keys and values meanwhile."""
        carries: list[Tensor] | None = None
        # Of the last block only what crosses chunks is wanted.
        for shard in shards if outputs is not None else shards[:-1]:
            sequence = self._handles.at(shard, carries, kept.prefixes)
            with self._autocast():
                output = block(kept.inputs.look(shard.chunk)[0], sequence)
            carries = sequence.carries_out
            if shard is not shards[-1]:
                kept.carries.put(shard.chunk + 1, carries)
            if outputs is not None:
                outputs.put(shard.chunk, [output])
            self._leave(shard)
        if outputs is not None:
            kept.prefixes = Prefixes(self._lift, filled=len(kept.prefixes))

    @torch.no_grad()
    def _refill(self, block: LayerBlock, kept: _Kept, shards: list[Shard]) -> None:
        """Keys and values of all chunks but the last, which the backward pass begins with, if they are not there."""
        carries: list[Tensor] | None = None
        for shard in shards[:-1] if kept.prefixes.wanted else []:
            sequence = self._handles.at(shard, carries, kept.prefixes)
            with suppress(Filled), self._autocast():
                block(kept.inputs.look(shard.chunk)[0], sequence)
            carries = sequence.carries_out  # of the layers below the last that was filled
            self._leave(shard)
        kept.prefixes.all_filled()

    def _backward(
        self, block: LayerBlock, kept: _Kept, shards: list[Shard], grad_of: GradOf, into_inputs: bool
    ) -> Shelf | None:
        """Add the block's gradients to the sums; returns those of its inputs, if they are wanted."""
        results = self._shelf()
        cotangents: list[Tensor] = []  # of what the chunk carries out; nothing reads that of the last chunk
        for shard in reversed(shards):
            grads, cotangents = self._backward_chunk(block, kept, shard, grad_of, into_inputs, cotangents)
            if into_inputs:
                results.put(shard.chunk, grads)
            self._leave(shard)
        return results if into_inputs else None

    def _backward_chunk(
        self, block: LayerBlock, kept: _Kept, shard: Shard, grad_of: GradOf, into_inputs: bool,
        cotangents: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The gradients of the inputs, one tensor or none, and of what came in from the chunk before.

        What is here alone dies on return: the graph, and the gradients of parameters that the sums have.
        """
        [x] = kept.inputs.take(shard.chunk)
        inputs = [x.detach().requires_grad_()] if into_inputs else [x]
        carries = [carry.detach().requires_grad_() for carry in kept.carries.take(shard.chunk)] if shard.chunk else None
        sequence = self._handles.at(shard, carries, kept.prefixes)
        with torch.enable_grad(), self._autocast(), kept.prefixes.saving():
            output = block(inputs[0], sequence)
        ends = [(output, grad_of(output, shard.chunk)), *zip(sequence.carries_out, cotangents, strict=False)]
        leaves = [*(inputs if into_inputs else []), *(carries or [])]
        found = _gradients(ends, [*leaves, *block.trainable])
        grads, found[: len(leaves)] = found[: len(leaves)], []
        self._sums.add(block.trainable, found)
        return grads[: int(into_inputs)], grads[int(into_inputs) :]

    def _leave(self, shard: Shard) -> None:
        """A chunk is done; others may wait for this rank until all are."""
        shard.release()
        self._handles.group.journal.tick()

    def _shelf(self) -> Shelf:
        return make_shelf(self._lift)


def _taken(grads: Shelf) -> GradOf:
    return lambda output, chunk: grads.take(chunk)[0]


def _gradients(ends: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    """Of the leaves, from tensors with their cotangents: zeros where nothing leads there."""
    reached = [(end, cotangent) for end, cotangent in ends if end.requires_grad]
    if not reached or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, cotangents = zip(*reached, strict=True)
    return list(torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True))
