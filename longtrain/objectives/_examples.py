"""Sums over the tokens of examples."""

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.core.targets import Targets


def per_example(values: Tensor, targets: Targets) -> Tensor:
    """[n] values of tokens -> [num_examples] float64 sums over the tokens of each.

    By a mask rather than an indexed addition, whose order on a GPU differs from run to run.
    """
    example, count = targets.columns["example"], targets.num_examples
    here = targets.examples or range(count)
    own = example == torch.arange(here.start, here.stop, device=example.device)[:, None]
    return F.pad(torch.where(own, values.double(), 0.0).sum(1), (here.start, count - here.stop))
