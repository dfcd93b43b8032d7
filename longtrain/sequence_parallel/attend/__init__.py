"""Algorithms that serve `Sequence.attend`: a module defines `attend(call, shard) -> output`."""
