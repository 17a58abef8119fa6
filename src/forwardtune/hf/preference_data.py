"""L6: data sets of preferences, made into examples and an objective for Trainer, as TRL's DPOTrainer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
from ..evaluation import find_layout, with_common_beginning
from ..objectives import TaskObjective
from ..reference import with_reference
from ..tasks.batching import Layout, collate
from ..tasks.chat import TASK
from ..tasks.encoding import Encoded, Encoder

_DATASETS = ("train_dataset", "eval_dataset")


class PreferenceData:
    """The preferences among a trainer's arguments, in tokens; a data collator for them; and their objective (DPO).

    Args:
        asked: the trainer's arguments, in which the data sets are replaced.

    Attributes:
        objective: direct preference optimization with ``args.beta``; the reference is the model as it comes, without its adapter.

    Raises:
        InputError: no tokenizer, or a row that is no preference.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        args, self._tokenizer = asked["args"], asked.get("processing_class")
        if self._tokenizer is None:
            raise InputError("preferences need a tokenizer: pass processing_class=tokenizer", "processing_class")
        task = replace(TASK.of_form("preference"), beta=args.beta)
        encoder = Encoder(self._tokenizer, args.max_length or 2**31)
        for name in _DATASETS:
            if asked.get(name) is not None:
                rows = enumerate(asked[name], start=1)
                asked[name] = encoder(task, [task.example(row, f"{name}, row {number}") for number, row in rows])
        asked["data_collator"] = self
        self.objective = TaskObjective("loss", task, self._tokenizer)
        self._layout: Layout | None = None

    def settle(self, trainer: Any) -> None:
        """Find out what the untuned model says of the texts, when the trainer has put it where it will be."""
        size = trainer.args.per_device_train_batch_size
        self._layout = find_layout(trainer.model, self._tokenizer, trainer.train_dataset)
        if trainer.args.assignment == "shared":
            self._layout = with_common_beginning(trainer.model, self._tokenizer, trainer.train_dataset, self._layout)
        for name in _DATASETS:
            if (examples := getattr(trainer, name)) is not None:
                setattr(trainer, name, with_reference(trainer.model, self._tokenizer, examples, batch_size=size))

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Any]:
        assert self._layout is not None
        return collate(examples, self._layout)

    def prepare_eval(self, dataset: Any) -> Any:
        """Examples made before. Raises InputError for others: the model is no longer their reference."""
        if not all(isinstance(example, Encoded) for example in dataset):
            raise InputError(
                "preferences to evaluate need the untuned model as a reference: pass them as eval_dataset to MeZOTrainer"
            )
        return dataset
