"""A vocabulary head in slices, where that gives the bits of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import TunedTensor

# A linear layer with so many outputs is a vocabulary head; the widest inner layers have fewer.
VOCABULARY = 30_000
# It is cut into so many slices at least, and at most.
_SLICES = (8, 64)
# So many layouts of inputs with gaps between their rows are tried; after them the head is computed whole.
_STRIDED_TRIALS = 64


def is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and module.out_features >= VOCABULARY)


def as_parameter(value: Tensor, tensor: TunedTensor) -> Tensor:
    """The value as a parameter that requires grad as the tuned one does: torch chooses some kernels by that."""
    return nn.Parameter(value, requires_grad=tensor.parameter.requires_grad)


class Slices:
    """How the heads of a model are cut.

    Args:
        most_bytes: of a slice; 0: no limit.

    Attributes:
        is_exact: by head and kind of input, whether slices give the bits of the whole.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._strided_trials = 0
        self.is_exact: dict[tuple[Any, ...], bool] = {}

    def rows(self, table: Tensor) -> int:
        """Rows in a slice of a vocabulary head; slices of one height if the table can be cut so.

        For every shape that a matrix product has, oneDNN keeps a kernel of about a megabyte.
        """
        height, (least, most) = table.shape[0], _SLICES
        slices = max(1, self._most_bytes and -(-table.nbytes // self._most_bytes))
        slices = min(max(slices, least), most)
        even = (n for n in range(slices, min(2 * slices, most) + 1) if height % n == 0)
        return -(-height // next(even, slices))

    def may_slice(self, tensor: TunedTensor, whole: Callable[[], Tensor], x: Tensor, bias: Tensor | None) -> bool:
        """Whether slices of the head give the bits of the whole for inputs like x: tried once, on the unperturbed weights.

        For many positions the logits take more memory than the weights, and slices would save nothing. A trial costs two
        products. torch folds a contiguous x to a matrix, so its number of rows is all that its shape says to a kernel:
        there are at most ``width // 8`` of them. Strides can have any values, and only so many are tried.
        """
        height, width = tensor.parameter.shape
        rows = x.numel() // width
        if height < VOCABULARY or rows > width // 8:
            return False
        layout = rows if x.is_contiguous() else (x.shape, x.stride())
        key = (tensor.id, x.ndim, layout, x.dtype, bias is None, torch.is_autocast_enabled(x.device.type))
        if key not in self.is_exact:
            if not x.is_contiguous():
                if self._strided_trials == _STRIDED_TRIALS:
                    return False
                self._strided_trials += 1
            weight = as_parameter(whole().detach(), tensor)
            cut = self.rows(weight)
            sliced = project_in_slices(x, weight, bias, cut, lambda lo, hi: weight[lo:hi], lambda: None)
            self.is_exact[key] = torch.equal(F.linear(x, weight, bias), sliced)
        return self.is_exact[key]


def project_in_slices(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    piece: Callable[[int, int], Tensor],
    done: Callable[[], None],
) -> Tensor:
    """``x W^T + b``, so many rows of W at a time; ``piece`` gives the rows, ``done`` takes them back."""
    height = weight.shape[0]
    out: Tensor | None = None
    for lo in range(0, height, rows):
        hi = min(lo + rows, height)
        part = F.linear(x, piece(lo, hi), None if bias is None else bias[lo:hi])
        out = part.new_empty(*part.shape[:-1], height) if out is None else out
        out[..., lo:hi] = part
        done()
    assert out is not None
    return out
