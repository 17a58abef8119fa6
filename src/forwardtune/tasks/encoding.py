"""From text to tokens: prompts, answer options, demonstrations, and the cutting of what is too long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from ..errors import InputError, warn
from .chat import ChatTask
from .chat_encoding import encode_chat
from .encoded import Encoded as Encoded
from .encoded import named
from .task import MASK, Example, Task
from .tokens import Tokens, least, word_starts

#: Between demonstrations, and before the prompt.
SEPARATOR = "\n\n"
# To a token; a text is seen to be too long by an end of so many times the longest input.
_MANY_CHARACTERS = 32


@dataclass
class Encoder:
    """Turns examples into tokens.

    What is too long is cut on the left of the example's context, word by word; question and answers stay whole.
    Demonstrations are examples that are put with their right answers before every prompt (in-context learning).
    """

    tokenizer: Any
    max_length: int  # longest input
    demonstrations: Sequence[Example] = ()
    truncated: int = field(default=0, init=False)  # how many prompts were cut
    demonstrated: int = field(default=0, init=False)  # how many demonstrations fitted beside the longest example

    def __call__(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """Encode the examples of a task. Data that hold text that the tokenizer reads as a control token are warned of.

        Raises:
            InputError: nothing of a context would be left, a tokenizer without a mask token for a masked task, or a
                label word of several tokens.
        """
        if isinstance(task, ChatTask):
            if self.demonstrations:
                raise InputError(
                    "demonstrations stand before a task file's prompts: leave demonstrations out", "demonstrations"
                )
            encoded, self.truncated = encode_chat(self.tokenizer, self.max_length, task, examples)
            return encoded
        self._warn_of_control_tokens(task, examples)
        return self._filled_masks(task, examples) if task.kind == "masked" else self._continued(task, examples)

    def calibrations(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """The same examples with their prompts' content left out, after the same demonstrations.

        Raises:
            InputError: the task has no such prompt, or is not a choice between continuations.
        """
        if task.free_text or task.conversational or task.preference is not None or task.kind == "masked":
            raise InputError(
                f"task {task.name} cannot be calibrated, only a choice between continuations can: leave calibrations out",
                "calibrations",
            )
        bare = [Example(example.calibration, example.options, example.right) for example in examples]
        if not all(example.prompt.strip() for example in bare):
            raise InputError(
                f"task {task.name} has no prompt without content: add 'calibration: TEXT' to its task file"
            )
        return self._continued(task, bare, self._preamble(task, examples))

    @cached_property
    def _texts(self) -> Tokens:
        return Tokens(self.tokenizer)

    def _warn_of_control_tokens(self, task: Task, examples: Sequence[Example]) -> None:
        answers = " ".join([*(task.answers or {}).values(), *(task.options or ())[1:]])
        written = set(self._texts.control(answers))
        found: Counter[str] = Counter()
        count = 0
        for example in examples:
            tokens = self._texts.from_data(example.prompt, task.prompt)
            for text in (*example.options, *example.targets):
                tokens |= {*self._texts.control(text)} - written
            found.update(tokens)
            count += bool(tokens)
        if count:
            warn(
                f"task {task.name}: the text of {count} of {len(examples)} examples holds what this model's tokenizer reads "
                f"as control tokens ({', '.join(f'{token} in {n}' for token, n in found.items())}): if it is meant as "
                "text, reword it in the data",
            )

    # --- cutting ------------------------------------------------------------------------------------------------------

    def _fitting(
        self, task: Task, where: str, text: str, context: tuple[int, int], encode: Callable[[str], Encoded]
    ) -> Encoded:
        """The text in tokens, with as little as needed cut off the left of its context (start and end)."""
        start, end = context

        def encode_cut(cut: int) -> Encoded:
            return encode(text[:start] + text[start + cut :])

        total = self._far_too_long(text)
        if not total:
            encoded = encode(text)
            if _input_length(encoded, task) <= self.max_length:
                return encoded
            total = len(encoded.prompt)
        self.truncated += 1
        places = word_starts(text[start:end])
        # About which share of the context must go, of so many characters of a text of so many tokens.
        excess = max(0, total - self.max_length) / total * len(text) / max(1, end - start)
        cut = least(places, lambda cut: _input_length(encode_cut(cut), task) <= self.max_length, excess)
        if cut is not None:
            return encode_cut(cut)
        encoded = encode_cut(places[-1] if places else 0)
        answers = _input_length(encoded, task) - len(encoded.prompt)
        raise InputError(
            f"task {task.name}, {where}: an input of {self.max_length} tokens leaves no room for its context "
            f"beside the rest of the prompt{f' and answers of {answers} tokens' if answers else ''}: choose a model with "
            "a longer context, or raise max_length",
            "max_length",
        )

    def _far_too_long(self, text: str) -> int:
        """About how many tokens a text has, if its end alone has far more than fit; 0 if it must be looked at in whole."""
        end = text[-_MANY_CHARACTERS * self.max_length :]
        count = len(self._texts.open(end)) if len(end) < len(text) else 0
        return count * len(text) // len(end) if count > 2 * self.max_length else 0

    # --- causal models ------------------------------------------------------------------------------------------------

    def _continued(self, task: Task, examples: Sequence[Example], preamble: str | None = None) -> list[Encoded]:
        preamble = self._preamble(task, examples) if preamble is None else preamble
        encoded = []
        for number, example in enumerate(examples, start=1):
            start, end = (place + len(preamble) for place in example.context)
            where = named(example, number)
            encode = partial(self._split, task, example, where)
            encoded.append(self._fitting(task, where, preamble + example.prompt, (start, end), encode))
        return encoded

    def _split(self, task: Task, example: Example, where: str, prompt: str) -> Encoded:
        # Prompt and answer are tokenised together, as the model saw text in training. What all continuations share is
        # the prompt; a token that spans the border counts as part of the answers.
        alone = self._texts.open(prompt)
        texts = (example.target + task.stop,) if example.targets else example.options
        if not texts:
            return Encoded(alone, [], example=example)
        whole = [self._texts.open(prompt + text) for text in texts]
        border = min(_common_prefix(alone, tokens) for tokens in whole)
        # Options that begin alike, as sentences with one word exchanged do, share their beginning's computation too.
        alike = min(min(_common_prefix(whole[0], tokens), len(tokens) - 1) for tokens in whole)
        shared = border if task.free_text else max(border, alike)
        options = [tokens[shared:] for tokens in whole]
        if not border or not all(options):
            raise InputError(
                f"task {task.name}, {where}: prompt and answers {texts} share no border of tokens; "
                "change the end of the prompt"
            )
        if task.preference is not None and self.tokenizer.eos_token_id is not None:
            options = [[*option, self.tokenizer.eos_token_id] for option in options]  # where a text ends is part of it
        truths = tuple(text.strip() for text in example.targets)
        return Encoded(whole[0][:shared], options, example.right or (0,), truths, shared - border, example=example)

    def _preamble(self, task: Task, examples: Sequence[Example]) -> str:
        """As many of the last demonstrations as fit before every example, as text."""
        texts = [
            demo.prompt + (demo.options[demo.label] if demo.options else demo.target) for demo in self.demonstrations
        ]
        longest = self._longest(task, examples, "") if texts else 0
        while texts:
            preamble = SEPARATOR.join(texts) + SEPARATOR
            # A vocabulary may part a prompt's first word otherwise behind a line break, so the quick sum is verified.
            quick = len(self._texts.open(preamble)) + longest
            if quick <= self.max_length and self._longest(task, examples, preamble) <= self.max_length:
                self.demonstrated = len(texts)
                return preamble
            texts = texts[1:]
        self.demonstrated = 0
        return ""

    def _longest(self, task: Task, examples: Sequence[Example], preamble: str) -> int:
        uncut = (
            self._split(task, example, named(example, i), preamble + example.prompt)
            for i, example in enumerate(examples, start=1)
        )
        return max(_input_length(encoded, task) for encoded in uncut)

    # --- masked models ------------------------------------------------------------------------------------------------

    def _filled_masks(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        mask = self.tokenizer.mask_token_id
        if mask is None:
            raise InputError(f"task {task.name} needs a mask token, and this tokenizer has none: choose a masked model")
        if self.demonstrations:
            raise InputError("demonstrations are for causal models: leave demonstrations out", "demonstrations")
        assert task.answers is not None
        words = [self._word(task, text) for text in task.answers.values()]
        filled = []
        for number, example in enumerate(examples, start=1):

            def encode(text: str, example: Example = example) -> Encoded:
                tokens = self._texts.closed(text.replace(MASK, self.tokenizer.mask_token))
                return Encoded(tokens, words, example.right, mask=0, example=example)

            where = named(example, number)
            encoded = self._fitting(task, where, example.prompt, example.context, encode)
            if encoded.prompt.count(mask) != 1:
                raise InputError(f"task {task.name}, {where}: its text has a mask token of its own: drop the row")
            filled.append(replace(encoded, mask=encoded.prompt.index(mask)))
        return filled

    def _word(self, task: Task, text: str) -> list[int]:
        """The one token of a label word. Byte-level vocabularies know most words with the space before them."""
        for form in (" " + text, text):
            tokens = self.tokenizer(form, add_special_tokens=False)["input_ids"]
            if len(tokens) == 1 and tokens[0] != self.tokenizer.unk_token_id:
                return tokens
        pieces = " + ".join(self.tokenizer.convert_ids_to_tokens(tokens))
        raise InputError(
            f"task {task.name}: the answer {text!r} is not one token of this model ({pieces}), so it cannot fill a mask: "
            "choose another word in a task file"
        )


def _input_length(encoded: Encoded, task: Task) -> int:
    """Tokens of the longest sequence that the model sees: the prompt with the longest option, or what is generated."""
    if encoded.mask is not None:
        return len(encoded.prompt)
    longest = max(map(len, encoded.options), default=0)
    return len(encoded.prompt) + max(longest, task.max_new_tokens if task.free_text else 0)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
