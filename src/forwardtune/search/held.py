"""L3: steps that are held back: estimated at one point of the weights, tried with several learning rates, taken with one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..method.record import updates_of
from ..method.rule import move_all
from ..optimizer import MeZO
from ..trajectory import ReturnPoint


def hold(optimizer: MeZO) -> None:
    """From now on steps are estimated but not taken: the weights stay, so all of them are of the same point."""
    optimizer.fold()
    if optimizer.held:
        raise RuntimeError(f"{len(optimizer.held)} steps are held back already: take or drop them first")
    optimizer.held = []


def drop(optimizer: MeZO) -> None:
    """Forget the steps that are held, as if they had not been estimated."""
    optimizer.next_step -= len(optimizer.held or ())
    optimizer.held = None
    optimizer.zero_grad()


@torch.no_grad()
def move_to_trial(optimizer: MeZO, lr: float) -> None:
    """Move the weights by the steps that are held, with this learning rate, without taking them.

    The weights are those that :func:`take` would give, to the bit. They belong to no step: bring the ones before back, and set
    ``optimizer.interrupted`` to False, or use :func:`trial`.

    Raises:
        OverflowError: a step does not fit float32; nothing was moved. :func:`take` skips such a step.
    """
    optimizer.require_whole_weights()
    records = [replace(record, lr=(lr,) * len(record.lr)) for record in optimizer.held or () if not record.skipped]
    steps = [updates_of(optimizer.rule, record) for record in records]
    groups = [[step[group] for step in steps] for group in range(len(optimizer.param_groups))]
    optimizer.interrupted = True
    folded_at = None if optimizer.pending is None else optimizer.pending.at
    history = copy.deepcopy(optimizer.history)
    move_all(optimizer.rule, optimizer.noise, optimizer.tuned, groups, history, folded_at=folded_at)


@contextmanager
def trial(optimizer: MeZO, lr: float, point: ReturnPoint) -> Iterator[None]:
    """Inside, the weights are those to which the held steps lead with this learning rate; afterwards those of the point.

    Raises:
        OverflowError: as :func:`move_to_trial`.
    """
    move_to_trial(optimizer, lr)
    try:
        yield
    finally:
        point.restore()
        optimizer.interrupted = False


@torch.no_grad()
def take(optimizer: MeZO, lr: float) -> None:
    """Take the steps that are held, with this learning rate, in order. Recorders are told of each."""
    optimizer.require_whole_weights()
    held, optimizer.held = optimizer.held or [], None
    for group in optimizer.param_groups:
        group["lr"] = lr
    for record in held:
        optimizer.take(replace(record, lr=(lr,) * len(record.lr)))
