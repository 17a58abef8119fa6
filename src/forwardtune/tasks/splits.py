"""Which rows are for training, development and testing: the rules that a task file can choose.

A rule names rows by their places in the source, counted without those that have no label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, warn
from .task import Task

_TEST_SEED = 0
_MASKED_TEST_SEED = 42


@dataclass(frozen=True)
class Wanted:
    """How many examples are asked for, and the seed that draws them."""

    train: int
    dev: int
    test: int
    per_class: int | None
    seed: int


class Default:
    """The rule ``forwardtune``: development and training rows in an order drawn by the seed, development first.

    Where the training data are short, development takes at most a quarter of them, unless as many remain for training.
    ``per_class`` needs that many rows of every class. Test rows are the same for every seed, so that runs can be compared.
    """

    name = "forwardtune"

    def test(self, task: Task, count: int, wanted: Wanted) -> list[int]:
        """Places of the test rows among ``count``."""
        return sample(task, "test", count, wanted.test, _TEST_SEED)

    def train_and_dev(
        self, task: Task, labels: Sequence[str], source: str, wanted: Wanted
    ) -> tuple[list[int], list[int]]:
        """Places of the training and of the development rows, by the labels of all; ``source`` is for messages.

        Raises:
            InputError: the data do not hold what is asked for.
        """
        order = list(range(len(labels)))
        random.Random(f"{wanted.seed} {task.name} train").shuffle(order)
        if wanted.per_class is not None:
            train, dev, short = _of_each_class(task, labels, order, wanted)
            if short:
                raise _too_few(source, *short[0], wanted)
            return train, dev
        scarce = len(labels) < 2 * wanted.dev
        share = min(wanted.dev, len(labels) // 4) if scarce else wanted.dev
        return order[share : share + wanted.train], order[:share]


class MeZO:
    """The rule ``mezo``: as the code of the MeZO paper draws them from rows in the order of the source.

    Causal models (section 3.1): ``permutation(rows)`` by the seed, with numpy's ``RandomState``; the first ``train + dev``
    are taken, and the last ``dev`` of these are for development, however few that leaves for training; test rows are the
    first of another ``permutation`` by the same seed. ``per_class``, masked models (section 3.2): rows are shuffled by the
    seed; of each class the first k are for training and the next k for development, as many as there are; test rows are
    the first after a shuffle by 42.
    """

    name = "mezo"

    def test(self, task: Task, count: int, wanted: Wanted) -> list[int]:
        """As of :class:`Default`; all rows where there are no more than asked for."""
        if wanted.per_class is None:
            order: list[int] = _state(wanted.seed).permutation(count).tolist()
            return order[: wanted.test]
        return _shuffled(count, _MASKED_TEST_SEED)[: wanted.test] if count > wanted.test else list(range(count))

    def train_and_dev(
        self, task: Task, labels: Sequence[str], source: str, wanted: Wanted
    ) -> tuple[list[int], list[int]]:
        """As of :class:`Default`."""
        if (k := wanted.per_class) is not None:
            train, dev, short = _of_each_class(task, labels, _shuffled(len(labels), wanted.seed), wanted)
            for label, there in short:
                if not there or (wanted.dev and not dev):
                    raise _too_few(source, label, there, wanted)
            if short:
                few = ", ".join(f"{there} of {text}" for (_, text), there in short)
                warn(f"task {task.name}: {source} has only {few}; training takes up to {k}, development what is left")
            return train, dev
        taken: list[int] = _state(wanted.seed).permutation(len(labels)).tolist()[: wanted.train + wanted.dev]
        border = max(0, len(taken) - wanted.dev)
        if not border:
            raise InputError(
                f"task {task.name} draws its splits as the MeZO paper does, which sets {wanted.dev} examples aside for "
                f"development and leaves none of the {len(labels)} in {source} to train on: ask for fewer "
                f"(dev_examples={len(labels) // 4}), or use a task file without 'splits: {self.name}'",
                "dev_examples",
            )
        if border < min(wanted.train, wanted.dev):
            warn(
                f"task {task.name} draws its splits as the MeZO paper does: of the {len(labels)} examples in {source}, "
                f"{border} are for training and {wanted.dev} for development"
            )
        return taken[:border], taken[border:]


#: The rules by name; the first is the default.
RULES: dict[str, Default | MeZO] = {rule.name: rule for rule in (Default(), MeZO())}
DEFAULT_RULE = Default.name


def sample(task: Task, split: str, count: int, limit: int, seed: int) -> list[int]:
    """Places of ``limit`` of so many rows, drawn without replacement by the seed and the names of task and split."""
    if limit >= count:
        return list(range(count))
    return random.Random(f"{seed} {task.name} {split}").sample(range(count), limit)


def set_aside(count: int, wanted: int, name: str) -> tuple[list[int], list[int]]:
    """Places of the test rows and of the others, of data that are not divided: at most a fifth, the same for every seed.

    Raises:
        InputError: there are too few rows to set any aside.
    """
    test = min(wanted, count // 5)
    if not test:
        raise InputError(
            f"task {name}: {count} rows are too few to set some aside for tests: give 5 or more, or a folder with test data of its own"
        )
    order = list(range(count))
    random.Random(f"{_TEST_SEED} {name} set aside").shuffle(order)
    return sorted(order[:test]), sorted(order[test:])


def _of_each_class(
    task: Task, labels: Sequence[str], order: Sequence[int], wanted: Wanted
) -> tuple[list[int], list[int], list[tuple[tuple[str, str], int]]]:
    """The first k of each class in the order, the next k if development rows are wanted, and the classes with fewer."""
    if task.answers is None:
        raise InputError(f"task {task.name} has no classes to draw examples of: leave per_class out", "per_class")
    k = wanted.per_class or 0
    border = k + (k if wanted.dev else 0)
    members = {label: [i for i in order if labels[i] == label] for label in task.answers}
    train = [i for of_class in members.values() for i in of_class[:k]]
    dev = [i for of_class in members.values() for i in of_class[k:border]]
    counts = zip(task.answers.items(), map(len, members.values()), strict=True)
    return train, dev, [(answer, there) for answer, there in counts if there < border]


def _too_few(source: str, answer: tuple[str, str], there: int, wanted: Wanted) -> InputError:
    k, dev = wanted.per_class, wanted.per_class if wanted.dev else 0
    return InputError(
        f"{source} holds {there} examples of class {answer[0]} ({answer[1]}), and {k} for training and {dev} for "
        f"development are asked for: lower per_class to {there // 2 if dev else there}",
        "per_class",
    )


def _shuffled(count: int, seed: int) -> list[int]:
    places = list(range(count))
    _state(seed).shuffle(places)
    return places


def _state(seed: int) -> np.random.RandomState:
    if not 0 <= seed < 2**32:
        raise InputError(f"the seed must be from 0 to 4294967295 for splits of the MeZO paper, got {seed}")
    return np.random.RandomState(seed)
