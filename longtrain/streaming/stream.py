"""Exact backpropagation, streamed over blocks of layers and chunks of time.

Forward, a block runs over the chunks in order without a graph; what is kept of it is its inputs, and what crosses from
chunk to chunk (its carries: states, rows of convolutions and windows) at every boundary. Backward, from the last block
and the last chunk, a chunk is computed again with a graph, from leaf copies of its input and its incoming carries, and
differentiated with the cotangents of its output and of its outgoing carries. Softmax layers keep keys and values
besides, while their block is worked on (`sequence_parallel.prefix`). One block and one chunk is plain backpropagation.

Sources: StreamBP (Luo et al. 2025) and ALST (Bekman et al. 2025) for one layer at a time; SeCO (Li et al. 2025) for
chunks through all layers. Passes forward: 2 less that of the last chunk of the last block; a block with softmax layers
that is not the last needs keys and values again, which for one layer is a projection. An objective that is not
linear needs the last chunk of the last block too, and the head's part of a forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial

import torch
from torch import Tensor

from longtrain.core.contracts import Objective
from longtrain.core.layout import SequenceLayout
from longtrain.core.targets import Targets
from longtrain.model.model import Model
from longtrain.sequence_parallel.handle import Handles
from longtrain.sequence_parallel.lift import Lift
from longtrain.sequence_parallel.prefix import Filled, Prefixes
from longtrain.sequence_parallel.shard import Shard
from longtrain.streaming.blocks import LayerBlock, blocks_of
from longtrain.streaming.config import StreamConfig
from longtrain.streaming.head import Head, Piece, pieces
from longtrain.streaming.shelf import DeviceShelf, Shelf, make_shelf
from longtrain.streaming.sums import GradientSums
from longtrain.streaming.waiting import Kept, Watch, waiting

GradOf = Callable[[Tensor, int], Tensor]
"""The gradient of the loss by a block's output for a chunk."""


class Stream:
    """Makes the gradients of a step. A collective: every rank of a sequence calls it alike."""

    def __init__(
        self,
        model: Model,
        handles: Handles,
        objective: Objective,
        config: StreamConfig,
        autocast: Callable[[], AbstractContextManager[object]],
        lift: Lift | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`lift` is that of another stream, whose waits for the host count with this one's."""
        self._blocks = blocks_of(model, config)
        self._handles, self._objective, self._config, self._autocast = handles, objective, config, autocast
        self._lift = (lift or Lift(handles.device)) if config.offload == "host" else None
        self._watch = watch
        self._sums = GradientSums(model.parameters())
        self._head = Head(model, objective, self._sums, autocast)

    def beside(self, model: Model) -> "Stream":
        """Of another model, cut alike."""
        return Stream(model, self._handles, self._objective, self._config, self._autocast, self._lift)

    def backward(self, tokens: Tensor, targets: Targets, layout: SequenceLayout, count: Tensor) -> Tensor:
        """Add the gradients of loss / count to the sums, for the tokens and targets [B, L] that this rank holds.

        `tokens` are in ascending order of chunks, and in a chunk of slots. May be called for several batches.

        Returns:
            This rank's part of the loss and of the objective's metrics, float64 [1 + metrics]; the ranks' parts add up.
        """
        shards = self._handles.shards(layout)
        parts = [slice(shard.own_rows.begin, shard.own_rows.end) for shard in shards]
        asked = [pieces(targets.part(part), self._config.logit_tokens) for part in parts]
        kept, sums = self._forward_all([tokens[:, part] for part in parts], asked, shards)
        self._tell("forward", [], kept)
        if not self._objective.linear:
            total = self._handles.group.all_reduce(torch.stack(sums).sum(0))
        else:
            total = self._sums_of_nothing(targets)
        cotangent = self._gradient_by_sums(total, count)
        own: list[Tensor] = []

        def score(output: Tensor, chunk: int) -> Tensor:
            of_chunk, grad = self._head.backward(output, asked[chunk], cotangent)
            own.append(of_chunk)
            return grad

        grad_of: GradOf = score
        above: list[Shelf] = []
        for number in reversed(range(len(self._blocks))):
            block, of_block = self._blocks[number], kept.pop()
            self._refill(block, of_block, shards)
            into_inputs = self._trains_below(number)
            self._backward(
                block, of_block, shards, grad_of, into_inputs, partial(self._tell, block.name, above, [of_block, *kept])
            )
            if not into_inputs:
                break
            grad_of, above = _taken(of_block.inputs), [of_block.inputs]
        if self._objective.linear:
            return self._outcome(torch.stack(own).sum(0))
        # Every rank of the sequence knows the whole; it counts once.
        return self._outcome(total) if self._handles.group.rank == 0 else torch.zeros_like(self._outcome(total))

    def deliver(self) -> None:
        """Hand the sums over to the parameters' `grad`, once, and begin anew."""
        self._sums.deliver()
        if self._lift is not None:
            self._lift.settle()

    def host_wait_seconds(self) -> float:
        """How long the device stood still for copies to and from the host's memory since the last call."""
        return 0.0 if self._lift is None else self._lift.waited()

    def _tell(self, phase: str, above: list[Shelf], kept: list[Kept]) -> None:
        if self._watch is not None:
            self._watch(phase, waiting(above, kept, self._sums))

    def _trains_below(self, number: int) -> bool:
        """Whether anything of the blocks before this one is not frozen."""
        return any(block.trainable for block in self._blocks[:number])

    def log_probs(self, tokens: Tensor, labels: Tensor, layout: SequenceLayout) -> Tensor:
        """log p(label) of the tokens that this rank holds, [B, L], in nats; 0 where there is no label. No gradients."""
        shards = self._handles.shards(layout)
        parts = [slice(shard.own_rows.begin, shard.own_rows.end) for shard in shards]
        some = [labels[:, part] for part in parts]
        asked = [pieces(Targets(each), self._config.logit_tokens) for each in some]
        found: list[Tensor] = []

        def score(chunk: int, output: Tensor) -> None:
            found.append(self._head.log_probs(output, some[chunk], asked[chunk]))

        inputs = _tokens_on_a_shelf([tokens[:, part] for part in parts])
        for block in self._blocks:
            outputs = self._shelf()
            receive = score if block is self._blocks[-1] else _into(outputs)
            self._forward(block, self._nothing_kept(inputs), shards, receive, keep_carries=False)
            inputs = outputs
        if self._lift is not None:
            self._lift.settle()
        return torch.cat(found, dim=1)

    def _forward_all(
        self, tokens: list[Tensor], asked: list[list[Piece]], shards: list[Shard]
    ) -> tuple[list[Kept], list[Tensor]]:
        """What the backward pass needs of every block, and what the objective sums over the chunks, if it must know."""
        kept: list[Kept] = []
        sums: list[Tensor] = []
        inputs = _tokens_on_a_shelf(tokens)
        for number, block in enumerate(self._blocks):
            of_block, outputs = self._nothing_kept(inputs), self._shelf()
            last = block is self._blocks[-1]
            differentiated = bool(block.trainable) or self._trains_below(number) or last
            forward = partial(self._forward, block, of_block, keep_carries=differentiated)
            if not last:
                forward(shards, _into(outputs))
                # Keys and values make room for those of the blocks above.
                of_block.prefixes = Prefixes(self._lift, filled=len(of_block.prefixes))
            elif self._objective.linear:  # only what crosses chunks is wanted
                forward(shards[:-1], lambda chunk, output: None)
            else:
                forward(shards, lambda chunk, output: sums.append(self._head.sums(output, asked[chunk])))
            kept.append(of_block if differentiated else self._nothing_kept(DeviceShelf()))
            inputs = outputs
        return kept, sums

    def _sums_of_nothing(self, targets: Targets) -> Tensor:
        """Zeros in the shape of the objective's sums."""
        labels = targets.labels
        nothing = targets.flatten().at(slice(0, 0))
        return torch.zeros_like(self._objective.sums(labels.new_zeros(0, dtype=torch.float64), nothing))

    def _gradient_by_sums(self, total: Tensor, count: Tensor) -> Tensor:
        """Of loss / count, at what the objective sums in all."""
        leaf = total.detach().double().requires_grad_()
        with torch.enable_grad():
            [found] = torch.autograd.grad([self._objective.loss_sum(leaf) / count], [leaf])
        return found

    def _outcome(self, sums: Tensor) -> Tensor:
        return torch.cat([self._objective.loss_sum(sums)[None], self._objective.metric_sums(sums)])

    def _nothing_kept(self, inputs: Shelf) -> Kept:
        return Kept(inputs, self._shelf(), Prefixes(self._lift))

    @torch.no_grad()
    def _forward(
        self, block: LayerBlock, kept: Kept, shards: list[Shard], receive: Callable[[int, Tensor], None],
        keep_carries: bool,
    ) -> None:  # fmt: skip
        """Keep keys and values, and carries for a backward pass; `receive` gets every chunk's number and output."""
        carries: list[Tensor] | None = None
        for shard in shards:
            sequence = self._handles.at(shard, carries, kept.prefixes)
            with self._autocast():
                output = block(kept.inputs.look(shard.chunk)[0], sequence)
            carries = sequence.carries_out
            if keep_carries and shard.chunk + 1 < shard.layout.num_chunks:
                kept.carries.put(shard.chunk + 1, carries)
            receive(shard.chunk, output)
            self._leave(shard)

    @torch.no_grad()
    def _refill(self, block: LayerBlock, kept: Kept, shards: list[Shard]) -> None:
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
        self, block: LayerBlock, kept: Kept, shards: list[Shard], grad_of: GradOf, into_inputs: bool,
        after_chunk: Callable[[], None],
    ) -> None:  # fmt: skip
        """Add the block's gradients to the sums, and put those of its inputs in their place if they are wanted."""
        cotangents: list[Tensor] = []  # of what the chunk carries out; none for the last chunk: nothing reads that
        for shard in reversed(shards):
            grads, cotangents = self._backward_chunk(block, kept, shard, grad_of, into_inputs, cotangents)
            if into_inputs:
                kept.inputs.put(shard.chunk, grads)
            self._leave(shard)
            after_chunk()

    def _backward_chunk(
        self, block: LayerBlock, kept: Kept, shard: Shard, grad_of: GradOf, into_inputs: bool,
        cotangents: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The gradients of the inputs, one tensor or none, and of what came in from the chunk before.

        What is here alone dies on return: the graph, and the gradients of parameters that the sums have.
        """
        [x] = kept.inputs.take(shard.chunk)
        inputs = [x.detach().requires_grad_()] if into_inputs else [x]
        carries = [carry.detach().requires_grad_() for carry in kept.carries.take(shard.chunk)] if shard.chunk else None
        sequence = self._handles.at(shard, carries, kept.prefixes)
        with torch.enable_grad(), self._autocast(), kept.prefixes.with_a_graph():
            output = block(inputs[0], sequence)
        ends = [(output, grad_of(output, shard.chunk))]
        ends += zip(sequence.carries_out, cotangents, strict=True) if cotangents else []
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


def _tokens_on_a_shelf(tokens: list[Tensor]) -> Shelf:
    shelf = DeviceShelf()
    for chunk, some in enumerate(tokens):
        shelf.put(chunk, [some])
    return shelf


def _into(shelf: Shelf) -> Callable[[int, Tensor], None]:
    return lambda chunk, output: shelf.put(chunk, [output])


def _taken(grads: Shelf) -> GradOf:
    return lambda output, chunk: grads.take(chunk)[0]


def _gradients(ends: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> list[Tensor]:
    """Of the leaves, from tensors with their cotangents: zeros where nothing leads there."""
    reached = [(end, cotangent) for end, cotangent in ends if end.requires_grad]
    if not reached or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, cotangents = zip(*reached, strict=True)
    return list(torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True))
