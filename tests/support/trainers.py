"""Trainers of tiny models that say nothing, and the kill that ends their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from forwardtune import MeZOConfig

QUIET = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}


class KilledError(Exception):
    """Stands for anything that ends a run between two steps."""


class Kill(TrainerCallback):
    """Ends the run after so many steps: right when the last was logged, or when the next one begins."""

    def __init__(self, after: int, *, at_begin: bool = False) -> None:
        self.after, self.at_begin = after, at_begin

    def _kill(self, state: Any, begins: bool) -> None:
        if state.global_step == self.after and self.at_begin is begins:
            raise KilledError

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._kill(state, True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._kill(state, False)


def quiet_config(folder: Path, **changes: Any) -> MeZOConfig:
    """Batches of four, on the CPU; nothing is shown, reported or saved."""
    return MeZOConfig(**{"output_dir": str(folder), **QUIET, "per_device_train_batch_size": 4, "seed": 3, **changes})
