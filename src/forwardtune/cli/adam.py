"""Backpropagation with Adam, on the same model, data, objective and measurements as MeZO."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..evaluation import training_objective
from ..trajectory import Log
from . import say
from .callbacks import Run, Trained, ingredients, reporting
from .session import Session
from .tuned import tuned_weights

_BEST = "best.pt"


def train_adam(session: Session, folder: Path, log: Log | None, settings: dict[str, Any]) -> Trained | None:
    """Run backpropagation with Adam, and leave the model at its best step; None when Ctrl-C stopped it."""
    from ..paper.baselines import AdamTrainer, adam_arguments

    options, best = session.options, folder / _BEST
    arguments = adam_arguments(
        str(folder),
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=options.batch_size,
        lr_scheduler_type=options.lr_scheduler,
        weight_decay=options.weight_decay,
        seed=options.seed,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        **reporting(options.report_to, options.steps),
    )
    trainer = AdamTrainer(
        args=arguments, stratify=session.stratify, **ingredients(session, training_objective(session.task))
    )
    steps = _AdamSteps(trainer)
    trainer.add_callback(steps)
    say(f"tuning for {options.steps} steps by backpropagation")
    run = Run(
        session,
        trainer,
        folder,
        last=lambda: steps.taken[-1],
        improved=lambda model: torch.save(tuned_weights(model), best),
    )
    try:
        run.train()
        if run.was_interrupted:
            say(f"stopped after step {trainer.state.global_step} of {options.steps}; nothing was saved")
            return None
        facts = run.facts(steps.taken)
        if facts.get("best_step", len(steps.taken)) < len(steps.taken):
            session.model.load_state_dict(torch.load(best, weights_only=True), strict=False)
    finally:
        best.unlink(missing_ok=True)
    session.model.eval()
    return Trained(facts, run.history(steps.taken))


@dataclass
class _AdamStep:
    """What a step gave, in the words of a :class:`~forwardtune.StepRecord`."""

    loss: float
    seconds: float
    flat: bool = False

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.loss)


class _AdamSteps(TrainerCallback):
    """Keeps what every step gave: there is no step log."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._began = trainer, 0.0
        self.taken: list[_AdamStep] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken.append(_AdamStep(self._trainer.last_loss, time.perf_counter() - self._began))
