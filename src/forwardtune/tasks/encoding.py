"""From text to tokens: prompts, options, and batches that process every prompt once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .task import Example, Task


@dataclass(frozen=True)
class Encoded:
    """One example in tokens.

    Attributes:
        prompt: tokens of the prompt, possibly cut on the left.
        options: tokens of every continuation: the answer options, or the target text alone.
        label: which option is right; 0 for free text.
        text: the target text, for scoring free text.
    """

    prompt: list[int]
    options: list[list[int]]
    label: int
    text: str = ""

    @property
    def length(self) -> int:
        """Tokens in the model's input."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


@dataclass
class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest input; prompts are cut on the left to fit, the answers never.

    ``truncated`` counts the prompts that were cut.
    """

    tokenizer: Any
    max_length: int
    truncated: int = field(default=0, init=False)

    def __call__(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """Encode the examples of a task.

        Raises:
            InputError: an answer alone is longer than ``max_length`` allows.
        """
        return [self._encode(task, example, number) for number, example in enumerate(examples, start=1)]

    def _encode(self, task: Task, example: Example, number: int) -> Encoded:
        texts = example.options or (example.target + task.stop,)
        # Prompt and answer are tokenised together, as the model saw text in training. What all continuations share is
        # the prompt; a token that spans the border counts as part of the answers.
        alone = self._tokens(example.prompt)
        whole = [self._tokens(example.prompt + text) for text in texts]
        shared = min(_common_prefix(alone, tokens) for tokens in whole)
        prompt, options = alone[:shared], [tokens[shared:] for tokens in whole]
        if not prompt or not all(options):
            raise InputError(
                f"task {task.name}, example {number}: prompt and answers {texts} share no border of tokens; "
                "change the end of the prompt"
            )
        room = self.max_length - max(sum(len(option) - 1 for option in options), max(map(len, options)))
        if room < 1:
            raise InputError(
                f"task {task.name}, example {number}: its answers take {max(map(len, options))} tokens, and an input of "
                f"{self.max_length} leaves no room for the prompt: raise --max-length or shorten the answers"
            )
        if len(prompt) > room:
            self.truncated += 1
            begins = [prompt[0]] if prompt[0] == self.tokenizer.bos_token_id and room > 1 else []
            prompt = begins + prompt[len(prompt) - room + len(begins) :]
        return Encoded(prompt, options, max(example.label, 0), example.target.strip())

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        # Some tokenizers close every text; a continuation must not be cut off from its prompt like that.
        if tokens and tokens[-1] == self.tokenizer.eos_token_id:
            tokens = tokens[:-1]
        return tokens


def _common_prefix(a: list[int], b: list[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def collate(
    batch: Sequence[Encoded], pad: int, *, shared: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One model input for a batch of examples, with the places of the answer tokens in it.

    The last token of an option is never an input, so options of one token need no input at all beyond the prompt.
    Longer ones stand side by side behind the prompt: each sees the prompt and itself alone (``attention_mask``), at
    the positions that it would have by itself (``position_ids``). With ``shared=False`` every option has a row of its
    own, the plain definition.

    Returns:
        ``input_ids`` (rows, length), padded on the right; ``positions`` (p,), places in the flattened input whose
        logits are needed; ``logit_rows`` (n,) and ``tokens`` (n,), one for each answer token: which of the p predicts
        it, and what it is; ``slots`` (n,), number of its option within the batch; ``options`` (batch, most options),
        those numbers by example, -1 where an example has fewer; ``labels`` (batch,). With long options also
        ``position_ids`` (rows, length) and ``attention_mask`` (rows, 1, length, length), additive, in ``dtype``.
    """
    rows: list[tuple[list[int], list[list[int]]]] = []
    for example in batch:
        rows += [(example.prompt, example.options)] if shared else [(example.prompt, [o]) for o in example.options]
    length = max(len(prompt) + sum(len(o) - 1 for o in options) for prompt, options in rows)
    input_ids = torch.full((len(rows), length), pad)
    position_ids = torch.arange(length).repeat(len(rows), 1)
    side_by_side = any(sum(len(o) > 1 for o in options) > 1 for _, options in rows)
    seen = torch.ones(len(rows), length, length, dtype=torch.bool).tril() if side_by_side else None
    places: dict[int, int] = {}
    logit_rows: list[int] = []
    tokens: list[int] = []
    slots: list[int] = []
    slot = 0
    for row, (prompt, options) in enumerate(rows):
        input_ids[row, : len(prompt)] = torch.tensor(prompt)
        start = len(prompt)
        for option in options:
            end = start + len(option) - 1
            input_ids[row, start:end] = torch.tensor(option[:-1], dtype=torch.int64)
            position_ids[row, start:end] = torch.arange(len(prompt), len(prompt) + len(option) - 1)
            if seen is not None:
                seen[row, start:end, len(prompt) : start] = False
            for j, token in enumerate(option):
                place = row * length + (len(prompt) - 1 if j == 0 else start + j - 1)
                logit_rows.append(places.setdefault(place, len(places)))
                tokens.append(token)
                slots.append(slot)
            start, slot = end, slot + 1
    counts = [len(example.options) for example in batch]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    inputs = {
        "input_ids": input_ids,
        "positions": torch.tensor(list(places)),
        "logit_rows": torch.tensor(logit_rows),
        "tokens": torch.tensor(tokens),
        "slots": torch.tensor(slots),
        "options": torch.tensor(
            [[s + i if i < c else -1 for i in range(max(counts))] for s, c in zip(starts, counts, strict=True)]
        ),
        "labels": torch.tensor([example.label for example in batch]),
    }
    if seen is not None:
        inputs["position_ids"] = position_ids
        inputs["attention_mask"] = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[
            :, None
        ]
    return inputs
