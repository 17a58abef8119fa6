"""L6: a Trainer whose training examples are spread evenly by their labels."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..strata import StratifiedSampler, groups_by, labels_of


class Stratified:
    """Put before ``Trainer`` among the bases.

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
