"""Examples of the task ``chat`` in tokens: conversations, texts, preferences, and prompts to go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError, warn
from .chat import ChatTask
from .chat_tokens import ChatTokens
from .encoded import Encoded, named
from .task import Example
from .tokens import Tokens


def encode_chat(
    tokenizer: Any, max_length: int, task: ChatTask, examples: Sequence[Example]
) -> tuple[list[Encoded], int]:
    """The examples in tokens, cut on the right to ``max_length``, and how many were cut.

    Examples of which nothing is learnt in that length are left out, with a warning. So are none whose texts hold what the
    tokenizer reads as control tokens, but a warning counts them.

    Raises:
        InputError: an example that the chat template cannot write, or none of which anything is left.
    """
    chat = ChatTokens(tokenizer)
    encode = _ENCODERS.get(task.form, _learnt)
    encoded = [encode(chat, task, one, named(one, i), max_length) for i, one in enumerate(examples, start=1)]
    kept = [one for one, _ in encoded if one is not None]
    if len(kept) < len(encoded):
        first = next(
            named(example, i)
            for i, (example, one) in enumerate(zip(examples, encoded, strict=True), 1)
            if one[0] is None
        )
        said = (
            f"{len(encoded) - len(kept)} of {len(encoded)} examples have nothing to learn within {max_length} tokens, the first of "
            f"them {first}"
        )
        if not kept:
            raise InputError(f"{said}: raise max_length", "max_length")
        warn(f"{said}: they are left out")
    _warn_of_control_tokens(Tokens(tokenizer), examples)
    return kept, sum(was_cut for _, was_cut in encoded)


_Cut = tuple[Encoded | None, bool]


def _learnt(chat: ChatTokens, task: ChatTask, example: Example, where: str, limit: int) -> _Cut:
    """A conversation or text: the prompt is what stands before the first learnt token, and the option goes to the last."""
    tokens, learnt = chat.of_row(example.row, task.form, where)
    places = [
        place for place, counts in enumerate(learnt[:limit]) if counts and place
    ]  # nothing predicts the first token
    was_cut = len(tokens) > limit
    if not places:
        return None, was_cut
    begin, end = places[0], places[-1] + 1
    unscored = frozenset(range(end - begin)) - {place - begin for place in places}
    option = tokens[begin:end]
    return Encoded(tokens[:begin], [option], (0,), example.targets, unscored=unscored, example=example), was_cut


def _pair(chat: ChatTokens, task: ChatTask, example: Example, where: str, limit: int) -> _Cut:
    prompt, *texts = chat.of_pair(example.row, where)
    room = limit - len(prompt)
    was_cut = room < max(map(len, texts))
    if room < 1 or not prompt or not all(texts):
        return None, was_cut
    return Encoded(prompt, [text[:room] for text in texts], (0,), example=example), was_cut


def _request(chat: ChatTokens, task: ChatTask, example: Example, where: str, limit: int) -> _Cut:
    """A prompt, if there is room behind it for what is written."""
    tokens = chat.of_prompt(example.row["prompt"], where)
    return (None, True) if len(tokens) + task.max_new_tokens > limit else (Encoded(tokens, [], example=example), False)


_ENCODERS: Mapping[str, Callable[..., _Cut]] = {"preference": _pair, "prompt": _request}


def _warn_of_control_tokens(texts: Tokens, examples: Sequence[Example]) -> None:
    """Warn of messages whose content holds what the tokenizer reads as control tokens: it could end a turn, or begin one."""
    held = [example for example in examples if any(map(texts.control, _contents(example.row)))]
    if held:
        warn(
            f"messages of {len(held)} of {len(examples)} examples hold what this model's tokenizer reads as control tokens, the first in "
            f"{named(held[0], 1)}: if it is meant as text, reword it in the data"
        )


def _contents(row: Mapping[str, Any]) -> list[str]:
    lists = (value for name, value in row.items() if name in ("messages", "prompt", "completion", "chosen", "rejected"))
    return [str(message["content"]) for value in lists if isinstance(value, list) for message in value]
