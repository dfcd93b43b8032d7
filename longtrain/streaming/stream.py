"""Exact backpropagation, streamed over blocks of layers and chunks of time.

Forward, a block runs over the chunks in order without a graph; what is kept of it is its inputs, and what crosses from
chunk to chunk (its carries: states, rows of convolutions and windows) at every boundary. Backward, from the last block
and the last chunk, a chunk is computed again with a graph, from leaf copies of its input and its incoming carries, and
differentiated with the cotangents of its output and of its outgoing carries. Softmax layers keep keys and values
besides, while their block is worked on (`sequence_parallel.prefix`). One block and one chunk is plain backpropagation.

Sources: StreamBP (Luo et al. 2025) and ALST (Bekman et al. 2025) for one layer at a time; SeCO (Li et al. 2025) for
chunks through all layers. Passes forward: 2 less that of the last chunk of the last block; a block with softmax layers
that is not the last needs keys and values again, which for one layer is a projection. An objective that is not
tokenwise needs the last chunk of the last block too, and the head's part of a forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtrain.core.contracts import Objective
from longtrain.core.layout import SequenceLayout
from longtrain.core.targets import Targets
from longtrain.model.model import Model
from longtrain.sequence_parallel.handle import Handles
from longtrain.sequence_parallel.prefix import Filled, Prefix
from longtrain.sequence_parallel.shard import Shard
from longtrain.streaming.blocks import LayerBlock, blocks_of
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.head import Head
from longtrain.streaming.shelf import Shelf, make_shelf
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
    prefixes: list[Prefix] = field(default_factory=list)


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
        self._handles, self._objective, self._autocast, self._offload = handles, objective, autocast, config.offload
        self._sums = GradientSums(model.parameters())
        self._head = Head(model, objective, config.logit_tokens, self._sums, autocast)

    def backward(self, tokens: Tensor, targets: Targets, layout: SequenceLayout, count: Tensor) -> Tensor:
        """Add the gradients of loss / count to the sums, for the tokens and targets [B, L] that this rank holds.

        `tokens` are in ascending order of chunks, and in a chunk of slots. May be called for several batches.

        Returns:
            This rank's part of the loss, a float64 scalar; the ranks' parts add up to it.
        """
        shards = self._handles.shards(layout)
        parts = [slice(shard.own_rows.begin, shard.own_rows.end) for shard in shards]
        asked = [targets.part(part) for part in parts]
        kept, sums = self._forward_all([tokens[:, part] for part in parts], asked, shards)
        loss, cotangent = self._differentiate_sums(sums, count)

        def score(output: Tensor, chunk: int) -> Tensor:
            nonlocal loss
            own, grad = self._head.backward(output, asked[chunk], cotangent)
            if self._objective.tokenwise:
                loss = loss + own
            return grad

        grad_of: GradOf = score
        for number in reversed(range(len(self._blocks))):
            block, of_block, below = self._blocks[number], kept.pop(), self._blocks[:number]
            if block is not self._blocks[-1]:
                self._refill(block, of_block, shards)
            grads = self._backward(block, of_block, shards, grad_of, into_inputs=any(b.trainable for b in below))
            if grads is None:  # whatever is below is frozen
                break
            grad_of = _taken(grads)
        return loss

    def deliver(self) -> None:
        """Hand the sums over to the parameters' `grad`, once, and begin anew."""
        self._sums.deliver()

    def log_probs(self, tokens: Tensor, labels: Tensor, layout: SequenceLayout) -> Tensor:
        """log p(label) of the tokens that this rank holds, [B, L], in nats; 0 where there is no label. No gradients."""
        shards = self._handles.shards(layout)
        parts = [slice(shard.own_rows.begin, shard.own_rows.end) for shard in shards]
        inputs, found = Shelf(), []

        def score(chunk: int, output: Tensor) -> None:
            found.append(self._head.log_probs(output, labels[:, parts[chunk]]))

        for chunk, part in enumerate(parts):
            inputs.put(chunk, [tokens[:, part]])
        for block in self._blocks:
            outputs = self._shelf()
            self._forward(
                block, _Kept(inputs, self._shelf()), shards, score if block is self._blocks[-1] else _into(outputs)
            )
            inputs = outputs
        return torch.cat(found, dim=1)

    def _forward_all(
        self, tokens: list[Tensor], targets: list[Targets], shards: list[Shard]
    ) -> tuple[list[_Kept], list[Tensor]]:
        """What the backward pass needs of every block, and what the objective sums over the chunks, if it must know."""
        kept, inputs, sums = [], Shelf(), []
        for chunk, some in enumerate(tokens):
            inputs.put(chunk, [some])
        for block in self._blocks:
            of_block, outputs = _Kept(inputs, self._shelf()), self._shelf()
            kept.append(of_block)
            if block is not self._blocks[-1]:
                self._forward(block, of_block, shards, _into(outputs))
                of_block.prefixes = [Prefix() for _ in of_block.prefixes]  # their room is for the blocks above
            elif self._objective.tokenwise:  # only what crosses chunks is wanted
                self._forward(block, of_block, shards[:-1], lambda chunk, output: None)
            else:
                self._forward(block, of_block, shards, lambda chunk, x: sums.append(self._head.sums(x, targets[chunk])))
            inputs = outputs
        return kept, sums

    def _differentiate_sums(self, sums: list[Tensor], count: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's part of the loss so far, and the gradient of loss / count by what the objective sums."""
        if self._objective.tokenwise:
            return torch.zeros_like(count), 1 / count
        total = self._handles.group.all_reduce(torch.stack(sums).sum(0)).requires_grad_()
        with torch.enable_grad():
            loss = self._objective.loss_sum(total)
        [cotangent] = torch.autograd.grad([loss / count], [total])
        # Every rank of the sequence knows the whole loss; it counts once.
        return loss.detach() if self._handles.group.rank == 0 else torch.zeros_like(count), cotangent

    @torch.no_grad()
    def _forward(
        self, block: LayerBlock, kept: _Kept, shards: list[Shard], receive: Callable[[int, Tensor], None]
    ) -> None:
        """Keep what crosses chunks; `receive` gets the number of every chunk and the block's output for it."""
        for shard in shards:
            sequence = self._handles.at(shard, self._carries(kept, shard.chunk), kept.prefixes)
            with self._autocast():
                output = block(kept.inputs.look(shard.chunk)[0], sequence)
            if shard.chunk + 1 < shard.layout.num_chunks:
                kept.carries.put(shard.chunk + 1, sequence.carries_out)
            receive(shard.chunk, output)

    @torch.no_grad()
    def _refill(self, block: LayerBlock, kept: _Kept, shards: list[Shard]) -> None:
        """Keys and values of all chunks but the last, which the backward pass begins with."""
        if not kept.prefixes:
            return
        kept.prefixes[-1].only_fill = True
        for shard in shards[:-1]:
            sequence = self._handles.at(shard, self._carries(kept, shard.chunk), kept.prefixes)
            try:
                with self._autocast():
                    block(kept.inputs.look(shard.chunk)[0], sequence)
            except Filled:
                continue
        kept.prefixes[-1].only_fill = False

    def _backward(
        self, block: LayerBlock, kept: _Kept, shards: list[Shard], grad_of: GradOf, into_inputs: bool
    ) -> Shelf | None:
        """Add the block's gradients to the sums; returns those of its inputs, if they are wanted."""
        results, parameters = self._shelf(), block.trainable
        cotangents: list[Tensor] = []  # of what the chunk carries out; nothing reads that of the last chunk
        for shard in reversed(shards):
            [x] = kept.inputs.take(shard.chunk)
            x = x.detach().requires_grad_(into_inputs)
            incoming = self._carries(kept, shard.chunk, last_time=True)
            carries = None if incoming is None else [carry.detach().requires_grad_() for carry in incoming]
            sequence = self._handles.at(shard, carries, kept.prefixes)
            with torch.enable_grad(), self._autocast():
                output = block(x, sequence)
            leaves = [*([x] if into_inputs else []), *(carries or []), *parameters]
            ends = [(output, grad_of(output, shard.chunk)), *zip(sequence.carries_out, cotangents, strict=False)]
            found = list(_gradients(ends, leaves))
            if into_inputs:
                results.put(shard.chunk, [found.pop(0)])
            cotangents = [found.pop(0) for _ in carries or []]
            self._sums.add(parameters, found)
        return results if into_inputs else None

    def _carries(self, kept: _Kept, chunk: int, last_time: bool = False) -> tuple[Tensor, ...] | None:
        if chunk == 0:
            return None
        return kept.carries.take(chunk) if last_time else kept.carries.look(chunk)

    def _shelf(self) -> Shelf:
        return make_shelf(self._offload, self._handles.device)


def _into(shelf: Shelf) -> Callable[[int, Tensor], None]:
    return lambda chunk, output: shelf.put(chunk, [output])


def _taken(grads: Shelf) -> GradOf:
    return lambda output, chunk: grads.take(chunk)[0]


def _gradients(ends: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the leaves, from tensors with their cotangents: zeros where nothing leads there."""
    reached = [(end, cotangent) for end, cotangent in ends if end.requires_grad]
    if not reached or not leaves:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    outputs, cotangents = zip(*reached, strict=True)
    return torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)
