"""Values on their way to the device and back, a piece at a time, while the device computes with other pieces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Pieces of so many bytes keep a bus busy. While one comes, another one is computed with, and a third one goes.
_PIECE = 1 << 25
_ROOMS = 3


def on_the_way(sizes: Iterable[int]) -> int:
    """Bytes on the device through which tensors of these bytes come and go."""
    return _ROOMS * min(_PIECE, max(sizes))


class Ferry:
    """Carries values between where they live and the device.

    What comes has a stream of its own, and so has what goes; computing stays on the caller's. Events order them where they share memory, so the
    host waits for nothing but in :meth:`wait`: it runs ahead, and the streams overlap. What lies in memory that is not pinned is copied while
    the host waits. On the device there are ``_ROOMS`` pieces, as large as the largest one so far, of ``_PIECE`` bytes at most.

    Args:
        device: where the model computes.
        streams: the module of torch that has its streams; by default that of CUDA, or the CPU's, whose streams are none: all happens in order.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device = device
        self._streams: Any = streams or (torch.cuda if device.type == "cuda" else torch.cpu)
        self._coming, self._going = self._streams.Stream(device), self._streams.Stream(device)
        self._rooms: list[Tensor] = []
        self._left: list[Any] = [None] * _ROOMS  # events: what lay in a room last is needed no more
        self._sent: dict[int, Any] = {}  # address of what went -> an event: it arrived
        self._turn = 0

    def trips(self, flats: Sequence[Tensor], unit: int = 8) -> Iterator[tuple[int, list[Tensor]]]:
        """Flat tensors of as many elements, in pieces on the device, each with the number of its first element.

        What is written to pieces until the next ones are asked for is in the tensors when :meth:`wait` returns.

        Args:
            unit: pieces are cut at multiples of so many elements; by default of a block of the noise.
        """
        each = max(1, _PIECE // (unit * sum(flat.itemsize for flat in flats))) * unit
        place = flats[0].data_ptr()
        if place in self._sent:
            self._coming.wait_event(self._sent[place])
        for lo in range(0, flats[0].numel(), each):
            here = [flat[lo : lo + each] for flat in flats]
            turn, there = self._bring(here)
            yield lo, there
            self._going.wait_stream(self._current)
            self._copy(self._going, there, here)
            self._left[turn] = self._sent[place] = self._going.record_event()

    def bring(self, values: Tensor, out: Tensor) -> None:
        """Copy values to a tensor on the device; both are contiguous. They set out while the device still computes with others."""
        here, there = values.view(-1), out.view(-1)
        each = _PIECE // values.itemsize
        for lo in range(0, here.numel(), each):
            turn, (piece,) = self._bring([here[lo : lo + each]])
            there[lo : lo + each].copy_(piece)
            self._left[turn] = self._current.record_event()

    def wait(self) -> None:
        """Return when all that went has arrived."""
        self._streams.synchronize(self._device)
        self._sent.clear()

    @property
    def _current(self) -> Any:
        return self._streams.current_stream(self._device)

    def _bring(self, here: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Copies of these in the next room, and its number. What is launched from now on finds them there."""
        sizes = [-(-values.nbytes // 16) * 16 for values in here]
        self._grow(sum(sizes))
        self._turn = turn = (self._turn + 1) % _ROOMS
        parts = self._rooms[turn][: sum(sizes)].split(sizes)
        there = [part[: v.nbytes].view(v.dtype) for part, v in zip(parts, here, strict=True)]
        if self._left[turn] is not None:
            self._coming.wait_event(self._left[turn])
        self._copy(self._coming, here, there)
        self._current.wait_stream(self._coming)
        return turn, there

    def _copy(self, stream: Any, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        with self._streams.stream(stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=self._device.type == "cuda")

    def _grow(self, size: int) -> None:
        if self._rooms and size <= self._rooms[0].numel():
            return
        self.wait()  # no stream needs the old ones, nor what the memory of the new ones was before
        self._rooms = []
        with torch.inference_mode(False):  # they outlive the step
            self._rooms = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(_ROOMS)]
        self._left = [None] * _ROOMS
