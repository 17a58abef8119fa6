"""Which updates of low rank are done together: the factors of their directions are made before them, and take memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .definition import Update

# Numbers in the factors of one tensor that are made for steps that are applied together: a megabyte, in the second-level cache; and in those
# of all tensors that share a launch.
_OF_ONE, _OF_ALL = 1 << 18, 1 << 23


def sweeps(updates: Sequence[Update], sizes: Sequence[int]) -> Iterator[tuple[list[int], list[Update]]]:
    """Tensors, by their places, and consecutive steps that are applied together to them. A step is never cut, and each tensor gets its steps in
    order.

    Args:
        sizes: for every tensor how many numbers the factors of one term are.
    """
    alike: dict[int, list[int]] = {}
    for i, size in enumerate(sizes):
        alike.setdefault(size, []).append(i)
    cuts: dict[tuple[int, ...], list[int]] = {}
    for size, which in alike.items():
        cuts.setdefault(tuple(_cuts(updates, size)), []).extend(which)
    for ends, which in cuts.items():
        for lo, hi in zip((0, *ends), ends, strict=False):
            terms = sum(len(item.terms) for item in updates[lo:hi])
            for some in _bounded(which, [sizes[i] * terms for i in which]):
                yield some, list(updates[lo:hi])


def _cuts(updates: Sequence[Update], size: int) -> Iterator[int]:
    """Before which steps a sweep ends."""
    held = 0
    for i, item in enumerate(updates):
        more = size * len(item.terms)
        if i and held + more > _OF_ONE:
            yield i
            held = 0
        held += more
    if updates:
        yield len(updates)


def _bounded(which: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    some: list[int] = []
    held = 0
    for i, size in zip(which, sizes, strict=True):
        if some and held + size > _OF_ALL:
            yield some
            some, held = [], 0
        some.append(i)
        held += size
    if some:
        yield some
