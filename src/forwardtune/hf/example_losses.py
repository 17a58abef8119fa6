"""The loss of every example from a Hugging Face model's logits, where its own loss is one number for the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..errors import InputError
from ..models.principal import IGNORED

# So far may the mean over the tokens be from the model's own loss, as a share: models in half precision may compute it in that.
_AGREES = {True: 1e-3, False: 3e-2}


class ExampleLosses:
    """Cross-entropy of the labels, the mean over each example's own; shape (batch,).

    Labels of tokens (batch, length), moved by one where the model moves them, or of examples (batch,). A label of -100 counts nowhere.
    The model's own loss is the mean over all tokens of the batch, in which long examples weigh more.

    The first batch shows what the model does with its labels: its own loss must be the mean over the tokens, moved or not.
    """

    def __init__(self) -> None:
        self._moves: bool | None = None

    def __call__(self, model: nn.Module, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The losses of the batch.

        Raises:
            InputError: there are no labels, logits do not fit them, or the model's own loss is something else.
        """
        labels, logits = inputs.get("labels"), getattr(outputs, "logits", None)
        if labels is None or logits is None or labels.shape != logits.shape[:-1] or logits.shape[-1] < 2:
            raise InputError(_needed("the model's logits and labels do not say one"))
        if self._moves is None:
            likely = labels.ndim > 1 and _class_name(model) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            own = getattr(outputs, "loss", None)
            if own is None:
                self._moves = likely
            elif not math.isfinite(own := float(own)):  # there is nothing to compare: ask again
                return _means(*_by_token(logits, labels, likely))
            else:
                self._moves = _found(logits, labels, likely, own)
        return _means(*_by_token(logits, labels, self._moves))


def _found(logits: Tensor, labels: Tensor, likely: bool, own: float) -> bool:
    """Whether labels are moved by one in the model's own loss."""
    share, means = _AGREES[logits.dtype in (torch.float32, torch.float64)], []
    for moves in (likely, not likely) if labels.ndim > 1 and labels.shape[1] > 1 else (False,):
        losses, counted = _by_token(logits, labels, moves)
        means.append(float(losses.sum() / counted.sum()))
        if abs(means[-1] - own) <= share * max(abs(own), 1.0):
            return moves
    raise InputError(
        _needed(f"the model's own loss ({own:.4g}) is not the mean cross-entropy of its labels ({means[0]:.4g})")
    )


def _by_token(logits: Tensor, labels: Tensor, moves: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every label, and whether it counts; both of shape (batch, labels)."""
    if moves:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED)
    counted = (labels != IGNORED).reshape(len(labels), -1)
    return losses.view(counted.shape), counted


def _means(losses: Tensor, counted: Tensor) -> Tensor:
    return losses.sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _needed(why: str) -> str:
    return (
        f"assignment='example' needs a loss for every example, and {why}: pass MeZOTrainer(objective=...), a function of model and "
        "inputs that returns the losses, shape (batch,)"
    )


def _class_name(model: nn.Module) -> str:
    base = getattr(model, "get_base_model", None)  # of a peft adapter
    return type(base() if base is not None else model).__name__
