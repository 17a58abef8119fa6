"""L0: the watch over a run's losses. It decides when to go back, and to what learning rate; others act on it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

#: By how much the learning rate rises after a held-out loss that is the best so far, and falls after one that is worse.
RISE, FALL = 1.5, 1.5
#: A loss that is worse by less than this share of the best one, and of what was gained so far, says that steps are small or go
#: nowhere yet: then the rate stays.
SLIGHT, SLIGHT_OF_GAIN = 0.02, 0.5
#: By how much it falls when a run diverges.
PLUNGE = 10**0.5
# So many losses of minibatches are averaged before they count.
_WINDOW = 8
# A mean so many standard errors above that of the untuned model is no accident: of a thousand runs of 500 normal losses
# around one mean, one or two go back. With 4 it would be about 25.
_ERRORS = 5.0
# Nor is it worth going back for less than this share of the untuned loss.
_SHARE = 0.1
# A given learning rate is too large when a loss of the first steps, before losses have a history, is so many times the first.
_EARLY, _EXPLODED = 8, 10.0


@dataclass(frozen=True)
class GoBack:
    """Go on from the weights after ``step`` steps, with this learning rate.

    Attributes:
        why: ``"diverged"`` or ``"worse"``.
    """

    step: int
    lr: float
    why: str


@dataclass
class Guard:
    """Watches losses of minibatches, which come with every step, and losses on held-out examples, which come rarely.

    A run has *diverged* when the mean of its last eight losses is above that of its first eight by five standard errors and
    a tenth, or when none of them was finite. The standard error is of all losses so far, but none counts as farther from the
    mean of the first eight than that is from zero, or than five of their deviations. The run goes back to its best point, and
    its learning rate is divided by the square root of ten.

    A held-out loss is compared with the best one. If it is lower, the learning rate is multiplied by 1.5. If it is higher, the
    steps since then were in vain: the run goes back to the best point. The learning rate is then divided by 1.5, but stays as
    it is if the loss was hardly higher (by at most 2%, and half of what was gained so far), as happens where a rate is too low.
    So it climbs while it is too low, comes down while it is too high, and follows the run. Equal losses, as of an
    objective with steps, change nothing. With ``patience`` the run goes on where a loss is hardly higher, and so many of them in a row
    lower the rate: steps that are long for what they gain wander, and a run that goes back each time stands still. The last measurement leads
    to the best point in any case. The rule was chosen by simulation and on real runs (``docs/log.md``).

    Its state follows from the losses that it was given, in order: a resumed run gives it the same again.

    Args:
        lr: the learning rate that the run has.
        best_step: where to go back to as long as no held-out loss is known.
        rise, fall: factors of the rate after a held-out loss that is the best so far, and after one that is worse.
        slight: factor of the rate, in place of ``1 / fall``, after one that is hardly worse.
        patience: the run goes on after a loss that is hardly worse, and the rate falls after so many in a row; None: it goes back.
    """

    lr: float
    best_step: int = 0
    best_loss: float = math.inf
    rise: float = RISE
    fall: float = FALL
    slight: float = 1.0
    patience: int | None = None
    _in_vain: int = 0
    _first_known: float = math.inf
    _first: list[float] = field(default_factory=list)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    # The variance of one loss, from neighbours: halved squares of their differences, which no trend can swell.
    _bounds: tuple[float, float] = (-math.inf, math.inf)
    _squares: float = 0.0
    _pairs: int = 0
    _before: float | None = None

    def stepped(self, loss: float) -> GoBack | None:
        """Take in the loss of a step's minibatch; not finite for one that was skipped."""
        if len(self._first) < _WINDOW and math.isfinite(loss):
            self._first.append(loss)
            self._recent.clear()  # losses that were not finite, and not eight in a row
            if len(self._first) == _WINDOW:
                self._count_first()
            return None
        self._count(loss)
        self._recent.append(loss)
        if len(self._recent) < _WINDOW or not self._is_beyond():
            return None
        return self._go_back("diverged", self.lr / PLUNGE)

    def known(self, step: int, loss: float) -> None:
        """Take in a loss on held-out examples from which nothing follows for the learning rate."""
        if self._first_known == math.inf:
            self._first_known = loss
        if loss < self.best_loss:
            self.best_step, self.best_loss = step, loss

    def measured(self, step: int, loss: float, *, is_last: bool = False) -> GoBack | None:
        """Take in the loss on held-out examples after a step; the learning rate changes."""
        if loss < self.best_loss:
            self._in_vain = 0
            self.known(step, loss)
            self.lr *= self.rise
        elif loss != self.best_loss:
            is_slight = self._is_slight(loss - self.best_loss)
            if not is_slight or is_last or self.patience is None:
                return self._go_back("worse", self.lr * self.slight if is_slight else self.lr / self.fall)
            self._in_vain += 1
            if self._in_vain == self.patience:
                self._in_vain, self.lr = 0, self.lr / self.fall
        return None

    def _is_slight(self, harm: float) -> bool:
        gained = self._first_known - self.best_loss
        return harm <= SLIGHT * abs(self.best_loss) and (gained <= 0 or harm <= SLIGHT_OF_GAIN * gained)

    def _count_first(self) -> None:
        for loss in self._first:
            self._count(loss)
        mean = self._first_mean
        far = max(abs(mean), _ERRORS * math.sqrt(self._squares / self._pairs))
        self._bounds = (mean - far, mean + far)

    def _count(self, loss: float) -> None:
        """Let a loss count for the variance, those of a diverging run as well.

        The first eight alone may say little of it: where losses have two levels, as of small minibatches with few classes, all
        may lie on the lower one. Those of an explosion cannot swell it, for beyond the bounds all count as the same.
        """
        if not math.isfinite(loss):
            return
        lowest, highest = self._bounds
        loss = min(max(loss, lowest), highest)
        if self._before is not None:
            self._squares += (loss - self._before) * (loss - self._before) / 2
            self._pairs += 1
        self._before = loss

    @property
    def _first_mean(self) -> float:
        return sum(self._first) / _WINDOW

    def _is_beyond(self) -> bool:
        finite = [loss for loss in self._recent if math.isfinite(loss)]
        if not finite:
            return bool(self._first)  # else the untuned model is no better
        mean = self._first_mean
        # The standard error of the difference of two means.
        error = math.sqrt(self._squares / self._pairs * (1 / _WINDOW + 1 / len(finite)))
        return sum(finite) / len(finite) > mean + max(_ERRORS * error, _SHARE * abs(mean))

    def _go_back(self, why: str, lr: float) -> GoBack:
        self.lr, self._in_vain = lr, 0
        self._recent.clear()
        self._before = None
        return GoBack(self.best_step, self.lr, why)


class GivenRate:
    """The watch over a learning rate that the user gave: it warns, once, when the run diverges."""

    def __init__(self, lr: float) -> None:
        self._guard: Guard | None = Guard(lr)
        self._first: float | None = None

    def stepped(self, step: int, loss: float) -> str | None:
        """A step was taken; the loss is not finite if it was skipped. Returns the warning."""
        if self._guard is None:
            return None
        if self._first is None and math.isfinite(loss):
            self._first = loss
        early = step <= _EARLY and self._first is not None and loss > _EXPLODED * max(1.0, abs(self._first))
        if self._guard.stepped(loss) is None and not early:
            return None
        self._guard = None
        return (
            f"the loss has left its range by step {step}: lower the learning rate, or let it be found (auto), which also goes "
            "back when that happens"
        )
