"""L6: fine-tuning by backpropagation with Adam, on the objective that MeZO lowers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ...errors import InputError
from ...strata import Stratified

Objective = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def adam_arguments(output_dir: str, **settings: Any) -> TrainingArguments:
    """``TrainingArguments`` as the MeZO paper fine-tunes: AdamW without weight decay, batch size 8, learning rate 1e-5.

    Nothing is saved, reported or cast; the weights compute in their own dtype. Gradients are clipped to norm 1, as
    Trainer does by default.

    Args:
        settings: further ones, or others in the place of these: ``max_steps`` (the paper's 5 epochs of 1,000 examples are
            625), ``learning_rate`` (it tries 1e-5, 5e-5 and 8e-5).

    Source: MeZO, appendix E (hyper-parameters of fine-tuning).
    """
    defaults: dict[str, Any] = {
        "learning_rate": 1e-5,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(output_dir, **{**defaults, **settings})


class AdamTrainer(Stratified, Trainer):
    """``transformers.Trainer`` that backpropagates an objective through the parameters that require grad.

    The model is in training mode, with dropout, as fine-tuning usually is. Takes what Trainer takes.

    Args:
        objective: ``(model, inputs) -> losses``, one per example or their mean, with a gradient. Without one the
            model's own loss is lowered.
        stratify: whether training examples are spread evenly by ``"label"`` (:class:`~forwardtune.StratifiedSampler`), or ``"none"``.

    Raises:
        InputError: nothing requires grad, float16 weights are to be tuned, or several GPUs are visible; from
            :meth:`train`, an objective without gradient.
    """

    def __init__(self, *args: Any, objective: Objective | None = None, stratify: str = "none", **kwargs: Any) -> None:
        self.objective, self.stratify = objective, stratify
        #: Objective on the last minibatch that was trained on, before its step.
        self.last_loss = math.nan
        super().__init__(*args, **kwargs)
        if objective is not None:
            self.loss_is_scaled_for_ga = False  # the objective is a mean over one microbatch
            self.model_accepts_loss_kwargs = False  # the same, for versions of Trainer without that attribute
        _require_tunable(self.model)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise InputError(
                "AdamTrainer runs in one process on one device: set CUDA_VISIBLE_DEVICES=0, or spread a large model with "
                "device_map='auto'"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean of the objective over the batch, or without an objective the model's own loss."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = self.objective(model, inputs)
        if torch.is_grad_enabled() and not (isinstance(losses, Tensor) and losses.requires_grad):
            raise InputError(
                "the objective has no gradient, so it cannot be backpropagated: tune with MeZO, which asks for none, or "
                "give a differentiable objective such as the loss of the right answer"
            )
        losses = torch.as_tensor(losses, dtype=torch.float32)
        if torch.is_grad_enabled():
            self.last_loss = float(losses.detach().mean())
        return (losses.mean(), {"losses": losses.reshape(-1)}) if return_outputs else losses.mean()


def _require_tunable(model: Any) -> None:
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not tuned:
        raise InputError(
            "no parameter of the model requires grad, so there is nothing to tune: call model.requires_grad_(True), or "
            "add an adapter"
        )
    if any(parameter.dtype == torch.float16 for parameter in tuned):
        raise InputError(
            "Adam cannot tune float16 weights: squared gradients and its eps of 1e-8 are 0 there, and steps become "
            "infinite. Load the model in float32 or bfloat16"
        )
