"""A side path: the weights stay as they are, and what a direction would add to a layer's output is added there.

For a linear layer ``y = x W^T`` and a direction ``Z_b = U_b V_b^T / sqrt(r)`` of example b, at scale s the rows of that example get

    y_b += (x_b V_b) (s U_b / sqrt(r))^T

So two forward passes of a minibatch test as many directions as it has examples, and no weight is perturbed. Source: low-rank directions of
LOZO (Chen et al., 2024) and EGGROLL (Sarkar et al., 2025); one for each example as in the low-rank perturbations of the latter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..method.estimators import Losses, Query
from ..method.unread import Used
from ..noise import Noise
from ..parameters import TunedParameters, TunedTensor
from . import side_experts
from .experts import of_experts
from .owners import Groups, Owners, declared, selected
from .perturbation import (
    Closure,
    Perturbation,
    ReadElsewhereError,
    as_loss,
    as_losses,
    grouped,
    read,
    without_compilation,
)
from .point_directions import PointDirections
from .scratch import Scratch
from .side_weight import SideWeight

# The first step compares with perturbed weights at so many times eps, where rounding in half precision matters less. At the others it
# looks again where they differ: by rounding alone an accuracy, or what a model writes, may turn over at one point, not at all of them.
_FURTHER = (8.0, -8.0, 4.0)
# So much may the two differ, as a share of what the perturbation does to the loss and of the loss.
TOLERANCE = {torch.float64: (1e-6, 1e-9), torch.float32: (5e-2, 1e-5)}
ROUGH = (0.5, 3e-2)


def tolerance(used: Sequence[Tensor], module: nn.Module | None) -> tuple[float, float]:
    """How far the two may be apart: by the coarsest dtype of what was perturbed and of what else the model computes with, as a float32 adapter
    adds to activations in half precision."""
    beside = [] if module is None else [p for p in module.parameters() if p.is_floating_point()]
    return max((TOLERANCE.get(p.dtype, ROUGH) for p in (*used, *beside)), default=ROUGH)


class SidePathError(InputError, ReadElsewhereError):
    """The losses are not those of perturbed weights: the model mixes its examples, or reads weights past the side path."""


class SidePath(Perturbation):
    """The layers compute with the weights that they have, and each adds what the direction would add to its output.

    In the place of every tuned tensor its owner has a stand-in (:class:`~forwardtune.points.side_weight.SideWeight`) that knows the
    operations which are linear in it: projections, look-ups, and the scales and shifts of normalisations. A tensor that the model uses in any
    other way has no side path; it is left out of the estimate, and so of the step, and named.

    Which rows of an activation belong to which example is told by :mod:`forwardtune.points.owners`; by default the first dimension of the
    model's input counts the examples.

    Attributes:
        left_out: ids of the tensors that have no side path.
        experts: ids of those that hold a slice for every expert.
    """

    name = "side_path"

    def __init__(self, tuned: TunedParameters, noise: Noise) -> None:
        super().__init__(tuned, noise)
        if tuned.module is None:
            raise InputError(
                "a side path, on which every example has its direction, needs the module: pass MeZO(module, ...) or module=..."
            )
        self.left_out: set[int] = set()
        self.used: Used = Used()
        by_parameter = {id(tensor.parameter): tensor for tensor in tuned}
        self._places = [
            (module, name, by_parameter[id(parameter)])
            for module in tuned.module.modules()
            for name, parameter in module._parameters.items()
            if id(parameter) in by_parameter
        ]
        owned: dict[nn.Module, dict[str, TunedTensor]] = {}
        for module, name, tensor in self._places:
            owned.setdefault(module, {})[name] = tensor
        stacks = {module: of_experts(module, tensors) for module, tensors in owned.items()}
        self._routing = [module for module, names in stacks.items() if names]
        self.experts = {owned[module][name].id for module, names in stacks.items() for name in names}
        self._stand_ins: dict[tuple[nn.Module, str], SideWeight] = {}
        self._kinds: dict[int, str] = {}
        self._known: dict[
            Any, tuple[Owners, str, Groups | None]
        ] = {}  # by what an activation is like, at the present point
        self._alone = Groups(1)
        self.point = PointDirections(tuned, noise, self.left_out)
        self._owners: Owners | None = None  # of an input of which nothing was said
        self._examples: int | None = None  # of what the model worked on last
        self._passed: list[tuple[int, int]] = []  # rows and columns of the tensors that the module was called with
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._declared: tuple[int, ...] | None = None  # the shape of what examples_at said
        self._eager: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> SidePath:
        self.used = Used()
        self._eager = without_compilation()
        self._eager.__enter__()
        assert self.tuned.module is not None
        self._hooks.append(self.tuned.module.register_forward_pre_hook(self._look_at, with_kwargs=True))
        enter = functools.partial(side_experts.enter, self)
        for module in self._routing:
            self._hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(side_experts.leave))
        for module, name, tensor in self._places:
            if tensor.id not in self.left_out:
                stand_in = self._stand_ins.get((module, name))
                with torch.inference_mode(False):  # it outlives the evaluation
                    if stand_in is None or not stand_in.is_like(tensor.parameter):
                        stand_in = self._stand_ins[module, name] = SideWeight.wrap(self, tensor)
                    else:
                        stand_in.begin()
                module._parameters[name] = stand_in  # type: ignore[assignment]
        return self

    def __exit__(self, *exception: object) -> None:
        for module, name, tensor in self._places:
            module._parameters[name] = tensor.parameter
        for stand_in in self._stand_ins.values():
            stand_in.rest()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._eager.__exit__(None, None, None)
        self._owners = None
        self._known.clear()
        self.point.forget()
        torch.clear_autocast_cache()

    def shift(self, step: int, query: Query) -> None:
        self.point.go_to(step, query)
        self._owners, self._examples, self._passed = None, None, []
        self._known.clear()
        torch.clear_autocast_cache()

    def losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        while True:
            before = len(self.left_out)
            losses = super().losses(step, queries, closure)
            if len(self.left_out) == before:
                break
            if len(self.left_out) == len(self.tuned):
                unfit = f", or examples_at({self._declared}) does not fit its input" if self._declared else ""
                remedy, argument = self._remedy(queries[0])
                raise InputError(f"no tuned tensor has a side path in this model{unfit}: use {remedy}", argument)
        return losses

    def _losses(self, step: int, queries: Sequence[Query], closure: Closure) -> list[Losses]:
        values = [self._of_one(step, query, closure) for query in queries]
        return [read(value) for value in values]  # now: a GPU went from point to point without waiting

    def _of_one(self, step: int, query: Query, closure: Closure) -> Tensor | float:
        self.shift(step, query)
        if not query.per_example:
            return as_loss(closure())
        return grouped(self._counted(as_losses(closure())), query.group)

    def _counted(self, found: Tensor) -> Tensor:
        """What the closure returned, once it is known to be of as many examples as the model saw."""
        number, count = found.numel(), self._examples
        if count is not None and number != count:
            said = "examples_at says" if self._declared else "what a tuned weight meets first has"
            rows = "" if self._declared else " rows, which count as examples"
            raise TypeError(
                f"the closure returned the losses of {number} examples, and {said} {count}{rows}: return a loss for each, or say "
                "which row belongs to which with forwardtune.points.owners.examples_at"
            )
        return found

    @staticmethod
    def _remedy(query: Query) -> tuple[str, str]:
        """What does without a side path, and the argument in it."""
        return ("assignment='shared'", "assignment") if query.per_example else ("perturbation='auto'", "perturbation")

    def check(self, step: int, query: Query, closure: Closure) -> tuple[Losses, Losses | None]:
        losses, again = self.losses(step, [query, query], closure)
        if all(map(math.isfinite, losses)) and again == losses:  # else the closure itself differs from call to call
            self._compare(step, query, closure)
        return losses, again

    def _compare(self, step: int, query: Query, closure: Closure) -> None:
        """See that the losses of the first and the last example are the ones that their perturbed weights give.

        Both, as a model in which every example sees those before it moves the first one as it should.

        Raises:
            SidePathError: one is not.
        """
        (clean,) = self.losses(step, [query._replace(scale=0.0)], closure)
        wanted = sorted({0, len(clean) - 1})
        for factor in _FURTHER:
            wrong = self._differences(step, query._replace(scale=factor * query.scale), closure, clean, wanted)
            wanted = list(wrong)
            if not wrong:
                return
        b, (moved, expected) = next(iter(wrong.items()))
        remedy, argument = self._remedy(query)
        if math.isnan(expected) and math.isfinite(moved):  # scratch has NaN in the weights that nobody may read
            raise SidePathError(
                "a tuned weight is read on a way that the side path cannot see, such as a reference to it outside the modules: use "
                f"{remedy}",
                argument,
            )
        whose = f"the loss of example {b}" if query.per_example else "the loss"
        mixes = "mixes its examples, or " if query.per_example else ""
        raise SidePathError(
            f"the side path moves {whose} by {moved:.3g} where perturbed weights move it by {expected:.3g}: this model {mixes}uses a "
            f"weight in a way that has no side path. Use {remedy}",
            argument,
        )

    def _differences(
        self, step: int, query: Query, closure: Closure, clean: Losses, wanted: Sequence[int]
    ) -> dict[int, tuple[float, float]]:
        """Those of the wanted examples whose loss is not that of perturbed weights: what moves it here, and what would there."""
        (side,) = self.losses(step, [query], closure)
        used = TunedParameters([tensor for tensor in self.tuned if tensor.id in self.used], self.tuned.module)
        share, of_loss = tolerance([tensor.parameter for tensor in used], self.tuned.module)
        weights, wrong = Scratch(used, self.noise), {}
        for b in wanted:
            with weights:
                weights.shift(step, query._replace(probe=query.probe + b * query.stride, stride=0))
                scratch = read(grouped(as_losses(closure()), query.group) if query.per_example else as_loss(closure()))
            moved, expected = side[b] - clean[b], scratch[b] - clean[b]
            if not abs(moved - expected) <= share * max(abs(moved), abs(expected)) + of_loss * abs(clean[b]):
                wrong[b] = moved, expected
        return wrong

    # --- what the stand-ins ask ---------------------------------------------------------------------------------------------------

    def leave_out(self, tensor: TunedTensor) -> None:
        """From the next evaluation on the tensor is an ordinary one."""
        self.left_out.add(tensor.id)

    def _look_at(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        passed = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1]
        self._passed += [(value.shape[0], value.shape[1]) for value in passed]

    def _input(self) -> Owners | None:
        """The owners of the model's input; None before it was seen."""
        said = declared()
        if said is None:
            return self._owners
        self._declared = tuple(said.tokens.shape)
        return self._directions_of(said)

    def _directions_of(self, examples: Owners) -> Owners:
        """Which direction every place has, by which example it belongs to."""
        self._examples, owners = examples.count, examples.grouped(self.point.query.group)
        return owners if self.point.copies == 1 else owners.stacked(self.point.probes)

    def _present(self, lead: Sequence[int]) -> Owners | None:
        """The owners of what the model works on now; of these leading dimensions if it is the input. None: one vector is nobody's."""
        if not lead:
            return None
        owners = self._input()
        if owners is None:
            copies = self.point.copies * self.point.probes
            examples = _rows_are_examples(
                self._input_shape((lead[0] // copies, *lead[1:]) if lead[0] > 1 else tuple(lead))
            )
            owners = self._owners = self._directions_of(examples)
        positions = selected()
        return owners if positions is None else owners.at(positions)

    def _input_shape(self, lead: tuple[int, ...]) -> tuple[int, ...]:
        """The leading dimensions of the model's input, given those of what a tuned weight meets first."""
        if lead[0] == 1:  # perhaps what all rows have in common, as the positions of learned embeddings
            return max([1, *(rows for rows, _ in self._passed)]), *lead[1:]
        flattened = (shape for shape in self._passed if len(lead) == 1 and shape[0] * shape[1] == lead[0])
        return next(flattened, lead)

    def count(self) -> int | None:
        """The number of directions at the present point; None before the model's input was seen."""
        if not self.point.query.per_example:
            return 1
        owners = self._input()
        return None if owners is None else owners.count

    def height(self) -> int | None:
        """The number of rows of the model's input; None before it was seen."""
        owners = self._input()
        return None if owners is None else owners.tokens.shape[0]

    def groups(self, lead: Sequence[int], tensor: TunedTensor, device: torch.device) -> Groups | None:
        """The places of an activation with these leading dimensions by direction; None if they cannot be told.

        What meets a tensor has the same kind of places always. So a selection of tokens, as for one expert of many, is not taken for
        whole rows where it happens to have as many.
        """
        if not self.point.query.per_example:
            return self._alone
        key = lead, device, declared(), selected(), self.point.copies, self.point.probes
        known = self._known.get(key)
        if known is None:
            owners = self._present(lead)
            if owners is None:
                return None
            kind = "rows" if len(lead) > 1 else "pooled" if lead[0] == owners.tokens.shape[0] else "flat"
            known = self._known[key] = owners, "" if owners.tokens.shape[1] == 1 else kind, owners.groups(lead, device)
        owners, kind, groups = known
        if kind and self._kinds.setdefault(tensor.id, kind) != kind:
            return None
        return groups

    def sees(self, lead: Sequence[int]) -> bool:
        """Whether it is known which examples the model works on; activations with these leading dimensions tell it, if they are the input."""
        return not self.point.query.per_example or self._present(lead) is not None

    def blocks(self, y: Tensor) -> Tensor | None:
        """The rows of an activation by direction, shape (directions, rows, n), if they follow each other, as many for each."""
        if not self.point.query.per_example:
            return y.view(1, -1, y.shape[-1]) if y.is_contiguous() else None
        owners = self._present(y.shape[:-1])
        groups = None if owners is None else owners.groups(y.shape[:-1], y.device)
        return None if groups is None or not y.is_contiguous() else groups.blocks(y.view(-1, y.shape[-1]))

    def spread(self, vectors: Tensor, lead: Sequence[int]) -> Tensor | None:
        """For every place of such an activation the vector of its direction, of those in vectors, shape (directions, n), in a shape that
        broadcasts; None if it cannot be told."""
        if not self.point.query.per_example:
            return vectors.view(*(1,) * len(lead), -1)
        owners = self._present(lead)
        return None if owners is None else owners.spread(vectors, lead)

    def owner(self, lead: Sequence[int], device: torch.device) -> Tensor | None:
        """The direction of every place of such an activation, in a shape that broadcasts; None if it cannot be told."""
        if not self.point.query.per_example:
            return torch.zeros((1,) * len(lead), dtype=torch.int64, device=device)
        owners = self._present(lead)
        return None if owners is None else owners.of(lead, device)


@functools.lru_cache(maxsize=16)
def _rows_are_examples(lead: tuple[int, ...]) -> Owners:
    height, length = (*lead, 1)[:2]
    return Owners(torch.arange(height)[:, None].expand(height, length), height)
