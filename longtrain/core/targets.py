"""What a batch asks of the model: labels, and what else a data source says about the tokens that have one."""

from collections.abc import Callable, Mapping
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
    * `weight`: 1 / tokens of its example that have a label, so that the weights of an example add up to 1;
    * what they say themselves (`side`, `advantage`, `old_log_probs`, `reference_log_probs`): see `data/sources/`."""
    num_examples: int = 0
    """Of the batch, over all the ranks that share its sequences."""
    examples: range | None = None
    """Those that these tokens can belong to, where it is known to be fewer."""

    def part(self, tokens: slice) -> "Targets":
        """Some tokens of every sequence."""
        return self._each(lambda x: x[..., tokens])

    def flatten(self) -> "Targets":
        """All tokens, one sequence after another, as [n]."""
        return self._each(Tensor.flatten)

    def at(self, rows: slice | Tensor) -> "Targets":
        """Some tokens of [n]."""
        return self._each(lambda x: x[rows])

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Targets":
        columns = {name: function(column) for name, column in self.columns.items()}
        return replace(self, labels=function(self.labels), columns=columns)
