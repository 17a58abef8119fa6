"""Weights that take no part: said once, as a run would go on without them and say nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import warn
from ..method.record import StepRecord
from ..parameters import TunedParameters

# After so many steps from the start in which nothing changed the loss, that is said.
_FLAT = 10
# Names in a message.
_SHOWN = 4


class IdleWatch:
    """Looks at every step from the first on."""

    def __init__(self) -> None:
        self._flat: int | None = 0  # steps so far, all of them flat; None: nothing more to be said
        self._named: frozenset[int] = frozenset()  # those without a side path, once that was said

    def look(
        self, record: StepRecord, tuned: TunedParameters, was_used: bool, left_out: frozenset[int] = frozenset()
    ) -> None:
        """Warn of tensors that no evaluation of the first step went through; and when no step has changed the loss so far, at once where
        no evaluation read a tuned tensor.

        Args:
            record: the step.
            was_used: an evaluation read a tuned tensor.
            left_out: ids of the tensors that have no side path; those that were not named yet are.
        """
        if new := left_out - self._named:
            self._named = left_out
            warn(
                f"{len(new)} of {len(tuned)} tuned tensors have no side path in this model ({summary(tuned, sorted(new))}): steps leave "
                "them as they are. Directions that the minibatch shares, the default, would move them too",
            )
        idle = [number for number in record.unused if number not in left_out]
        if record.step == 0 and idle:
            warn(
                f"{len(idle)} of {len(tuned)} tuned tensors took no part in the first step "
                f"({summary(tuned, idle)}): a step moves only what its evaluations went through. Set "
                "requires_grad=False on what is not meant to be tuned",
            )
        if self._flat is None or record.skipped:
            return
        self._flat = self._flat + 1 if record.flat else None
        if self._flat == _FLAT or (self._flat == 1 and not was_used):
            seen = "" if was_used else ", and no evaluation read one of them"
            warn(
                f"the tuned weights have not changed the loss so far ({self._flat} steps, every coefficient is 0{seen}): check that "
                "the closure runs this model and that an adapter is not merged; objectives that are steps, such as accuracy, want "
                "larger minibatches or a larger eps",
            )


def summary(tuned: TunedParameters, ids: Sequence[int]) -> str:
    """The largest modules that hold nothing else of what is tuned, the first few by name."""
    among, others = {tuned[i].name for i in ids}, {t.name for t in tuned} - {tuned[i].name for i in ids}
    taken = {prefix for name in others for prefix in _prefixes(name)}
    tops = dict.fromkeys(next((p for p in _prefixes(name) if p not in taken), name) for name in sorted(among))
    shown = list(tops)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(tops) - len(shown)} more" if len(tops) > len(shown) else "")


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
