"""From encoded examples to one model input: every prompt once, hardly any padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from .encoding import Encoded

# What all prompts begin with is processed once if it has so many tokens, and is such a share of all that there are.
_WORTH_SHARING, _WORTH_SHARE = 16, 0.25
# It stands in each of the rows that a minibatch is cut into, where so many times as many tokens may follow it.
_BEHIND = 3
# Who owns it, among the sequences of a row: all see it.
_COMMON = -1


@dataclass(frozen=True)
class Layout:
    """How a batch of examples stands in the model's input.

    ``shared`` and ``packed`` need a model that honours position ids and a block mask, which
    :func:`forwardtune.evaluation.find_layout` finds out. Without them every option is a row of its own, padded on the
    right: the plain definition. ``flat`` needs variable-length attention, and no mask.
    """

    pad: int  # token that fills rows up
    dtype: torch.dtype = torch.float32  # of the additive attention mask
    shared: bool = True  # the options of an example stand side by side behind its prompt, which is processed once
    packed: bool = True  # several short examples stand in one row, so that little of it is padding
    flat: bool = False  # all stand in one row without padding, kept apart by their lengths; options that are tokens of input do not share
    causal: bool = True  # whether a token sees only what is before it
    first_position: int = 0  # position id of the first token (RoBERTa counts from 2)
    context: int = 0  # so many tokens were processed before, and their keys and values stand before every row
    begun: bool = False  # what all examples of a batch begin with stands once in a row, before them, if that pays


def collate(batch: Sequence[Encoded], layout: Layout) -> dict[str, Any]:
    """One model input for a batch of examples, with the places of the answer tokens in it.

    The last token of an option is never an input, so options of one token need no input at all beyond the prompt.
    Longer ones stand side by side behind the prompt: each sees the prompt and itself alone (``attention_mask``), at the
    positions that it would have by itself (``position_ids``). Rows are as long as the longest example, and shorter ones
    are put together in a row where they fit, each seeing itself alone. Where all begin alike and the layout is ``begun``, a row is
    that beginning and the rest of several examples, each of which sees the beginning and itself.

    Returns:
        ``input_ids`` (rows, length), padded on the right; ``positions`` (p,), places in the flattened input whose
        logits are needed; ``logit_rows`` (n,) and ``tokens`` (n,), one for each answer token: which of the p predicts
        it, and what it is; ``slots`` (n,), number of its option within the batch; ``options`` (batch, most options),
        those numbers by example, -1 where an example has fewer; ``labels`` (batch,); ``examples_at`` (rows, length), the
        example that a place belongs to, -1 for padding; in its place ``common``, int, where the rows begin with so many tokens that belong to
        all examples; ``reference`` (batch, 2) if the examples have it. Where attention is not plainly causal, ``attention_mask``: (rows, 1, length, length),
        additive, in the layout's dtype, with ``position_ids`` (rows, length); or for masked models in the plain layout
        (rows, length), 1 for tokens and 0 for padding. In the flat layout ``position_ids`` (1, length) and :func:`lengths_of`.
    """
    counts = [len(example.options) for example in batch]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    common = common_beginning(batch) if layout.begun else []
    sequences = _sequences([example.without(len(common)) for example in batch], starts, layout)
    if common:
        rows = _rows_behind(common, sequences)
    else:
        rows = [sequences] if layout.flat else _rows(sequences, layout.packed)
    length = len(common) + max(sum(sequence.length for sequence, *_ in row) for row in rows)
    blocks = layout.context > 0 or any(len(row) > 1 for row in rows)
    # Of every place: token, position, which sequence of the row it belongs to (0 is padding), which option (0: prompt), which
    # example of the batch (-1 is padding).
    ids, positions, owners, branches, examples = columns = [list[int]() for _ in range(5)]
    answers: list[tuple[int, int, int]] = []  # place of what predicts a token, the token, its option's slot
    for row in rows:
        end = len(ids) + length
        ids += common
        positions += range(-len(common), 0)
        owners += [_COMMON] * len(common)
        branches += [0] * len(common)
        examples += [-1] * len(common)
        for which, (sequence, slots, number) in enumerate(row, start=1):
            prompt, scored, begin = sequence.prompt, sequence.scored, len(ids)
            n, behind = len(prompt), begin + len(prompt)
            ids += prompt
            positions += range(n)
            branches += [0] * n
            for branch, (option, slot) in enumerate(zip(sequence.options, slots, strict=True), start=1):
                if sequence.mask is not None:
                    predictors, predicted = [begin + sequence.mask], option
                else:
                    inputs = len(option) - 1
                    predictors = [*range(behind - 1 - scored, behind), *range(len(ids), len(ids) + inputs)]
                    predicted = prompt[n - scored :] + option
                    ids += option[:-1]
                    positions += range(n, n + inputs)
                    branches += [branch] * inputs
                    blocks = blocks or (branch > 1 and inputs > 0)
                answers += [
                    (place, token, slot)
                    for i, (place, token) in enumerate(zip(predictors, predicted, strict=True), start=-scored)
                    if i not in sequence.unscored
                ]
            owners += [which] * (len(ids) - len(owners))
            examples += [number] * (len(ids) - len(examples))
        for column, pad in zip(columns, (layout.pad, 0, 0, 0, -1), strict=True):
            column += [pad] * (end - len(column))
    places = {place: i for i, place in enumerate(dict.fromkeys(place for place, _, _ in answers))}
    numbered = torch.tensor([(places[place], token, slot) for place, token, slot in answers], dtype=torch.int64)
    logit_rows, tokens, slots_of = numbered.view(-1, 3).T.contiguous()
    collated: dict[str, Any] = {
        "input_ids": torch.tensor(ids).view(-1, length),
        "positions": torch.tensor(list(places), dtype=torch.int64),
        "logit_rows": logit_rows,
        "tokens": tokens,
        "slots": slots_of,
        "options": torch.tensor(
            [[s + i if i < c else -1 for i in range(max(counts))] for s, c in zip(starts, counts, strict=True)]
        ),
        "labels": torch.tensor([example.label for example in batch]),
        **({"common": len(common)} if common else {"examples_at": torch.tensor(examples).view(-1, length)}),
    }
    if all(example.reference is not None for example in batch):
        collated["reference"] = torch.tensor([example.reference for example in batch])
    if layout.flat:
        sizes = [sequence.length for sequence, *_ in sequences]
        collated |= {"position_ids": torch.tensor([positions]) + layout.first_position, **lengths_of(sizes)}
    elif blocks:
        places_in, owner, branch_of = (
            torch.tensor(column).view(-1, length) for column in (positions, owners, branches)
        )
        collated["position_ids"] = places_in + layout.first_position + layout.context + len(common)
        collated["attention_mask"] = _block_mask(owner, branch_of, layout)
    elif not layout.causal:
        collated["attention_mask"] = (torch.tensor(owners).view(-1, length) > 0).long()
    return collated


def common_beginning(examples: Sequence[Encoded]) -> list[int]:
    """The tokens that all prompts begin with, as far as nothing there predicts an answer; none if it would not pay to process them once."""
    if len(examples) < 2 or any(example.mask is not None for example in examples):
        return []
    prompts = [example.prompt[: len(example.prompt) - example.scored - 1] for example in examples]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False))
    common = [token for token, *_ in columns]
    share = len(common) * len(examples) / sum(example.length for example in examples)
    return common if len(common) >= _WORTH_SHARING and share >= _WORTH_SHARE else []


def lengths_of(sizes: Sequence[int]) -> dict[str, Any]:
    """Where sequences of these sizes begin and end in the row in which they stand one after the other, as transformers' models pass it on
    to variable-length attention.

    Returns:
        ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32, shape (sequences + 1,); ``max_length_q`` and ``max_length_k``, int.
    """
    ends, longest = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32), max(sizes)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


# A prompt with the options behind it that share it, their slots, and the number of the example.
_Sequence = tuple[Encoded, Sequence[int], int]


def _sequences(batch: Sequence[Encoded], starts: Sequence[int], layout: Layout) -> list[_Sequence]:
    sequences: list[_Sequence] = []
    for number, (example, start) in enumerate(zip(batch, starts, strict=True)):
        shared = layout.shared or (layout.flat and all(len(option) < 2 for option in example.options))
        if shared or example.mask is not None or not example.options:
            sequences.append((example, range(start, start + len(example.options)), number))
        else:
            sequences += [
                (replace(example, options=[one]), [start + i], number) for i, one in enumerate(example.options)
            ]
    return sequences


def _rows(sequences: list[_Sequence], packed: bool) -> list[list[_Sequence]]:
    """First-fit decreasing: rows no longer than the longest sequence, so no attention is wider than it was."""
    if not packed:
        return [[one] for one in sequences]
    lengths = [sequence.length for sequence, *_ in sequences]
    rows: list[list[_Sequence]] = []
    room: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: -lengths[i]):
        row = next((row for row, left in enumerate(room) if lengths[i] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max(lengths))
        rows[row].append(sequences[i])
        room[row] -= lengths[i]
    return rows


def _rows_behind(common: list[int], sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """A few rows of about the same length, each behind what is common to all: the longest sequences first, each to where there is least."""
    lengths = [sequence.length for sequence, *_ in sequences]
    room = max(_BEHIND * len(common), *lengths)
    rows: list[list[_Sequence]] = [[] for _ in range(-(-sum(lengths) // room))]
    filled = [0] * len(rows)
    for i in sorted(range(len(sequences)), key=lambda i: -lengths[i]):
        row = filled.index(min(filled))
        rows[row].append(sequences[i])
        filled[row] += lengths[i]
    return rows


def _block_mask(owners: Tensor, branches: Tensor, layout: Layout) -> Tensor:
    """0 where a token sees another: in what is common to all; in the same sequence, there in the prompt or in the same option."""
    rows, length = owners.shape
    seen = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == _COMMON)
    seen &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    if layout.causal:
        seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(rows, 1, length, layout.context + length, dtype=layout.dtype)
    mask[..., layout.context :].masked_fill_(~seen[:, None], torch.finfo(layout.dtype).min)
    return mask
