"""Algorithms that serve `Sequence.scan`: a module defines `scan(op, shard, carry) -> (output, carry)`."""
