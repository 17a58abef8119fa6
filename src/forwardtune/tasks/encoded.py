"""An example in tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .task import Example

_NOTHING = Example("")


@dataclass(frozen=True)
class Encoded:
    """One example in tokens."""

    prompt: list[int]  # possibly cut; for a masked model the whole input
    options: list[list[int]]  # every continuation (the answers, or the target alone), or the token that fills the mask
    right: tuple[int, ...] = (0,)  # which options are right; training takes the first
    texts: tuple[str, ...] = ()  # the target texts, for scoring free text
    scored: int = 0  # so many of the prompt's last tokens are part of every option: options that begin alike
    unscored: frozenset[int] = frozenset()  # places in the option that count nowhere: other turns of a conversation
    mask: int | None = None  # place of the mask in the prompt; None for causal models
    example: Example = _NOTHING  # what was encoded
    reference: tuple[float, float] | None = None  # log-likelihoods of a preference's texts under the reference model

    @property
    def label(self) -> int:
        """The right option that is trained on."""
        return self.right[0]

    @property
    def length(self) -> int:
        """Tokens in the model's input when the options share their prompt."""
        return len(self.prompt) + (0 if self.mask is not None else sum(len(option) - 1 for option in self.options))

    def without(self, count: int) -> Encoded:
        """The example without so many tokens at its prompt's beginning."""
        return replace(self, prompt=self.prompt[count:]) if count else self


def named(example: Example, number: int) -> str:
    """What an example is called in messages: by the file and row that it comes from, else by its number."""
    return example.where or f"example {number}"
