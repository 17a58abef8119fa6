"""L1: scratch memory for perturbed weights, reused from module to module and step to step."""

from __future__ import annotations

import torch
from torch import Tensor


class _Stack:
    """Reused memory of one device, handed out in order and given back in the reverse order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alignment = Arena.alignment(device)
        self._chunks: list[Tensor] = []  # one in the steady state
        self._top = (0, 0, 0)  # chunk, offset in it, bytes handed out in all
        self._peak = 0

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(chunk.numel() for chunk in self._chunks)

    @property
    def mark(self) -> tuple[int, int, int]:
        """Where the stack ends now."""
        return self._top

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the shape and dtype of ``like``."""
        return self.take_bytes(like.nbytes).view(like.dtype).view(like.shape)

    def take_bytes(self, count: int) -> Tensor:
        """So much uninitialised memory."""
        size = -(-count // self._alignment) * self._alignment
        index, offset, used = self._top
        if used == 0 and self._chunks and size > self._chunks[0].numel():
            self._chunks.clear()  # nothing is lent: grow by replacing
        while index < len(self._chunks) and offset + size > self._chunks[index].numel():
            index, offset = index + 1, 0
        if index == len(self._chunks):
            self._grow(size)
        self._top = (index, offset + size, used + size)
        self._peak = max(self._peak, used + size)
        return self._chunks[index][offset : offset + count]

    def release(self, mark: tuple[int, int, int], *, poison: bool) -> None:
        """Give back everything taken since the mark; with ``poison`` it becomes NaN in every dtype."""
        if poison:
            for number in range(mark[0], self._top[0] + 1):
                self._chunks[number][mark[1] if number == mark[0] else 0 :].fill_(0xFF)
        self._top = mark
        if mark[2] == 0 and len(self._chunks) > 1:
            self._chunks.clear()  # first: the old chunks and the new one should not exist together
            self._grow(self._peak)
            self._top = (0, 0, 0)

    def is_given_back(self, tensor: Tensor) -> bool:
        """Whether it lies in memory of this stack that is not lent now."""
        place, (index, offset, _) = tensor.untyped_storage().data_ptr(), self._top
        for number, chunk in enumerate(self._chunks):
            if chunk.untyped_storage().data_ptr() == place:
                return (number, tensor.data_ptr() - chunk.data_ptr()) >= (index, offset)
        return False

    def _grow(self, size: int) -> None:
        with torch.inference_mode(False):  # the memory outlives the evaluation that first asks for it
            self._chunks.append(torch.empty(size, dtype=torch.uint8, device=self._device))


class Arena:
    """A stack of scratch memory on every device."""

    def __init__(self) -> None:
        self._stacks: dict[torch.device, _Stack] = {}

    @property
    def nbytes(self) -> int:
        """Memory held on all devices."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def mark(self) -> dict[torch.device, tuple[int, int, int]]:
        """Where the stacks end now."""
        return {device: stack.mark for device, stack in self._stacks.items()}

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of the shape, dtype and device of ``like``."""
        return self._stack(like.device).take(like)

    def take_bytes(self, count: int, device: torch.device) -> Tensor:
        """So much uninitialised memory of a device: a tensor of uint8."""
        return self._stack(device).take_bytes(count)

    @staticmethod
    def alignment(device: torch.device) -> int:
        """Tensors begin as torch's own do there: matrix libraries choose kernels, and so roundings, by the alignment."""
        return 512 if device.type == "cuda" else 64

    def _stack(self, device: torch.device) -> _Stack:
        if device not in self._stacks:
            self._stacks[device] = _Stack(device)
        return self._stacks[device]

    def release(self, mark: dict[torch.device, tuple[int, int, int]], *, poison: bool) -> None:
        """Give back everything taken since the mark."""
        for device, stack in self._stacks.items():
            stack.release(mark.get(device, (0, 0, 0)), poison=poison)

    def is_given_back(self, tensor: Tensor) -> bool:
        """Whether it lies in memory of the arena that is not lent now."""
        stack = self._stacks.get(tensor.device)
        return stack is not None and stack.is_given_back(tensor)
