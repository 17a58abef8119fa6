"""L1: where the values of a tuned tensor live, between the evaluations that read them and the updates that change them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class Resident:
    """The values live in the parameter itself, on the device where the model computes."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The values, in the parameter's shape, where the model computes; not to be changed."""
        return parameter.data

    @contextmanager
    def change(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """Inside, what is written to the tensor is the parameter's value afterwards."""
        yield parameter.data


RESIDENT = Resident()
