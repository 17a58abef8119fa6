"""L5: what is kept of a forward pass until it is over."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class Shelf:
    """Tensors that are kept through a forward pass, in memory that stays from pass to pass.

    Kept as they come, they lie between what layers need for a moment only, so nothing as large finds room in its place again: on a CPU each layer of a pass then takes
    new memory of the system.
    """

    def __init__(self) -> None:
        self._room: dict[Hashable, Tensor] = {}

    def keep(self, key: Hashable, tensor: Tensor) -> Tensor:
        """A copy, which stands until the next one by that key."""
        room, numel = self._room.get(key), tensor.numel()
        if room is None or room.numel() < numel or (room.dtype, room.device) != (tensor.dtype, tensor.device):
            self._room[key] = room = torch.empty(numel, dtype=tensor.dtype, device=tensor.device)
        return room[:numel].view(tensor.shape).copy_(tensor.detach())
