"""From encoded examples to one model input: every prompt once, hardly any padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .encoding import Encoded


@dataclass(frozen=True)
class Layout:
    """How a batch of examples stands in the model's input.

    Attributes:
        pad: token that fills rows up.
        dtype: of the additive attention mask.
        shared: the options of an example stand side by side behind its prompt, which is processed once.
        packed: several short examples stand in one row, so that little of it is padding.
        causal: whether a token sees only what is before it.
        first_position: position id of the first token (RoBERTa counts from 2).
        context: so many tokens were processed before, and their keys and values stand before every row.

    ``shared`` and ``packed`` need a model that honours position ids and a block mask, which
    :func:`forwardtune.evaluation.find_layout` finds out. Without them every option is a row of its own, padded on the
    right: the plain definition.
    """

    pad: int
    dtype: torch.dtype = torch.float32
    shared: bool = True
    packed: bool = True
    causal: bool = True
    first_position: int = 0
    context: int = 0


@dataclass
class _Sequence:
    """A prompt with the options behind it that share it."""

    prompt: list[int]
    options: list[list[int]]
    scored: int
    mask: int | None
    slots: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + (0 if self.mask is not None else sum(len(option) - 1 for option in self.options))


def collate(batch: Sequence[Encoded], layout: Layout) -> dict[str, Tensor]:
    """One model input for a batch of examples, with the places of the answer tokens in it.

    The last token of an option is never an input, so options of one token need no input at all beyond the prompt.
    Longer ones stand side by side behind the prompt: each sees the prompt and itself alone (``attention_mask``), at the
    positions that it would have by itself (``position_ids``). Rows are as long as the longest example, and shorter ones
    are put together in a row where they fit, each seeing itself alone.

    Returns:
        ``input_ids`` (rows, length), padded on the right; ``positions`` (p,), places in the flattened input whose
        logits are needed; ``logit_rows`` (n,) and ``tokens`` (n,), one for each answer token: which of the p predicts
        it, and what it is; ``slots`` (n,), number of its option within the batch; ``options`` (batch, most options),
        those numbers by example, -1 where an example has fewer; ``labels`` (batch,); ``reference`` (batch, 2) if the
        examples have it. Where attention is not plainly
        causal, ``attention_mask``: (rows, 1, length, length), additive, in the layout's dtype, with ``position_ids``
        (rows, length); or for masked models in the plain layout (rows, length), 1 for tokens and 0 for padding.
    """
    rows = _rows(_sequences(batch, layout.shared), layout.packed)
    length = max(sum(sequence.length for sequence in row) for row in rows)
    input_ids, position_ids, owners, branches = [], [], [], []
    places: dict[int, int] = {}
    logit_rows: list[int] = []
    tokens: list[int] = []
    slots: list[int] = []
    blocks = layout.context > 0 or any(len(row) > 1 for row in rows)
    for number, row in enumerate(rows):
        ids: list[int] = []
        positions: list[int] = []
        owner: list[int] = []  # which sequence of the row a token belongs to; 0 is padding
        branch: list[int] = []  # which of its options, 0 for the prompt
        for which, sequence in enumerate(row, start=1):
            begin = number * length + len(ids)
            n = len(sequence.prompt)
            ids += sequence.prompt
            positions += range(n)
            branch += [0] * n
            for behind, (option, slot) in enumerate(zip(sequence.options, sequence.slots, strict=True), start=1):
                if sequence.mask is not None:
                    predictors, predicted = [begin + sequence.mask], option
                else:
                    inner = number * length + len(ids)
                    predictors = [begin + n - 1 - sequence.scored + i for i in range(sequence.scored + 1)]
                    predictors += range(inner, inner + len(option) - 1)
                    predicted = sequence.prompt[n - sequence.scored :] + option
                    ids += option[:-1]
                    positions += range(n, n + len(option) - 1)
                    branch += [behind] * (len(option) - 1)
                    blocks = blocks or (behind > 1 and len(option) > 1)
                for place, token in zip(predictors, predicted, strict=True):
                    logit_rows.append(places.setdefault(place, len(places)))
                    tokens.append(token)
                    slots.append(slot)
            owner += [which] * (len(ids) - len(owner))
        fill = length - len(ids)
        input_ids.append(ids + [layout.pad] * fill)
        position_ids.append(positions + [0] * fill)
        owners.append(owner + [0] * fill)
        branches.append(branch + [0] * fill)
    counts = [len(example.options) for example in batch]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    inputs = {
        "input_ids": torch.tensor(input_ids),
        "positions": torch.tensor(list(places), dtype=torch.int64),
        "logit_rows": torch.tensor(logit_rows, dtype=torch.int64),
        "tokens": torch.tensor(tokens, dtype=torch.int64),
        "slots": torch.tensor(slots, dtype=torch.int64),
        "options": torch.tensor(
            [[s + i if i < c else -1 for i in range(max(counts))] for s, c in zip(starts, counts, strict=True)]
        ),
        "labels": torch.tensor([example.label for example in batch]),
    }
    if all(example.reference is not None for example in batch):
        inputs["reference"] = torch.tensor([example.reference for example in batch])
    owner_ids = torch.tensor(owners)
    if blocks:
        inputs["position_ids"] = torch.tensor(position_ids) + layout.first_position + layout.context
        inputs["attention_mask"] = _block_mask(owner_ids, torch.tensor(branches), layout)
    elif not layout.causal:
        inputs["attention_mask"] = (owner_ids > 0).long()
    return inputs


def _sequences(batch: Sequence[Encoded], shared: bool) -> list[_Sequence]:
    sequences, slot = [], 0
    for example in batch:
        options = [(option, slot + i) for i, option in enumerate(example.options)]
        slot += len(options)
        together = shared or example.mask is not None or not options
        for group in [options] if together else [[option] for option in options]:
            sequences.append(
                _Sequence(example.prompt, [o for o, _ in group], example.scored, example.mask, [s for _, s in group])
            )
    return sequences


def _rows(sequences: list[_Sequence], packed: bool) -> list[list[_Sequence]]:
    """First-fit decreasing: rows no longer than the longest sequence, so no attention is wider than it was."""
    if not packed:
        return [[sequence] for sequence in sequences]
    capacity = max(sequence.length for sequence in sequences)
    rows: list[list[_Sequence]] = []
    room: list[int] = []
    for sequence in sorted(sequences, key=lambda sequence: -sequence.length):
        for i, left in enumerate(room):
            if sequence.length <= left:
                rows[i].append(sequence)
                room[i] -= sequence.length
                break
        else:
            rows.append([sequence])
            room.append(capacity - sequence.length)
    return rows


def _block_mask(owners: Tensor, branches: Tensor, layout: Layout) -> Tensor:
    """0 where a token sees another: in the context; in the same sequence, there in the prompt or in the same option."""
    rows, length = owners.shape
    seen = owners[:, :, None] == owners[:, None, :]
    seen &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    if layout.causal:
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(rows, 1, length, layout.context + length, dtype=layout.dtype)
    mask[..., layout.context :].masked_fill_(~seen[:, None], torch.finfo(layout.dtype).min)
    return mask
