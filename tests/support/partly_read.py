"""A model of which steps read different parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PartlyRead(nn.Module):
    """A table of which steps read some rows, and a layer that every third step does not reach; a loss for each of two examples."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.sometimes = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape) / 32)
        self.to(dtype)

    def forward(self, step: int) -> Tensor:
        x = self.table(torch.tensor([step % 6, (step * step) % 5]))
        x = x if step % 3 == 1 else self.sometimes(x)
        return self.out(x).float().square().mean(1)
