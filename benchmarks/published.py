"""The published loop: three passes of ``torch.normal`` over the stored weights, and one for the update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

EPS = 1e-3


@torch.no_grad()
def reference_step(model: Any, loss: Callable[[], Any], lr: float, seed: int) -> None:
    """One step."""

    def add_noise(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype, device=parameter.device)
            parameter.data = parameter.data + scale * z

    add_noise(EPS)
    plus = float(loss())
    add_noise(-2 * EPS)
    minus = float(loss())
    add_noise(EPS)
    add_noise(-lr * (plus - minus) / (2 * EPS))
