"""L1: both sides of a probe in one forward pass, for closures that know nothing of it.

At the first side the module is given every row of its input twice, and computes the second half for the other side; the closure gets the
first half of the output. At the other side the module does not run: the closure gets the second half.
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
from .perturbation import Closure, as_losses, read
from .side_path import ROUGH, TOLERANCE, SidePath

COPIES = 2


class NotStackedError(Exception):
    """The input or the output cannot be put together, or the other side's call is another one. Costs an evaluation, and no bits."""


class Calls:
    """Calls of a module, answered for both sides.

    Args:
        module: what the closure calls.
        doubled: called with the number of copies before the module runs, and with 1 after it.
    """

    def __init__(self, module: nn.Module, doubled: Callable[[int], object]) -> None:
        self._module, self._doubled = module, doubled
        self._calls: list[tuple[Any, Any]] = []
        self._stacked: dict[str, bool] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """Inside, calls are computed for both sides. Raises NotStackedError at the end if there was none."""
        self._calls = []
        with self._answered(self._compute):
            yield
        if not self._calls:
            raise NotStackedError

    @contextmanager
    def second(self) -> Iterator[None]:
        """Inside, the same calls get what was computed for the other side."""
        try:
            with self._answered(self._recall):
                yield
            if self._calls:
                raise NotStackedError
        finally:
            self._calls = []

    def _compute(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        rows = next(
            (leaf.shape[0] for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim > 1), 0
        )
        if not rows:
            raise NotStackedError
        twice = [_stacked(leaf, rows) for leaf in args], {name: _stacked(leaf, rows) for name, leaf in kwargs.items()}
        self._keep_in_mind(rows, {str(k): leaf for k, leaf in [*enumerate(args), *kwargs.items()]})
        self._doubled(COPIES)
        try:
            with copies_of(COPIES) as widths:
                output = forward(*twice[0], **twice[1])
        finally:
            self._doubled(1)
        if isinstance(output, Mapping) and isinstance(loss := output.get("loss"), Tensor) and not loss.ndim:
            output["loss"] = None  # type: ignore[index]  # of both sides together: nobody can use it
        first, second = (
            _mapped(output, functools.partial(_half, k=k, rows=rows, widths=widths)) for k in range(COPIES)
        )
        self._calls.append(((args, kwargs), second))
        return first

    def _keep_in_mind(self, rows: int, leaves: dict[str, Any]) -> None:
        """An argument has rows always or never: else one that happens to be as long as there are rows would be taken for them."""
        has_rows = {
            name: leaf.ndim > 0 and leaf.shape[0] == rows for name, leaf in leaves.items() if isinstance(leaf, Tensor)
        }
        if any(self._stacked.setdefault(name, stacked) != stacked for name, stacked in has_rows.items()):
            raise NotStackedError

    def _recall(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if not self._calls:
            raise NotStackedError
        given, output = self._calls.pop(0)
        if not _same(given, (args, kwargs)):
            raise NotStackedError
        return output

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
    """The side path, with one forward pass of twice the rows for both sides of a probe: weights are read once for both.

    For closures that call the module itself, with the same input at every call, and whose loss of an example comes from that example's rows
    of the output. At the first step the losses are compared with those of two passes; where they differ, and for calls that cannot be put
    together, two passes are made. Losses differ from theirs by the rounding that another number of rows has.

    Attributes:
        together: whether passes are shared; None before the first step.
    """

    name = "both_signs"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        assert tuned.module is not None
        self.together: bool | None = None
        self._calls = Calls(tuned.module, self._double)

    def _losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        losses: list[Losses] = []
        while len(losses) < len(queries):
            query, *rest = queries[len(losses) :]
            pair = self._pair(step, query, closure) if rest and _is_other_side(query, rest[0]) else None
            losses += pair or super()._losses(step, [query], closure)
        return losses

    def _pair(self, step: int, query: Query, closure: Closure) -> list[Losses] | None:
        """The losses on both sides; None if one pass cannot give them."""
        if self.together is False:
            return None
        left_out, kinds = set(self.left_out), dict(self._kinds)
        shared: list[Losses] | None = None
        try:
            self.shift(step, query)
            with self._calls.first():
                plus = as_losses(closure())
            with self._calls.second():
                minus = as_losses(closure())
            shared = [read(plus), read(minus)]
        except (NotStackedError, torch.OutOfMemoryError):
            pass
        except Exception:
            if self.together:
                raise
            # What is wrong with the closure itself shows again.
        if self.left_out != left_out:  # perhaps an argument that seemed to have a row for each example
            shared = None
            self.left_out.intersection_update(left_out)
            self._kinds = kinds
        if self.together:
            return shared
        apart = super()._losses(step, [query, query._replace(scale=-query.scale)], closure)
        if self.left_out == left_out:
            self.together = shared is not None and all(map(self._agree, shared, apart))
        return shared if self.together else apart

    def _agree(self, a: Losses, b: Losses) -> bool:
        """Whether losses are the same up to the rounding of the roughest of the weights."""
        of_loss = max((TOLERANCE.get(tensor.parameter.dtype, ROUGH)[1] for tensor in self.tuned), default=ROUGH[1])
        near = (x == y or abs(x - y) <= of_loss * max(1.0, abs(y)) for x, y in zip(a, b, strict=False))
        return len(a) == len(b) and all(near)

    def _double(self, copies: int) -> None:
        """From now on the model works on so many copies of its input."""
        self.point.copies = copies
        if copies > 1:
            self._owners = None
            self._known.clear()


def _is_other_side(a: Query, b: Query) -> bool:
    return a.per_example and a.scale != 0 and b == a._replace(scale=-a.scale)


def _stacked(leaf: Any, rows: int) -> Any:
    if not isinstance(leaf, Tensor):
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise NotStackedError  # a cache, or something else with rows in it
    return torch.cat([leaf] * COPIES) if leaf.ndim and leaf.shape[0] == rows else leaf


def _half(leaf: Any, *, k: int, rows: int, widths: set[int]) -> Any:
    if not isinstance(leaf, Tensor):  # a cache is of both sides together
        return leaf if isinstance(leaf, (bool, int, float, str)) else None
    if leaf.ndim:
        if leaf.shape[0] == COPIES * rows:
            return leaf[k * rows : (k + 1) * rows]
        if leaf.ndim > 1 and leaf.shape[0] == 1 and leaf.shape[1] in widths:
            return leaf.chunk(COPIES, dim=1)[k]
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
