"""What a home of values is, and which one a parameter has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..noise import flattened

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

    def pieces(
        self, parameter: nn.Parameter, beside: Sequence[Tensor] = (), unit: int = 8
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """The values where the model computes, to be changed: in row-major order, flat and contiguous, in one piece or several.

        What is written to a piece until the next one is asked for is the parameter's value afterwards, inside of :func:`at_home_afterwards`.

        Args:
            beside: flat tensors of as many elements, on the values' device, that come in the same pieces and may be changed, too.
            unit: pieces are cut at multiples of so many elements.

        Yields:
            The number of a piece's first element; and the piece, with those of ``beside``.
        """
        with self.change(parameter) as weight, flattened(weight) as flat:
            yield 0, [flat, *beside]

    def wait(self) -> None:
        """Return when the values that pieces were given are where they live."""

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


@contextmanager
def at_home_afterwards(homes: Iterable[Resident]) -> Iterator[None]:
    """Afterwards, however it ended, values that were changed inside are where they live."""
    try:
        yield
    finally:
        for home in set(homes):
            home.wait()


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
