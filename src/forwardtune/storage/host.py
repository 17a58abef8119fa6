"""Values in the host's memory, beside a GPU that computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..memory import free
from .offloaded import Offloaded


class InHostMemory(Offloaded):
    """Values in the memory of the host, pinned where the device is CUDA's, so that the host does not wait for copies.

    Args:
        device: where the model computes.

    Raises:
        InputError: that is the host itself; or, from :meth:`place`, the host has no room for weights that are not there yet.
    """

    name = "cpu"

    def __init__(self, device: str | torch.device = "cuda") -> None:
        super().__init__(device)
        if self._visits is None:
            raise InputError(
                "offload='cpu' keeps weights in the memory of the host, and here the host computes: use offload='disk'",
                "offload",
            )

    def _rooms(self, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
        needed = sum(p.nbytes for p in parameters if p.device.type != "cpu")
        if needed > (there := free()):
            raise InputError(
                f"weights in the memory of the host take {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} are free: use offload='disk'",
                "offload",
            )
        for parameter in parameters:  # one at a time: what moves in leaves its old place before the next one comes
            pinned = self.device.type == "cuda"
            yield torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)
