"""L6: data sets of conversations and texts, made into tokens and labels for Trainer, as TRL's SFTTrainer does."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import datasets
import torch

from ..errors import InputError, warn
from ..models import takes_lengths
from ..models.principal import IGNORED
from ..storage import device_of
from ..tasks.batching import lengths_of
from ..tasks.chat import TASK, ChatTask, form_of
from ..tasks.chat_tokens import ChatTokens
from ..tasks.tokens import padding_id


def is_chat(dataset: Any, text_column: str, *, formatted: bool) -> bool:
    """Whether a data set holds conversations or texts and no tokens yet.

    Args:
        text_column: what it calls plain texts.
        formatted: a function of the user's makes texts of its rows.

    Raises:
        InputError: it holds prompts alone, of which no labels can be made.
    """
    if isinstance(dataset, dict):
        return any(is_chat(one, text_column, formatted=formatted) for one in dataset.values())
    columns = columns_of(dataset)
    if "input_ids" in columns:
        return False
    form = _form(columns, text_column, formatted)
    if form == "prompt":
        raise InputError(
            "train_dataset holds prompts alone, of which nothing can be learnt without a reward: pass objective=..., a function of model "
            "and inputs, or add a column 'completion'"
        )
    return form is not None


@dataclass
class ChatData:
    """Makes tokens and labels of the rows of a data set.

    Attributes:
        tokenizer: with a chat template, where rows are conversations.
        max_length: longer ones are cut on the right; None cuts nothing.
        text_column: of plain texts.
        assistant_only: whether the assistant's turns alone are learnt of ``messages``.
        completion_only: whether completions alone are learnt; None: yes.
        formatting: row -> text, in place of the columns.
        packing, eval_packing: whether several rows are put into one.
        objective: none but the model's own loss.
    """

    tokenizer: Any
    max_length: int | None
    text_column: str = "text"
    assistant_only: bool = True
    completion_only: bool | None = None
    formatting: Callable[[Any], str] | None = None
    packing: bool = False
    eval_packing: bool = False
    objective: None = None

    def settle(self, trainer: Any) -> None:
        """See to it that the model keeps packed rows apart, when the trainer has put it where it will be."""
        trainer.data_collator.flat = takes_lengths(trainer.model) and trainer.args.assignment != "example"
        if self.packing:
            require_apart(trainer.model, trainer.train_dataset, trainer.data_collator)

    def prepare_eval(self, dataset: Any) -> Any:
        """A data set to evaluate, as :meth:`prepare` makes it."""
        return self.prepare(dataset, packing=self.eval_packing)

    def prepare(self, dataset: Any, *, packing: bool) -> Any:
        """The data set with ``input_ids`` and ``labels``, and with ``position_ids`` where rows are packed.

        What is not learnt has the label -100. Rows of which nothing is learnt within ``max_length`` are left out, with a warning.
        With packing, rows are put together, best fit first, into rows of at most ``max_length``; positions begin again with each.

        Raises:
            InputError: a row is not what its columns say, or the template cannot write it.
        """
        if isinstance(dataset, dict):
            return {name: self.prepare(one, packing=packing) for name, one in dataset.items()}
        if packing and self.max_length is None:
            raise InputError("packing needs max_length, the length of the packed rows: give a number", "max_length")
        dataset = datasets.Dataset.from_list(list(dataset)) if isinstance(dataset, list) else dataset
        columns = columns_of(dataset)
        if not columns or "input_ids" in columns:
            return dataset
        form = _form(columns, self.text_column, self.formatting is not None)
        chat = ChatTokens(
            self.tokenizer,
            assistant_only=self.assistant_only,
            completion_only=self.completion_only is not False,
        )
        done = dataset.map(_Encode(chat, TASK.of_form(str(form)), self), with_indices=True, remove_columns=columns)
        kept = done.filter(_is_learnt)
        if isinstance(done, datasets.Dataset) and len(kept) < len(done):
            said = f"{len(done) - len(kept)} of {len(done)} rows have nothing to learn within max_length={self.max_length} tokens"
            if not len(kept):
                raise InputError(f"{said}: raise max_length")
            warn(f"{said}: they are left out")
        return (
            kept.map(_Pack(int(self.max_length or 0)), batched=True, remove_columns=["input_ids", "labels"])
            if packing
            else kept
        )


@dataclass
class _Encode:
    chat: ChatTokens
    task: ChatTask
    data: ChatData

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, list[int]]:
        where, data = f"row {number + 1}", self.data
        if data.formatting is not None:
            row = {"text": data.formatting(row)}
            if not isinstance(row["text"], str):
                raise InputError(f"{where}: formatting_func must return text, not {row['text']!r:.60}")
        elif self.task.form == "text":
            row = {"text": row[data.text_column if data.text_column in row else "text"]}
        tokens, learnt = self.chat.of_row(self.task.example(row, where).row, self.task.form, where)
        labels = [token if counts else IGNORED for token, counts in zip(tokens, learnt, strict=True)]
        return {"input_ids": tokens[: data.max_length], "labels": labels[: data.max_length]}


@dataclass
class _Pack:
    """Best-fit decreasing: each sequence goes into the fullest row that has room for it, the longest first."""

    length: int

    def __call__(self, batch: Mapping[str, Sequence[list[int]]]) -> dict[str, list[list[int]]]:
        sizes = list(map(len, batch["input_ids"]))
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []  # of each row that is not full: (room, row), in order
        for one in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
            at = bisect_left(room, (sizes[one], -1))
            left, row = room.pop(at) if at < len(room) else (self.length, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(one)
            if left > sizes[one]:
                insort(room, (left - sizes[one], row))
        return {
            "input_ids": [[token for one in row for token in batch["input_ids"][one]] for row in rows],
            # Nothing of a sequence predicts its first token.
            "labels": [[label for one in row for label in (IGNORED, *batch["labels"][one][1:])] for row in rows],
            "position_ids": [[place for one in row for place in range(sizes[one])] for row in rows],
        }


@dataclass
class ChatCollator:
    """Rows of tokens and labels as one batch, padded on the right.

    Returns:
        ``input_ids`` and ``labels`` (batch, length), and ``attention_mask``; of packed rows ``position_ids`` in its place, by which
        transformers keeps the sequences of a row apart, and ``use_cache=False``, without which it does not. A flat batch is one row of all
    packed rows, (1, tokens), with :func:`~forwardtune.tasks.batching.lengths_of` its sequences: for attention that takes no masks.
    """

    tokenizer: Any
    flat: bool = False

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        if self.flat and "position_ids" in rows[0]:
            row = {
                name: [value for row in rows for value in row[name]] for name in ("input_ids", "labels", "position_ids")
            }
            starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
            sizes = [end - begin for begin, end in pairwise([*starts, len(row["input_ids"])])]
            return {name: torch.tensor([row[name]]) for name in row} | {"use_cache": False, **lengths_of(sizes)}
        length = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            found = [row.get(name, row["input_ids"]) for row in rows]  # labels, if there are none
            return torch.tensor([[*tokens, *[value] * (length - len(tokens))] for tokens in found])

        batch: dict[str, Any] = {
            "input_ids": padded("input_ids", padding_id(self.tokenizer)),
            "labels": padded("labels", IGNORED),
        }
        if "position_ids" in rows[0]:
            return {**batch, "position_ids": padded("position_ids", 0), "use_cache": False}
        ends = torch.tensor([[len(row["input_ids"])] for row in rows])
        return {**batch, "attention_mask": (torch.arange(length) < ends).long()}


@torch.no_grad()
def require_apart(model: Any, rows: Iterable[Mapping[str, list[int]]], collator: ChatCollator) -> None:
    """Raise InputError unless the model keeps the sequences of a packed row apart, as a trial on two of them shows."""
    for row in rows:
        starts = [i for i, place in enumerate(row.get("position_ids", ())) if place == 0]
        if len(starts) > 1:
            break
    else:
        return  # no row holds two
    first, second = row["input_ids"][: starts[1]][-16:], row["input_ids"][starts[1] :][:16]
    tokens, places = [*first, *second], [*range(len(first)), *range(len(second))]
    batch = collator([{"input_ids": tokens, "labels": tokens, "position_ids": places}] * 2)
    on = {
        name: value.to(device_of(model)) if isinstance(value, torch.Tensor) else value for name, value in batch.items()
    }
    training = model.training
    model.eval()
    try:
        together = model(**on).logits[0, len(first) : len(tokens)].float()
        alone = model(input_ids=torch.tensor([second], device=device_of(model)), use_cache=False).logits[0].float()
        apart = torch.allclose(together, alone, rtol=0.05, atol=0.05)
    except TypeError:  # it takes no positions
        apart = False
    finally:
        model.train(training)
    if not apart:
        raise InputError(
            f"{type(model).__name__} does not keep the sequences of a packed row apart: leave packing out, or choose an attention "
            "implementation that does"
        )


def _is_learnt(row: Mapping[str, list[int]]) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])


def _form(columns: Sequence[str], text_column: str, formatted: bool) -> str | None:
    if formatted and columns:
        return "text"
    return form_of(columns) or ("text" if text_column in columns else None)


def columns_of(dataset: Any) -> list[str]:
    """The columns of a data set that is known to have some; nothing of any other."""
    if isinstance(dataset, datasets.Dataset):
        return list(dataset.column_names)
    if isinstance(dataset, datasets.IterableDataset):
        return list(dataset.column_names or next(iter(dataset), {}))
    if isinstance(dataset, list) and dataset and isinstance(dataset[0], dict):
        return list(dataset[0])
    return []
