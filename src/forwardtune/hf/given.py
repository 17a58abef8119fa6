"""L6: what users give a Trainer that it would take otherwise than MeZO means it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import warn


@contextmanager
def quantised_base(model: Any) -> Iterator[None]:
    """Inside, Trainer takes a quantised model without an adapter; MeZO tunes its unquantised weights without a gradient.

    Trainer's check looks at this attribute, which transformers sets on models with an adapter of its own.
    """
    mark = "_hf_peft_config_loaded"
    unmarked = getattr(model, "is_quantized", False) and not getattr(model, mark, False)
    if unmarked:
        setattr(model, mark, True)
    try:
        yield
    finally:
        if unmarked:
            setattr(model, mark, False)


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
