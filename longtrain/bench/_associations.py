"""Multi-query associative recall (Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language
Models", section 3): the data, made here and the same for the same seed and device."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLANK = 0
TOKENS_PER_PAIR = 4  # key, value, query, and a blank among the queries
# The gap between a pair and its query falls off like a power, as distances in text do (appendix of the paper).
GAP_EXPONENT = 0.1 - 1


@dataclass(frozen=True)
class Batch:
    """Rows of B sequences with D pairs each."""

    tokens: Tensor
    """[B, 4 D]: k_1 v_1 ... k_D v_D, then every key once more somewhere among blanks."""
    queries: Tensor
    """[B, D]: where the keys stand again."""
    answers: Tensor
    """[B, D]: the value of each."""


def associations(pairs: int, vocabulary: int, batch: int, generator: torch.Generator) -> Batch:
    """A batch of fresh pairs: half of the vocabulary are keys, distinct within a sequence, the other half values."""
    device, half = generator.device, vocabulary // 2
    uniform = torch.ones(batch, half - 1, device=device)
    keys = 1 + torch.multinomial(uniform, pairs, generator=generator)
    values = half + torch.randint(vocabulary - half, (batch, pairs), generator=generator, device=device)
    begin, tokens = 2 * pairs, TOKENS_PER_PAIR * pairs
    gaps = torch.arange(1, tokens - begin + 1, device=device, dtype=torch.float32) ** GAP_EXPONENT
    queries = begin + torch.multinomial(gaps.expand(batch, -1), pairs, generator=generator)
    rows = torch.full((batch, tokens), BLANK, device=device)
    rows[:, 0:begin:2], rows[:, 1:begin:2] = keys, values
    return Batch(rows.scatter(1, queries, keys), queries, values)
