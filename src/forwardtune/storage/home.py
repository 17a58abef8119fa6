"""What a home of values is, and which one a parameter has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_HOME = "_forwardtune_home"


class Resident:
    """The values live in the parameter itself, on the device where the model computes."""

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The values, in the parameter's shape, where they live; not to be changed."""
        return parameter.data

    @contextmanager
    def change(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """Inside, what is written to the tensor is the parameter's value afterwards."""
        yield self.read(parameter)

    def computes_on(self, parameter: nn.Parameter) -> torch.device:
        """Where the model computes with the parameter."""
        return parameter.device

    def visit(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Values that :meth:`read` gave, or a part of them, where the model computes: themselves, or a copy.

        Args:
            out: memory there, in the shape and dtype of the values, that a copy may be put into.
        """
        return values

    def outline(self, values: Tensor) -> Tensor:
        """A tensor of the shape, dtype and device that the values have where the model computes. Its elements mean nothing."""
        return values


RESIDENT = Resident()


def home_of(parameter: Tensor | None) -> Resident:
    """Where the values of a parameter live."""
    home: Resident = getattr(parameter, _HOME, RESIDENT)
    return home


def settle(parameter: nn.Parameter, home: Resident) -> None:
    """From now on the parameter's values live there."""
    setattr(parameter, _HOME, home)


def is_offloaded(module: nn.Module) -> bool:
    """Whether values of a module's parameters live in a file, or elsewhere than where it computes."""
    return any(home_of(parameter) is not RESIDENT for parameter in module.parameters())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, and its input is to be."""
    parameter = next(module.parameters())
    return home_of(parameter).computes_on(parameter)
