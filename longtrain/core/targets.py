"""What a batch asks of the model: labels, and what else a data source says about the tokens that have one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Of some tokens of a batch; every tensor has the same shape, [B, L] or [n]."""

    labels: Tensor
    """int64, the token that is to be predicted; `IGNORED_LABEL` where there is none."""
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, of the tokens that have a label; any number elsewhere. Sources of examples give

    * `example`: which of the batch's examples a token belongs to, int64 in [0, num_examples);
    * `weight`: 1 / tokens of its example that have a label, and 0 where there is no label, so that the weights of an
      example add up to 1;
    * what they say themselves (`side`, `advantage`, `old`, `reference`): see `data/sources/`."""
    num_examples: int = 0
    """Of the batch, over all the ranks that share its sequences."""

    def part(self, tokens: slice) -> "Targets":
        """Some tokens of every sequence."""
        return self._each(lambda x: x[..., tokens])

    def split(self, size: int) -> Iterator["Targets"]:
        """All tokens, one sequence after another, as [n] with n <= `size`; of no tokens one empty part."""
        flat = self._each(Tensor.flatten)
        return (flat.part(slice(begin, begin + size)) for begin in range(0, max(self.labels.numel(), 1), size))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        columns = {name: function(column) for name, column in self.columns.items()}
        return replace(self, labels=function(self.labels), columns=columns)
