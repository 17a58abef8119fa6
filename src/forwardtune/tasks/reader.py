"""Reading task files, and finding the tasks of the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from .metrics import CHOICE_METRICS, TEXT_METRICS
from .splits import RULES
from .task import MASK, Task
from .template import columns_of
from .yaml_file import read_yaml

LIBRARY = Path(__file__).parent / "library"

# A task file's keys, and those of its part for masked models.
_WORDING = ("prompt", "answers", "context", "replace")
_KEYS = (
    "name", *_WORDING, "options", "label", "unlabelled", "target", "preference", "beta", "metric", "loss", "calibration", "train", "dev", "test", "hub",
    "dev_examples", "splits", "stop", "max_new_tokens", "masked",
)  # fmt: skip
# What a task may have its model answer, with the metrics and losses that suit it; the first is the default.
_METRICS = {
    "answers": CHOICE_METRICS,
    "options": CHOICE_METRICS,
    "target": TEXT_METRICS,
    "preference": CHOICE_METRICS,
    "nothing": ("reward",),
}
_LOSSES = {
    "answers": ("cross_entropy", "likelihood"),
    "options": ("cross_entropy", "likelihood"),
    "target": ("likelihood",),
    "preference": ("preference",),
    "nothing": ("none",),
}
_TEXTS = ("name", "label", "target", "metric", "context", "calibration", "train", "dev", "test", "stop")


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def get_task(name: str) -> Task:
    """A task of the package by its name, or one from a YAML file by its path.

    Raises:
        InputError: no such task or file, or a file with something wrong in it.
    """
    if name in task_names():
        return read_task(LIBRARY / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_task(path)
    raise InputError(
        f"unknown task {name!r}: choose one of {', '.join(task_names())}, or give the path of a task file (.yaml)"
        f"{nearest(name, task_names())}"
    )


def read_task(path: Path) -> Task:
    """Read and check a task file (``docs/tasks.md`` is the format).

    Raises:
        InputError: the file cannot be read, or something in it is wrong.
    """
    content = read_yaml(path, "task file", "prompt, answers, train and test")
    try:
        return _task(content, path)
    except _WrongError as wrong:
        raise InputError(f"task file {path}: {wrong}") from None


class _WrongError(Exception):
    """What is wrong in a task file."""


def _task(content: dict[str, Any], path: Path) -> Task:
    _known(content, _KEYS)
    for key in _TEXTS:
        if not isinstance(content.get(key, ""), str):
            raise _WrongError(f"{key} must be text, got {content[key]!r}: put it in quotes")
    masked = content.get("masked")
    if masked is not None:
        if not isinstance(masked, dict) or MASK not in str(masked.get("prompt", "")):
            raise _WrongError(
                f"masked must hold a prompt with {MASK} in it, such as {{prompt: '{{text}} It was {MASK}.'}}"
            )
        _known(masked, _WORDING, "masked: ")
        if "prompt" not in content:  # worded for masked models alone
            return _task({**{k: v for k, v in content.items() if k != "masked"}, **masked}, path)
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not _template(prompt, "prompt"):
        raise _WrongError('prompt must be text with at least one {column} in it, such as "{text} It was"')
    kind = _kind_of_answer(content)
    if MASK in prompt and kind != "answers":
        raise _WrongError(f"a prompt with {MASK} needs answers that fill the mask")
    metric, loss = (_one_of(content, key, known[kind]) for key, known in (("metric", _METRICS), ("loss", _LOSSES)))
    context = content.get("context")
    if context is not None and context not in _template(prompt, "prompt"):
        raise _WrongError(
            f"context {context!r} is not a column of the prompt{nearest(context, _template(prompt, 'prompt'))}"
        )
    _template(content.get("calibration", ""), "calibration")
    task = Task(
        name=content.get("name", path.stem),
        prompt=prompt,
        label=_label(content, kind),
        answers=_answers(content) if kind == "answers" else None,
        options=_options(content) if kind == "options" else None,
        preference=_preference(content) if kind == "preference" else None,
        beta=_beta(content),
        metric=metric,
        loss=loss,
        unlabelled=str(content["unlabelled"]) if "unlabelled" in content else None,
        replace=_replacements(content.get("replace", {})),
        context=context,
        calibration=content.get("calibration"),
        dev_examples=_whole(content, "dev_examples", 500, 0),
        splits=_one_of(content, "splits", tuple(RULES)),
        stop=content.get("stop", "\n"),
        max_new_tokens=_whole(content, "max_new_tokens", 50, 1),
        **_source(content, path),
    )
    if masked is None:
        return task
    shared = {k: v for k, v in content.items() if k not in ("masked", "context", "calibration", "replace")}
    return replace(task, masked=_task({**shared, **masked}, path))


def _kind_of_answer(content: dict[str, Any]) -> str:
    """``answers``, ``options``, ``target``, ``preference``, or ``nothing``: what is generated is rewarded."""
    kinds = [kind for kind in _METRICS if kind in content]
    if len(kinds) > 1 or {"label", "target"} <= set(content) or {"label", "preference"} <= set(content):
        raise _WrongError(
            "give one of answers (with label), options (with label), target (free text) and preference, not several"
        )
    if not kinds and "label" in content:
        raise _WrongError("label needs answers or options beside it: say what the model answers for each label")
    return kinds[0] if kinds else "nothing"


def _one_of(content: dict[str, Any], key: str, known: tuple[str, ...]) -> str:
    value = content.get(key, known[0])
    if value not in known:
        raise _WrongError(f"{key} {value!r} does not suit it: choose {' or '.join(known)}")
    return str(value)


def _label(content: dict[str, Any], kind: str) -> str:
    if kind == "target":
        return str(content["target"])
    return str(content.get("label", "label")) if kind in ("answers", "options") else ""


def _options(content: dict[str, Any]) -> tuple[str, str]:
    options = content["options"]
    if not isinstance(options, dict) or set(options) != {"each", "text"}:
        raise _WrongError('options must be {each: COLUMN, text: TEMPLATE}, such as {each: entities, text: "{option}"}')
    _template(options["text"], "options")
    return str(options["each"]), options["text"]


def _preference(content: dict[str, Any]) -> tuple[str, str]:
    columns = content["preference"]
    if not isinstance(columns, dict) or set(columns) != {"chosen", "rejected"}:
        raise _WrongError("preference must be {chosen: COLUMN, rejected: COLUMN}")
    return str(columns["chosen"]), str(columns["rejected"])


def _beta(content: dict[str, Any]) -> float:
    value = content.get("beta", 0.1)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise _WrongError(f"beta must be a positive number, got {value!r}: 0.1 is usual")
    return float(value)


def _answers(content: dict[str, Any]) -> dict[str, str]:
    answers = content.get("answers")
    if not isinstance(answers, dict) or len({str(value) for value in answers}) < max(2, len(answers)):
        raise _WrongError(
            "answers must map at least two different label values to texts, such as {0: terrible, 1: great}"
        )
    for value, text in answers.items():
        if isinstance(text, str) and not text.strip():
            raise _WrongError(f"the answer for {value!r} is empty: give the text that the model is to say")
        if not isinstance(text, str):
            raise _WrongError(
                f"the answer for {value!r} is {text!r}, not text: put it in quotes (YAML reads no as false)"
            )
        _template(text, f"the answer for {value!r}")
    answers = {str(value): text.strip() for value, text in answers.items()}
    if len(set(answers.values())) < len(answers):
        raise _WrongError("two answers have the same text, so the model could not tell them apart")
    return answers


def _source(content: dict[str, Any], path: Path) -> dict[str, Any]:
    files = {split: path.parent / content[split] for split in ("train", "dev", "test") if split in content}
    hub = content.get("hub")
    if (hub is None) == (not files):
        raise _WrongError("give either files (train: and test:) or a data set of the hub (hub:)")
    if hub is not None:
        if not (isinstance(hub, dict) and {"path", "train", "test"} <= set(hub)):
            raise _WrongError("hub must be {path: ..., train: ..., test: ...}, with name: ... for a configuration")
        _known(hub, ("path", "name", "train", "dev", "test", "label"), "hub: ")
    return {"files": files, "hub": {key: str(value) for key, value in hub.items()} if hub else None}


def _replacements(content: Any) -> dict[str, dict[str, str]]:
    if not isinstance(content, dict) or not all(isinstance(pairs, dict) for pairs in content.values()):
        raise _WrongError("replace must be {column: {text: text in its place}}")
    replace = {str(column): {str(old): str(new) for old, new in pairs.items()} for column, pairs in content.items()}
    for column, pairs in replace.items():
        for new in pairs.values():
            again = [name for name in _template(new, f"replace: {column}") if name in replace]
            if again:
                raise _WrongError(
                    f"replace: the new text for {column} names {again[0]}, which is replaced itself: name another column"
                )
    return replace


def _template(text: Any, what: str) -> list[str]:
    """The columns of a template."""
    if not isinstance(text, str):
        raise _WrongError(f"{what} must be text, got {text!r}: put it in quotes")
    try:
        return columns_of(text)
    except ValueError as error:
        raise _WrongError(f"{what} {error}") from None


def _whole(content: dict[str, Any], key: str, default: int, least: int) -> int:
    value = content.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _WrongError(f"{key} must be a whole number of at least {least}, got {value!r}")
    return value


def _known(content: dict[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for key in content:
        if key not in known:
            raise _WrongError(f"{where}unknown key {key!r} (known: {', '.join(known)}){nearest(str(key), known)}")
