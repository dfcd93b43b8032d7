"""Sums over the tokens of examples."""

import torch
from torch import Tensor

from longtrain.core.labels import IGNORED_LABEL
from longtrain.core.targets import Targets


def per_example(values: Tensor, targets: Targets) -> Tensor:
    """[n] values of tokens -> [num_examples] float64 sums over those that have a label.

    By a mask rather than an indexed addition, whose order on a GPU differs from run to run.
    """
    example, labelled = targets.columns["example"], targets.labels != IGNORED_LABEL
    own = example == torch.arange(targets.num_examples, device=example.device)[:, None]
    return torch.where(own & labelled, values.double(), 0.0).sum(1)
