"""Bytes from every rank to every rank, in their order: all that crosses the wire goes through :meth:`Wire.exchange`."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..errors import InputError, LogError, LogWriteError, WorkerError

# Length of the content, negative if it is an error; what is exchanged; the beginning of the content.
_HEAD = struct.Struct("<qI")
#: Bytes that each rank sends at least. Content that does not fit them takes a second round.
FRAME = 64
_ROOM = FRAME - _HEAD.size


class Wire:
    """Exchanges bytes within torch's default process group.

    A rank that fails says so in the place of what it was to send, so the others stop with its message instead of waiting for it.

    Attributes:
        rank, count: of the group.
        sent: bytes that this rank has sent so far to each of the others.
    """

    def __init__(self) -> None:
        self.rank, self.count, self.sent = dist.get_rank(), dist.get_world_size(), 0
        on_host = "gloo" in dist.get_backend_config().lower() or dist.get_backend() != "nccl"
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        self._ended = False

    def exchange(self, content: bytes, what: str) -> list[bytes]:
        """What every rank sends, in the order of ranks.

        Args:
            what: name of what is exchanged, the same on every rank.

        Raises:
            WorkerError: a rank is gone, did not answer in time, failed, or exchanges something else.
            InputError: a rank was given something that it cannot use.
        """
        contents, failed = self._rounds(content, what, failed=False)
        if failed:
            self._ended = True
            first = failed[0]
            kind, _, message = contents[first].decode().partition("\n")
            raise (InputError if kind == "input" else WorkerError)(f"rank {first}: {message}")
        return contents

    def tell(self, error: BaseException) -> None:
        """Send an error in the place of what the others wait for. Nothing is exchanged after it."""
        if self._ended:
            return
        is_input = isinstance(error, InputError | LogError) and not isinstance(error, LogWriteError)
        kind = "input" if is_input else type(error).__name__
        message = str(error) if kind == "input" else f"{kind}: {error}"
        try:
            self._rounds(f"{kind}\n{message}".encode()[:4000], "error", failed=True)
        except WorkerError:
            pass  # the others are gone already
        self._ended = True

    def _rounds(self, content: bytes, what: str, *, failed: bool) -> tuple[list[bytes], Sequence[int]]:
        if self._ended:
            raise WorkerError("a process of the run has failed before: start the run again")
        length = -len(content) - 1 if failed else len(content)
        frames = self._gather(_HEAD.pack(length, zlib.crc32(what.encode())) + content[:_ROOM], FRAME)
        heads = [_HEAD.unpack_from(frame) for frame in frames]
        wrong = [rank for rank, (size, _) in enumerate(heads) if size < 0]
        odd = [rank for rank, (_, kind) in enumerate(heads) if kind != heads[0][1]]
        if odd and not wrong:
            self._ended = True
            raise WorkerError(
                f"rank {odd[0]} is at another point of the run than rank 0, which comes to {what}: start the run again"
            )
        lengths = [-size - 1 if size < 0 else size for size, _ in heads]
        if max(lengths) <= _ROOM:
            bodies = [frame[_HEAD.size :] for frame in frames]
        else:
            bodies = self._gather(content, max(lengths))
        return [body[:size] for body, size in zip(bodies, lengths, strict=True)], wrong

    def _gather(self, content: bytes, size: int) -> list[bytes]:
        """The same number of bytes from every rank, in the order of ranks."""
        mine = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8).to(self._device)
        every = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(self.count)]
        try:
            dist.all_gather(every, mine)
        except RuntimeError as error:
            self._ended = True
            raise WorkerError(
                f"a process of the run is gone, or did not answer in time ({_short(error)}). Every step so far is in the log of each rank: "
                "resume the run, or let torchrun --max-restarts do it"
            ) from error
        self.sent += size
        return [part.cpu().numpy().tobytes() for part in every]


def _short(error: Exception) -> str:
    text = str(error).splitlines()[0]
    return text.rpartition("] ")[2] if text.startswith("[") else text
