"""What a task is: a declaration, and the examples that it makes of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .template import Fields, RowError, columns_of, tail_of

#: Where a masked model fills in the answer; becomes the tokenizer's own mask token.
MASK = "[MASK]"


@dataclass(frozen=True)
class Example:
    """One example of a task, as text. Training takes the first of the right options, or of the targets."""

    prompt: str  # for a masked model it holds [MASK]
    options: tuple[str, ...] = ()  # the possible continuations, or fillings of the mask; empty for free text
    right: tuple[int, ...] = ()  # which options are right
    targets: tuple[str, ...] = ()  # texts to produce, for free text, each as good
    context: tuple[int, int] = (0, 0)  # start and end of the part of the prompt that may be cut on the left
    calibration: str = ""  # the prompt without content, for surface-form-competition calibration
    row: Mapping[str, Any] = field(default_factory=dict)  # the columns that it was made of
    where: str = field(default="", compare=False)  # the file and the row that it was made of, for messages

    @property
    def label(self) -> int:
        """The right option that is trained on; -1 for free text."""
        return self.right[0] if self.right else -1

    @property
    def target(self) -> str:
        """The text that is trained on; empty for a task with options."""
        return self.targets[0] if self.targets else ""


@dataclass(frozen=True)
class Task:
    """A declaration: where the examples are, how one becomes a prompt, what the answers are, what is measured.

    ``docs/tasks.md`` says what the keys of a task file mean, which these are.
    """

    name: str
    prompt: str  # template with {column} placeholders
    label: str  # column of the label, or of the target texts; empty where what is generated is rewarded
    answers: Mapping[str, str] | None  # label value (as text) -> template of a continuation
    metric: str  # accuracy; for free text one of metrics.TEXT_METRICS, or reward where there is no target
    loss: str = "cross_entropy"  # or likelihood, preference, none
    options: tuple[str, str] | None = None  # column that holds a list, template with {option} of one of its entries
    preference: tuple[str, str] | None = None  # columns of the chosen and the rejected text
    beta: float = 0.1  # how far a preferred text may move the model from its reference (DPO)
    class_weights: tuple[float, ...] | None = (
        None  # of each answer in the loss (:mod:`.weights`); None: all count alike
    )
    unlabelled: str | None = None  # label value of rows that are left out
    replace: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # column -> {text: text in its place}
    context: str | None = None  # the column that may be cut on the left; by default the prompt's first
    calibration: str | None = None  # template of the prompt without content; by default the prompt's last words
    files: Mapping[str, Path] = field(default_factory=dict)  # split (train, dev, test) -> data file
    hub: Mapping[str, str] | None = None  # path, name, revision, label column and splits of a data set of the hub
    streaming: bool = False  # whether the first rows alone are read
    holds_out: bool = False  # whether test examples are set aside from the training data
    dev_examples: int = 500
    splits: str = "forwardtune"  # the rule that draws them (:mod:`.splits`)
    stop: str = "\n"  # free text ends here
    max_new_tokens: int = 50
    masked: Task | None = None  # the same task worded for masked models, if this one is for causal models

    @property
    def kind(self) -> str:
        """``masked`` or ``causal``: the models that it is worded for."""
        return "masked" if MASK in self.prompt else "causal"

    @property
    def free_text(self) -> bool:
        """Whether the answer is generated, not chosen."""
        return self.answers is None and self.options is None and self.preference is None

    @property
    def conversational(self) -> bool:
        """Whether an example is a conversation or a text, some of whose tokens are learnt (:mod:`.chat`)."""
        return False

    @property
    def fixed_answers(self) -> bool:
        """Whether every example has the same options."""
        return self.answers is not None and not any(columns_of(text) for text in self.answers.values())

    @property
    def wordings(self) -> list[Task]:
        """The task as it is put to each kind of model."""
        return [self] if self.masked is None else [self, self.masked]

    def worded_for(self, kind: str) -> Task:
        """The task as it is put to a ``causal`` or a ``masked`` model. Raises InputError if it is not worded for it."""
        for wording in self.wordings:
            if wording.kind == kind:
                return wording
        remedies = {
            "causal": f"choose a masked model such as roberta-large, or write a task file whose prompt has no {MASK}",
            "masked": f"choose a causal model, or write a task file with {MASK} in its prompt",
        }
        raise InputError(
            f"task {self.name} has a prompt for {self.kind} models alone, and this model is {kind}: {remedies[kind]}"
        )

    def label_of(self, value: Any) -> str:
        """A label value as the answers spell it; as it is if they do not know it.

        1, 1.0, "1.0" and true are the same label (a data frame with a gap turns whole numbers into fractions), unless the
        answers tell them apart. Where the answers are for words such as yes and no, or true and false, they are for all such
        words and for 1 and 0.
        """
        text = str(value).strip()
        if self.answers is None or text in self.answers:
            return text
        alike = [label for label in self.answers if same_label(label, text)]
        senses = {_sense(label): label for label in self.answers}
        if not alike and None not in senses and len(senses) == len(self.answers):
            return senses.get(_sense(text) or _sense_of_number(text), text)
        return alike[0] if len(alike) == 1 else text

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The example of one row; ``where`` names the row in messages.

        Raises:
            RowError: a column is missing or empty, or the label is not among the answers.
        """
        fields = Fields(row, where, self.name, self.replace)
        pieces = fields.pieces(self.prompt)
        prompt = "".join(text for text, _ in pieces)
        cut, start, context = self.context or columns_of(self.prompt)[0], 0, (0, 0)
        for text, column in pieces:
            if column == cut:
                context = (start, start + len(text))
                break
            start += len(text)
        calibration = tail_of(self.prompt).lstrip() if self.calibration is None else fields.fill(self.calibration)
        joint = "" if self.kind == "masked" or prompt[-1:].isspace() else " "
        options, right, targets = self._answers_of(fields, where)
        options, targets = (tuple(joint + text for text in texts) for texts in (options, targets))
        return Example(prompt, options, right, targets, context, calibration, row, where)

    def _answers_of(self, fields: Fields, where: str) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]]:
        """The texts of a row's options and which of them are right, or its targets."""
        if self.preference is not None:
            return tuple(map(fields.text, self.preference)), (0,), ()
        if self.free_text:
            targets = fields.value(self.label) if self.label else []
            targets = targets if isinstance(targets, (list, tuple)) else [targets]
            return (), (), tuple(dict.fromkeys(str(text).strip() for text in targets))
        if self.options is not None:
            column, template = self.options
            entries, truths = (_stripped(fields.value(name), name, where) for name in (column, self.label))
            right = tuple(i for i, entry in enumerate(entries) if entry in truths)
            if not right:
                raise RowError(
                    f"{where}: none of {sorted(set(truths))} is among the {len(entries)} entries of {column!r}"
                )
            return tuple(fields.fill(template, entry) for entry in entries), right, ()
        assert self.answers is not None
        value = self.label_of(fields.value(self.label))
        if value not in self.answers:
            remedy = "add it to the answers, or drop the row"
            if value.lower() in _YAML_BOOLEANS and {"True", "False"} & self.answers.keys():
                remedy = (
                    "YAML reads yes and no without quotes as true and false: put the labels of the answers in quotes"
                )
            raise RowError(
                f"{where}: label {value!r} is not among the answers of task {self.name} ({', '.join(self.answers)}): {remedy}"
            )
        return tuple(map(fields.fill, self.answers.values())), (list(self.answers).index(value),), ()


# What YAML takes for a truth value unless it stands in quotes.
_YAML_BOOLEANS = {"yes", "no", "on", "off"}


_SENSES = {
    **dict.fromkeys(("true", "yes", "y", "on"), "yes"),
    **dict.fromkeys(("false", "no", "n", "off"), "no"),
}


def _sense(label: str) -> str | None:
    """Whether a word says yes or no; None if it is another word."""
    return _SENSES.get(label.strip().lower())


def _sense_of_number(label: str) -> str | None:
    return {"1": "yes", "0": "no"}.get(_number(label))


def same_label(one: str, other: str) -> bool:
    """Whether two labels are the same text or number, true and false being 1 and 0."""
    return one == other or _number(one) == _number(other)


def _number(label: str) -> str:
    """One spelling for labels that are the same number."""
    text = label.strip()
    text = {"true": "1", "false": "0"}.get(text.lower(), text)
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _stripped(value: Any, column: str, where: str) -> list[str]:
    """The entries of a column that holds a list, as text."""
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{where}: column {column!r} must hold a list, not {value!r:.60}")
    return [str(entry).strip() for entry in value]
