"""Copies between the host and a device that do not wait for what the device has to do."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on a device. The copy stands in the queue of the device; the host goes on."""
    tensor = tensor if dtype is None else tensor.to(dtype)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
