"""Perturbed copies of a module's weights, made just before it runs."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..method.estimators import Losses, Query
from ..method.unread import Used
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor
from ..storage import RESIDENT
from .arena import Arena
from .experts import ExpertSlices, ExpertWeight, of_experts
from .head import Slices, as_parameter, is_table, project_in_slices
from .hooks import Hooks
from .lazy import LazyWeight
from .leaks import Leaks, among, storage_of
from .perturbation import Closure, Perturbation, ReadElsewhereError, as_loss, without_compilation
from .windows import Windows


class Scratch(Perturbation):
    """Every module that owns tuned weights computes on a perturbed copy of them, made just before it runs.

    The weights are only read. Hooks exist inside the block alone. A module is lent its scratch copy from the moment that
    it is called until it returns. An embedding computes only the rows that it looks up, and a vocabulary head that is asked
    for few positions works through its rows in slices, where that gives the same bits. Of the experts that are kept in one tensor those are perturbed that tokens are routed to.

    A weight that another module reads as an attribute of its owner (``self.conv.weight``) is perturbed as a whole when that
    happens, and kept in a second tensor from the next block on. What is read on any other way, as from a list of parameters made at
    construction, cannot be seen: inside the block every tuned parameter therefore holds NaN (one element, expanded), which the loss then
    shows. ``losses`` raises :class:`ReadElsewhereError` if that happens, and :meth:`check` finds it for losses that hide a NaN. The error
    says which tensors, as far as operations show it; :meth:`copy_whole` lets them be perturbed as a whole, too.
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
        self._experts = {id(module): of_experts(module, dict(owned)) for module, owned in self._owners}
        owners = {id(module) for module, _ in self._owners}
        self._around = {
            id(module)
            for module, _ in self._owners
            if any(id(m) in owners for m in module.modules() if m is not module)
        }
        self._tables = {t.id for module, owned in self._owners if is_table(module) for k, t in owned if k == "weight"}
        # A slice of a vocabulary head takes no more scratch memory than the largest other module does.
        self.slices = Slices(
            max(
                (sum(t.parameter.nbytes for _, t in owned) for module, owned in self._owners if not is_table(module)),
                default=0,
            )
        )
        self._by_id = {tensor.id: tensor for tensor in tuned}
        self._arena = Arena()
        self._hooks = Hooks()  # made at the first block: before it this can be copied
        self._lent: list[tuple[nn.Module, dict[str, Any], Any]] = []
        self._point: dict[str, Any] | None = None  # step, probe and scale; None: theta itself
        # Values where they live; what stands for them where the model computes; and what each parameter pointed to.
        self._originals: dict[int, Tensor] = {}
        self._outlines: dict[int, Tensor] = {}
        self._pointed: dict[int, Tensor] = {}
        self._outside: dict[int, LazyWeight] = {}
        self._stand_ins: dict[int, LazyWeight] = {}  # those of all blocks
        # Tensors that are read outside their owners: those seen in this block, and those perturbed as a whole since an earlier one.
        self._strays: dict[int, Tensor] = {}
        self._whole: dict[int, Tensor] = {}
        self._windows = Windows(noise, self._arena)
        self._read_past: set[int] = set()  # what is read on ways that are not seen
        self._poisons: dict[int, Tensor] = {}  # what stands for a tensor, by id
        self._poison_of: dict[int, int] = {}  # address of the NaN that stands for a tensor -> its id
        self._lent_at: dict[int, int] = {}  # address in scratch memory -> id of the tensor that lay there last
        self._seen: list[tuple[nn.Module, bool]] | None = None
        self._eager: AbstractContextManager[Any] = nullcontext()

    @property
    def _me(self) -> Scratch:
        """For what is kept and calls this object: it does not keep it, which goes, with its memory, as soon as nobody wants it."""
        return weakref.proxy(self)

    def __enter__(self) -> Scratch:
        self._originals = {tensor.id: tensor.read() for tensor in self.tuned}
        self._outlines = {tensor.id: tensor.home.outline(self._originals[tensor.id]) for tensor in self.tuned}
        self._pointed = {tensor.id: tensor.parameter.data for tensor in self.tuned}
        self._whole = {i: w for i, w in self._whole.items() if _alike(w, self._outlines[i])}
        self._whole |= self._strays
        self._whole |= {i: torch.empty_like(self._outlines[i]) for i in self._read_past - self._whole.keys()}
        self._strays = {}
        self._windows.enter(self._originals, self.tuned)
        self.used = Used(self._whole)  # who reads these is not seen
        try:
            for tensor in self.tuned:
                if tensor.id not in self._whole:
                    self._outside[tensor.id] = self._seen_from_outside(tensor)
            for module, owned in self._owners:
                for name, tensor in owned:
                    if tensor.id in self._outside:
                        module._parameters[name] = self._outside[tensor.id]  # type: ignore[assignment]
            if not self._hooks:
                me = self._me
                for module, owned in self._owners:
                    self._hooks.add(module, self._lender(module, owned), lambda *returned: me._take_back(*returned))
            self._hooks.enter()
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
            tensor, original = self._by_id[number], self._originals[number]
            here = tensor.home.visit(original, shadow)
            if self._point is not None:
                self.noise.perturb(shadow, here, tensor=number, **self._point)
            tensor.parameter.data = here if self._point is None else shadow
        self._windows.begin(self._originals)

    def __exit__(self, *exception: object) -> None:
        self._eager.__exit__(None, None, None)
        self._eager = nullcontext()
        self._hooks.leave()
        # torch runs no hook after KeyboardInterrupt and its like: whatever is still lent comes back here.
        while self._lent:
            self._return_last()
        self._windows.leave()
        for module, owned in self._owners:
            for name, tensor in owned:
                module._parameters[name] = tensor.parameter
        for tensor in self.tuned:
            tensor.parameter.data = self._pointed[tensor.id]
        for stand_in in self._outside.values():
            stand_in.rest()
        self._outside, self._originals, self._outlines, self._pointed, self._point = {}, {}, {}, {}, None
        self._poison_of, self._lent_at = {}, {}
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
                    raise ReadElsewhereError(_ELSEWHERE, self._leaks(closure, None))
        return losses

    @property
    def copied(self) -> frozenset[int]:
        """Ids of the tensors that were perturbed as a whole so far, in memory of their own, as they are read outside their owners."""
        return frozenset(self._whole.keys() | self._strays.keys() | self._read_past)

    @property
    def nbytes(self) -> int:
        """Memory that is kept for perturbed weights."""
        return self._arena.nbytes + sum(t.nbytes for t in (self._whole | self._strays).values())

    def copy_whole(self, tensors: Iterable[int]) -> None:
        """From the next block on these tensors, by id, can be read on any way: a perturbed copy is in their place."""
        self._read_past.update(tensors)

    def _leaks(self, closure: Closure, clean: list[tuple[nn.Module, bool]] | None) -> frozenset[int]:
        """Ids of the tensors that the closure reads past its perturbed copies: as operations show, or by trials.

        Args:
            clean: which outputs have a NaN by themselves; None: the loss alone is looked at.
        """
        with Leaks(self._whose_place) as leaks:
            try:
                closure()
            except Exception:
                pass  # NaN in the place of a weight may lead anywhere; what was read until then counts
        if leaks.found:
            return frozenset(leaks.found)

        def is_bad(numbers: Sequence[int]) -> bool:
            self._poison(False)
            self._poison_places(numbers)
            self._seen = None if clean is None else []
            try:
                return math.isnan(float(as_loss(closure()))) or any(
                    bad and not was for (_, bad), (_, was) in zip(self._seen or (), clean or (), strict=False)
                )
            except Exception:
                return True
            finally:
                self._seen = None

        found = among(sorted(self._outside), is_bad)
        self._poison(True)
        return found

    def _whose_place(self, value: Tensor) -> int | None:
        place = storage_of(value)
        if place in self._poison_of:
            return self._poison_of[place]
        if place is None or not self._arena.is_given_back(value):
            return None
        address = value.data_ptr()
        return self._lent_at.get(max((at for at in self._lent_at if at <= address), default=0))

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
                    self._seen = None
                    raise ReadElsewhereError(
                        _ELSEWHERE + self._named(first), self._leaks(closure, clean_seen)
                    ) from raised
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
        self._poison_of = {}
        for number in self._outside:
            self._let_find(number, self._originals[number])
        if on:
            self._poison_places(self._outside)

    def _poison_places(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            outline, poison = self._outlines[number], self._poisons.get(number)
            if poison is None or not _alike(poison, outline):
                poison = self._poisons[number] = outline.new_full((), math.nan).expand(outline.shape)
            self._poison_of[poison.untyped_storage().data_ptr()] = number
            self._let_find(number, poison)

    def _let_find(self, number: int, data: Tensor) -> None:
        """Whoever looks for the tensor past the hooks finds this."""
        self._by_id[number].parameter.data = data
        self._outside[number].point_to(data)

    def _lender(self, module: nn.Module, owned: list[tuple[str, TunedTensor]]) -> Callable[[nn.Module, Any], None]:
        me, single = self._me, self._experts.get(id(module), ())

        def may_share() -> list[TunedTensor]:
            """Those of the module's weights that can be perturbed together with others': what is computed in part cannot, nor what others run inside
            of."""
            if id(module) in me._around:
                return []
            found = [t for k, t in owned if k not in single and not (k == "weight" and is_table(module))]
            found = [t for t in found if t.home is RESIDENT and t.id not in me._whole]
            return [t for t in found if me.noise.launches_together(me._originals[t.id])]

        def lend(module: nn.Module, args: Any) -> None:
            if me._point is not None and me._seen is None:
                running = len(me._lent)
                me._windows.turn_to(module, running, may_share, me._originals, me._outlines, me._point)
            me._lent.append((module, {name: module._parameters[name] for name, _ in owned}, me._arena.mark()))
            for name, tensor in owned:
                if tensor.id not in me._whole:
                    module._parameters[name] = me._inside(tensor, name, module)  # type: ignore[assignment]

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
        self._windows.returned(len(self._lent))
        module._parameters.update(parameters)
        self._arena.release(mark, poison=self._seen is not None and self._poisoned)
        torch.clear_autocast_cache()  # of casts of scratch memory, which would add up to the whole model
        return module

    def _inside(self, tensor: TunedTensor, name: str, module: nn.Module) -> Tensor:
        """The weight as its owner sees it while it runs."""
        if name == "weight" and is_table(module):
            return self._table(tensor, functools.cache(lambda: self._perturbed(tensor)))
        if name in self._experts.get(id(module), ()):
            return self._of_experts(tensor)
        self._note_use(tensor)
        return self._perturbed(tensor)

    def _perturbed(self, tensor: TunedTensor) -> Tensor:
        source = self._originals[tensor.id]
        if self._point is None or not self.noise.takes_part(tensor.id, self._point["step"]):
            return as_parameter(tensor.home.visit(source), tensor)
        if (ready := self._windows.value(tensor)) is not None:
            return ready
        out = self._arena.take(self._outlines[tensor.id])
        self._lent_at[out.data_ptr()] = tensor.id
        self.noise.perturb(out, tensor.home.visit(source, out), tensor=tensor.id, **self._point)
        return as_parameter(out, tensor)

    def _seen_from_outside(self, tensor: TunedTensor) -> LazyWeight:
        """The weight as others see it: perturbed where it is read."""
        outline, known = self._outlines[tensor.id], self._stand_ins.get(tensor.id)
        if known is None or not known.is_like(outline):
            with torch.inference_mode(False):  # it outlives the evaluation
                known = self._stand_ins[tensor.id] = self._stand_in(tensor)
        known.stand_for(as_parameter(outline, tensor))
        return known

    def _stand_in(self, tensor: TunedTensor) -> LazyWeight:
        me = self._me

        def whole() -> Tensor:
            original = me._originals[tensor.id]
            if tensor.id not in me._strays:
                with torch.inference_mode(False):  # it outlives the evaluation
                    stray = me._strays[tensor.id] = torch.empty_like(me._outlines[tensor.id])
                if me._point is not None:
                    me.noise.perturb(stray, tensor.home.visit(original, stray), tensor=tensor.id, **me._point)
            if me._point is None:
                return as_parameter(tensor.home.visit(original), tensor)
            return as_parameter(me._strays[tensor.id], tensor)

        if tensor.id in self._tables:
            return self._table(tensor, whole)
        outline = as_parameter(self._outlines[tensor.id], tensor)
        return LazyWeight.wrap(outline, whole, lambda: me._note_use(tensor))

    def _note_use(self, tensor: TunedTensor) -> None:
        assert isinstance(self.used, Used)
        self.used.read(tensor.id)

    def _note_rows(self, tensor: TunedTensor, numbers: Tensor) -> None:
        assert isinstance(self.used, Used)
        self.used.read_rows(tensor.id, numbers, tensor.parameter.shape[0])

    def _of_experts(self, tensor: TunedTensor) -> Tensor:
        """The weights of experts, as their owner sees them: of those that tokens are routed to."""
        source, outline = self._originals[tensor.id], self._outlines[tensor.id]
        plain = self._point is None or not self._poisoned  # where weights may be read on any way, all of them are there
        out = self._perturbed(tensor) if plain else as_parameter(self._arena.take(outline), tensor)

        def perturb(lo: int, hi: int) -> None:
            if not plain:
                assert self._point is not None
                start = lo * source[0].numel()
                piece = out.detach()[lo:hi]
                here = tensor.home.visit(source[lo:hi], piece)
                self.noise.perturb(piece, here, tensor=tensor.id, start=start, shape=source.shape, **self._point)

        slices = ExpertSlices(
            out, perturb, lambda: self._note_use(tensor), lambda numbers: self._note_rows(tensor, numbers)
        )
        weight = ExpertWeight.of(as_parameter(outline, tensor), slices)
        if not plain:  # nor does code find them that knows nothing of this class
            weight.point_to(outline.new_full((), math.nan).expand(source.shape))
            self._lent_at[out.data_ptr()] = tensor.id
        return weight

    def _table(self, tensor: TunedTensor, whole: Callable[[], Tensor]) -> LazyWeight:
        """The weight of an embedding or a vocabulary head, of which only what is needed is computed."""
        me = self._me

        def rows(numbers: Tensor) -> Tensor | None:
            if me._point is None:
                return None
            source = me._originals[tensor.id]
            found = me.noise.perturb_rows(source, numbers.to(source.device), tensor=tensor.id, **me._point)
            return found.to(numbers.device)

        def project(x: Tensor, bias: Tensor | None) -> Tensor | None:
            source, outline = me._originals[tensor.id], me._outlines[tensor.id]
            if me._point is None or not me.slices.may_slice(tensor, lambda: tensor.home.visit(source), x, bias):
                return None
            mark, poison = me._arena.mark(), me._seen is not None and me._poisoned
            return project_in_slices(
                x,
                outline,
                bias,
                me.slices.rows(outline),
                perturbed_slice,
                lambda: me._arena.release(mark, poison=poison),
            )

        def perturbed_slice(lo: int, hi: int) -> Tensor:
            assert me._point is not None
            source = me._originals[tensor.id]
            out = me._arena.take(me._outlines[tensor.id][lo:hi])
            here = tensor.home.visit(source[lo:hi], out)
            start = lo * source.shape[1]
            me.noise.perturb(out, here, tensor=tensor.id, start=start, shape=source.shape, **me._point)
            return as_parameter(out, tensor)

        return LazyWeight.wrap(
            as_parameter(self._outlines[tensor.id], tensor),
            whole,
            lambda: me._note_use(tensor),
            rows,
            project,
            lambda numbers: me._note_rows(tensor, numbers),
        )


_ELSEWHERE = "the model reads a tuned weight on a way that perturbation='scratch' cannot see"


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _has_nan(output: Any) -> bool:
    if isinstance(output, Tensor):
        return bool(output.is_floating_point() and output.isnan().any())
    if isinstance(output, dict):
        output = list(output.values())
    return any(map(_has_nan, output)) if isinstance(output, (list, tuple)) else False
