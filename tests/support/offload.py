"""Homes of weights outside the device, and a run whose weights live in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forwardtune import MeZO
from forwardtune.storage import InHostMemory, Offloaded, OnDisk
from forwardtune.storage.visits import Visits

from .models import token_batch


class Beside(InHostMemory):
    """A host beside a device that is the host, too: what does not visit it is NaN, so that no GPU is needed to see what is missing."""

    def __init__(self) -> None:
        Offloaded.__init__(self, "cpu")
        self._visits = Visits(self)
        self._values: dict[int, torch.Tensor] = {}

    def place(self, module: nn.Module) -> None:
        super().place(module)
        for parameter in module.parameters():
            if id(parameter) not in self._values:
                self._values[id(parameter)] = parameter.data
                parameter.data = torch.full_like(parameter.data, torch.nan)

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        is_here = not parameter.data.isnan().all()  # a perturbed copy that takes its place
        return parameter.data if is_here else self._values[id(parameter)]


HOMES: dict[str, Callable[[Path], Offloaded]] = {"disk": OnDisk, "host": lambda folder: Beside()}


def tuned(model: Any, steps: int = 3, device: str = "cpu", **settings: Any) -> tuple[str, list[float]]:
    """The digest after a few steps, and their losses."""
    optimizer = MeZO(model, lr=1e-3, **settings)
    each = settings.get("assignment") == "example"
    tokens = token_batch().to(device)

    def loss() -> torch.Tensor:
        extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        squares = model(input_ids=tokens, **extra).logits.float().pow(2)
        return squares.mean(dim=(1, 2)) if each else squares.mean()

    losses = [optimizer.step(loss) for _ in range(steps)]
    return optimizer.tuned.digest(), losses
