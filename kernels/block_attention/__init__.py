"""Softmax attention of a block of queries to a block of keys, with the log-sum-exp that lets blocks be merged.

A query sees a key of its own document that is not later than itself and, with a window, less than `window` tokens
before it. Tokens are named by their place in the whole sequence: a block may be any of its spans, in ascending order.
"""

from longtrain_kernels.block_attention.attention import BlockAttention
from longtrain_kernels.block_attention.blocks import Tokens
from longtrain_kernels.block_attention.choice import AUTO, NAMES
from longtrain_kernels.block_attention.kernel import Unsupported
from longtrain_kernels.block_attention.merging import merge_into
from longtrain_kernels.spans import Span

__all__ = ["AUTO", "NAMES", "BlockAttention", "Span", "Tokens", "Unsupported", "merge_into"]
