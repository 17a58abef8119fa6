"""The loss of every example from a Hugging Face model's logits, where its own loss is one number for the batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError

_IGNORED = -100


def example_losses(model: nn.Module, inputs: Mapping[str, Any], logits: Tensor | None) -> Tensor:
    """Cross-entropy of the labels, the mean over each example's own; shape (batch,).

    Labels of tokens (batch, length), those of causal models moved by one, or of examples (batch,). A label of -100 counts
    nowhere. The model's own loss is the mean over all tokens of the batch, in which long examples weigh more.

    Raises:
        InputError: there are no labels, or logits do not fit them.
    """
    labels = inputs.get("labels")
    if labels is None or logits is None or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
        raise InputError(
            "assignment='example' needs a loss for every example, and the model's logits and labels do not say one: pass "
            "MeZOTrainer(objective=...), a function of model and inputs that returns the losses, shape (batch,)"
        )
    if labels.ndim > 1 and _class_name(model) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=_IGNORED)
    counted = (labels != _IGNORED).reshape(len(labels), -1)
    return losses.view(counted.shape).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _class_name(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", None)  # of a peft adapter
    return type(base() if base is not None else model).__name__
