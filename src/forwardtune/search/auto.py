"""L0: ``"auto"`` in place of a number (:mod:`forwardtune.search.rates`): how much it may cost, and where it begins."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import AUTO as AUTO
from ..config import number_or_auto as number_or_auto

#: Share of a run's forward passes that finding learning rate and eps may take.
SHARE = 0.15
#: Held-out measurements in a run that finds its learning rate.
MEASUREMENTS = 20
# Learning rate and eps of the paper by the names of what is tuned, and for everything else (MeZO, appendix E.3).
_FIRST, _FIRST_ELSE = {"lora_": (1e-4, 1e-2), "prompt_encoder": (1e-2, 1e-1)}, (1e-6, 1e-3)


def first_settings(names: Sequence[str]) -> tuple[float, float]:
    """Learning rate and eps to begin with, by what is tuned: the paper's (MeZO, appendix E.3)."""
    return next((found for part, found in _FIRST.items() if any(part in name for name in names)), _FIRST_ELSE)
