"""Values in the host's memory, beside a GPU that computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

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
        pinned = self.device.type == "cuda"
        if pinned:
            pin_no_more_than_asked()
        for parameter in parameters:  # one at a time: what moves in leaves its old place before the next one comes
            yield torch.empty_like(parameter, device="cpu", pin_memory=pinned, requires_grad=False)


def pin_no_more_than_asked() -> None:
    """Have torch take as much memory as pinned tensors of a mebibyte and more need.

    By default it rounds up to a power of two, up to twice a model. Blocks that are not rounded must not be cached: torch gives a cached one to
    whoever asks for a size between the same powers of two. One option does both.
    """
    with suppress(AttributeError, RuntimeError, ValueError):  # of another torch, where memory is rounded up then
        settings = torch._C._accelerator_getAllocatorSettings()
        if "pinned_max_cached_size_mb" not in settings:
            torch._C._accelerator_setAllocatorSettings(
                ",".join(filter(None, [settings, "pinned_max_cached_size_mb:1"]))
            )
