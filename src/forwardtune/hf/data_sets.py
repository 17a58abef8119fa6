"""L6: which of a trainer's data sets are made into tokens first, and by what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import InputError
from ..tasks.chat import form_of
from .chat_data import ChatCollator, ChatData, columns_of, is_chat
from .preference_data import PreferenceData


def prepared_data(
    asked: dict[str, Any], objective: Any, formatting: Callable[[Any], str] | None
) -> ChatData | PreferenceData | None:
    """Put tokens in the place of conversations, texts and preferences among a trainer's arguments, with a collator for them.

    Nothing is changed if there are none, or if there is an ``objective`` or a ``data_collator``, which take rows as they are.

    Args:
        asked: the arguments of transformers' Trainer, by name.
        formatting: row -> text, in place of the columns.

    Returns:
        What prepares other data sets like them; None if nothing was changed.

    Raises:
        InputError: a row that is not what its columns say, no tokenizer, or ``formatting`` without rows for it.
    """
    args, has_own = asked["args"], objective is not None or asked.get("data_collator") is not None
    named = [] if has_own else [name for name in ("train_dataset", "eval_dataset") if asked.get(name) is not None]
    if named and formatting is None and form_of(columns_of(asked[named[0]])) == "preference":
        return PreferenceData(asked)
    chat = [name for name in named if is_chat(asked[name], args.dataset_text_field, formatted=formatting is not None)]
    if not chat:
        if formatting is not None:
            raise InputError(
                "formatting_func makes texts of rows, and the data have tokens, a data_collator or an objective already: leave one out"
            )
        return None
    tokenizer = asked.get("processing_class")
    if tokenizer is None:
        raise InputError(
            "conversations and texts need a tokenizer: pass processing_class=tokenizer", "processing_class"
        )
    data = ChatData(
        tokenizer,
        args.max_length,
        args.dataset_text_field,
        args.assistant_only_loss,
        args.completion_only_loss,
        formatting,
        args.packing and "train_dataset" in chat,
        args.packing if args.eval_packing is None else args.eval_packing,
    )
    for name in chat:
        asked[name] = (
            data.prepare(asked[name], packing=data.packing)
            if name == "train_dataset"
            else data.prepare_eval(asked[name])
        )
    asked["data_collator"] = ChatCollator(tokenizer)
    return data
