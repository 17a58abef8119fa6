"""L2: how the model is evaluated at ``theta + scale * z``.

All three ways are context managers: inside the block :meth:`Perturbation.shift` moves the model to a point, on exit the
model is back at theta, whatever happened in between.

============  =======================================  =======================  ========================================
name          how                                      extra memory             afterwards
============  =======================================  =======================  ========================================
``scratch``   each module computes on a perturbed      the largest module       bit for bit as before
              copy of its own weights, made just       that owns weights
              before it runs, in a reused buffer
``copy``      all perturbed weights at once, in a      all tuned weights        bit for bit as before
              second set of tensors
``in_place``  ``+eps z``, ``-2 eps z``, ``+eps z``     none                     off by rounding, which adds up: in
              on the weights (the published loop)                               half precision it ruins the weights
============  =======================================  =======================  ========================================

All three evaluate at the same point: float32 addition, rounded to nearest in the weights' dtype.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arena import Arena
from .noise import Noise
from .parameters import TunedParameters, TunedTensor


class Perturbation(ABC):
    """Moves a model to ``theta + scale * z(step, probe)`` and back.

    Use::

        with perturbation:
            perturbation.shift(step, probe, +eps)
            plus = loss()
            perturbation.shift(step, probe, -eps)
            minus = loss()
    """

    name: str

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        self.tuned = tuned
        self.noise = noise

    @abstractmethod
    def shift(self, step: int, probe: int, scale: float) -> None:
        """Evaluate at ``theta + scale * z(step, probe)`` from now on; theta is always the unperturbed point.

        Scale 0 is theta itself, and costs no noise.
        """

    @abstractmethod
    def __enter__(self) -> Perturbation: ...

    @abstractmethod
    def __exit__(self, *exception: object) -> None: ...


class InPlace(Perturbation):
    """The published loop: the weights themselves move, and come back only up to rounding."""

    name = "in_place"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        self._at: tuple[int, int, float] | None = None

    def __enter__(self) -> InPlace:
        return self

    def shift(self, step: int, probe: int, scale: float) -> None:
        if scale == 0:
            self._return()
            return
        if self._at is not None and self._at[:2] == (step, probe):
            self._add(step, probe, scale - self._at[2])
        else:
            self._return()
            self._add(step, probe, scale)
        self._at = (step, probe, scale)

    def __exit__(self, *exception: object) -> None:
        self._return()

    def _return(self) -> None:
        if self._at is not None:
            step, probe, scale = self._at
            self._at = None
            self._add(step, probe, -scale)

    def _add(self, step: int, probe: int, scale: float) -> None:
        for tensor in self.tuned:
            weight = tensor.parameter.detach()
            self.noise.perturb(weight, weight, tensor=tensor.id, step=step, probe=probe, scale=scale)


class Copy(Perturbation):
    """The parameters point to a second set of tensors while the model is evaluated."""

    name = "copy"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        self._shadows: list[Tensor] = []
        self._originals: list[Tensor] = []

    def __enter__(self) -> Copy:
        self._originals = [tensor.parameter.data for tensor in self.tuned]
        if [(s.shape, s.device, s.dtype) for s in self._shadows] != [
            (o.shape, o.device, o.dtype) for o in self._originals
        ]:
            self._shadows = [torch.empty_like(original) for original in self._originals]
        return self

    def shift(self, step: int, probe: int, scale: float) -> None:
        for tensor, original, shadow in zip(self.tuned, self._originals, self._shadows, strict=True):
            if scale == 0:
                tensor.parameter.data = original
                continue
            self.noise.perturb(shadow, original, tensor=tensor.id, step=step, probe=probe, scale=scale)
            tensor.parameter.data = shadow

    def __exit__(self, *exception: object) -> None:
        for tensor, original in zip(self.tuned, self._originals, strict=True):
            tensor.parameter.data = original
        self._originals = []


class Scratch(Perturbation):
    """Every module that owns tuned weights computes on a perturbed copy of them, made just before it runs.

    The weights are only read. Hooks exist inside the block alone. A module lends its scratch copy from the moment that
    it is called until it returns. An embedding computes only the rows that it looks up, and a vocabulary head that is asked
    for few positions works through its rows in slices, where that gives the same bits.

    A weight that is read outside the module that owns it is seen unperturbed: :meth:`poisoned` finds that out.
    """

    name = "scratch"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        if tuned.module is None:
            raise ValueError("perturbation='scratch' needs the module: pass MeZO(module, ...) or module=...")
        by_parameter = {id(tensor.parameter): tensor for tensor in tuned}
        self._owners = [
            (module, owned)
            for module in tuned.module.modules()
            if (owned := [(k, by_parameter[id(p)]) for k, p in module._parameters.items() if id(p) in by_parameter])
        ]
        # A slice of a vocabulary head takes no more scratch memory than the largest other module does.
        self._slice_bytes = max(
            (sum(_nbytes(t.parameter) for _, t in owned) for module, owned in self._owners if not _is_table(module)),
            default=0,
        )
        self._arena = Arena()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._lent: list[tuple[nn.Module, list[tuple[str, nn.Parameter]], Any]] = []
        self._point: tuple[int, int, float] | None = None
        self._hidden: dict[int, Tensor] = {}
        self._slices_are_exact: dict[tuple[Any, ...], bool] = {}
        self._strided_trials = 0

    def __enter__(self) -> Scratch:
        for module, owned in self._owners:
            self._hooks.append(module.register_forward_pre_hook(self._lender(owned)))
            self._hooks.append(module.register_forward_hook(self._take_back, always_call=True))
        return self

    def shift(self, step: int, probe: int, scale: float) -> None:
        self._point = (step, probe, scale) if scale else None

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # torch runs no hook after KeyboardInterrupt and its like: whatever is still lent comes back here.
        while self._lent:
            self._return_last()
        self._point = None

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """Every tuned weight reads as NaN outside its owner, and scratch memory is NaN once it is given back.

        An evaluation that gives the same loss inside and outside this block reads each tuned weight through its owner
        alone, which is what makes the scratch path exact. It takes no memory: the NaNs are one element, expanded.
        """
        self._hidden = {tensor.id: tensor.parameter.data for tensor in self.tuned}
        try:
            for tensor in self.tuned:
                weight = self._hidden[tensor.id]
                tensor.parameter.data = weight.new_full((), float("nan")).expand(weight.shape)
            yield
        finally:
            for tensor in self.tuned:
                tensor.parameter.data = self._hidden[tensor.id]
            self._hidden = {}

    def _lender(self, owned: list[tuple[str, TunedTensor]]) -> Callable[[nn.Module, Any], None]:
        def lend(module: nn.Module, args: Any) -> None:
            if self._point is None:
                return
            self._lent.append((module, [(name, tensor.parameter) for name, tensor in owned], self._arena.mark()))
            for name, tensor in owned:
                lazily = name == "weight" and _is_table(module)
                module._parameters[name] = self._lazy(tensor) if lazily else self._perturbed(tensor)  # type: ignore[assignment]

        return lend

    def _take_back(self, module: nn.Module, args: Any, output: Any) -> None:
        # A module that a nested exception left behind is returned together with the one that encloses it.
        while any(lender is module for lender, _, _ in self._lent):
            if self._return_last() is module:
                return

    def _return_last(self) -> nn.Module:
        module, parameters, mark = self._lent.pop()
        for name, parameter in parameters:
            module._parameters[name] = parameter
        self._arena.release(mark, poison=bool(self._hidden))
        return module

    def _source(self, tensor: TunedTensor) -> Tensor:
        return self._hidden[tensor.id] if self._hidden else tensor.parameter.detach()

    def _perturbed(self, tensor: TunedTensor) -> Tensor:
        assert self._point is not None
        step, probe, scale = self._point
        source = self._source(tensor)
        out = self._arena.take(source)
        self.noise.perturb(out, source, tensor=tensor.id, step=step, probe=probe, scale=scale)
        return _as_parameter(out, tensor)

    def _lazy(self, tensor: TunedTensor) -> Tensor:
        assert self._point is not None
        step, probe, scale = self._point
        source = _as_parameter(self._source(tensor).detach(), tensor)
        address = {"tensor": tensor.id, "step": step, "probe": probe, "scale": scale}

        def rows(numbers: Tensor) -> Tensor:
            return self.noise.perturb_rows(source, numbers, **address)  # type: ignore[arg-type]

        def project(x: Tensor, bias: Tensor | None) -> Tensor | None:
            if not self._may_slice(tensor, source, x, bias):
                return None
            mark, poison = self._arena.mark(), bool(self._hidden)
            return _project_in_slices(
                x,
                source,
                bias,
                self._slice_rows(source),
                perturbed_slice,
                lambda: self._arena.release(mark, poison=poison),
            )

        def perturbed_slice(lo: int, hi: int) -> Tensor:
            out = self._arena.take(source[lo:hi])
            self.noise.perturb(out, source[lo:hi], **address, start=lo * source.shape[1])  # type: ignore[arg-type]
            return _as_parameter(out, tensor)

        return _LazyTable.wrap(source, rows, project, functools.cache(lambda: self._perturbed(tensor)))

    def _slice_rows(self, table: Tensor) -> int:
        """Rows in a slice of a vocabulary head; slices of one height if the table can be cut so.

        For every shape that a matrix product has, oneDNN keeps a kernel of about a megabyte.
        """
        height, (least, most) = table.shape[0], _SLICES
        slices = max(1, self._slice_bytes and -(-_nbytes(table) // self._slice_bytes))
        slices = min(max(slices, least), most)
        even = (n for n in range(slices, min(2 * slices, most) + 1) if height % n == 0)
        return -(-height // next(even, slices))

    def _may_slice(self, tensor: TunedTensor, source: Tensor, x: Tensor, bias: Tensor | None) -> bool:
        """Whether slices of the head give the bits of the whole for inputs like x: tried once, on the unperturbed weights.

        For many positions the logits take more memory than the weights, and slices would save nothing. A trial costs two
        products. torch folds a contiguous x to a matrix, so its number of rows is all that its shape says to a kernel:
        there are at most ``width // 8`` of them. Strides can have any values, and only so many are tried.
        """
        height, width = source.shape
        rows = x.numel() // width
        if height < _VOCABULARY or rows > width // 8:
            return False
        layout = rows if x.is_contiguous() else (x.shape, x.stride())
        key = (tensor.id, x.ndim, layout, x.dtype, bias is None, torch.is_autocast_enabled(x.device.type))
        if key not in self._slices_are_exact:
            if not x.is_contiguous():
                if self._strided_trials == _STRIDED_TRIALS:
                    return False
                self._strided_trials += 1
            weight = _as_parameter(source.detach(), tensor)
            cut = self._slice_rows(source)
            sliced = _project_in_slices(x, weight, bias, cut, lambda lo, hi: weight[lo:hi], lambda: None)
            self._slices_are_exact[key] = torch.equal(F.linear(x, weight, bias), sliced)
        return self._slices_are_exact[key]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_parameter(value: Tensor, tensor: TunedTensor) -> Tensor:
    """The value as a parameter that requires grad as the tuned one does: torch chooses some kernels by that."""
    return nn.Parameter(value, requires_grad=tensor.parameter.requires_grad)


# A linear layer with so many outputs is a vocabulary head; the widest inner layers have fewer.
_VOCABULARY = 30_000
# It is cut into so many slices at least, and at most.
_SLICES = (8, 64)
# So many layouts of inputs with gaps between their rows are tried; after them the head is computed whole.
_STRIDED_TRIALS = 64


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and module.out_features >= _VOCABULARY)


def _project_in_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    piece: Callable[[int, int], Tensor],
    done: Callable[[], None],
) -> Tensor:
    """``x W^T + b``, so many rows of W at a time; ``piece`` gives the rows, ``done`` takes them back."""
    height = weight.shape[0]
    out: Tensor | None = None
    for lo in range(0, height, rows):
        hi = min(lo + rows, height)
        part = F.linear(x, piece(lo, hi), None if bias is None else bias[lo:hi])
        out = part.new_empty(*part.shape[:-1], height) if out is None else out
        out[..., lo:hi] = part
        done()
    assert out is not None
    return out


class _LazyTable(Tensor):
    """The perturbed weight of an embedding or a vocabulary head, of which only what is needed is computed.

    A look-up computes its rows, a projection may go through them in slices; questions about shape, dtype and device are
    answered from the original; any other use computes the whole table first.
    """

    _rows: Callable[[Tensor], Tensor]
    _project: Callable[[Tensor, Tensor | None], Tensor | None]
    _whole: Callable[[], Tensor]

    @staticmethod
    def wrap(
        original: Tensor,
        rows: Callable[[Tensor], Tensor],
        project: Callable[[Tensor, Tensor | None], Tensor | None],
        whole: Callable[[], Tensor],
    ) -> _LazyTable:
        table = Tensor._make_subclass(_LazyTable, original, original.requires_grad)
        table._rows, table._project, table._whole = rows, project, whole
        return table

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.embedding and kwargs.get("max_norm") is None:
                numbers, table = args
                return table._rows(numbers)
            if func is F.linear and not kwargs and isinstance(args[1], cls):
                x, table, bias = (*args, None)[:3]
                projected = table._project(x, bias)
                if projected is not None:
                    return projected
            if func in _METADATA:
                return func(*args, **kwargs)

        def dense(value: Any) -> Any:
            if isinstance(value, cls):
                return value._whole()
            return type(value)(map(dense, value)) if isinstance(value, (list, tuple)) else value

        return func(*map(dense, args), **{key: dense(value) for key, value in kwargs.items()})


_METADATA = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.element_size}


PERTURBATIONS: dict[str, type[Perturbation]] = {cls.name: cls for cls in (Scratch, Copy, InPlace)}
