"""Lazy folding: the steps between two refreshes of V wait, and are added to the weights at once.

While V stays, what steps add to a matrix of low rank is one sum, ``sum_k P_k V_k^T`` with ``P_k = sum_t sizes_t[k] U_tk / sqrt(r)``. So a step need
not sweep the weights: the side path adds P's part to what layers give, and the sum is folded into the weights when V is drawn anew, or
earlier where somebody reads them. What waits is a list of updates, a few numbers a step: P is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import nn

from ..errors import InputError, nearest
from ..names import FOLDS
from ..noise import LowRank, Noise, Update
from ..parameters import TunedParameters
from ..storage import Offloaded
from .rule import History, Rule, move_all
from .rules import SGD


@dataclass
class Pending:
    """The steps of a run that are not in the weights yet.

    Attributes:
        steps: since the last fold, an update for every parameter group each.
        taken: steps of the run so far.
        at: after how many steps the weights were folded at another time than a refresh, ascending.
        recorders: called with the number of steps before such a fold.
    """

    rule: Rule
    noise: Noise
    tuned: TunedParameters
    when_read: Callable[[], object]
    steps: list[Sequence[Update]] = field(default_factory=list)
    taken: int = 0
    at: list[int] = field(default_factory=list)
    recorders: list[Callable[[int], None]] = field(default_factory=list)
    _watch: Watch | None = None
    _is_aside: bool = False

    def __post_init__(self) -> None:
        waiting = [tensor for tensor in self.tuned if self.noise.waits(tensor.parameter.shape)]
        others = [tensor for tensor in self.tuned if not self.noise.waits(tensor.parameter.shape)]
        self._waiting = TunedParameters(waiting, self.tuned.module)
        self._others = TunedParameters(others, self.tuned.module)

    @property
    def structure(self) -> LowRank:
        """Of the directions; V is drawn anew every ``refresh`` steps."""
        assert self.noise.structure is not None
        return self.noise.structure

    @property
    def is_behind(self) -> bool:
        """Whether the weights lag behind the steps, for whoever reads them now."""
        return bool(self.steps) and not self._is_aside

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, nobody reads the weights."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    def take(self, step: int, updates: Sequence[Update]) -> int:
        """Take one step, of no updates if it was skipped. Returns how many stored values did not change."""
        unchanged = self.tuned.numel
        if updates:
            moved = move_all(self.rule, self.noise, self._others, [[update] for update in updates], History())
            unchanged = moved + self._waiting.numel
            self.steps.append(updates)
            if self._watch is None and self.tuned.module is not None:
                self._watch = Watch(self.tuned.module, self._waiting, self.when_read)
        self.taken = step + 1
        if self.steps and self.taken % self.structure.refresh == 0:
            unchanged += self._fold() - self._waiting.numel
        return unchanged

    def fold(self) -> None:
        """Add what waits to the weights, before V is drawn anew. Recorders are told before that."""
        for recorder in self.recorders:
            recorder(self.taken)
        self.at.append(self.taken)
        self._fold()

    def _fold(self) -> int:
        groups = [list(group) for group in zip(*self.steps, strict=True)]
        unchanged = move_all(self.rule, self.noise, self._waiting, groups, History(), folded_at=())
        self.forget()
        return unchanged

    def forget(self) -> None:
        """Nothing waits any more."""
        self.steps = []
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def go_on(self, steps: int, at: Sequence[int]) -> None:
        """The weights are those after so many steps of a run, folded."""
        self.taken, self.at = steps, list(at)
        self.forget()


def pending_of(
    fold: str, rule: Rule, noise: Noise, tuned: TunedParameters, when_read: Callable[[], object], *, may_wait: bool
) -> Pending | None:
    """What waits in a run that folds its weights at refreshes; None where every step moves them.

    Args:
        when_read: called before somebody reads weights that lag behind.
        may_wait: whether the run, on its side, adds what waits to what layers give.

    Raises:
        InputError: an unknown ``fold``, or one that cannot be.
    """
    if fold not in FOLDS:
        raise InputError(f"unknown fold {fold!r}{nearest(str(fold), FOLDS)}: choose {' or '.join(FOLDS)}", "fold")
    if fold == "step":
        return None
    stays = noise.structure is not None and noise.structure.refresh > 1 and noise.emphasis is None
    adds = isinstance(rule, SGD) and rule.moves_together
    if not (stays and adds and may_wait) or any(isinstance(tensor.home, Offloaded) for tensor in tuned):
        raise InputError(
            "fold='refresh' lets steps wait until V is drawn anew, while the side path adds them to what layers give: set refresh to 2 or more, and "
            "assignment='example' or perturbation='side_path', with the rule 'sgd', and leave weight_decay, active_layers, sparsity, modify, "
            "offloaded weights and several workers out; or use fold='step'",
            "fold",
        )
    return Pending(rule, noise, tuned, when_read)


class Watch:
    """Calls somebody before a module that owns one of these tensors computes, or gives its state: whoever asks for that reads them.

    A copy of the module calls nobody.
    """

    def __init__(self, module: nn.Module, tensors: TunedParameters, call: Callable[[], object]) -> None:
        self._call = call
        self.parameters = own = {id(tensor.parameter) for tensor in tensors}
        owners = [m for m in module.modules() if any(id(parameter) in own for parameter in m._parameters.values())]
        self._hooks = [m.register_forward_pre_hook(self) for m in owners]
        self._hooks += [m.register_state_dict_pre_hook(self) for m in dict.fromkeys([module, *owners])]
        _watches.add(self)

    def __call__(self, *arguments: Any) -> None:
        self._call()

    def __reduce__(self) -> Any:
        return _Nobody, ()

    def remove(self) -> None:
        """Watch no more."""
        _watches.discard(self)
        for hook in self._hooks:
            hook.remove()


_watches: WeakSet[Watch] = WeakSet()


def about_to_read(tensors: TunedParameters) -> None:
    """Have steps that wait added before these weights are read on another way: to perturb them, say, for another optimizer."""
    for watch in list(_watches):
        if any(id(tensor.parameter) in watch.parameters for tensor in tensors):
            watch()


class _Nobody:
    def __call__(self, *arguments: Any) -> None:
        return None
