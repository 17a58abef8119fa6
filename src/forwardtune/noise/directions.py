"""What z is: a direction is a table of values and the number of random bits that index it.

An element's half-word is shifted right by ``16 - bits`` and the result indexes the table. The scale of a perturbation
or an update is multiplied into the table once, on the host, so a kernel does one look-up and one float32 addition per
element: nothing in it can round differently on another machine.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, field
from statistics import NormalDist

import torch
from torch import Tensor

#: Version of the noise: any change of its bits is a new number, and logs written under the old one still replay.
NOISE_VERSION = 1


@dataclass(frozen=True, eq=False)
class Direction:
    """A distribution of perturbation directions with zero mean and unit variance per element.

    Attributes:
        name: what the step log calls it.
        bits: how many random bits index the table, the upper ones of the element's 16.
        values: float32 tensor of ``2**bits`` values.

    Raises:
        ValueError: bits outside 1 to 16, or other values than so many finite float32 numbers.
    """

    name: str
    bits: int
    values: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 16):
            raise ValueError(f"the direction {self.name!r} takes {self.bits!r} bits of 16: give it 1 to 16")
        values = self.values
        if values.dtype != torch.float32 or values.shape != (2**self.bits,) or not values.isfinite().all():
            raise ValueError(
                f"the direction {self.name!r} has a table of {values.dtype} {list(values.shape)}: give it "
                f"{2**self.bits} finite float32 numbers, one for every value of its {self.bits} bits"
            )

    @property
    def shift(self) -> int:
        """How far a half-word is shifted right to index the table."""
        return 16 - self.bits

    def table(self, scale: float) -> Tensor:
        """``scale * values`` as float32: one multiplication in float64, one rounding.

        Every platform with IEEE arithmetic computes the same bits.
        """
        return (self.values.double() * scale).float()

    def digest(self) -> str:
        """SHA-256 of the table's little-endian bytes, as hex."""
        return hashlib.sha256(struct.pack(f"<{2**self.bits}f", *self.values.tolist())).hexdigest()


def _gaussian_values() -> Tensor:
    """4,096 standard normal quantiles at the midpoints of equal probabilities, scaled to unit variance."""
    half = 2048
    normal = NormalDist()
    lower = [normal.inv_cdf((i + 0.5) / (2 * half)) for i in range(half)]
    deviation = math.sqrt(math.fsum(x * x for x in lower) / half)
    lower = [x / deviation for x in lower]
    values = lower + [-x for x in reversed(lower)]
    digest = hashlib.sha256(struct.pack("<4096f", *values)).hexdigest()
    if digest != _GAUSSIAN_SHA256:
        raise RuntimeError(
            "the Gaussian table computed on this machine differs from the one of noise version 1; "
            "please report the platform, its C library and Python version"
        )
    return torch.tensor(values, dtype=torch.float32)


# The quantiles go through the C library's log and sqrt: the digest makes sure that they came out as everywhere else.
_GAUSSIAN_SHA256 = "87d2297bd6f503ad9b582cb87a6d8d21e20633747144ac688b90f4efcde6a2e8"

GAUSSIAN = Direction("gaussian", 12, _gaussian_values())
RADEMACHER = Direction("rademacher", 1, torch.tensor([-1.0, 1.0], dtype=torch.float32))

DIRECTIONS = {direction.name: direction for direction in (GAUSSIAN, RADEMACHER)}
#: Those whose tables belong to the version of the noise.
SPECIFIED = tuple(DIRECTIONS)


def register_direction(direction: Direction) -> Direction:
    """Make a direction known by its name, so that a step log of a run with it can be written, and read again.

    Call it in a module of yours, and import that module wherever a log is read. The log keeps a digest of the table, so
    another table under the same name is noticed.

    Raises:
        ValueError: the name belongs to another table.
    """
    known = DIRECTIONS.setdefault(direction.name, direction)
    if known.digest() != direction.digest():
        raise ValueError(f"there is another direction {direction.name!r} already: choose another name")
    return known


def get_direction(name: str | Direction) -> Direction:
    """The direction of that name.

    Raises:
        ValueError: no such direction; the message lists the known ones.
    """
    if isinstance(name, Direction):
        return name
    try:
        return DIRECTIONS[name]
    except KeyError:
        raise ValueError(f"unknown direction {name!r}: choose one of {', '.join(DIRECTIONS)}") from None
