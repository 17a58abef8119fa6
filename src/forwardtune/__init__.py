"""Fine-tune language models with forward passes only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .optimizer import MeZO, NonFiniteLossError, StepRecord

if TYPE_CHECKING:
    from .hf.trainer import MeZOConfig, MeZOTrainer
    from .search.auto_lr import AutoLR
    from .trajectory import StepLog, replay

__version__ = "0.1.0"
__all__ = [
    "AutoLR",
    "MeZO",
    "MeZOConfig",
    "MeZOTrainer",
    "NonFiniteLossError",
    "StepLog",
    "StepRecord",
    "__version__",
    "replay",
]

# What needs more than torch is imported when it is first asked for.
_LAZY = {
    "AutoLR": ".search.auto_lr",
    "MeZOConfig": ".hf.trainer",
    "MeZOTrainer": ".hf.trainer",
    "StepLog": ".trajectory",
    "replay": ".trajectory",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
