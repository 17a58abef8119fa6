"""Conversations in tokens, by the tokenizer's chat template, and which of the tokens are learnt: the assistant's alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InputError
from .template import RowError
from .tokens import control_tokens

Messages = Sequence[Mapping[str, Any]]
#: Tokens, and whether each is learnt.
Learnt = tuple[list[int], list[bool]]

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Two texts that begin and end otherwise: where they stand in a rendered conversation, a message's content stands.
_PROBES = ("\u2660one\u2660", "\u2665two\u2665")


class ChatTokens:
    """Rows of the task ``chat`` in tokens, as TRL's SFTTrainer and DPOTrainer make them.

    A template that marks what the assistant writes (``{% generation %}``) decides what is learnt. Of another one, a turn is
    what a conversation up to it has more than one that ends with the request to write it (``add_generation_prompt``), with the
    marks that end the turn. Where a template writes earlier turns otherwise once others follow, as those do that drop
    thoughts, it is the turn's content and the control token behind it.

    Args:
        tokenizer: with a chat template, where rows are conversations.
        assistant_only: whether the assistant's turns alone are learnt of ``messages``, or all of them.
        completion_only: whether the completion alone is learnt.
    """

    def __init__(self, tokenizer: Any, *, assistant_only: bool = True, completion_only: bool = True) -> None:
        self._tokenizer, self._assistant_only, self._completion_only = tokenizer, assistant_only, completion_only
        self._marked = isinstance(tokenizer.chat_template, str) and bool(_MARKED.search(tokenizer.chat_template))
        self._end = (
            re.compile(rf"\s*(?:{found})\n?")
            if (found := "|".join(map(re.escape, control_tokens(tokenizer))))
            else None
        )

    def of_row(self, row: Mapping[str, Any], form: str, where: str) -> Learnt:
        """The tokens of a row of ``messages``, ``prompt`` and ``completion``, or ``text``, and which are learnt.

        Raises:
            RowError: the template cannot write the conversation, or not so that the assistant's turns can be told apart.
        """
        if form == "text":
            tokens = self._text(self._closed(row["text"]))
            return tokens, [True] * len(tokens)
        how = _extras(row)
        if form == "messages":
            return self.conversation(row["messages"], where, **how)
        if isinstance(row["prompt"], str):
            tokens = self._text(row["prompt"] + self._closed(row["completion"]))
            begin = _common(self._text(row["prompt"]), tokens)
            return tokens, [not self._completion_only or i >= begin for i in range(len(tokens))]
        whole, others = [*row["prompt"], *row["completion"]], [m for m in row["completion"] if m["role"] != "assistant"]
        if self._assistant_only and others:
            tokens, learnt = self.conversation(whole, where, **how)
        else:
            tokens = self._all(whole, where, how)
            learnt = [True] * len(tokens)
        begin = _common(self._requested(row["prompt"], where, how), tokens) if self._completion_only else 0
        return tokens, [counts and i >= begin for i, counts in enumerate(learnt)]

    def of_pair(self, row: Mapping[str, Any], where: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens of a preference's prompt, of its chosen and of its rejected text. Raises RowError as :meth:`of_row`."""
        prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
        if prompt is None:  # what both begin with
            if isinstance(chosen, str):
                raise RowError(f"{where}: chosen and rejected are texts without a prompt: add a column 'prompt'")
            shared = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if isinstance(prompt, str):
            before = self._text(prompt)
            texts = [self._text(prompt + self._closed(text)) for text in (chosen, rejected)]
        else:
            how = _extras(row)
            before = self._requested(prompt, where, how)
            texts = [self._all([*prompt, *turns], where, how) for turns in (chosen, rejected)]
        border = min(_common(before, text) for text in texts)
        return before[:border], texts[0][border:], texts[1][border:]

    def of_prompt(self, prompt: str | Messages, where: str) -> list[int]:
        """The tokens of a prompt that the model is to go on from."""
        return self._text(prompt) if isinstance(prompt, str) else self._requested(prompt, where, {})

    def conversation(self, messages: Messages, where: str, **how: Any) -> Learnt:
        """The tokens of a whole conversation, and which are learnt. ``how`` goes to the chat template."""
        if not self._assistant_only:
            tokens = self._all(messages, where, how)
            return tokens, [True] * len(tokens)
        if self._marked:
            found = self._apply(
                messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **how
            )
            tokens, learnt = found["input_ids"], [bool(one) for one in found["assistant_masks"]]
        else:
            text = self._apply(messages, where, tokenize=False, **how)
            tokens, places = self._with_places(text)
            spans = self._turns(messages, text, where, how)
            learnt = [any(end > first and start < last for first, last in spans) for start, end in places]
        if not any(learnt):
            raise RowError(
                f"{where}: the chat template marks nothing as the assistant's, so nothing could be learnt: check the template"
            )
        return tokens, learnt

    # --- turns --------------------------------------------------------------------------------------------------------

    def _turns(self, messages: Messages, text: str, where: str, how: dict[str, Any]) -> list[tuple[int, int]]:
        """Where each turn of the assistant begins and ends in the text of the conversation."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._prefix(messages[:i], text, where, {**how, "add_generation_prompt": True})
            after = self._prefix(messages[: i + 1], text, where, how)
            if before is None or after is None or after <= before:
                begin, end = self._content(messages, i, text, where, how)
                before, after = begin if before is None else before, end if after is None else after
            spans.append((before, after))
        return spans

    def _prefix(self, messages: Messages, text: str, where: str, how: dict[str, Any]) -> int | None:
        """How long the text of these first messages is, if that of the whole conversation begins with it."""
        try:
            begin: str = self._apply(messages, where, tokenize=False, **how)
        except RowError:  # it takes no conversation that ends there
            return None
        return len(begin) if begin and text.startswith(begin) else None

    def _content(self, messages: Messages, i: int, text: str, where: str, how: dict[str, Any]) -> tuple[int, int]:
        """Where the content of a message stands in the text, up to the control token that ends its turn."""
        probes = []
        for probe in _PROBES:
            changed = [{**message, "content": probe} if j == i else message for j, message in enumerate(messages)]
            probes.append(self._apply(changed, where, tokenize=False, **how))
        begin, behind = _common(*probes), _common(probes[0][::-1], probes[1][::-1])
        end = len(text) - behind
        content = text[begin:end]
        if not content.strip() or content.strip() not in str(messages[i]["content"]):
            raise RowError(
                f"{where}: the chat template writes what the assistant said otherwise, so its tokens cannot be told from others: put "
                "{% generation %} and {% endgeneration %} around them in the template"
            )
        closing = self._end.match(text, end) if self._end else None
        return begin, closing.end() if closing else end

    # --- the tokenizer ------------------------------------------------------------------------------------------------

    def _apply(self, messages: Messages, where: str, **how: Any) -> Any:
        if self._tokenizer.chat_template is None:
            raise InputError(
                "the data are conversations, and this model's tokenizer has no chat template: choose a model tuned for chat, set "
                "tokenizer.chat_template, or give prompt and completion as texts"
            )
        try:
            return self._tokenizer.apply_chat_template(messages, **how)
        except Exception as error:  # templates raise what they like
            raise RowError(
                f"{where}: the chat template cannot write this conversation ({error}): mend it, or drop the row"
            ) from None

    def _all(self, messages: Messages, where: str, how: dict[str, Any]) -> list[int]:
        return list(self._apply(messages, where, tokenize=True, return_dict=True, **how)["input_ids"])

    def _requested(self, messages: Messages, where: str, how: dict[str, Any]) -> list[int]:
        """The conversation, and the request to go on."""
        return self._all(messages, where, {"add_generation_prompt": True, **how})

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _closed(self, text: str) -> str:
        """The text with the mark that ends it."""
        end = self._tokenizer.eos_token
        return text if end is None or text.endswith(end) else text + end

    def _with_places(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text that has its marks, and the first and last character of each."""
        if self._tokenizer.is_fast:
            found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(found["input_ids"]), [tuple(place) for place in found["offset_mapping"]]
        tokens = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        ends = [len(self._tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))]
        return tokens, list(zip([0, *ends], ends, strict=False))


def _extras(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to the template: tools, and arguments of its own."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **(row.get("chat_template_kwargs") or {})}


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many of their first elements are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
