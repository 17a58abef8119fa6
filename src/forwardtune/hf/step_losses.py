"""L6: the losses of a step of :class:`~forwardtune.hf.trainer.MeZOTrainer`, of each microbatch and its parts, as the optimizer asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..workers import Parts
from .example_losses import ExampleLosses
from .sharing import SIZES, digest_of, parts_of

Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


class StepLosses:
    """What a step is estimated from, and what the objective is told of it.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer` whose steps they are.
        objective: in the place of the model's own loss.
    """

    def __init__(self, trainer: Any, objective: Objective | None) -> None:
        self._trainer, self.objective = trainer, objective
        self._of_model = ExampleLosses()
        self._microbatch = 0
        self._in_step = False  # while a step is estimated; a trial of threads is no part of it
        self._told: tuple[int, int] | None = None  # the step and part that the objective was told of last

    def tell(self, method: str, *arguments: Any) -> Any:
        """Call a method of the objective, if it has it."""
        return getattr(self.objective, method, lambda *arguments: None)(*arguments)

    def estimate(self, parts: Parts) -> float:
        """Have the optimizer estimate a step, or a microbatch of it. Returns the mean loss."""
        try:
            self._in_step, self._told = True, None
            return float(self._trainer.mezo.estimate(parts))
        finally:
            self.tell("end_step")
            self._in_step = False

    def parts(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None) -> Parts:
        """The next microbatch as the optimizer takes it."""
        trainer, mezo = self._trainer, self._trainer.mezo
        self._microbatch = self._microbatch + 1 if mezo.gathering else 0
        parts, per_example, step = parts_of(inputs), mezo.estimator.per_example, mezo.next_step
        sizes = list(inputs[SIZES]) if len(parts) > 1 else None
        scaled = self._scaled_for_accumulation(num_items_in_batch)
        share = 1 if scaled else trainer.current_gradient_accumulation_steps

        def closure_of(number: int, part: Any) -> Callable[[], Tensor]:
            # A loss that is a mean over its examples counts as they do; one over all of the batch's items is a share already.
            weight = 1.0 if scaled or sizes is None else sizes[number] / sum(sizes)

            def closure() -> Tensor:
                # All evaluations of a part draw the same random numbers.
                here = (step, self._microbatch * mezo.parts + number)
                if self._in_step and here != self._told:
                    self.tell("begin_step", *here)
                    self._told = here
                with trainer.compute_loss_context_manager():
                    if per_example:
                        loss = self._of_examples(model, part)
                    else:
                        loss = trainer.compute_loss(model, dict(part), num_items_in_batch=num_items_in_batch) / share
                        loss = loss if weight == 1.0 else loss * weight
                if mezo.checking:  # evaluations of the first step's self-check are no part of the step
                    self.tell("take_statistics")
                return loss

            return closure

        digest = digest_of(inputs) if trainer.workers.count > 1 else b""
        return Parts([closure_of(number, part) for number, part in enumerate(parts)], sizes, digest)

    def _of_examples(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """The losses of the batch's examples, shape (batch,): the objective's, or :class:`~.example_losses.ExampleLosses`."""
        if self.objective is None:
            return self._of_model(model, inputs, model(**inputs))
        losses = torch.as_tensor(self.objective(model, inputs), dtype=torch.float32)
        if losses.ndim != 1:
            raise InputError(
                f"assignment='example' needs a loss for every example, and the objective returned shape {tuple(losses.shape)}: return the "
                "losses, shape (batch,), or use assignment='shared'"
            )
        return losses

    def _scaled_for_accumulation(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the loss is already a share of the whole accumulated batch, by Trainer's own rule."""
        if self.objective is not None:
            return False
        by_model = self._trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        stated = getattr(self._trainer, "loss_is_scaled_for_ga", None)
        return bool(by_model or self._trainer.compute_loss_func is not None if stated is None else stated)
