"""Perturbed copies of a module's weights, made just before it runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..method.estimators import Losses, Query
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor
from .arena import Arena
from .head import Slices, as_parameter, is_table, nbytes, project_in_slices
from .lazy import LazyWeight
from .perturbation import Closure, Perturbation, ReadElsewhereError, as_loss, without_compilation


class Scratch(Perturbation):
    """Every module that owns tuned weights computes on a perturbed copy of them, made just before it runs.

    The weights are only read. Hooks exist inside the block alone. A module is lent its scratch copy from the moment that
    it is called until it returns. An embedding computes only the rows that it looks up, and a vocabulary head that is asked
    for few positions works through its rows in slices, where that gives the same bits.

    A weight that another module reads as an attribute of its owner (``self.conv.weight``) is perturbed as a whole when that
    happens, and kept in a second tensor from the next block on. What is read on any other way, as from a list of parameters made at
    construction, cannot be seen: inside the block every tuned parameter therefore holds NaN (one element, expanded), which the loss then
    shows. ``losses`` raises :class:`ReadElsewhereError` if that happens, and :meth:`check` finds it for losses that hide a NaN.
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
        self._tables = {t.id for module, owned in self._owners if is_table(module) for k, t in owned if k == "weight"}
        # A slice of a vocabulary head takes no more scratch memory than the largest other module does.
        self.slices = Slices(
            max(
                (sum(nbytes(t.parameter) for _, t in owned) for module, owned in self._owners if not is_table(module)),
                default=0,
            )
        )
        self._by_id = {tensor.id: tensor for tensor in tuned}
        self._arena = Arena()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._lent: list[tuple[nn.Module, dict[str, Any], Any]] = []
        self._point: dict[str, Any] | None = None  # step, probe and scale; None: theta itself
        self._originals: dict[int, Tensor] = {}
        self._outside: dict[int, LazyWeight] = {}
        # Tensors that are read outside their owners: those seen in this block, and those perturbed as a whole since an earlier one.
        self._strays: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}
        # Vectors whose sweeps share a launch are perturbed at the beginning of a point, each in a tensor of its own.
        self._ahead: dict[int, Tensor] = {}
        self._seen: list[tuple[nn.Module, bool]] | None = None
        self._eager: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> Scratch:
        self._originals = {tensor.id: tensor.read() for tensor in self.tuned}
        self._whole = {i: w for i, w in self._whole.items() if _alike(w, self._originals[i])}
        self._whole |= self._strays
        self._strays = {}
        self.used = set(self._whole)  # who reads these is not seen
        try:
            for tensor in self.tuned:
                if tensor.id not in self._whole:
                    self._outside[tensor.id] = self._seen_from_outside(tensor)
            for module, owned in self._owners:
                for name, tensor in owned:
                    if tensor.id in self._outside:
                        module._parameters[name] = self._outside[tensor.id]  # type: ignore[assignment]
                self._hooks.append(module.register_forward_pre_hook(self._lender(owned)))
                self._hooks.append(module.register_forward_hook(self._take_back, always_call=True))
            self._poison(True)
            self._eager = without_compilation()
            self._eager.__enter__()
        except BaseException:
            self.__exit__()
            raise
        return self

    def shift(self, step: int, query: Query) -> None:
        self._point = {"step": step, "probe": query.probe, "scale": query.scale} if query.scale else None
        self._strays.clear()
        torch.clear_autocast_cache()
        for number, shadow in self._whole.items():
            original, parameter = self._originals[number], self._by_id[number].parameter
            if self._point is not None:
                self.noise.perturb(shadow, original, tensor=number, **self._point)
            parameter.data = original if self._point is None else shadow
        if self._point is not None:
            self._perturb_ahead(self._point)

    def _perturb_ahead(self, point: dict[str, Any]) -> None:
        vectors = {i: w for i, w in self._originals.items() if w.ndim == 1 and i not in self._whole}
        vectors = {i: w for i, w in vectors.items() if self.noise.launches_together(w)}
        kept = {i: w for i, w in self._ahead.items() if i in vectors and _alike(w, vectors[i])}
        with torch.inference_mode(False):  # they outlive the evaluation
            self._ahead = {i: kept[i] if i in kept else torch.empty_like(w) for i, w in vectors.items()}
        self.noise.perturb_many(list(self._ahead.values()), list(vectors.values()), tensors=list(vectors), **point)

    def __exit__(self, *exception: object) -> None:
        self._eager.__exit__(None, None, None)
        self._eager = nullcontext()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        # torch runs no hook after KeyboardInterrupt and its like: whatever is still lent comes back here.
        while self._lent:
            self._return_last()
        for module, owned in self._owners:
            for name, tensor in owned:
                module._parameters[name] = tensor.parameter
        for tensor in self.tuned:
            tensor.parameter.data = self._originals[tensor.id]
        self._outside, self._originals, self._point = {}, {}, None
        torch.clear_autocast_cache()

    def losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        with self:
            losses = self._losses(step, queries, closure)
            bad = next((q for q, (loss,) in zip(queries, losses, strict=True) if not math.isfinite(loss)), None)
            if bad is not None:
                self.shift(step, bad)
                with self._clean():
                    clean = float(as_loss(closure()))
                if math.isfinite(clean) and not math.isfinite(float(as_loss(closure()))):
                    raise ReadElsewhereError(_ELSEWHERE)
        return losses

    def check(self, step: int, query: Query, closure: Closure) -> tuple[Losses, Losses | None]:
        """Evaluate one point twice, with the weights there to be read on any way, and with NaN in their place.

        In the second evaluation scratch memory becomes NaN, too, when it is given back.

        Raises:
            ReadElsewhereError: the second evaluation has a NaN that the first had not, in the loss or in the output of a
                module that owns tuned weights.
        """
        with self:
            self.shift(step, query)
            clean_seen: list[tuple[nn.Module, bool]] = []
            seen: list[tuple[nn.Module, bool]] = []
            self._seen = clean_seen
            try:
                with self._clean():
                    clean = float(as_loss(closure()))
                if not math.isfinite(clean):
                    return (clean,), None
                self._seen = seen
                raised: Exception | None = None
                poisoned = math.nan
                try:
                    poisoned = float(as_loss(closure()))
                except Exception as error:
                    raised = error
                first = next((m for (m, bad), (_, was) in zip(seen, clean_seen, strict=False) if bad and not was), None)
                if first is not None or (raised is None and math.isnan(poisoned)):
                    raise ReadElsewhereError(_ELSEWHERE + self._named(first)) from raised
                if raised is not None:
                    raise raised
                return (clean,), (poisoned,)
            finally:
                self._seen = None

    def _named(self, module: nn.Module | None) -> str:
        assert self.tuned.module is not None
        name = next((name for name, other in self.tuned.module.named_modules() if other is module and name), None)
        return f" (it shows first in the output of {name})" if name else ""

    @contextmanager
    def _clean(self) -> Iterator[None]:
        """Inside, weights can be read, unperturbed, on any way."""
        self._poison(False)
        try:
            yield
        finally:
            self._poison(True)

    def _poison(self, on: bool) -> None:
        self._poisoned = on
        for number, outside in self._outside.items():
            original = self._originals[number]
            data = original.new_full((), math.nan).expand(original.shape) if on else original
            self._by_id[number].parameter.data = data
            outside.point_to(data)

    def _lender(self, owned: list[tuple[str, TunedTensor]]) -> Callable[[nn.Module, Any], None]:
        def lend(module: nn.Module, args: Any) -> None:
            assert self.used is not None
            self._lent.append((module, {name: module._parameters[name] for name, _ in owned}, self._arena.mark()))
            for name, tensor in owned:
                self.used.add(tensor.id)
                if tensor.id not in self._whole:
                    module._parameters[name] = self._inside(tensor, name, module)  # type: ignore[assignment]

        return lend

    def _take_back(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._seen is not None:
            self._seen.append((module, _has_nan(output)))
        # A module that a nested exception left behind is returned together with the one that encloses it.
        while any(lender is module for lender, _, _ in self._lent):
            if self._return_last() is module:
                return

    def _return_last(self) -> nn.Module:
        module, parameters, mark = self._lent.pop()
        module._parameters.update(parameters)
        self._arena.release(mark, poison=self._seen is not None and self._poisoned)
        torch.clear_autocast_cache()  # of casts of scratch memory, which would add up to the whole model
        return module

    def _inside(self, tensor: TunedTensor, name: str, module: nn.Module) -> Tensor:
        """The weight as its owner sees it while it runs."""
        original = self._originals[tensor.id]
        if self._point is None:
            return as_parameter(original, tensor)
        if name == "weight" and is_table(module):
            return self._table(tensor, functools.cache(lambda: self._perturbed(tensor)))
        return self._perturbed(tensor)

    def _perturbed(self, tensor: TunedTensor) -> Tensor:
        assert self._point is not None
        source = self._originals[tensor.id]
        if tensor.id in self._ahead:
            return as_parameter(self._ahead[tensor.id], tensor)
        out = self._arena.take(source)
        self.noise.perturb(out, source, tensor=tensor.id, **self._point)
        return as_parameter(out, tensor)

    def _seen_from_outside(self, tensor: TunedTensor) -> LazyWeight:
        """The weight as others see it: perturbed where it is read."""

        def whole() -> Tensor:
            original = self._originals[tensor.id]
            if tensor.id not in self._strays:
                with torch.inference_mode(False):  # it outlives the evaluation
                    self._strays[tensor.id] = torch.empty_like(original)
                if self._point is not None:
                    self.noise.perturb(self._strays[tensor.id], original, tensor=tensor.id, **self._point)
            return as_parameter(original if self._point is None else self._strays[tensor.id], tensor)

        if tensor.id in self._tables:
            return self._table(tensor, whole)
        return LazyWeight.wrap(self._originals[tensor.id], whole, lambda: self._note_use(tensor))

    def _note_use(self, tensor: TunedTensor) -> None:
        assert self.used is not None
        self.used.add(tensor.id)

    def _table(self, tensor: TunedTensor, whole: Callable[[], Tensor]) -> LazyWeight:
        """The weight of an embedding or a vocabulary head, of which only what is needed is computed."""
        source = as_parameter(self._originals[tensor.id], tensor)

        def rows(numbers: Tensor) -> Tensor | None:
            if self._point is None:
                return None
            return self.noise.perturb_rows(source, numbers, tensor=tensor.id, **self._point)

        def project(x: Tensor, bias: Tensor | None) -> Tensor | None:
            if self._point is None or not self.slices.may_slice(tensor, source, x, bias):
                return None
            mark, poison = self._arena.mark(), self._seen is not None and self._poisoned
            return project_in_slices(
                x,
                source,
                bias,
                self.slices.rows(source),
                perturbed_slice,
                lambda: self._arena.release(mark, poison=poison),
            )

        def perturbed_slice(lo: int, hi: int) -> Tensor:
            assert self._point is not None
            out = self._arena.take(source[lo:hi])
            self.noise.perturb(
                out, source[lo:hi], tensor=tensor.id, start=lo * source.shape[1], shape=source.shape, **self._point
            )
            return as_parameter(out, tensor)

        return LazyWeight.wrap(source, whole, lambda: self._note_use(tensor), rows, project)


_ELSEWHERE = "the model reads a tuned weight on a way that perturbation='scratch' cannot see"


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _has_nan(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(output.is_floating_point() and output.isnan().any())
    if isinstance(output, dict):
        output = list(output.values())
    return any(map(_has_nan, output)) if isinstance(output, (list, tuple)) else False
