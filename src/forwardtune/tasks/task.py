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
    """One example of a task, as text.

    Attributes:
        prompt: what the model reads. For a masked model it holds ``[MASK]``.
        options: the possible continuations, or fillings of the mask; empty for free text.
        right: which options are right; training takes the first.
        targets: texts to produce, for free text, each as good; training takes the first.
        context: start and end of the part of the prompt that may be cut on the left if the prompt is too long.
        calibration: the prompt without content, for surface-form-competition calibration.
        row: the columns that it was made of.
    """

    prompt: str
    options: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    targets: tuple[str, ...] = ()
    context: tuple[int, int] = (0, 0)
    calibration: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)

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

    Attributes:
        name: what the task is called.
        prompt: template with ``{column}`` placeholders. With ``[MASK]`` in it, it is for masked models.
        label: column of the label or, without answers, of the target text or texts; empty where there is neither, and
            what is generated is rewarded.
        answers: label value (as text) -> template of a continuation; None where there are none.
        options: ``(column, template)``: one option for each entry of a column that holds a list, called ``{option}`` in
            the template; the label column then holds the right entries. None for other tasks.
        loss: what is lowered: ``cross_entropy`` over the options' scores; ``likelihood``, the negative mean
            log-likelihood of the right option's, or the target's, tokens; ``preference`` of one text to another; or
            ``none``.
        preference: columns of the chosen and the rejected text, for ``preference``.
        beta: how far a preferred text may move the model from its reference (DPO's beta).
        metric: ``accuracy`` for options and preferences; ``f1``, ``exact_match``, ``drop_f1`` or ``drop_exact_match`` for
            free text; ``reward`` where there is no target.
        unlabelled: label value of rows that have no label and are left out.
        replace: column -> {text: text in its place}.
        context: the column that may be cut on the left when a prompt is too long.
        calibration: template of the prompt without content (appendix E.1 of the MeZO paper calls it SFC).
        files: split (``train``, ``dev``, ``test``) -> path of a JSON Lines or CSV file.
        hub: ``{"path": ..., "name": ..., "train": ..., "test": ...}`` of a hub data set, with ``"label"`` if the label
            column has another name there.
        dev_examples: size of the development split that is taken from the training data.
        splits: the rule that draws the splits (:mod:`.splits`): ``forwardtune`` or ``mezo``.
        stop: free text ends here.
        max_new_tokens: longest free text that is generated.
        masked: the same task worded for masked models, if this one is worded for causal models and there is one.
    """

    name: str
    prompt: str
    label: str
    answers: Mapping[str, str] | None
    metric: str
    loss: str = "cross_entropy"
    options: tuple[str, str] | None = None
    preference: tuple[str, str] | None = None
    beta: float = 0.1
    unlabelled: str | None = None
    replace: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    context: str | None = None
    calibration: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    hub: Mapping[str, str] | None = None
    dev_examples: int = 500
    splits: str = "forwardtune"
    stop: str = "\n"
    max_new_tokens: int = 50
    masked: Task | None = None

    @property
    def kind(self) -> str:
        """``masked`` or ``causal``: the models that it is worded for."""
        return "masked" if MASK in self.prompt else "causal"

    @property
    def free_text(self) -> bool:
        """Whether the answer is generated, not chosen."""
        return self.answers is None and self.options is None and self.preference is None

    @property
    def fixed_answers(self) -> bool:
        """Whether every example has the same options."""
        return self.answers is not None and not any(columns_of(text) for text in self.answers.values())

    @property
    def wordings(self) -> list[Task]:
        """The task as it is put to each kind of model."""
        return [self] if self.masked is None else [self, self.masked]

    def worded_for(self, kind: str) -> Task:
        """The task as it is put to a ``causal`` or a ``masked`` model.

        Raises:
            InputError: it is not worded for that kind.
        """
        for wording in self.wordings:
            if wording.kind == kind:
                return wording
        if kind == "causal":
            raise InputError(
                f"task {self.name} has a prompt for masked models alone, and this model is causal: choose a masked "
                f"model such as roberta-large, or write a task file whose prompt has no {MASK}"
            )
        raise InputError(
            f"task {self.name} has a prompt for causal models alone, and this model is masked: choose a causal model, "
            f"or write a task file with {MASK} in its prompt"
        )

    def label_of(self, value: Any) -> str:
        """A label value as the answers spell it; as it is if they do not know it.

        1, 1.0, "1.0" and true are the same label, and so are 0, 0.0 and false: a data frame with a gap turns whole numbers
        into fractions. Where the answers tell them apart, they are different.
        """
        text = str(value).strip()
        if self.answers is None or text in self.answers:
            return text
        alike = [label for label in self.answers if same_label(label, text)]
        return alike[0] if len(alike) == 1 else text

    def example(self, row: Mapping[str, Any], where: str) -> Example:
        """The example of one row; ``where`` names the row in messages.

        Raises:
            RowError: a column is missing or empty, or the label is not among the answers.
        """
        fields = Fields(row, where, self.name, self.replace)
        pieces = fields.pieces(self.prompt)
        prompt = "".join(text for text, _ in pieces)
        cut = self.context or next(iter(columns_of(self.prompt)))
        context = (0, 0)
        for i, (text, column) in enumerate(pieces):
            if column == cut:
                start = sum(len(earlier) for earlier, _ in pieces[:i])
                context = (start, start + len(text))
                break
        joint = "" if self.kind == "masked" or prompt[-1:].isspace() else " "
        calibration = tail_of(self.prompt).lstrip() if self.calibration is None else fields.fill(self.calibration)
        if self.preference is not None:
            texts = tuple(joint + fields.text(column) for column in self.preference)
            return Example(prompt, texts, (0,), (), context, calibration, row)
        if self.free_text:
            if not self.label:
                return Example(prompt, context=context, row=row)
            targets = fields.value(self.label)
            targets = targets if isinstance(targets, (list, tuple)) else [targets]
            texts = tuple(dict.fromkeys(joint + str(text).strip() for text in targets))
            return Example(prompt, targets=texts, context=context, calibration=calibration, row=row)
        if self.options is not None:
            column, template = self.options
            entries = [str(entry).strip() for entry in _list(fields.value(column), column, where)]
            truths = {str(truth).strip() for truth in _list(fields.value(self.label), self.label, where)}
            options = [fields.fill(template, entry) for entry in entries]
            right = tuple(i for i, entry in enumerate(entries) if entry in truths)
            if not right:
                raise RowError(f"{where}: none of {sorted(truths)} is among the {len(entries)} entries of {column!r}")
        else:
            assert self.answers is not None
            value = self.label_of(fields.value(self.label))
            if value not in self.answers:
                remedy = "add it to the answers, or drop the row"
                if value.lower() in _YAML_BOOLEANS and {"True", "False"} & self.answers.keys():
                    remedy = "YAML reads yes and no without quotes as true and false: put the labels of the answers in quotes"
                raise RowError(
                    f"{where}: label {value!r} is not among the answers of task {self.name} ({', '.join(self.answers)}): {remedy}"
                )
            options = [fields.fill(text) for text in self.answers.values()]
            right = (list(self.answers).index(value),)
        return Example(prompt, tuple(joint + text for text in options), right, (), context, calibration, row)


# What YAML takes for a truth value unless it stands in quotes.
_YAML_BOOLEANS = {"yes", "no", "on", "off"}


def same_label(one: str, other: str) -> bool:
    """Whether two labels are the same text or number, true and false being 1 and 0."""
    return one == other or _number(one) == _number(other)


def _number(label: str) -> str:
    """One spelling for labels that are the same number."""
    label = label.strip()
    text = {"true": "1", "false": "0"}.get(label.lower(), label)
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else text


def _list(value: Any, column: str, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{where}: column {column!r} must hold a list, not {value!r:.60}")
    return list(value)
