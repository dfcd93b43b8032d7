"""Small tensors of the host on their way to a device."""

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait: from pinned memory, whatever its size."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
