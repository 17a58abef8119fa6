"""L0: what z is, and the sweeps over the weights that use it.

``z = noise(seed, step, probe, tensor, element)`` is a pure function: never stored, never drawn from a global generator,
the same on every device, dtype, shard layout and parameter order. :mod:`.definition` says what it is, in plain torch;
:mod:`.cpu` and :mod:`.gpu` compute the same bits fast. ``docs/noise.md`` is the specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..devices import sent
from . import backends, definition
from .backends import compile_kernels, load_kernels
from .definition import ROUNDING_PROBE, Count, Places, Strips, Terms, Update
from .directions import (
    DIRECTIONS,
    GAUSSIAN,
    NOISE_VERSION,
    RADEMACHER,
    SPECIFIED,
    Direction,
    get_direction,
    register_direction,
)
from .emphasis import Emphasis, give_back, pieces
from .factored import sweeps
from .folds import Fold, folds_of
from .philox import split_seed
from .structure import LowRank, Rows, rows_and_columns

__all__ = [
    "DIRECTIONS",
    "GAUSSIAN",
    "NOISE_VERSION",
    "RADEMACHER",
    "ROUNDING_PROBE",
    "SPECIFIED",
    "Count",
    "Direction",
    "Emphasis",
    "Fold",
    "LowRank",
    "Noise",
    "Update",
    "compile_kernels",
    "flattened",
    "folds_of",
    "get_direction",
    "load_kernels",
    "register_direction",
]

#: A tensor, its first element and the number of elements that are drawn, at all of these terms.
_Wanted: TypeAlias = tuple[int, int, int, Terms]


@dataclass(frozen=True)
class Noise:
    """The directions of one run: a seed, a distribution, for matrices a structure, and where they are longer, shorter or absent.

    Tensors may have any layout; elements are numbered in row-major order. dtypes: float32, bfloat16, float16, float64.

    A piece of a tensor is passed with ``start``, the index of its first element in the full tensor, and ``shape``, the full
    tensor's. Without a structure the shape does not matter.
    """

    seed: int
    direction: Direction = GAUSSIAN
    structure: LowRank | None = None
    emphasis: Emphasis | None = None

    def __post_init__(self) -> None:
        split_seed(self.seed)

    def is_low_rank(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape has directions of low rank."""
        return self.structure is not None and self.structure.applies(shape)

    def waits(self, shape: Sequence[int]) -> bool:
        """Whether steps of a tensor of this shape may wait for a :class:`Fold`: a matrix of low rank. Stacks of them, as of experts, may not."""
        return len(shape) == 2 and self.is_low_rank(shape)

    def takes_part(self, tensor: int, step: int) -> bool:
        """Whether a tensor has a direction in a step."""
        return self.emphasis is None or self.emphasis.takes_part(self.seed, tensor, step)

    # --- sweeps over weights ---------------------------------------------------------------------------------------

    def z(
        self, like: Tensor, *, tensor: int, step: int, probe: int, start: int = 0, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The direction of one tensor: float32, in the shape and on the device of ``like``."""
        shape = self._full_shape(like, start, shape)
        if self.is_low_rank(shape):
            z = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
            self.perturb(z, z, tensor=tensor, step=step, probe=probe, scale=1.0, start=start, shape=shape)
        else:
            scale = self._probed(tensor, step, 1.0)
            z = self._strips(tensor, [step], [probe], [start], [scale], like.numel(), like.device)
        return z.view(like.shape)

    def perturb(
        self, out: Tensor, source: Tensor, *, tensor: int, step: int, probe: int, scale: float, start: int = 0,
        shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """``out <- source + scale * z``, added in float32, rounded to nearest. ``out`` may be ``source``."""
        shape = self._full_shape(source, start, shape)
        flat_out, flat_source = _flat(out), _flat(source)
        scale, limit = self._probed(tensor, step, scale), self._limit(tensor)
        if scale == 0.0:
            flat_out.copy_(flat_source)
        elif limit is None:
            self._perturb(flat_out, flat_source, tensor, step, probe, scale, start, shape)
        else:
            for (lo, piece), (_, of) in zip(pieces(flat_out), pieces(flat_source), strict=True):
                kept = of.clone()  # ``out`` may be ``source``
                self._perturb(piece, kept, tensor, step, probe, scale, start + lo, shape)
                give_back(piece, kept, limit)
        _give_back(out, flat_out)

    def _perturb(
        self,
        out: Tensor,
        source: Tensor,
        tensor: int,
        step: int,
        probe: int,
        scale: float,
        start: int,
        shape: Sequence[int],
    ) -> None:
        backend = backends.backend(source)
        if self.is_low_rank(shape):
            rows = Rows.of(tensor, shape, start, source.numel())
            ((u, v),) = self._factors([rows], [step], [probe], [scale], source.device)
            backend.perturb_factored(out, source, u[0], v[0], start)
        else:
            backend.perturb(out, source, self.direction, self.seed, tensor, step, probe, scale, start)

    def perturb_rows(self, source: Tensor, rows: Tensor, *, tensor: int, step: int, probe: int, scale: float) -> Tensor:
        """Rows ``source[rows] + scale * z[rows]`` of a table, shape ``(*rows.shape, width)``: what an embedding reads."""
        numbers = rows.reshape(-1).to(torch.int64)
        flat = source.index_select(0, numbers)  # copies, and refuses numbers outside the table
        backend, width = backends.backend(source), source.shape[-1]
        scale, limit = self._probed(tensor, step, scale), self._limit(tensor)
        kept = None if limit is None else flat.clone()
        if self.is_low_rank(source.shape):
            probes = torch.full_like(numbers, probe)
            u = self._u_rows(numbers, probes, tensor, step, scale)
            v = self._v(source.shape, tensor, [step], [probe], source.device)
            backend.perturb_factored(flat.view(-1), flat.view(-1), u, v[0])
        elif backend is not definition and source.is_contiguous():
            backend.perturb_rows(
                flat, source, numbers.contiguous(), self.direction, self.seed, tensor, step, probe, scale
            )
        else:
            for row, number in zip(flat, numbers.tolist(), strict=True):
                definition.perturb(
                    row, row.clone(), self.direction, self.seed, tensor, step, probe, scale, number * width
                )
        if kept is not None and limit is not None:
            give_back(flat, kept, limit)
        return flat.view(*rows.shape, width)

    def update(
        self, weight: Tensor, updates: Sequence[Update], *, tensor: int, start: int = 0,
        shape: Sequence[int] | None = None,
    ) -> Count:  # fmt: skip
        """Apply optimizer steps to ``weight`` in place; half precision is rounded stochastically.

        Returns:
            How many stored values did not change, summed over the steps. It may be a tensor that was not read yet.
        """
        shape = self._full_shape(weight, start, shape)
        flat, limit = _flat(weight), self._limit(tensor)
        if self.emphasis is not None:
            updates = self.emphasis.updates(self.seed, tensor, updates)
        if limit is None:
            unchanged = self._update(flat, updates, tensor, start, shape)
        else:  # which weights are too large is another question after every step
            unchanged = 0
            for lo, piece in pieces(flat):
                for item in updates:
                    kept = piece.clone()
                    self._update(piece, [item], tensor, start + lo, shape)
                    give_back(piece, kept, limit)
                    unchanged += (piece == kept).sum()
        _give_back(weight, flat)
        return unchanged

    def _update(self, flat: Tensor, updates: Sequence[Update], tensor: int, start: int, shape: Sequence[int]) -> Count:
        backend = backends.backend(flat)
        if not self.is_low_rank(shape):
            found: Count = backend.update(flat, updates, self.direction, self.seed, tensor, start)
            return found
        return self._update_factored([flat], updates, [Rows.of(tensor, shape, start, flat.numel())])

    def _update_factored(self, flats: Sequence[Tensor], updates: Sequence[Update], places: Sequence[Rows]) -> Count:
        backend, device, rank = backends.backend(flats[0]), flats[0].device, self._structure.rank
        unchanged: Count = 0
        for which, fused in sweeps(updates, [rank * (place.number + place.width) for place in places]):
            some, here = [flats[i] for i in which], [places[i] for i in which]
            terms = [(item.step, probe, size) for item in fused for probe, size in item.terms]
            steps, probes, sizes = zip(*terms, strict=True) if terms else ((), (), ())
            us, vs = zip(*self._factors(here, steps, probes, sizes, device), strict=True)
            lo = 0
            for item in fused:
                if isinstance(item, Fold):
                    self._add_up(us, item, lo, here)
                lo += len(item.terms)
            if len(which) == 1:
                start, tensor = here[0].start, here[0].tensor
                unchanged += backend.update_factored(some[0], fused, us[0], vs[0], self.seed, tensor, start)
            else:
                ids = [place.tensor for place in here]
                unchanged += backend.update_factored_many(some, fused, us, vs, self.seed, ids)
        return unchanged

    def _add_up(self, us: Sequence[Tensor], fold: Fold, lo: int, places: Sequence[Rows]) -> None:
        """Let the terms of a fold, from this one on, have sums in the place of U."""
        rows = [(place.tensor, place.first, place.number) for place in places]
        for u, sums in zip(us, self.sums_of_u(rows, fold.parts, len(fold.sizes), us[0].device), strict=True):
            if len(fold.terms) == len(sums):
                u[lo : lo + len(sums)] = sums
            else:
                for k, (probe, _) in enumerate(fold.terms):
                    u[lo + k] = sums[probe]

    # --- many tensors: on a GPU launching takes longer than the sweep over a small one ------------------------------

    def launches_together(self, weight: Tensor) -> bool:
        """Whether a sweep over several tensors like this one costs one launch."""
        return not self.is_low_rank(weight.shape) and self.moves_together(weight)

    def moves_together(self, weight: Tensor) -> bool:
        """Whether an update of several tensors like this one costs a few launches, not some for each."""
        fits = self._fits(weight)
        return fits is not None and fits(weight)

    def _fits(self, weight: Tensor) -> Callable[[Tensor], bool] | None:
        """Says whether a tensor of this device and dtype can be one of many; None: none can."""
        return None if self.emphasis is not None else getattr(backends.backend(weight), "fits", None)

    def perturber(
        self, outs: Sequence[Tensor], sources: Sequence[Tensor], *, tensors: Sequence[int]
    ) -> Callable[[int, int, float], None]:
        """:meth:`perturb` of several whole tensors, by their ids, of one dtype on one device, which all launch together.

        Returns:
            What does it when it is called with a step, a probe and a scale. It knows where the sources lie, and does not keep them.
        """
        flat = [[_flat(each) for each in many] for many in (outs, sources)]
        perturb: Callable[[int, int, float], None] = backends.backend(sources[0]).perturber(
            *flat, self.direction, self.seed, tensors
        )
        return perturb

    def update_many(self, weights: Sequence[Tensor], updates: Sequence[Update], *, tensors: Sequence[int]) -> Count:
        """:meth:`update` of several whole tensors, by their ids, and the count for all of them."""
        unchanged: Count = 0
        for which in self._together(weights):
            first, ids = weights[which[0]], [tensors[i] for i in which]
            if len(which) == 1:
                unchanged += self.update(first, updates, tensor=ids[0])
                continue
            flat = [_flat(weights[i]) for i in which]
            if self.is_low_rank(first.shape):
                places = [Rows.of(tensors[i], weights[i].shape, 0, weights[i].numel()) for i in which]
                unchanged += self._update_factored(flat, updates, places)
            else:
                unchanged += backends.backend(first).update_many(flat, updates, self.direction, self.seed, ids)
        return unchanged

    def _together(self, weights: Sequence[Tensor]) -> list[list[int]]:
        """Places of those that share launches."""
        fits: dict[tuple[torch.device, torch.dtype], Callable[[Tensor], bool] | None] = {}
        shared: dict[tuple[torch.device, torch.dtype, bool] | int, list[int]] = {}
        for i, weight in enumerate(weights):
            kind, low = (weight.device, weight.dtype), self.is_low_rank(weight.shape)
            if kind not in fits:
                fits[kind] = self._fits(weight)
            fit = fits[kind]
            together = fit is not None and weight.numel() > 0 and fit(weight)
            shared.setdefault((*kind, low) if together else i, []).append(i)
        return list(shared.values())

    def store(self, weight: Tensor, x: Tensor, *, tensor: int, step: int, start: int = 0) -> Count:
        """``weight <- round(x)``, rounded as :meth:`update` rounds at that step: what other rules end with.

        Args:
            weight: flat and contiguous, of ``n`` elements.
            x: float32 (float64 for float64 weights), shape ``(n,)``.

        Returns:
            How many stored values did not change. It may be a tensor that was not read yet.
        """
        half = weight.dtype in (torch.bfloat16, torch.float16)
        backend = backends.backend(weight) if half else definition
        unchanged: Count = backend.store(weight.detach(), x.contiguous(), self.seed, tensor, step, start)
        return unchanged

    # --- directions themselves, float32, for who multiplies with them ----------------------------------------------

    def factors(
        self, shape: Sequence[int], *, tensor: int, step: int, probes: Sequence[int], scale: float, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """U and V with ``scale * Z_k = U_k V_k^T`` for a tensor of low rank, shapes ``(K, m, rank)`` and ``(K, n, rank)``."""
        many, scale = len(probes), self._probed(tensor, step, scale)
        rows = Rows.of(tensor, shape, 0, math.prod(shape))
        return self._factors([rows], [step] * many, probes, [scale] * many, device)[0]

    def factors_of(
        self, places: Sequence[tuple[int, Sequence[int]]], *, step: int, probes: Sequence[int], device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """:meth:`factors`, at scale 1, of several tensors on one device: their ids and shapes. Transposed, shapes ``(K * rank, m)`` and
        ``(K * rank, n)``, and rounded to a dtype."""
        wanted = [*self._wanted_u(places, step, probes), *self._wanted_v(places, step, probes)]
        found = self._drawn(wanted, device, dtype, self._turned)
        return list(zip(found[: len(places)], found[len(places) :], strict=True))

    def u_of(
        self, places: Sequence[tuple[int, Sequence[int]]], *, step: int, probes: Sequence[int], device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:  # fmt: skip
        """U of :meth:`factors_of`."""
        return self._drawn(self._wanted_u(places, step, probes), device, dtype, self._turned)

    def v_of(
        self, places: Sequence[tuple[int, Sequence[int]]], *, step: int, probes: Sequence[int], device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> list[Tensor]:  # fmt: skip
        """V of :meth:`factors_of`."""
        return self._drawn(self._wanted_v(places, step, probes), device, dtype, self._turned)

    def directions_of(
        self, places: Sequence[tuple[int, int]], *, step: int, probes: Sequence[int], device: torch.device,
        dtype: torch.dtype = torch.float32, mirrored: bool = False,
    ) -> list[Tensor]:  # fmt: skip
        """:meth:`directions`, at scale 1, of several vectors on one device: their ids and lengths. Each of shape ``(K, n)``, rounded to a dtype;
        mirrored: with the same behind them, turned round, ``(2 K, n)``."""
        scaled = self._terms_at(step, probes)
        wanted = [(tensor, 0, length, scaled(tensor)) for tensor, length in places]
        return self._drawn(wanted, device, dtype, (lambda z: torch.cat([z, -z], dim=1)) if mirrored else None)

    def sums_of_u(
        self, places: Sequence[tuple[int, int, int]], updates: Sequence[Update], count: int, device: torch.device
    ) -> list[Tensor]:  # fmt: skip
        """What several steps add up to: ``sum_t sizes_t[k] U_tk / sqrt(r)`` for k up to a count, in float32, step by step.

        Rows that a step leaves alone get nothing of it.

        Args:
            places: of matrices of low rank on one device: id, first row, number of rows.

        Returns:
            For each the sums, shape ``(count, rows, rank)``.
        """
        low, sums = self._structure, [torch.zeros(0, device=device)] * len(places)
        for update in updates:
            sizes = [*update.sizes, *[0.0] * (count - len(update.sizes))]
            scales = [low.scale(size) for size in sizes]
            terms = Terms([update.step], range(count), scales)
            wanted = [(tensor, first * low.rank, rows * low.rank, terms) for tensor, first, rows in places]
            drawn = self._drawn(wanted, device, torch.float32, self._as_rows)
            for (tensor, first, rows), u in zip(places, drawn, strict=True):
                if tensor in update.unused:
                    u.zero_()
                elif tensor in update.unread:
                    alone = sent(update.unread[tensor][first : first + rows], device)
                    u.masked_fill_(alone[:, None], 0.0)
            if update is updates[0]:
                sums = drawn
            else:
                torch._foreach_add_(sums, drawn)
        return sums

    def factor_rows(
        self, shape: Sequence[int], rows: Tensor, probes: Tensor, *, tensor: int, step: int, scale: float
    ) -> Tensor:
        """Row ``rows[i]`` of probe ``probes[i]``'s U, as in :meth:`factors`: shape ``(len(rows), rank)``."""
        return self._u_rows(rows, probes, tensor, step, self._probed(tensor, step, scale))

    def directions(
        self, shape: Sequence[int], *, tensor: int, step: int, probes: Sequence[int], scale: float, device: torch.device
    ) -> Tensor:
        """``scale * z_k`` of a tensor with full directions, shape ``(K, *shape)``."""
        scale = self._probed(tensor, step, scale)
        flat = self._strips(tensor, [step], probes, [0], [scale], math.prod(shape), device)
        return flat.view(len(probes), *shape)

    def direction_rows(
        self, shape: Sequence[int], rows: Tensor, probes: Tensor, *, tensor: int, step: int, scale: float
    ) -> Tensor:
        """Row ``rows[i]`` of probe ``probes[i]``'s direction, as in :meth:`directions`: shape ``(len(rows), n)``."""
        scale = self._probed(tensor, step, scale)
        return self._strips(tensor, [step], probes, rows * shape[-1], [scale], shape[-1], rows.device)

    # --- addresses -------------------------------------------------------------------------------------------------

    def _probed(self, tensor: int, step: int, scale: float) -> float:
        return scale if self.emphasis is None else self.emphasis.scale(self.seed, tensor, step, scale)

    def _limit(self, tensor: int) -> float | None:
        return None if self.emphasis is None else self.emphasis.limit(tensor)

    @property
    def _structure(self) -> LowRank:
        assert self.structure is not None, "these directions are full"
        return self.structure

    def _full_shape(self, passed: Tensor, start: int, shape: Sequence[int] | None) -> Sequence[int]:
        if shape is None and start and self.structure is not None:
            raise ValueError("a piece of a tensor has no direction of low rank without the tensor's shape: pass it")
        return passed.shape if shape is None else shape

    def _factors(
        self, places: Sequence[Rows], steps: Sequence[int], probes: Sequence[int], scales: Sequence[float],
        device: torch.device,
    ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """The rows of each U that these elements lie in, and each V whole: shapes ``(K, rows, rank)`` and ``(K, n, rank)``."""
        low = self._structure
        of_u = Terms(steps, probes, [low.scale(scale) for scale in scales])
        of_v = Terms([low.step_of_v(step) for step in steps], probes, [1.0])
        wanted = [(p.tensor, p.first * low.rank, p.number * low.rank, of_u) for p in places]
        wanted += [(p.tensor, p.height * low.rank, p.width * low.rank, of_v) for p in places]
        found = self._drawn(wanted, device, torch.float32, self._as_rows)
        return list(zip(found[: len(places)], found[len(places) :], strict=True))

    def _terms_at(self, step: int, probes: Sequence[int], rooted: bool = False) -> Callable[[int], Terms]:
        """Terms of scale 1 for a tensor, by its number; of most tensors the same ones. ``rooted``: over the root of the rank, as of U."""
        made: dict[float, Terms] = {}

        def scaled(tensor: int) -> Terms:
            scale = self._probed(tensor, step, 1.0)
            if scale not in made:
                made[scale] = Terms([step], probes, [self._structure.scale(scale) if rooted else scale])
            return made[scale]

        return scaled

    def _wanted_u(self, places: Sequence[tuple[int, Sequence[int]]], step: int, probes: Sequence[int]) -> list[_Wanted]:
        low, scaled = self._structure, self._terms_at(step, probes, rooted=True)
        return [(tensor, 0, rows_and_columns(shape)[0] * low.rank, scaled(tensor)) for tensor, shape in places]

    def _wanted_v(self, places: Sequence[tuple[int, Sequence[int]]], step: int, probes: Sequence[int]) -> list[_Wanted]:
        low, terms = self._structure, Terms([self._structure.step_of_v(step)], probes, [1.0])
        sides = [(tensor, *rows_and_columns(shape)) for tensor, shape in places]
        return [(tensor, height * low.rank, width * low.rank, terms) for tensor, height, width in sides]

    def _drawn(
        self,
        wanted: Sequence[_Wanted],
        device: torch.device,
        dtype: torch.dtype,
        form: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """Strips of several tensors, drawn in one call, each of shape ``(K, length)``; ``form`` changes the last two dimensions of many at once."""
        alike: dict[tuple[int, int, int], list[int]] = {}
        for i, (_, start, length, terms) in enumerate(wanted):
            alike.setdefault((start, length, id(terms)), []).append(i)
        many = [Strips(tuple(wanted[i][0] for i in which), *wanted[which[0]][1:]) for which in alike.values()]
        drawn = backends.for_directions(device).many_strips(self.direction, self.seed, many, device, dtype)
        parts = [(part if form is None else form(part)).unbind() for part in drawn]
        placed = {
            i: one
            for which, part in zip(alike.values(), parts, strict=True)
            for i, one in zip(which, part, strict=True)
        }
        return [placed[i] for i in range(len(wanted))]

    def _as_rows(self, drawn: Tensor) -> Tensor:
        return drawn.unflatten(2, (-1, self._structure.rank))

    def _turned(self, drawn: Tensor) -> Tensor:
        return self._as_rows(drawn).mT.flatten(1, 2)

    def _u_rows(self, rows: Tensor, probes: Tensor, tensor: int, step: int, scale: float) -> Tensor:
        low = self._structure
        return self._strips(tensor, [step], probes, rows * low.rank, [low.scale(scale)], low.rank, rows.device)

    def _v(
        self, shape: Sequence[int], tensor: int, steps: Sequence[int], probes: Sequence[int], device: torch.device
    ) -> Tensor:
        low, (height, width) = self._structure, rows_and_columns(shape)
        drawn_at = [low.step_of_v(step) for step in steps]
        v = self._strips(tensor, drawn_at, probes, [height * low.rank], [1.0], width * low.rank, device)
        return v.view(len(probes), width, low.rank)

    def _strips(
        self, tensor: int, steps: Sequence[int], probes: Places, starts: Places, scales: Sequence[float], count: int,
        device: torch.device,
    ) -> Tensor:  # fmt: skip
        """See :func:`.definition.strips`."""
        return backends.for_directions(device).strips(
            self.direction, self.seed, tensor, steps, probes, starts, scales, count, device
        )


@contextmanager
def flattened(weight: Tensor) -> Iterator[Tensor]:
    """The elements in row-major order, contiguous, to be changed: what is written to them is the weight's afterwards."""
    flat = _flat(weight)
    yield flat
    _give_back(weight, flat)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1)


def _give_back(tensor: Tensor, flat: Tensor) -> None:
    if not tensor.is_contiguous():
        tensor.detach().copy_(flat.view(tensor.shape))
