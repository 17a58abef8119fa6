"""Homes of weights outside the device, and a run whose weights live in one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from forwardtune import MeZO
from forwardtune.noise import Noise
from forwardtune.storage import InHostMemory, Offloaded, OnDisk
from forwardtune.storage.ferry import Ferry
from forwardtune.storage.visits import Visits

from .models import token_batch


class Beside(InHostMemory):
    """A host beside a device that is the host, too: what does not visit it is NaN, and what is copied on streams arrives as late as it may, so
    that no GPU is needed to see what is missing.

    Args:
        poison: False leaves values where parameters point to, as a real host does: for what reads and writes them there.
    """

    def __init__(self, *, poison: bool = True) -> None:
        Offloaded.__init__(self, "cpu")
        self._visits = Visits(self)
        self.streams = LateStreams()
        self.__dict__["_ferry"] = self.ferry = Ferry(self.device, self.streams)
        self._values: dict[int, torch.Tensor] = {}
        self._poison = poison

    @property
    def on_the_way(self) -> int:
        """Bytes on the device through which values come and go."""
        return sum(room.nbytes for room in self.ferry._rooms)

    def place(self, module: nn.Module) -> None:
        super().place(module)
        for parameter in module.parameters():
            if self._poison and id(parameter) not in self._values:
                self._values[id(parameter)] = parameter.data
                parameter.data = torch.full_like(parameter.data, torch.nan)

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        is_here = not parameter.data.isnan().all()  # a perturbed copy that takes its place
        return parameter.data if is_here else self._values.get(id(parameter), parameter.data)


class LateStreams:
    """In the place of ``torch.cuda``: streams whose copies are made when somebody waits for them, and no sooner.

    What is computed is computed at once, on the current stream. Orders that CUDA needs and that cannot show here are asserted: the stream made
    first, on which values come, writes to memory again when it has heard of its last use; the other one, on which they go, reads what came
    when it has heard of what was computed since.
    """

    def __init__(self) -> None:
        self.computing = _Stream(self)
        self.side: list[_Stream] = []
        self.came: dict[int, int] = {}  # address of memory -> when something came there last
        self._ticks = itertools.count(1)

    def now(self) -> int:
        return next(self._ticks)

    def Stream(self, device: torch.device) -> _Stream:  # noqa: N802 (torch's name)
        self.side.append(_Stream(self))
        return self.side[-1]

    def current_stream(self, device: torch.device) -> _Stream:
        return self.computing

    def stream(self, stream: _Stream) -> TorchFunctionMode:
        return _Postponed(stream)

    def synchronize(self, device: torch.device) -> None:
        for stream in self.side:
            stream.run(len(stream.todo))
            stream.heard = stream.heard_of_computing = self.now()

    @property
    def idle(self) -> bool:
        return all(stream.done == len(stream.todo) for stream in self.side)


class _Stream:
    def __init__(self, streams: LateStreams) -> None:
        self._streams = streams
        self.todo: list[Callable[[], object]] = []
        self.done = self.heard = self.heard_of_computing = 0

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.todo[self.done - 1]()

    def copy(self, target: torch.Tensor, source: torch.Tensor, since: int) -> None:
        to, of = (tensor.untyped_storage().data_ptr() for tensor in (target, source))
        if self is self._streams.side[0]:
            before = self._streams.came.get(to, 0)
            assert self.heard >= before or before == since, "values come to memory that is in use"
            self._streams.came[to] = since
        else:
            assert self.heard_of_computing >= self._streams.came[of], "values go that are still computed with"
        self.todo.append(lambda: target.copy_(source))

    def record_event(self) -> tuple[_Stream, int, int]:
        return self, len(self.todo), self._streams.now()

    def wait_event(self, event: tuple[_Stream, int, int]) -> None:
        other, until, when = event
        self.heard = max(self.heard, when)
        if other is self._streams.computing:
            self.heard_of_computing = max(self.heard_of_computing, when)
        if self is self._streams.computing:
            other.run(until)
        else:
            self.todo.append(lambda: other.run(until))

    def wait_stream(self, other: _Stream) -> None:
        self.wait_event(other.record_event())


class _Postponed(TorchFunctionMode):
    def __init__(self, stream: _Stream) -> None:
        super().__init__()
        self._stream, self._since = stream, stream._streams.now()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_:
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self._stream.copy(*args[:2], self._since)
        return args[0]


HOMES: dict[str, Callable[[Path], Offloaded]] = {"disk": OnDisk, "host": lambda folder: Beside()}


def tuned(model: Any, steps: int = 3, device: str = "cpu", **settings: Any) -> tuple[str, list[float]]:
    """The digest after a few steps, and their losses."""
    optimizer = MeZO(model, lr=1e-3, **settings)
    each = settings.get("assignment") == "example"
    tokens = token_batch().to(device)

    def loss() -> torch.Tensor:
        extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        squares = model(input_ids=tokens, **extra).logits.float().pow(2)
        return squares.mean(dim=(1, 2)) if each else squares.mean()

    losses = [optimizer.step(loss) for _ in range(steps)]
    return optimizer.tuned.digest(), losses


def interrupting(at: int) -> Callable[..., Any]:
    """``Noise.update``, with an interrupt at the call of that number."""
    real, calls = Noise.update, []

    def update(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return update
