"""L4: an order of the training examples in which every minibatch has about its share of each stratum, such as a label.

Drawn at random, a minibatch of 16 has more of one label than of the other by chance, and the losses of different labels pull the weights
in opposite directions: most of what such minibatches differ by is that. In an order that is stratified every example still comes once in a pass,
and every run of examples, a minibatch or a group that shares a direction, has its share of each label.

Source: stratified sampling with proportional allocation (Cochran, "Sampling Techniques", 1977, chapter 5).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .errors import InputError


class StratifiedSampler(Sampler[int]):
    """Yields every index once, so that the examples of each stratum are evenly spread.

    Within a stratum the order is random, and example k of n stands at ``(k + u) / n`` of the pass, with one u of the uniform distribution for
    each stratum. So of m examples in a row about ``m n / N`` are of a stratum that has n of N.

    Args:
        strata: that of every example.
        seed: decides the order, with the number of the pass. torch's global random state is neither read nor changed.

    Example::

        sampler = StratifiedSampler(dataset["label"], seed=0)
        loader = DataLoader(dataset, batch_size=16, sampler=sampler)
    """

    def __init__(self, strata: Sequence[Hashable] | Tensor, seed: int = 0) -> None:
        self._strata = strata.tolist() if isinstance(strata, Tensor) else list(strata)
        self._seed, self._epoch = seed, 0

    @property
    def count(self) -> int:
        """How many strata there are."""
        return len(set(self._strata))

    def __len__(self) -> int:
        return len(self._strata)

    def set_epoch(self, epoch: int) -> None:
        """Say which pass comes next. Each that is begun without it has the next number."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed((self._seed * 1_000_003 + self._epoch) % 2**63)
        self._epoch += 1
        members: dict[Hashable, list[int]] = {}
        for index in torch.randperm(len(self._strata), generator=draw).tolist():
            members.setdefault(self._strata[index], []).append(index)
        places = []
        for stratum in dict.fromkeys(self._strata):  # in an order of the data, whatever the permutation
            own, begin = members[stratum], float(torch.rand((), dtype=torch.float64, generator=draw))
            places += [((k + begin) / len(own), index) for k, index in enumerate(own)]
        yield from (index for _, index in sorted(places))


def labels_of(dataset: Any) -> list[Hashable]:
    """The label of every row: its attribute or column ``label`` or ``labels``.

    Raises:
        InputError: there is none, or it is no single value.
    """
    columns = getattr(dataset, "column_names", None)
    for name in ("label", "labels"):
        if isinstance(columns, list) and name in columns:
            found = list(dataset[name])
        elif columns is None and hasattr(dataset, "__len__") and len(dataset):
            rows = [dataset[i] for i in range(len(dataset))]
            if not all(hasattr(row, name) or (isinstance(row, dict) and name in row) for row in rows):
                continue
            found = [getattr(row, name) if hasattr(row, name) else row[name] for row in rows]
        else:
            continue
        found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in found]  # of torch or NumPy
        if all(isinstance(value, (int, str)) for value in found):
            return found
    raise InputError(
        "stratify='label' needs training examples with a single label each, in a column label or labels: leave stratify out",
        "stratify",
    )


def groups_by(strata: int, batch_size: int) -> int:
    """How many examples share a direction where minibatches are stratified: one of each stratum, as far as there is room for two groups."""
    return max(1, min(strata, batch_size // 2))


class Stratified:
    """A Trainer whose training examples are spread by their labels: put it before ``transformers.Trainer`` among the bases.

    Attributes:
        stratify: ``"label"``, ``"none"``, or ``"auto"``: by label where every training example has one.
    """

    stratify = "none"
    args: Any
    train_dataset: Any

    def train_sampler(self) -> StratifiedSampler | None:
        """What spreads the examples; None where Trainer's own order stays. Raises InputError: they shall be, and have no labels."""
        if self.stratify == "none" or not hasattr(self.train_dataset, "__len__"):
            if self.stratify == "label":
                raise InputError(
                    "stratify='label' spreads the examples of a whole pass, and these come one by one: leave stratify out",
                    "stratify",
                )
            return None
        try:
            labels = labels_of(self.train_dataset)
        except InputError:
            if self.stratify == "auto":
                return None
            raise
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StratifiedSampler(labels, seed)

    def examples_in_group(self) -> int:
        """How many examples share a direction, where that was left open."""
        sampler = self.train_sampler()
        return 1 if sampler is None else groups_by(sampler.count, self.args.per_device_train_batch_size)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = self.train_sampler()
        return super()._get_train_sampler(*args, **kwargs) if sampler is None else sampler  # type: ignore[misc]
