"""What evaluations read of the tuned tensors, and what a run has not read yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parameters import TunedParameters
from .record import StepRecord


class Used(set[int]):
    """Ids of the tuned tensors that were read.

    Attributes:
        rows: of those that were read in part, by id, which rows of the first dimension were: bool, shape (rows,).
    """

    def __init__(self, ids: Iterable[int] = (), rows: Mapping[int, Tensor] | None = None) -> None:
        super().__init__(ids)
        self.rows = dict(rows or {})

    @classmethod
    def of(cls, ids: set[int]) -> Used:
        """Of a plain set: those tensors as a whole."""
        return ids if isinstance(ids, cls) else cls(ids)

    def read(self, number: int) -> None:
        """Note that a tensor was read as a whole."""
        self.add(number)
        self.rows.pop(number, None)

    def read_rows(self, number: int, rows: Tensor, height: int) -> None:
        """Note that rows of a tensor of so many were read; ``rows`` are their numbers, int64."""
        if number in self and number not in self.rows:
            return
        self.add(number)
        with torch.inference_mode(False):  # it outlives the evaluation
            if number not in self.rows:
                self.rows[number] = torch.zeros(height, dtype=torch.bool, device=rows.device)
            # Assigned to an index, a number that lies on the host would be waited for on a GPU.
            self.rows[number].index_fill_(0, rows.reshape(-1).to(self.rows[number].device, torch.int64), True)

    def merged(self, other: set[int]) -> Used:
        """What was read by either."""
        other = Used.of(other)
        rows = {}
        for number in self.rows.keys() | other.rows.keys():
            parts = [one.rows.get(number) for one in (self, other) if number in one]
            if all(part is not None for part in parts):
                masks = [part for part in parts if part is not None]
                rows[number] = masks[0] | masks[-1].to(masks[0].device)
        return Used(set(self) | set(other), rows)


class Unread:
    """The rows that no step of a run has read so far, of tensors that were read in part alone.

    A tensor that some step read as a whole, or moved without knowing what was read, has none for ever.
    """

    def __init__(self) -> None:
        self._rows: Mapping[int, Tensor] = {}
        self._never: frozenset[int] | None = None  # ids of tensors of which nothing was read so far; None: all

    def after(self, used: Used, tuned: TunedParameters) -> Mapping[int, Tensor]:
        """Take in what a step read; nothing means that everything counts as read.

        Returns:
            By id, which rows are still unread: bool, shape (rows,), on the CPU. The same objects as before where nothing changed.
        """
        never = frozenset(tensor.id for tensor in tuned) if self._never is None else self._never
        if not used:
            self._rows, self._never = {}, frozenset()
            return self._rows
        now = dict(self._rows)
        for number in used & (never | now.keys()):
            rows, before = used.rows.get(number), now.pop(number, None)
            if rows is None:
                continue
            left = ~rows.cpu() if before is None else before & ~rows.cpu()
            if bool(left.any()):
                now[number] = before if before is not None and torch.equal(left, before) else left
        self._never = never - used
        if now.keys() != self._rows.keys() or any(now[number] is not self._rows[number] for number in now):
            self._rows = now
        return self._rows

    @classmethod
    def of_records(cls, records: Sequence[StepRecord]) -> Unread:
        """After the steps of these records, from the first one on."""
        self = cls()
        if records:
            self._rows = records[-1].unread
            self._never = frozenset.intersection(*(frozenset(record.unused) for record in records))
        return self

    def state(self) -> dict[str, Any]:
        """For ``state_dict``."""
        return {"rows": dict(self._rows), "never": None if self._never is None else sorted(self._never)}

    @classmethod
    def of_state(cls, saved: dict[str, Any] | None, steps: int) -> Unread:
        """What :meth:`state` gave. A state without it, of steps of an earlier version, is of a run that moved every row."""
        self = cls()
        if saved is not None:
            never = saved["never"]
            self._rows, self._never = dict(saved["rows"]), None if never is None else frozenset(never)
        elif steps:
            self._never = frozenset()
        return self
