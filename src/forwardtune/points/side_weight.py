"""L1: a weight on a side path: what the model computes with it is computed with the weight as it is, and the direction's part added."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..parameters import TunedTensor
from .head import as_parameter
from .lazy import METADATA, no_values, refuse_writing

if TYPE_CHECKING:
    from .owners import Groups
    from .side_path import SidePath


class SideWeight(Tensor):
    """Stands in a module for a tuned tensor.

    Operations that are linear in it (:data:`LINEAR`) are done with the tensor itself, and the part of the direction is added to what they
    give. A vector that is used element by element becomes a :class:`PerExample`. Any other use has no side path: the tensor is left out.
    """

    _path: SidePath
    _tensor: TunedTensor
    _original: Tensor
    _is_param = True  # for isinstance(weight, nn.Parameter)

    @staticmethod
    def wrap(path: SidePath, tensor: TunedTensor) -> SideWeight:
        parameter = tensor.parameter
        weight = Tensor._make_subclass(SideWeight, parameter.detach(), parameter.requires_grad)
        weight._path, weight._tensor = path, tensor
        weight.stand_for(tensor.read())
        return weight

    def stand_for(self, values: Tensor) -> None:
        """Compute with these values from now on: the tensor's, on the device, or where they live."""
        self._original = as_parameter(values, self._tensor)

    def is_like(self, parameter: Tensor) -> bool:
        """Whether it can stand for the parameter as that is now."""
        with torch._C.DisableTorchFunctionSubclass():
            return (
                self.dtype == parameter.dtype
                and self.device == parameter.device
                and self.requires_grad == parameter.requires_grad
            )

    def begin(self) -> None:
        """Stand for the values that the tensor has now."""
        values = self._tensor.read()
        with torch._C.DisableTorchFunctionSubclass():
            self.data = self._tensor.parameter.data
        self.stand_for(values)

    def rest(self) -> None:
        """Keep no values alive: the model may move elsewhere before the next evaluation."""
        self._original = no_values(self._original.dtype, self._original.device)
        with torch._C.DisableTorchFunctionSubclass():
            self.data = no_values(self.dtype, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(args[0]._original, *args[1:], **kwargs)
        handler = LINEAR.get(func)
        if handler is not None:
            if any(type(a) is PerExample for a in (*args, *kwargs.values())):
                args, kwargs = mapped(args, _first), mapped(kwargs, _first)
            with torch._C.DisableTorchFunctionSubclass():
                result = handler(*args, **kwargs)
            if result is not None:
                return result
        elif not kwargs and len(args) == 2 and name_of(func) in ELEMENTWISE:
            result = _met(func, *args)
            if result is not None:
                return result
        refuse_writing(func, args, cls)
        moved = [weight for weight in leaves((args, kwargs)) if isinstance(weight, cls) and _moves(weight)]
        if moved and all(weight.ndim == 1 for weight in moved) and name_of(func) in ELEMENTWISE:
            for other in leaves((args, kwargs)):
                if isinstance(other, Tensor) and not isinstance(other, (cls, PerExample)) and other.ndim > 1:
                    moved[0]._path.owner(
                        other.shape[:-1], other.device
                    )  # where this is the model's input, it counts the examples
            return func(*mapped(args, _spread), **mapped(kwargs, _spread))
        for weight in moved:
            weight._path.leave_out(weight._tensor)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*mapped(args, plain), **mapped(kwargs, plain))


class PerExample(Tensor):
    """A vector of which every example has its own, shape (directions, n): meets an activation example by example."""

    _path: SidePath
    _tensor: TunedTensor
    _value: Tensor

    @staticmethod
    def wrap(path: SidePath, tensor: TunedTensor, value: Tensor) -> PerExample:
        vector = Tensor._make_subclass(PerExample, value)
        vector._path, vector._tensor, vector._value = path, tensor, value
        return vector

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        vectors = [a for a in leaves((args, kwargs)) if isinstance(a, cls)]
        first = vectors[0]
        if func in METADATA:
            return func(args[0]._value[0], *args[1:], **kwargs)
        others = [a for a in leaves((args, kwargs)) if isinstance(a, Tensor) and not isinstance(a, cls) and a.ndim > 0]
        with torch._C.DisableTorchFunctionSubclass():
            if name_of(func) in ELEMENTWISE and not others and len(vectors) == 1:
                value = func(*mapped(args, _values), **mapped(kwargs, _values))
                if isinstance(value, Tensor) and value.shape == first._value.shape:
                    return PerExample.wrap(first._path, first._tensor, value)
            if name_of(func) in ELEMENTWISE and len(others) == 1:
                lead = others[0].shape[:-1]
                rows = {id(v): v._rows(lead) for v in vectors}
                if all(row is not None for row in rows.values()) and others[0].shape[-1:] == first._value.shape[1:]:
                    aligned = lambda a: rows[id(a)] if isinstance(a, cls) else a  # noqa: E731
                    return func(*mapped(args, aligned), **mapped(kwargs, aligned))
            return func(*mapped(args, _first), **mapped(kwargs, _first))

    def _rows(self, lead: Any) -> Tensor | None:
        """The vector of every place of an activation with these leading dimensions, in a shape that broadcasts."""
        return self._path.spread(self._value, lead)


ELEMENTWISE = {
    *("add", "sub", "mul", "div", "rsub", "true_divide", "__add__", "__radd__", "__mul__", "__rmul__", "__sub__", "__rsub__"),
    *("__truediv__", "__neg__", "neg", "float", "double", "half", "bfloat16", "to", "type", "type_as", "contiguous", "clone", "detach"),
}  # fmt: skip


def _moves(weight: Any) -> bool:
    """Note that the tensor is read, if this stands for one; whether the present point moves it."""
    if not isinstance(weight, SideWeight):
        return False
    weight._path.used.read(weight._tensor.id)
    return weight._path.point.scale != 0


def _waits(weight: Any) -> bool:
    """Whether this stands for a tensor that lags behind the steps of the run."""
    return isinstance(weight, SideWeight) and weight._path.point.waiting.lags(weight._tensor)


def stored(value: Any) -> Any:
    """The tensor behind a stand-in; anything else as it is."""
    return value._original if isinstance(value, SideWeight) else value


def plain(value: Any) -> Any:
    """:func:`stored`, with the steps that wait to be added to it."""
    return value._path.point.waiting.whole(value._tensor, value._original) if _waits(value) else stored(value)


def _spread(value: Any) -> Any:
    """A stand-in of a vector as the vectors of all examples."""
    if not _moves(value):
        return plain(value)
    path, tensor = value._path, value._tensor
    count = path.count()
    if count is None:
        path.leave_out(tensor)
        return value._original
    with torch._C.DisableTorchFunctionSubclass():
        return PerExample.wrap(path, tensor, _vectors(value, count))


def _met(func: Any, a: Any, b: Any) -> Tensor | None:
    """What an operation makes, element by element, of a vector and an activation; None: of something else, or the examples cannot be told."""
    weight, other = (a, b) if type(a) is SideWeight else (b, a)
    if type(other) is not Tensor or type(weight) is not SideWeight or other.ndim < 2 or not _moves(weight):
        return None
    with torch._C.DisableTorchFunctionSubclass():
        if weight.ndim != 1 or weight.shape != other.shape[-1:]:
            return None
        rows = _rows(weight, other.shape[:-1])
        if rows is None:
            return None
        result: Tensor = func(rows, other) if weight is a else func(other, rows)
    return result


def _rows(weight: SideWeight, lead: Any) -> Tensor | None:
    """The perturbed vector of every place of an activation with these leading dimensions; None if it cannot be told whose they are."""
    path = weight._path
    if not path.sees(lead) or (count := path.count()) is None:
        return None
    return path.spread(_vectors(weight, count), lead)


def _vectors(weight: SideWeight, count: int) -> Tensor:
    """The perturbed vectors of so many directions, (count, n), rounded as perturbed weights are."""
    return weight._path.point.moved(weight._tensor, weight._original, count)


def _values(value: Any) -> Any:
    return value._value if isinstance(value, PerExample) else value


def _first(value: Any) -> Any:
    """Vectors that were computed from a weight are nobody's where an operation would take a weight: it is left out."""
    if not isinstance(value, PerExample):
        return value
    value._path.leave_out(value._tensor)
    return value._value[0]


def name_of(func: Any) -> str:
    return str(getattr(func, "__name__", ""))


def leaves(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return change(value)


# --- operations that are linear in a weight --------------------------------------------------------------------------------------
# Each does it with the weight itself and adds the direction's part. None: it has no side path here.


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
    if isinstance(x, SideWeight):
        return None
    y = F.linear(x, stored(weight), stored(bias))
    if (_moves(weight) | _waits(weight)) and not _add_product(y, x, weight, transposed=False):
        return None
    return y if _add_shift(y, bias) else None


def _addmm(bias: Any, x: Tensor, weight: Any, **scales: Any) -> Tensor | None:
    if scales or isinstance(x, SideWeight):
        return None
    y = torch.addmm(stored(bias), x, stored(weight))
    if (_moves(weight) | _waits(weight)) and not _add_product(y, x, weight, transposed=True):
        return None
    return y if _add_shift(y, bias) else None


# Up to so many directions times rank, all of them are multiplied with every row at once, which matrix units like better than a batch
# of thin products.
_AT_ONCE = 32


def _add_product(y: Tensor, x: Tensor, weight: SideWeight, *, transposed: bool) -> bool:
    """Add ``x_b Z_b^T`` to the output of a projection with W (out, in), or ``x_b Z_b`` where W is (in, out); and to all rows what waits."""
    path, tensor = weight._path, weight._tensor
    groups = path.groups(x.shape[:-1], tensor, x.device)
    if groups is None or weight.ndim != 2 or not y.is_contiguous():
        return False
    # Autocast gives y in a dtype of its own, and in-place products take one dtype alone.
    rows, out, point = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]), path.point
    rows = rows if x.dtype == y.dtype else rows.to(y.dtype)
    scale = point.scale
    if scale == 0:
        _add_waiting(out, rows, weight, transposed)
        return True
    count = groups.directions
    if not point.is_low_rank(tensor):
        z = point.directions(tensor, count).to(y.dtype)
        _add_by_example(groups, out, rows, lambda x: torch.bmm(x, z if transposed else z.mT))
        return True
    rank = point.rank
    if count * rank <= _AT_ONCE:
        u, v, waiting = point.with_waiting(tensor, count, y.dtype)
        inner, outer = (u, v) if transposed else (v, u)  # (columns, n) and (columns, m)
        narrow = F.linear(rows, inner)
        own = groups.one_hot(narrow.dtype, rank, waiting)
        narrow = narrow if own is None else narrow.mul_(own)
        out.addmm_(narrow, outer, alpha=scale)  # the scale in the precision of the sum
    else:
        u, v = point.factors(tensor, count, y.dtype)
        inner, outer = (u, v) if transposed else (v, u)  # (directions, rank, n) and (directions, rank, m)
        _add_by_example(groups, out, rows, lambda x: torch.bmm(torch.bmm(x, inner.mT), outer).mul_(scale))
        _add_waiting(out, rows, weight, transposed)
    return True


def _add_waiting(out: Tensor, rows: Tensor, weight: SideWeight, transposed: bool) -> None:
    """Add what waits to be added to a weight, as it is with every row."""
    found = weight._path.point.waiting.of(weight._tensor, out.dtype)
    if found is not None:
        p, v = found
        inner, outer = (p, v) if transposed else (v, p)
        out.addmm_(F.linear(rows, inner), outer)


def _add_by_example(groups: Groups, out: Tensor, rows: Tensor, product: Callable[[Tensor], Tensor]) -> None:
    """Add to the rows of every example what its direction, the same in all copies but for the sign, makes of them."""
    copies = groups.gathered(rows).chunk(groups.copies)
    parts = [product(x) if k == 0 else product(x).neg_() for k, x in enumerate(copies)]
    groups.add_to(out, parts[0] if len(parts) == 1 else torch.cat(parts))


def _add_shift(y: Tensor, bias: Any) -> bool:
    """Add the directions of a bias to an output."""
    if not _moves(bias):
        return True
    path = bias._path
    groups = path.groups(y.shape[:-1], bias._tensor, y.device)
    if groups is None or not y.is_contiguous():
        return False
    vectors = path.point.vectors(bias._tensor, groups.count, y.dtype)
    groups.add_vectors(y.view(-1, y.shape[-1]), vectors, path.point.scale)
    return True


def _embedding(
    numbers: Tensor, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **how: Any
) -> Tensor | None:
    if max_norm is not None or not isinstance(weight, SideWeight) or isinstance(numbers, SideWeight):
        return None
    y, path = F.embedding(numbers, stored(weight)), weight._path
    path.used.read_rows(weight._tensor.id, numbers, weight._original.shape[0])
    waiting = path.point.waiting_rows(weight._tensor, numbers)
    if path.point.scale == 0:
        return y if waiting is None else (y + waiting).to(y.dtype)
    owner = path.owner(numbers.shape, numbers.device)
    height = path.height()
    if owner is None and height is not None and numbers.shape[:1] == (1,):  # positions, the same for all rows
        numbers = numbers.expand(height, *numbers.shape[1:])
        owner = path.owner(numbers.shape, numbers.device)
    if owner is None:
        return None
    added = path.point.rows(weight._tensor, numbers, owner, path.count() or 1)
    return y + (added if waiting is None else added + waiting).to(y.dtype)


def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
    if len(shape) != 1:
        return None
    return _scaled_and_shifted(F.layer_norm(x, shape, None, None, eps), weight, bias)


def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor | None:
    if len(shape) != 1:
        return None
    return _scaled_and_shifted(F.rms_norm(x, shape, None, eps), weight, None)


def _scaled_and_shifted(y: Tensor, weight: Any, bias: Any) -> Tensor | None:
    for part, how in ((weight, torch.mul), (bias, torch.add)):
        if _moves(part):
            path = part._path
            if not path.sees(y.shape[:-1]) or (count := path.count()) is None:
                return None
            # Rows that follow each other, as many for each example, meet one vector.
            blocks = path.blocks(y)
            rows = (
                _vectors(part, count)[:, None]
                if blocks is not None
                else path.spread(_vectors(part, count), y.shape[:-1])
            )
            if rows is None:
                return None
            y = how(y, rows) if blocks is None else how(blocks, rows).view_as(y)
        elif part is not None:
            y = how(y, plain(part))
    return y


LINEAR: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
