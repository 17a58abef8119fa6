"""Trainers of tiny models that say nothing, and the kill that ends their runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from forwardtune import MeZOConfig


class KilledError(Exception):
    """Stands for anything that ends a run between two steps."""


class Kill(TrainerCallback):
    """Ends the run right after a step was logged, before anything is saved for it; or as the step after it begins."""

    def __init__(self, after: int, *, as_next_begins: bool = False) -> None:
        self.after = after
        setattr(self, "on_step_begin" if as_next_begins else "on_step_end", self.end)

    def end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.after:
            raise KilledError


def quiet_config(folder: Path, **changes: Any) -> MeZOConfig:
    """Batches of four, on the CPU; nothing is shown, reported or saved."""
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no", "use_cpu": True}
    return MeZOConfig(**{"output_dir": str(folder), **quiet, "per_device_train_batch_size": 4, "seed": 3, **changes})
