"""Copies between the host and a device that do not wait for what the device has to do."""

from __future__ import annotations

import torch
from torch import Tensor

_SMALL = 1 << 20


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on a device. The copy of a small one stands in the queue of the device; the host goes on.

    A large one is copied as it lies: to pin it takes longer than to wait.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu" or tensor.nbytes > _SMALL:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
