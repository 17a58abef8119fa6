"""Fine-tune language models with forward passes only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import NonFiniteLossError as NonFiniteLossError
    from .hf.config import MeZOConfig
    from .hf.trainer import MeZOTrainer
    from .method.record import StepRecord as StepRecord
    from .optimizer import MeZO
    from .search.auto_lr import AutoLR as AutoLR
    from .strata import StratifiedSampler as StratifiedSampler
    from .trajectory import StepLog
    from .trajectory.replay import replay

__version__ = "0.1.0"
__all__ = [
    "MeZO",
    "MeZOConfig",
    "MeZOTrainer",
    "StepLog",
    "replay",
]  # what most need; the others below can be imported, too

# Each name is imported when it is first asked for: `forwardtune --help` needs no torch, MeZO no transformers.
_HOMES = {
    "AutoLR": ".search.auto_lr",
    "MeZO": ".optimizer",
    "MeZOConfig": ".hf.config",
    "MeZOTrainer": ".hf.trainer",
    "NonFiniteLossError": ".errors",
    "StepLog": ".trajectory",
    "StepRecord": ".method.record",
    "StratifiedSampler": ".strata",
    "replay": ".trajectory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__file__", "__name__", "__path__", "__version__"]
