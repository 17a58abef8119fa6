"""L1: experts that one tensor holds, on a side path: a token meets the slice of the expert that it is routed to, along its example's direction.

For a stack W (experts, m, n), whose direction is that of a matrix of experts * m rows, expert e is ``Z_b[e] = U_b[e] V_b^T / sqrt(r)`` for
example b. In which order tokens go to their experts is the model's business. So what enters its module carries along whose each row is
(:class:`Routed`), through the operations that keep rows apart; and a weight remembers which of its slices were taken (:class:`Slices`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import TRANSPOSES, exchanged, is_grouped, picked
from .lazy import METADATA
from .side_weight import ELEMENTWISE, LINEAR, SideWeight, leaves, mapped, name_of

if TYPE_CHECKING:
    from .side_path import SidePath

# Operations that compute each row of their result from the same row of what they get, if it has as many.
ROW_BY_ROW = ELEMENTWISE | {
    *("add_", "mul_", "pow", "__pow__", "__rpow__", "square", "sqrt", "exp", "tanh", "erf", "clamp", "clip", "minimum", "maximum"),
    *("silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "sigmoid", "softplus", "mish", "masked_fill"),
    *("chunk", "split", "unsqueeze", "squeeze"),
}  # fmt: skip


class Routed(Tensor):
    """An activation with a token in each row.

    Attributes:
        _owner: number of the direction of every row, int64, shape (rows,).
    """

    _value: Tensor
    _owner: Tensor

    @staticmethod
    def wrap(value: Tensor, owner: Tensor) -> Routed:
        routed = Tensor._make_subclass(Routed, value)
        routed._value, routed._owner = value, owner
        return routed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Slices(Tensor):
    """What was taken of a stack: one expert's, one for every row, or all.

    Attributes:
        _experts: their numbers, int64, shape () or (rows,); None: all of them, which a grouped product tells apart.
        _turned: whether the last two dimensions are exchanged.
    """

    _value: Tensor
    _weight: SideWeight
    _experts: Tensor | None
    _turned: bool

    @staticmethod
    def wrap(value: Tensor, weight: SideWeight, experts: Tensor | None, *, turned: bool = False) -> Slices:
        slices = Tensor._make_subclass(Slices, value)
        slices._value, slices._weight, slices._experts, slices._turned = value, weight, experts, turned
        return slices

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation that something routed, or slices, go into."""
    if is_grouped(func):
        args = mapped(args, _whole)
    if any(
        isinstance(value, SideWeight) for value in leaves((args, kwargs))
    ):  # a weight that all tokens meet, in the order of the input
        return func(*mapped(args, _plain), **mapped(kwargs, _plain))
    with torch._C.DisableTorchFunctionSubclass():
        if func in METADATA:
            return func(_plain(args[0]), *args[1:], **kwargs)
        if (found := _product(func, args, kwargs)) is not None:
            return found
        routed = next((a for a in leaves((args, kwargs)) if isinstance(a, Routed)), None)
        if routed is not None and name_of(func) in ELEMENTWISE | {"add_"}:
            args = mapped(args, lambda value: _shifted(value, routed))
        for slices in leaves((args, kwargs)):
            if isinstance(slices, Slices):
                slices._weight._path.used.read(slices._weight._tensor.id)
                slices._weight._path.leave_out(slices._weight._tensor)
        result = func(*mapped(args, _plain), **mapped(kwargs, _plain))
        owner = None if routed is None else _owner_after(func, args, kwargs, routed)
        return result if owner is None else mapped(result, lambda part: _routed(part, owner))


def _plain(value: Any) -> Any:
    return value._value if isinstance(value, (Routed, Slices)) else value


def _routed(value: Any, owner: Tensor) -> Any:
    return Routed.wrap(value, owner) if isinstance(value, Tensor) and value.shape[:1] == owner.shape else value


def _owner_after(func: Any, args: Any, kwargs: Any, routed: Routed) -> Tensor | None:
    """Whose the rows of a result are; None where that is lost."""
    owner, name = routed._owner, name_of(func)
    if name in ROW_BY_ROW:
        return owner
    if not args or args[0] is not routed:
        return None
    if func is Tensor.__getitem__:
        index = args[1]
        if isinstance(index, Tensor) and index.ndim == 1:
            return owner[index]
        return owner if isinstance(index, tuple) and index[0] in (Ellipsis, slice(None)) else None
    if name == "repeat_interleave" and kwargs.get("dim") == 0 and isinstance(args[1], int):
        return owner.repeat_interleave(args[1])
    return None


# --- what is linear in slices -----------------------------------------------------------------------------------------------------


def _product(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The product of routed rows with the slices of their experts and, added, with the directions of those; None: it is no such product."""
    if len(args) < 2 or not all(isinstance(a, (Routed, Slices)) for a in args[:2]):
        return None
    first, second = args[:2]
    name, inputs, weights, bias = name_of(func), first, second, None
    if func is F.linear:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
    elif name == "bmm" and isinstance(first, Slices):
        inputs, weights = second, first
    elif not (name in ("matmul", "__matmul__", "bmm") or is_grouped(func)):
        return None
    if not isinstance(inputs, Routed) or not isinstance(weights, Slices) or bias is not None:
        return None
    x = inputs._value.squeeze(2 if weights is first else 1) if name == "bmm" else inputs._value
    experts = _experts_of_rows(weights, x, kwargs.get("offs"))
    if experts is None or x.ndim != 2 or weights._weight.ndim != 3:
        return None
    y = func(*mapped(args, _plain), **kwargs)
    # linear and a product from the left have the weight as (out, in), other products as (in, out)
    as_stored = weights._turned if func is F.linear or weights is first else not weights._turned
    _add_product(y.view(len(x), -1), x, weights._weight, experts, inputs._owner, transposed=as_stored)
    return Routed.wrap(y, inputs._owner)


def _experts_of_rows(weights: Slices, x: Tensor, ends: Tensor | None) -> Tensor | None:
    """The expert of every row of an input, shape (rows,). ``ends``: of a grouped product, where the rows of each expert end."""
    experts = weights._experts
    if experts is None and ends is not None:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        experts = torch.arange(len(sizes), device=ends.device).repeat_interleave(sizes)
        weights._weight._path.used.read_rows(weights._weight._tensor.id, experts, len(sizes))
    if experts is None or experts.ndim > 1:
        return None
    experts = experts.expand(len(x)) if not experts.ndim else experts
    return experts if len(experts) == len(x) else None


def _add_product(y: Tensor, x: Tensor, weight: SideWeight, experts: Tensor, owner: Tensor, *, transposed: bool) -> None:
    """Add ``x_t Z_b[e]^T`` to every row t of y, or ``x_t Z_b[e]`` where a slice is (in, out)."""
    point, tensor = weight._path.point, weight._tensor
    if point.scale == 0:
        return
    sign, owner, many = _sides(weight, owner)
    x = x.to(y.dtype)
    if not point.is_low_rank(tensor):
        z = point.directions(tensor, many).flatten(0, 1).to(y.dtype)
        which = owner * len(weight) + experts
        for pair in which.unique().tolist():
            rows = (which == pair).nonzero().view(-1)
            part = x[rows] @ (z[pair] if transposed else z[pair].mT)
            y.index_add_(0, rows, part * sign[rows, None].to(y.dtype))
        return
    u, v = point.factors(tensor, many, y.dtype)
    u = u.unflatten(2, weight.shape[:2])[owner, :, experts]  # (rows, r, m) and (rows, r, n)
    inner, outer = (u, v[owner]) if transposed else (v[owner], u)
    narrow = torch.bmm(x[:, None], inner.mT)
    y.add_(torch.bmm(narrow * sign[:, None, None].to(y.dtype), outer)[:, 0], alpha=point.scale)


def _shifted(value: Any, routed: Routed) -> Any:
    """Slices of a stack of vectors, moved along the directions of the rows that they meet."""
    if not isinstance(value, Slices) or value._weight.ndim != 2:
        return value
    experts = _experts_of_rows(value, routed._value, None)
    if experts is None:
        return value
    path, tensor = value._weight._path, value._weight._tensor
    moved = value._value + path.point.rows(tensor, experts, routed._owner, path.count() or 1)
    return moved.to(value._value.dtype)


def _sides(weight: SideWeight, owner: Tensor) -> tuple[Tensor, Tensor, int]:
    """On which side rows are, 1 or -1; along which direction; of how many."""
    many = (weight._path.count() or 1) // weight._path.point.copies
    return 1 - 2 * (owner // many), owner % many, many


# --- what makes slices ------------------------------------------------------------------------------------------------------------


def _taken(weight: Any, index: Any) -> Tensor | None:
    if not _is_stack(weight):
        return None
    numbers = picked(index, weight._original)
    if numbers is None:
        return None
    weight._path.used.read_rows(weight._tensor.id, numbers, len(weight._original))
    value = weight._original[index]
    numbers = numbers.view(()) if value.ndim < weight._original.ndim else numbers
    return value if weight._path.point.scale == 0 else Slices.wrap(value, weight, numbers)


def _is_stack(weight: Any) -> bool:
    return isinstance(weight, SideWeight) and weight._tensor.id in weight._path.experts


def _whole(value: Any) -> Any:
    return Slices.wrap(value._original, value, None) if _is_stack(value) else value


def _turned(func: Any) -> Any:
    def turned(weight: Any, *dimensions: Any, **kwargs: Any) -> Tensor | None:
        if not _is_stack(weight) or weight.ndim != 3:
            return None
        dims = exchanged(func, (weight, *dimensions), kwargs)
        return None if dims is None else Slices.wrap(weight._original.transpose(*dims), weight, None, turned=True)

    return turned


LINEAR |= {Tensor.__getitem__: _taken, **{func: _turned(func) for func in TRANSPOSES}}


# --- the module -------------------------------------------------------------------------------------------------------------------


def enter(path: SidePath, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A hook before a module of experts runs: the rows of what it gets are told apart."""

    def told_apart(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            return value
        owner = path.owner(value.shape[:1], value.device)
        return value if owner is None else Routed.wrap(value, owner.expand(len(value)))

    return tuple(map(told_apart, args)), {key: told_apart(value) for key, value in kwargs.items()}


def leave(module: nn.Module, args: Any, output: Any) -> Any:
    """A hook after it: what it gives is an activation like any other."""
    return mapped(output, _plain)
