"""Data that cannot teach, or cannot tell whether something was learnt: what to say about splits before they are used."""

from __future__ import annotations

from collections.abc import Mapping

from .data import Split
from .task import Example

# From this share of a split on, rows that another split holds too are worth a word: large data sets repeat some.
_SHARED = 0.01


def doubts(splits: Mapping[str, Split]) -> list[str]:
    """A line for each thing that makes ``train``, ``dev`` and ``test`` splits doubtful; usually none.

    - Training or test examples that all have the same answer: a model that always gives it is right.
    - A test split from the source of the training data: what development examples choose was chosen on test data.
    - Examples (prompt and right answer) of one split that another one holds too, if they are more than 1% of it.
    """
    found = []
    for name in ("train", "test"):
        if name in splits and (answer := _only_answer(splits[name])) is not None:
            found.append(
                f"all {len(splits[name])} {name} examples have the answer {answer!r}, so always giving it is right"
                + (": nothing else can be learnt from them, and a high score means nothing" if name == "train" else "")
            )
    if (
        {"train", "test"} <= splits.keys()
        and not splits["test"].task.holds_out
        and splits["train"].source == splits["test"].source
    ):
        source = splits["test"].source
        return [*found, f"training and test examples both come from {source}: give the test data another file"]
    keys = {name: [_key(example) for example in split.examples] for name, split in splits.items()}
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        if one in keys and other in keys:
            there = set(keys[one])
            shared = sum(key in there for key in keys[other])
            if shared > _SHARED * len(keys[other]):
                found.append(
                    f"{shared} of the {len(keys[other])} {other} examples are also among the {one} examples: what is "
                    "measured on them says little about new ones"
                )
    return found


def _key(example: Example) -> tuple[str, ...]:
    """What makes two examples the same: the prompt and the right answers."""
    return (example.prompt, *example.targets, *(example.options[i] for i in example.right))


def _only_answer(split: Split) -> str | None:
    """The right answer of all examples, if there is but one and classes or targets could differ."""
    if len(split) < 2 or split.task.preference is not None or not split.task.label:
        return None
    if split.task.answers is not None:  # its templates may fill to different texts
        labels = {example.label for example in split.examples}
        return list(split.task.answers.values())[labels.pop()] if len(labels) == 1 else None
    answers = {_key(example)[1:] for example in split.examples}
    return answers.pop()[0].strip() if len(answers) == 1 else None
