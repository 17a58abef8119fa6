"""L1: a weight that is computed when, and as far as, it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@functools.cache
def no_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a stand-in has while it stands for nothing: the model may move elsewhere, and what it had is not to be kept alive."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


def _nothing(*_: Any) -> None:
    return None


class StandIn(Tensor):
    """Stands in a module for a weight. Questions about shape, dtype and device are answered from the original.

    A kind says what it computes of the result of a function from parts of the weight (``_in_part``, else NotImplemented), and how it computes
    the whole (``_computed``), with which any other function goes on.
    """

    _in_part: Any
    _computed: Any
    _original: Tensor
    _is_param = True  # for isinstance(weight, nn.Parameter)

    @classmethod
    def _of(cls, original: Tensor) -> Any:
        weight = Tensor._make_subclass(cls, original.detach(), original.requires_grad)
        weight._original = original
        return weight

    def is_like(self, original: Tensor) -> bool:
        """Whether it can stand for this one."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.dtype == original.dtype and self.device == original.device

    def stand_for(self, original: Tensor) -> None:
        """Stand for another one from now on."""
        self._original = original

    def rest(self) -> None:
        """Keep nothing alive."""
        nothing = no_values(self._original.dtype, self._original.device)
        self._original = nothing
        self.point_to(nothing)

    def point_to(self, data: Tensor) -> None:
        """Let code that knows nothing of this class find ``data`` here."""
        with torch._C.DisableTorchFunctionSubclass():
            self.data = data

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(args[0]._original, *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            found = cls._in_part(func, args, kwargs)
        if found is not NotImplemented:
            return found
        refuse_writing(func, args, cls)

        def dense(value: Any) -> Any:
            if isinstance(value, cls):
                return value._computed()
            return type(value)(map(dense, value)) if isinstance(value, (list, tuple)) else value

        return func(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})


class LazyWeight(StandIn):
    """A weight that does not exist yet. A look-up may compute its rows alone, a projection may go through them in slices."""

    _rows: Callable[[Tensor], Tensor | None]
    _project: Callable[[Tensor, Tensor | None], Tensor | None]
    _whole: Callable[[], Tensor]
    _note_use: Callable[[], None]
    _note_rows: Callable[[Tensor], None]

    @classmethod
    def wrap(
        cls,
        original: Tensor,
        whole: Callable[[], Tensor],
        note_use: Callable[[], None],
        rows: Callable[[Tensor], Tensor | None] = _nothing,
        project: Callable[[Tensor, Tensor | None], Tensor | None] = _nothing,
        note_rows: Callable[[Tensor], None] | None = None,
    ) -> LazyWeight:
        """A stand-in for ``original``.

        Args:
            whole: computes the tensor.
            note_use: called when the tensor is read as a whole.
            rows: ``rows(numbers)`` computes ``tensor[numbers]``; None: the whole is wanted instead.
            project: ``project(x, bias)`` computes ``x tensor^T + bias``; None: the whole is wanted instead.
            note_rows: called with the numbers of rows that are looked up; None: that is a use of the tensor like any other.
        """
        weight = cls._of(original)
        weight._whole, weight._note_use, weight._rows, weight._project = whole, note_use, rows, project
        weight._note_rows = (lambda numbers: note_use()) if note_rows is None else note_rows
        return weight

    def _computed(self) -> Tensor:
        self._note_use()
        return self._whole()

    @classmethod
    def _in_part(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.embedding and kwargs.get("max_norm") is None and isinstance(args[1], cls):
            numbers, table = args
            table._note_rows(numbers)
            rows = table._rows(numbers)
            return F.embedding(numbers, table._whole()) if rows is None else rows
        if func is F.linear and not kwargs and isinstance(args[1], cls):
            x, table, bias = (*args, None)[:3]
            if not isinstance(x, cls) and not isinstance(bias, cls):
                projected = table._project(x, bias)
                if projected is not None:
                    table._note_use()
                    return projected
        return NotImplemented


def refuse_writing(func: Any, args: Any, kind: type[Tensor]) -> None:
    """Raise RuntimeError if the function changes its first argument, a stand-in of that kind."""
    if args and isinstance(args[0], kind) and _writes(func):
        raise RuntimeError(
            "the model writes to a tuned weight while it is evaluated, and what it would write is lost with the perturbed copy: "
            "if it does so once, as RWKV rescales its layers, run it once in evaluation mode before tuning it"
        )


def _writes(func: Any) -> bool:
    """Whether it changes its first argument: ``div_``, ``__imul__``, ``__setitem__``, ``weight.data = ...``."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return func == Tensor.data.__set__ or name == "__setitem__" or (name.startswith("__i") and name in _IN_PLACE)  # type: ignore[attr-defined]
    return name.endswith("_") and name != "requires_grad_"


_IN_PLACE = {
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}

_ATTRIBUTES = (
    "shape dtype device layout ndim requires_grad grad grad_fn is_leaf itemsize nbytes "
    "is_cuda is_cpu is_meta is_sparse is_quantized is_nested is_mps is_xpu"
)
_METHODS = (
    "size dim ndimension numel nelement stride element_size get_device __len__ "
    "is_floating_point is_complex is_signed is_contiguous storage_offset"
)
METADATA = {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()} | {
    getattr(Tensor, name) for name in _METHODS.split()
}
