"""Text to tokens, whatever the tokenizer puts around a text and reads in it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


class Tokens:
    """A Hugging Face tokenizer's view of texts that are parts of a longer one.

    A tokenizer may open and close every text with marks (BOS, EOS). A text that begins with the opening marks, as a
    conversation does that ``apply_chat_template(..., tokenize=False)`` wrote out, is not opened a second time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        begin = starts[0] if starts else 0
        self._opening = whole[:begin]
        self._closing = len(whole) - begin - len(bare) if starts else 0
        #: The marks that open a text, and those that close it.
        self.marks: tuple[list[int], list[int]] = (self._opening, whole[len(whole) - self._closing :])
        special = control_tokens(tokenizer)
        self._control = re.compile("|".join(map(re.escape, special))) if special else None

    def closed(self, text: str) -> list[int]:
        """The tokens of a whole text, with the marks around it."""
        tokens: list[int] = self._tokenizer(text)["input_ids"]
        count = len(self._opening)
        return tokens[count:] if count and tokens[count : 2 * count] == self._opening else tokens

    def open(self, text: str) -> list[int]:
        """The tokens of a text that goes on, without the marks behind it."""
        tokens = self.closed(text)
        return tokens[: len(tokens) - self._closing]

    def control(self, text: str) -> list[str]:
        """The strings in a text that the tokenizer reads as control tokens, in their order."""
        return self._control.findall(text) if self._control else []

    def from_data(self, text: str, template: str) -> set[str]:
        """Control tokens in a filled template that came with the data and that nobody wrote there on purpose.

        The template's own are meant. So are those of a text that begins with one although the template does not: a
        conversation that was written out.
        """
        if self._control is None:
            return set()
        written_out = self._control.match(text) and not self._control.match(template)
        return set() if written_out else set(Counter(self.control(text)) - Counter(self.control(template)))


def control_tokens(tokenizer: Any) -> list[str]:
    """The strings that the tokenizer reads as control tokens, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(map(str, tokenizer.all_special_tokens))
    return sorted(special, key=lambda token: (-len(token), token))


def padding_id(tokenizer: Any) -> int:
    """The token that fills rows up. Padding is masked, so where the tokenizer names none, any token will do."""
    named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in named if token is not None), 0)


def word_starts(text: str) -> list[int]:
    """Where a text may be cut: before a word; anywhere in a text of one long word."""
    starts = [match.start() for match in re.finditer(r"\S+", text)][1:]
    return starts if starts else list(range(1, len(text)))


def least(candidates: Sequence[int], fits: Callable[[int], bool], guess: float) -> int | None:
    """The smallest of the sorted candidates that fits; None if none does.

    ``fits`` is true from the result on, and ``guess`` is about which share of the candidates lies below it. It is sought
    in steps that double from the guess on, then by bisection: cheap where candidates far smaller than the result are dear
    to try, as texts are of which too little was cut.
    """
    low, high = -1, len(candidates)  # what does not fit, and what does
    place, step = max(0, min(len(candidates) - 1, int(guess * len(candidates)))), 1
    while low < place < high:
        if fits(candidates[place]):
            high, place = place, place - step
        else:
            low, place = place, place + step
        step *= 2
    place = bisect_left(candidates, True, low + 1, high, key=fits)
    return candidates[place] if place < len(candidates) else None
