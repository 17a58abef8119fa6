"""Losses of examples on a side path, and at weights that are perturbed for each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.parameters import TunedParameters
from forwardtune.points import Copy, SidePath

from .models import token_batch
from .trainers import quiet_config

EPS, COUNT, LENGTH = 1e-2, 5, 11


def losses_of(model: Any, ids: Tensor) -> Tensor:
    """A loss of every example, shape (rows,), in float64 or float32."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def side_path(model: nn.Module, **settings: Any) -> tuple[MeZO, SidePath]:
    optimizer = MeZO(model, **{"lr": 1e-3, "eps": EPS, "seed": 3, "assignment": "example", **settings})
    assert isinstance(optimizer.perturbation, SidePath)
    return optimizer, optimizer.perturbation


def by_weights(optimizer: MeZO, side: SidePath, step: int, closure: Any, count: int, scale: float = EPS) -> list[float]:
    """The examples' losses at weights that are perturbed along the direction of each, one after another."""
    tuned = TunedParameters([t for t in optimizer.tuned if t.id not in side.left_out], optimizer.module)
    weights = Copy(tuned, optimizer.noise)
    return [weights.losses(step, [Query(b, scale)], lambda b=b: closure()[b])[0][0] for b in range(count)]


def trainer_of(folder: Path, model: Any, *, labels: Any = None, given: Any = None, **settings: Any) -> Any:
    """A trainer of two steps over twelve rows of tokens."""
    from forwardtune import MeZOTrainer

    ids = token_batch(12, 6).tolist()
    labels = ids if labels is None else labels
    data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    args = quiet_config(
        folder, **{"max_steps": 2, "learning_rate": 1e-4, "eps": 1e-3, "assignment": "example", **settings}
    )
    return MeZOTrainer(model=model, args=args, train_dataset=data, **(given or {}))
