"""From text to tokens: prompts, answer options, demonstrations, and the cutting of what is too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..errors import InputError, warn
from .task import MASK, Example, Task
from .tokens import Tokens, least, word_starts

#: Between demonstrations, and before the prompt.
SEPARATOR = "\n\n"
_NOTHING = Example("")
# To a token; a text is seen to be too long by an end of so many times the longest input.
_MANY_CHARACTERS = 32


@dataclass(frozen=True)
class Encoded:
    """One example in tokens.

    Attributes:
        prompt: tokens of the prompt, possibly cut; for a masked model the whole input.
        options: tokens of every continuation (the answer options, or the target text alone), or the one token that
            fills the mask.
        right: which options are right; training takes the first.
        texts: the target texts, for scoring free text.
        scored: so many of the prompt's last tokens are part of every option: options that begin alike.
        mask: place of the mask in the prompt; None for causal models.
        example: what was encoded.
        reference: log-likelihoods of the chosen and the rejected text under the reference model.
    """

    prompt: list[int]
    options: list[list[int]]
    right: tuple[int, ...] = (0,)
    texts: tuple[str, ...] = ()
    scored: int = 0
    mask: int | None = None
    example: Example = _NOTHING
    reference: tuple[float, float] | None = None

    @property
    def label(self) -> int:
        """The right option that is trained on."""
        return self.right[0]

    @property
    def length(self) -> int:
        """Tokens in the model's input when the options share their prompt."""
        return len(self.prompt) + (0 if self.mask is not None else sum(len(option) - 1 for option in self.options))


@dataclass
class Encoder:
    """Turns examples into tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest input. What is too long is cut on the left of the example's context, word by word; question
            and answers stay whole.
        demonstrations: examples with their right answers, put before every prompt (in-context learning).

    ``truncated`` counts the prompts that were cut; ``demonstrated`` is the number of demonstrations that fitted beside
    the longest example: all examples get the same ones.
    """

    tokenizer: Any
    max_length: int
    demonstrations: Sequence[Example] = ()
    truncated: int = field(default=0, init=False)
    demonstrated: int = field(default=0, init=False)

    def __call__(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """Encode the examples of a task.

        Warns:
            UserWarning: data hold text, such as ``</s>``, that the tokenizer reads as a control token. Control tokens of
                the task's prompt are meant, and so are those of a text that begins with one: a conversation that was
                written out.

        Raises:
            InputError: nothing of a context would be left, a tokenizer without a mask token for a masked task, or a
                label word of several tokens.
        """
        self._warn_of_control_tokens(task, examples)
        if task.kind == "masked":
            return self._filled_masks(task, examples)
        preamble = self._preamble(task, examples)
        return [self._continuations(task, example, preamble, i) for i, example in enumerate(examples, start=1)]

    def calibrations(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        """The same examples with their prompts' content left out, after the same demonstrations.

        Raises:
            InputError: the task has no such prompt, or is not a choice between continuations.
        """
        if task.free_text or task.preference is not None or task.kind == "masked":
            raise InputError(
                f"task {task.name} cannot be calibrated, only a choice between continuations can: leave --calibrate out"
            )
        preamble = self._preamble(task, examples)
        bare = [
            Example(example.calibration, example.options, example.right, context=(0, 0), calibration="")
            for example in examples
        ]
        if not all(example.prompt.strip() for example in bare):
            raise InputError(
                f"task {task.name} has no prompt without content: add 'calibration: TEXT' to its task file"
            )
        return [self._continuations(task, example, preamble, i) for i, example in enumerate(bare, start=1)]

    @cached_property
    def _texts(self) -> Tokens:
        return Tokens(self.tokenizer)

    def _far_too_long(self, text: str) -> int:
        """About how many tokens a text has, if its end alone has far more than fit; 0 if it must be looked at in whole."""
        end = text[-_MANY_CHARACTERS * self.max_length :]
        count = len(self._texts.open(end)) if len(end) < len(text) else 0
        return count * len(text) // len(end) if count > 2 * self.max_length else 0

    def _warn_of_control_tokens(self, task: Task, examples: Sequence[Example]) -> None:
        answers = " ".join([*(task.answers or {}).values(), *(task.options or ())[1:]])
        found: dict[str, int] = {}
        count = 0
        for example in examples:
            written = set(self._texts.control(answers))
            tokens = self._texts.from_data(example.prompt, task.prompt)
            for text in (*example.options, *example.targets):
                tokens |= {*self._texts.control(text)} - written
            for token in tokens:
                found[token] = found.get(token, 0) + 1
            count += bool(tokens)
        if count:
            warn(
                f"task {task.name}: the text of {count} of {len(examples)} examples holds what this model's tokenizer reads "
                f"as control tokens ({', '.join(f'{token} in {n}' for token, n in found.items())}): if it is meant as "
                "text, reword it in the data",
            )

    # --- causal models ------------------------------------------------------------------------------------------------

    def _continuations(self, task: Task, example: Example, preamble: str, number: int) -> Encoded:
        texts = _continuations_of(task, example)
        start, end = (place + len(preamble) for place in example.context)
        whole = preamble + example.prompt

        def encode(cut: int) -> Encoded:
            return self._split(task, whole[:start] + whole[start + cut :], example, texts, number)

        total = self._far_too_long(whole)
        if not total:
            encoded = encode(0)
            if _input_length(encoded, task) <= self.max_length:
                return encoded
            total = len(encoded.prompt)
        self.truncated += 1
        places = word_starts(whole[start:end])
        cut = least(
            places,
            lambda cut: _input_length(encode(cut), task) <= self.max_length,
            _excess(total, self.max_length, end - start, len(whole)),
        )
        if cut is None:
            encoded = encode(places[-1] if places else 0)
            raise InputError(
                f"task {task.name}, example {number}: an input of {self.max_length} tokens leaves no room for its "
                f"context beside the rest of the prompt and answers of {_input_length(encoded, task) - len(encoded.prompt)}"
                " tokens: raise --max-length, or choose a model with a longer context"
            )
        return encode(cut)

    def _split(self, task: Task, prompt: str, example: Example, texts: Sequence[str], number: int) -> Encoded:
        # Prompt and answer are tokenised together, as the model saw text in training. What all continuations share is
        # the prompt; a token that spans the border counts as part of the answers.
        alone = self._texts.open(prompt)
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
                f"task {task.name}, example {number}: prompt and answers {texts} share no border of tokens; "
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
        if not texts:
            return ""
        longest = max(
            _input_length(self._continuations_uncut(task, example, i), task) for i, example in enumerate(examples, 1)
        )
        while texts:
            preamble = SEPARATOR.join(texts) + SEPARATOR
            # A vocabulary may part a prompt's first word otherwise behind a line break, so the quick sum is verified.
            if len(self._texts.open(preamble)) + longest <= self.max_length and all(
                _input_length(self._continuations_uncut(task, example, i, preamble), task) <= self.max_length
                for i, example in enumerate(examples, 1)
            ):
                break
            texts = texts[1:]
        self.demonstrated = len(texts)
        return preamble if texts else ""

    def _continuations_uncut(self, task: Task, example: Example, number: int, preamble: str = "") -> Encoded:
        return self._split(task, preamble + example.prompt, example, _continuations_of(task, example), number)

    # --- masked models ------------------------------------------------------------------------------------------------

    def _filled_masks(self, task: Task, examples: Sequence[Example]) -> list[Encoded]:
        if self.tokenizer.mask_token_id is None:
            raise InputError(f"task {task.name} needs a mask token, and this tokenizer has none: choose a masked model")
        if self.demonstrations:
            raise InputError("demonstrations are for causal models: leave --shots out")
        assert task.answers is not None
        words = [self._word(task, text) for text in task.answers.values()]
        return [self._filled_mask(task, example, words, i) for i, example in enumerate(examples, start=1)]

    def _filled_mask(self, task: Task, example: Example, words: list[list[int]], number: int) -> Encoded:
        start, end = example.context

        def encode(cut: int) -> list[int]:
            text = example.prompt[:start] + example.prompt[start + cut :]
            return self._texts.closed(text.replace(MASK, self.tokenizer.mask_token))

        total = self._far_too_long(example.prompt)
        tokens = [] if total else encode(0)
        if total or len(tokens) > self.max_length:
            self.truncated += 1
            cut = least(
                word_starts(example.prompt[start:end]),
                lambda cut: len(encode(cut)) <= self.max_length,
                _excess(total or len(tokens), self.max_length, end - start, len(example.prompt)),
            )
            if cut is None:
                raise InputError(
                    f"task {task.name}, example {number}: an input of {self.max_length} tokens leaves no room for its "
                    "context beside the rest of the prompt: raise --max-length, or choose a model with a longer context"
                )
            tokens = encode(cut)
        if tokens.count(self.tokenizer.mask_token_id) != 1:
            raise InputError(f"task {task.name}, example {number}: its text has a mask token of its own: drop the row")
        mask = tokens.index(self.tokenizer.mask_token_id)
        return Encoded(tokens, words, example.right, mask=mask, example=example)

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


def _continuations_of(task: Task, example: Example) -> tuple[str, ...]:
    """What may follow a prompt: its options, its target, or nothing that is known."""
    if example.options or not example.targets:
        return example.options
    return (example.target + task.stop,)


def _input_length(encoded: Encoded, task: Task) -> int:
    """Tokens of the longest sequence that the model sees: the prompt with the longest option, or what is generated."""
    longest = max(map(len, encoded.options), default=0)
    return len(encoded.prompt) + max(longest, task.max_new_tokens if task.free_text else 0)


def _excess(tokens: int, max_length: int, context: int, whole: int) -> float:
    """About which share of the context must go, of so many characters of a text of so many tokens."""
    return max(0, tokens - max_length) / tokens * whole / max(1, context)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
