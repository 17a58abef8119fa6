"""L6: what users give a Trainer that it would take otherwise than MeZO means it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.trainer_utils import has_length

from ..errors import warn
from ..models.quantised import keep_as_stored

_ABSENT = object()
# Columns of text in tokens, as tokenizers, processors and the data sets prepared here name them.
_OF_TEXT = {
    "input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids", "special_tokens_mask", "labels", "label",
    "completion_mask", "assistant_masks", "seq_lengths", "length",
}  # fmt: skip


def is_text(dataset: Any) -> bool:
    """Whether a data set holds nothing but tokens, as far as its columns, or those of its first row, say."""
    columns = getattr(dataset, "column_names", None)
    if columns is None and has_length(dataset) and hasattr(dataset, "__getitem__") and len(dataset):
        row = dataset[0]
        columns = row.keys() if isinstance(row, Mapping) else None
    return columns is not None and set(columns) <= _OF_TEXT


@contextmanager
def quantised_base(model: Any) -> Iterator[None]:
    """Inside, Trainer takes a quantised model of any format, with an adapter or without: MeZO needs no gradient of it.

    Trainer's check (``validate_quantization_for_training``) asks this attribute of the model, which transformers sets on one that has an
    adapter of its own, and asks no further. It is there while Trainer is made, on this model alone.
    """
    mark = "_hf_peft_config_loaded"
    unmarked = getattr(model, "is_quantized", False) and not getattr(model, mark, False)
    if not unmarked:
        yield
        return
    keep_as_stored(model)
    before = vars(model).get(mark, _ABSENT)
    setattr(model, mark, True)
    try:
        yield
    finally:
        if before is _ABSENT:
            delattr(model, mark)
        else:
            setattr(model, mark, before)


def warn_of_missing_ends(inputs: Mapping[str, Any], tokenizer: Any) -> None:
    """Warn of a collator that leaves no EOS in the labels because padding has the same token."""
    end = getattr(tokenizer, "eos_token_id", None)
    tokens, seen, labels = (inputs.get(name) for name in ("input_ids", "attention_mask", "labels"))
    if (
        end is None
        or end != getattr(tokenizer, "pad_token_id", None)
        or tokens is None
        or seen is None
        or labels is None
    ):
        return
    if not tokens.shape == seen.shape == labels.shape:
        return
    ends = (tokens == end) & (seen == 1)
    if ends.any() and (labels[ends] == -100).all():
        warn(
            f"padding and end of text are the same token ({tokenizer.eos_token}), and the data collator took it out of the "
            f"labels: none of the {int(ends.sum())} ends in the first minibatch is a target, so the model is not taught to "
            "stop. Give the tokenizer another pad_token before the collator is made, such as its unk_token"
        )
