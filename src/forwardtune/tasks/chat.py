"""Conversations and plain texts as they are: the task ``chat``, which needs no prompt. Their columns say what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError, nearest
from .task import Example, Task
from .template import RowError

#: The name of the task.
CHAT = "chat"

# The columns of each form, the first that fits; TRL's names.
_FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "preference": ("chosen", "rejected"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
    "prompt": ("prompt",),
}
# What ShareGPT calls the roles.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant"}


def form_of(columns: Iterable[str]) -> str | None:
    """What rows with such columns are: ``messages``, ``preference``, ``completion``, ``text`` or ``prompt``; None if none of it."""
    there = set(columns)
    found = next((form for form, needed in _FORMS.items() if there.issuperset(needed)), None)
    return "messages" if found == "conversations" else found


@dataclass(frozen=True)
class ChatTask(Task):
    """Rows that are conversations or texts.

    - ``messages`` (or ShareGPT's ``conversations``): a list of ``{"role", "content"}``. Every turn of the assistant is trained on.
    - ``prompt`` and ``completion``: texts, or lists of messages. The completion is trained on.
    - ``chosen`` and ``rejected``, with a ``prompt`` or with turns in common: preferences.
    - ``text``: all of it is trained on.
    - ``prompt`` alone: what the model writes is rewarded.

    How a row becomes tokens is in :mod:`.chat_tokens`. Cells of CSV may hold lists as JSON.
    """

    form: str = ""  # as :func:`form_of` gives it; empty until the data are known

    @property
    def free_text(self) -> bool:
        return self.form == "prompt"

    @property
    def conversational(self) -> bool:
        return self.form in ("messages", "completion", "text")

    def of_form(self, form: str) -> ChatTask:
        """The task, with what is measured and lowered for rows of that form."""
        if form == "preference":
            return replace(self, form=form, preference=("chosen", "rejected"), metric="accuracy", loss="preference")
        if form == "prompt":
            return replace(self, form=form, metric="reward", loss="none", stop="")
        return replace(self, form=form)

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The row with its conversations as lists of messages, and their texts. Raises RowError: it is not of the task's form."""
        row = _read(row, self.form, where)
        before, after = _texts(row, self.form, where)
        if self.form == "preference":
            return Example(before, tuple(after), (0,), row=row, where=where)
        return Example(before, targets=tuple(after), row=row, where=where)


#: The task, before its data are known.
TASK = ChatTask(CHAT, "", "", None, "token_accuracy", "likelihood", max_new_tokens=128)


def recognised(task: ChatTask, columns: Iterable[str], source: str) -> ChatTask:
    """The task for data with such columns.

    Raises:
        InputError: they are none of the columns that say what a row is.
    """
    there = list(columns)
    form = form_of(there)
    if form is None:
        known = list(dict.fromkeys(name for names in _FORMS.values() for name in names))
        near = next((hint for column in there if (hint := nearest(column, known))), "")
        raise InputError(
            f"{source} has the columns {', '.join(there) or 'none'}, and task {CHAT} knows messages; prompt and completion; prompt, chosen "
            f"and rejected; text: rename yours, or write a task file with a prompt{near}"
        )
    return task.of_form(form)


# --- rows ------------------------------------------------------------------------------------------------------------


def _read(row: Mapping[str, Any], form: str, where: str) -> dict[str, Any]:
    """The row with conversations as lists of messages with role and content."""
    read = dict(row)
    if form == "messages" and "messages" not in read:
        read["messages"] = read.pop("conversations", None)
    for name in ("prompt", *_FORMS[form]):
        if name in _FORMS[form] or name in read:
            if (value := read.get(name)) is None or value in ("", []):
                raise RowError(f"{where}: column {name!r} is empty; fill it or drop the row")
            read[name] = _messages(value, name, where, needed=form == "messages")
    kinds = {isinstance(read[name], list) for name in ("prompt", *_FORMS[form]) if name in read}
    if len(kinds) > 1:
        raise RowError(f"{where}: one of its columns is text and another a list of messages: make both the same")
    return read


def _messages(value: Any, name: str, where: str, *, needed: bool) -> Any:
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ", "[\n") and (needed or '"role"' in value):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"{where}: column {name!r} begins like JSON and is none ({error}): mend it") from None
    if isinstance(value, list):
        return [_message(one, name, where) for one in value]
    if needed or not isinstance(value, str):
        raise RowError(
            f"{where}: column {name!r} must hold {'' if needed else 'text or '}a list of messages, each with role and content, not "
            f"{value!r:.60}"
        )
    return value


def _message(one: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        raise RowError(f"{where}: column {name!r} must hold messages with role and content, not {one!r:.60}")
    message = {
        key: value for key, value in one.items() if value is not None
    }  # what Arrow fills other rows' keys up with
    role = message.pop("role", None) or message.pop("from", None)
    content = message.pop("content", None) if "content" in message else message.pop("value", None)
    if not isinstance(role, str) or (content is None and "tool_calls" not in message):
        raise RowError(f"{where}: a message of column {name!r} has no role or no content: {one!r:.80}")
    return {"role": _ROLES.get(role, role), "content": "" if content is None else content, **message}


def _texts(row: Mapping[str, Any], form: str, where: str) -> tuple[str, list[str]]:
    """What stands before what is learnt, and that, as text for people."""
    if form == "messages":
        turns = [i for i, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not turns:
            raise RowError(
                f"{where}: no turn of column 'messages' is the assistant's, so nothing could be learnt of it: drop the row"
            )
        return transcript(row["messages"][: turns[-1]]), [transcript(row["messages"][turns[-1] : turns[-1] + 1])]
    if form == "text":
        return "", [row["text"]]
    names = [name for name in _FORMS[form] if name != "prompt"]
    return transcript(row.get("prompt", "")), [transcript(row[name]) for name in names]


def transcript(messages: Any) -> str:
    """A conversation as text for people: a line for each turn, but the content alone of a single one by the assistant."""
    if isinstance(messages, str):
        return messages
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return str(messages[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
