"""Softmax attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged.

A query sees a key of its own document that is not later than itself and, with a window, less than `window` tokens
before it. Tokens are named by their index in the whole sequence: a block may be any set of them, in ascending order.
"""

from longtrain_kernels.block_attention.tiled import (
    Tokens,
    attention,
    attention_backward,
    attention_forward,
    merge,
)

__all__ = ["Tokens", "attention", "attention_backward", "attention_forward", "merge"]
