"""The processes of a launch share the evaluations of a step; losses are all that they exchange."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import InputError, WorkerError
from ..method.estimators import Losses, Query, groups_of
from ..method.unread import Used
from ..processes import Launch
from .alone import Alone, Evaluate, Seen
from .join import join
from .parts import Parts, Unit, deal
from .wire import Wire

T = TypeVar("T")
_DIGEST = 8


class Ranks(Alone):
    """The processes that ``torchrun`` or ``accelerate launch`` started, each with the whole model, share every step.

    A step's evaluations are its queries on the parts of the minibatch (:class:`~.parts.Parts`); each rank has a run of them, in that
    order. Losses travel as float64 and are put together in the same order on every rank, and every rank makes the same update. So log and
    weights have the bits of one process that evaluates the same parts one after another, whatever the number of ranks, as long as an
    evaluation has the same bits on each of them: the same processor, torch and number of threads.

    Args:
        timeout: in seconds. A rank that has not answered for so long is gone.
        check_every: after so many steps each, the ranks compare digests of their weights.

    Raises:
        InputError: ranks did not come in time, or rank 0 cannot be reached.
    """

    def __init__(self, timeout: float = 600.0, check_every: int = 100) -> None:
        join(Launch.read(), timeout)
        self._wire = Wire()
        self.rank, self.count, self._check_every = self._wire.rank, self._wire.count, check_every

    @property
    def sent(self) -> int:
        """Bytes that this rank has sent so far to each of the others."""
        return self._wire.sent

    def __reduce__(self) -> tuple[type[Ranks], tuple[()]]:
        return Ranks, ()  # a copy is of the same group

    def losses(self, queries: Sequence[Query], parts: Parts, evaluate: Evaluate) -> tuple[list[list[Losses]], Seen]:
        dealt = deal(len(queries), len(parts), self.count)
        mine = dealt[self.rank]
        try:
            own, seen = self._evaluated(mine, queries, parts, evaluate)
        except Exception as error:
            self._wire.tell(error)
            raise
        numbers = [loss for unit in mine for loss in own[unit]]
        facts = _digest(json.dumps(_facts(seen))) + _digest(parts.digest)
        sent = self._wire.exchange(facts + struct.pack(f"<{len(numbers)}d", *numbers), "losses")
        self._require_same_data([content[_DIGEST : 2 * _DIGEST] for content in sent])
        if any(content[:_DIGEST] != sent[0][:_DIGEST] for content in sent):
            for other in self.all(_facts(seen)):
                seen |= _seen(other)
        return assembled(sent, dealt, queries, parts), seen

    def _evaluated(
        self, units: Sequence[Unit], queries: Sequence[Query], parts: Parts, evaluate: Evaluate
    ) -> tuple[dict[Unit, Losses], Seen]:
        found: dict[Unit, Losses] = {}
        seen = Seen()
        for part in dict.fromkeys(unit.part for unit in units):
            own = [unit for unit in units if unit.part == part]
            wanted = parts.queries([queries[unit.query] for unit in own], part)
            losses, read = evaluate(wanted, parts.closures[part])
            found |= dict(zip(own, losses, strict=True))
            seen |= read
        return found, seen

    def _require_same_data(self, digests: Sequence[bytes]) -> None:
        odd = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
        if odd is not None:
            raise InputError(
                f"rank {odd} has another minibatch than rank 0: every rank reads the same data in the same order and takes its share of "
                "the evaluations, so do not divide the data between processes"
            )

    def divided(
        self, work: Callable[[Any], T], items: Sequence[Any], reach: Callable[[int], object] | None = None
    ) -> list[T]:
        results: list[T] = []
        try:
            own = items[self.rank :: self.count]
            for number, item in enumerate(own, start=1):
                results.append(work(item))
                if reach is not None:
                    reach(min(number * self.count, len(items)))
        except Exception as error:
            self._wire.tell(error)
            raise
        every = self.all(results)
        return [every[i % self.count][i // self.count] for i in range(len(items))]

    def require_same(self, facts: dict[str, Any], remedy: str) -> None:
        if (difference := self.compare(facts)) is not None:
            raise InputError(f"{difference}: {remedy}")

    def compare(self, facts: dict[str, Any]) -> str | None:
        facts = json.loads(json.dumps(facts))
        digests = self._wire.exchange(_digest(json.dumps(facts)), "facts")
        if all(digest == digests[0] for digest in digests):
            return None
        every = self.all(facts)
        for name in facts:
            for rank, other in enumerate(every):
                if other.get(name) != every[0].get(name):
                    return f"rank {rank} has {_shown(name, other.get(name))}, rank 0 {_shown(name, every[0].get(name))}"
        return f"rank 0 says of itself {', '.join(every[0])}, and another rank something else"

    def any(self, flag: bool) -> bool:
        return any(content != b"\0" for content in self._wire.exchange(bytes([flag]), "a flag"))

    def first(self, make: Callable[[], T], rank: int = 0) -> T:
        found: T = json.loads(self.bytes_of(rank, lambda: json.dumps(make()).encode()))
        return found

    def bytes_of(self, rank: int, make: Callable[[], bytes]) -> bytes:
        content = b""
        if self.rank == rank:
            try:
                content = make()
            except Exception as error:
                self._wire.tell(error)
                raise
        return self._wire.exchange(content, "what one has")[rank]

    def all(self, value: T) -> list[T]:
        return [json.loads(content) for content in self._wire.exchange(json.dumps(value).encode(), "what each has")]

    def all_bytes(self, content: bytes) -> list[bytes]:
        return self._wire.exchange(content, "bytes of each")

    def wait(self) -> None:
        self._wire.exchange(b"", "all")

    def taken(self, steps: int, digest: Callable[[], str]) -> None:
        if steps % self._check_every == 0:
            self.verify(steps, digest())

    def verify(self, steps: int, digest: str) -> None:
        digests = [content.decode() for content in self._wire.exchange(digest.encode(), "digests")]
        common = max(digests, key=digests.count)
        odd = [rank for rank, other in enumerate(digests) if other != common]
        if odd:
            raise WorkerError(
                f"after {steps} steps rank {', '.join(map(str, odd))} has other weights than the rest ({digests[odd[0]][:12]} instead of "
                f"{common[:12]}). The log is intact: replay it for the weights, and see whether memory or the processor of that rank is damaged"
            )

    def tell(self, error: BaseException) -> None:
        self._wire.tell(error)


def assembled(
    sent: Sequence[bytes], dealt: Sequence[Sequence[Unit]], queries: Sequence[Query], parts: Parts
) -> list[list[Losses]]:
    """What the ranks sent, by part and query."""
    found: dict[Unit, Losses] = {}
    for units, content in zip(dealt, sent, strict=True):
        found |= _unpacked(units, parts, content[2 * _DIGEST :], queries[0].group)
    return [[found[Unit(query, part)] for query in range(len(queries))] for part in range(len(parts))]


def _facts(seen: Seen) -> list[Any]:
    """What evaluations showed, as JSON: ids, and rows as text."""
    rows = {number: _packed(mask) for number, mask in sorted(seen.used.rows.items())}
    return [sorted(seen.used), rows, sorted(seen.left_out)]


def _seen(facts: Sequence[Any]) -> Seen:
    used, rows, left_out = facts
    return Seen(
        Used(used, {int(number): _unpacked_mask(packed) for number, packed in rows.items()}), frozenset(left_out)
    )


def _packed(mask: Tensor) -> str:
    return base64.b64encode(zlib.compress(mask.to("cpu", torch.uint8).numpy().tobytes())).decode()


def _unpacked_mask(text: str) -> Tensor:
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8).bool()


def _digest(content: str | bytes) -> bytes:
    return hashlib.blake2b(content.encode() if isinstance(content, str) else content, digest_size=_DIGEST).digest()


def _unpacked(units: Sequence[Unit], parts: Parts, content: bytes, group: int) -> dict[Unit, Losses]:
    """The losses of a rank's units: one each, or one for each example, or group of them, of the part."""
    numbers = struct.unpack(f"<{len(content) // 8}d", content)
    if parts.examples is not None and len(numbers) != len(units):
        sizes = [groups_of(parts.examples[unit.part], group) for unit in units]
    else:
        sizes = [len(numbers) // max(1, len(units))] * len(units)
    found, lo = {}, 0
    for unit, size in zip(units, sizes, strict=True):
        found[unit] = numbers[lo : lo + size]
        lo += size
    return found


def _shown(name: str, value: Any) -> str:
    return f"{name} {value if len(str(value)) < 80 else str(value)[:77] + '...'}"
