"""Templates of task files: text with ``{column}`` placeholders. Substitution alone; nothing is executed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import InputError, nearest


class RowError(InputError):
    """A row that a task cannot use."""


_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_NAME = re.compile(r"\w[\w .-]*")  # what is hardly anything but a column's


def _first_word_lowered(text: str) -> str:
    """The first word in lower case, unless it is the pronoun "I"."""
    word, space, rest = text.partition(" ")
    return text if word == "I" else word.lower() + space + rest


#: What can be done to a value, as in ``{premise|without_stop}``.
FILTERS: dict[str, Callable[[str], str]] = {
    "upper_first": lambda text: text[:1].upper() + text[1:],
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "lower_word": _first_word_lowered,
    "lower": str.lower,
    "without_stop": lambda text: text.removesuffix(".").rstrip(),
    "without_last": lambda text: text[:-1],
}

# What is said where braces stand that were hardly meant for a column, as in 'Return {"label": 0}'.
_BRACES = ". Braces that are no column are written {{ and }}"

Row = Mapping[str, Any]
Replacements = Mapping[str, Mapping[str, str]]


class Fields:
    """The values of one row, as templates see them; ``where`` and ``task`` name row and task in messages.

    ``a.b`` is key ``b`` of a column ``a`` that holds a mapping. The texts that ``replace`` puts in the place of others may
    hold placeholders themselves.
    """

    def __init__(self, row: Row, where: str, task: str, replace: Replacements | None = None) -> None:
        self._row, self._where, self._task, self._replace = row, where, task, replace or {}

    def value(self, column: str) -> Any:
        """The value of a column. Raises RowError if there is none, or it is empty."""
        value: Any = self._row
        for key in [column] if column in self._row else column.split("."):
            if not isinstance(value, Mapping) or key not in value:
                known, braces = list(map(str, self._row)), "" if _NAME.fullmatch(column) else _BRACES
                raise RowError(
                    f"{self._where} has no column {column!r}, which task {self._task} needs (it has "
                    f"{', '.join(known)}){nearest(column, known)}{braces}"
                )
            value = value[key]
        if value is None or (isinstance(value, str) and not value.strip()) or value == []:
            raise RowError(f"{self._where}: column {column!r} is empty; fill it or drop the row")
        return value

    def text(self, column: str, option: str | None = None) -> str:
        """The value of a column as text, stripped and with replacements. Raises RowError for a conversation, too."""
        value = self.value(column)
        if isinstance(value, list) and isinstance(value[0], Mapping) and "content" in value[0]:
            raise RowError(
                f"{self._where}: column {column!r} holds a list of messages, and a prompt is text: write the conversation "
                "out, with tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)"
            )
        text = str(value).strip()
        for old, new in self._replace.get(column, {}).items():
            if old in text:
                text = text.replace(old, self.fill(new, option))
        return text

    def fill(self, template: str, option: str | None = None) -> str:
        """The template with every placeholder substituted; ``{option}`` is the option at hand."""
        return "".join(text for text, _ in self.pieces(template, option))

    def pieces(self, template: str, option: str | None = None) -> list[tuple[str, str | None]]:
        """The filled template in pieces: (text, column that it comes from, None for the template's own words)."""
        pieces: list[tuple[str, str | None]] = []
        for words, placeholder in _parts(template):
            pieces.append((words, None))
            if placeholder == "option" and option is not None:
                pieces.append((option, "option"))
            elif placeholder is not None:
                column, *filters = placeholder.split("|")
                text = self.text(column, option)
                for name in filters:
                    text = FILTERS[name](text)
                pieces.append((text, column))
        return pieces


def columns_of(template: str) -> list[str]:
    """The columns that a template names, in their order. Raises ValueError for what names none, and unknown filters."""
    columns = []
    for _, placeholder in _parts(template):
        if placeholder is None:
            continue
        column, *filters = placeholder.split("|")
        if not column:
            raise ValueError("has a {} without the name of a column: name one, or write {{}} for braces")
        if '"' in placeholder or "\n" in placeholder:
            raise ValueError(f"has {'{' + placeholder + '}'!r}, which names no column{_BRACES}")
        for name in filters:
            if name not in FILTERS:
                raise ValueError(
                    f"has the unknown filter {name!r} (known: {', '.join(FILTERS)}){nearest(name, FILTERS)}"
                )
        columns.append(column)
    return list(dict.fromkeys(columns))


def tail_of(template: str) -> str:
    """The template's own words behind its last placeholder."""
    *_, (words, _) = _parts(template)
    return words


def _parts(template: str) -> Iterator[tuple[str, str | None]]:
    """The template's own words, and what stands in the braces behind them; None at the end."""
    words, end = "", 0
    for match in _PLACEHOLDER.finditer(template):
        words += template[end : match.start()]
        end = match.end()
        if match[1] is None:  # an escaped brace
            words += match[0][0]
        else:
            yield words, match[1]
            words = ""
    yield words + template[end:], None
