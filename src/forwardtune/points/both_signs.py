"""L1: both sides of a probe, or of several, in one forward pass, for closures that know nothing of it.

At the first point the module is given every row of its input once for each point, and computes all of them; the closure gets the first part
of the output. At the other points the module does not run: the closure gets the other parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..method.estimators import Losses, Query
from ..noise import Noise
from ..parameters import TunedParameters
from .owners import copies_of
from .perturbation import Closure, as_losses, grouped, read
from .side_path import ROUGH, TOLERANCE, SidePath


class NotStackedError(Exception):
    """The input or the output cannot be put together, or another point's call is another one. Costs an evaluation, and no bits."""


class Calls:
    """Calls of a module, answered for several points.

    Args:
        module: what the closure calls.
        stacked: called with the number of copies before the module runs, and with 1 after it.
    """

    def __init__(self, module: nn.Module, stacked: Callable[[int], object]) -> None:
        self._module, self._tell = module, stacked
        self._calls: list[tuple[Any, list[Any]]] = []
        self._stacked: dict[str, bool] = {}
        self._copies = self._part = self._next = 0

    @contextmanager
    def first(self, copies: int) -> Iterator[None]:
        """Inside, calls are computed for so many points. Raises NotStackedError at the end if there was none."""
        self.forget()
        self._copies = copies
        with self._answered(self._compute):
            yield
        if not self._calls:
            raise NotStackedError

    @contextmanager
    def other(self, part: int) -> Iterator[None]:
        """Inside, the same calls get what was computed for another point."""
        self._part, self._next = part, 0
        with self._answered(self._recall):
            yield
        if self._next < len(self._calls):
            raise NotStackedError

    def forget(self) -> None:
        """Keep no outputs."""
        self._calls = []

    def _compute(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        rows = next(
            (leaf.shape[0] for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1), 0
        )
        if not rows:
            raise NotStackedError
        stacked = functools.partial(_stacked, rows=rows, copies=self._copies)
        own = [stacked(leaf) for leaf in args], {name: stacked(leaf) for name, leaf in kwargs.items()}
        self._keep_in_mind(rows, {str(k): leaf for k, leaf in [*enumerate(args), *kwargs.items()]})
        self._tell(self._copies)
        try:
            with copies_of(self._copies) as widths:
                output = forward(*own[0], **own[1])
        finally:
            self._tell(1)
        if isinstance(output, Mapping) and isinstance(loss := output.get("loss"), Tensor) and not loss.ndim:
            output["loss"] = None  # type: ignore[index]  # of all points together: nobody can use it
        part = functools.partial(_part, copies=self._copies, rows=rows, widths=widths)
        parts = [_mapped(output, functools.partial(part, k=k)) for k in range(self._copies)]
        self._calls.append(((args, kwargs), parts))
        return parts[0]

    def _keep_in_mind(self, rows: int, leaves: dict[str, Any]) -> None:
        """An argument has rows always or never: else one that happens to be as long as there are rows would be taken for them."""
        has_rows = {
            name: leaf.ndim > 0 and leaf.shape[0] == rows for name, leaf in leaves.items() if isinstance(leaf, Tensor)
        }
        if any(self._stacked.setdefault(name, stacked) != stacked for name, stacked in has_rows.items()):
            raise NotStackedError

    def _recall(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._next >= len(self._calls):
            raise NotStackedError
        given, parts = self._calls[self._next]
        if not _same(given, (args, kwargs)):
            raise NotStackedError
        self._next += 1
        return parts[self._part]

    @contextmanager
    def _answered(self, answer: Callable[..., Any]) -> Iterator[None]:
        module, own = self._module, "forward" in vars(self._module)
        forward = module.forward

        @functools.wraps(forward)
        def instead(*args: Any, **kwargs: Any) -> Any:
            return answer(forward, args, kwargs)

        module.forward = instead
        try:
            yield
        finally:
            if own:
                module.forward = forward
            else:
                del module.forward


class BothSigns(SidePath):
    """The side path, with one forward pass of twice the rows for both sides of a probe: weights are read once for both. Of several probes with
    as many times the rows.

    For closures that call the module itself, with the same input at every call, and whose loss of an example comes from that example's rows
    of the output. At the first step the losses are compared with those of a pass for each point; where they differ, and for calls that cannot be
    put together, such passes are made. Losses differ from theirs by the rounding that another number of rows has.

    Attributes:
        together: whether passes are shared; None before the first step.
        probes: so many share a pass.
    """

    name = "both_signs"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        assert tuned.module is not None
        self.together: bool | None = None
        self.probes = 1
        self._calls = Calls(tuned.module, self._stack)

    def _losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        losses: list[Losses] = []
        while len(losses) < len(queries):
            rest = queries[len(losses) :]
            pairs = _pairs(rest, self.probes)
            shared = self._shared(step, rest[: 2 * pairs], closure) if pairs else None
            losses += shared or super()._losses(step, rest[: 2 * pairs or 1], closure)
        return losses

    def _shared(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses] | None:
        """The losses on both sides of these probes; None if one pass cannot give them."""
        if self.together is False:
            return None
        left_out, kinds = set(self.left_out), dict(self._kinds)
        shared: list[Losses] | None = None
        try:
            self.shift(step, queries[0])
            with self._calls.first(len(queries)):
                values = [grouped(as_losses(closure()), queries[0].group)]
            for place in range(1, len(queries)):
                probe, side = divmod(place, 2)
                with self._calls.other(
                    side * (len(queries) // 2) + probe
                ):  # sides one below the other, each of all probes
                    values.append(grouped(as_losses(closure()), queries[0].group))
            shared = [read(value) for value in values]
        except (NotStackedError, torch.OutOfMemoryError):
            pass
        except Exception:
            if self.together:
                raise
            # What is wrong with the closure itself shows again.
        finally:
            self._calls.forget()
        if self.left_out != left_out:  # perhaps an argument that seemed to have a row for each example
            shared = None
            self.left_out.intersection_update(left_out)
            self._kinds = kinds
        if self.together:
            return shared
        apart = super()._losses(step, queries, closure)
        if self.left_out == left_out:
            self.together = shared is not None and all(map(self._agree, shared, apart))
        return shared if self.together else apart

    def _agree(self, a: Losses, b: Losses) -> bool:
        """Whether losses are the same up to the rounding of the roughest of the weights."""
        of_loss = max((TOLERANCE.get(tensor.parameter.dtype, ROUGH)[1] for tensor in self.tuned), default=ROUGH[1])
        near = (x == y or abs(x - y) <= of_loss * max(1.0, abs(y)) for x, y in zip(a, b, strict=False))
        return len(a) == len(b) and all(near)

    def _stack(self, copies: int) -> None:
        """From now on the model works on so many copies of its input."""
        self.point.copies, self.point.probes = min(copies, 2), max(1, copies // 2)
        if copies > 1:
            self._owners = None
            self._known.clear()


def _pairs(queries: Sequence[Query], most: int) -> int:
    """How many pairs of sides, of a probe and those after it, the queries begin with."""
    first, count = queries[0], 0
    if not first.per_example or not first.scale:
        return 0
    for k, (a, b) in enumerate(zip(queries[: 2 * most : 2], queries[1::2], strict=False)):
        if a != first._replace(probe=first.probe + k) or b != a._replace(scale=-a.scale):
            break
        count += 1
    return count


def _stacked(leaf: Any, *, rows: int, copies: int) -> Any:
    if not isinstance(leaf, Tensor):
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise NotStackedError  # a cache, or something else with rows in it
    return torch.cat([leaf] * copies) if leaf.ndim and leaf.shape[0] == rows else leaf


def _part(leaf: Any, *, k: int, copies: int, rows: int, widths: set[int]) -> Any:
    if not isinstance(leaf, Tensor):  # a cache is of all points together
        return leaf if isinstance(leaf, (bool, int, float, str)) else None
    if leaf.ndim:
        if leaf.shape[0] == copies * rows:
            return leaf[k * rows : (k + 1) * rows]
        if leaf.ndim > 1 and leaf.shape[0] == 1 and leaf.shape[1] in widths:
            return leaf.chunk(copies, dim=1)[k]
    raise NotStackedError


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        changed = {key: _mapped(item, change) for key, item in value.items()}
        return type(value)(**changed) if hasattr(value, "to_tuple") else changed
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a is b or a == b)
