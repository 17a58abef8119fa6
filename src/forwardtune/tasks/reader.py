"""Reading task files, and finding the tasks of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from .chat import CHAT, TASK, ChatTask, recognised
from .given_data import columns_of_data, with_data
from .metrics import CHOICE_METRICS, TEXT_METRICS
from .splits import RULES
from .task import MASK, Task
from .template import columns_of
from .yaml_file import read_yaml

LIBRARY = Path(__file__).parent / "library"

# What a task may have its model answer, with the metrics and losses that suit it; the first is the default.
_KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "answers": {"metric": CHOICE_METRICS, "loss": ("cross_entropy", "likelihood")},
    "options": {"metric": CHOICE_METRICS, "loss": ("cross_entropy", "likelihood")},
    "target": {"metric": TEXT_METRICS, "loss": ("likelihood",)},
    "preference": {"metric": CHOICE_METRICS, "loss": ("preference",)},
    "nothing": {"metric": ("reward",), "loss": ("none",)},  # what is generated is rewarded
}


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def get_task(name: str, data: str | None = None, *, streaming: bool = False) -> Task:
    """A task of the package by its name, ``chat``, or one from a YAML file by its path.

    Args:
        data: where the examples are, in place of the task's own (:func:`.given_data.with_data`).
        streaming: read the first rows of the data alone.

    Raises:
        InputError: no such task, file or data, or a file with something wrong in it.
    """
    task = replace(_by_name(name), streaming=True) if streaming else _by_name(name)
    if data is not None:
        task = with_data(task, data, streaming=task.streaming)
    if isinstance(task, ChatTask):
        return recognised(task, *columns_of_data(task))
    if data is not None:
        return task
    if not task.files and task.hub is None:
        raise InputError(
            f"task {task.name} ({name}) names no data: give files (train: and test:) or a data set of the hub (hub:) in its task "
            "file, or data=... beside it",
            "data",
        )
    return task


def _by_name(name: str) -> Task:
    if name == CHAT:
        return TASK
    if name in task_names():
        return read_task(LIBRARY / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read_task(path)
    raise InputError(
        f"unknown task {name!r}: choose one of {', '.join(task_names())}, {CHAT} for conversations, or give the path of a task file (.yaml)"
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
    _known(content, (*_READERS, "metric", "loss", "splits", *_FILES, "hub", "masked"))
    masked = content.get("masked")
    if masked is not None:
        if not isinstance(masked, dict) or MASK not in str(masked.get("prompt", "")):
            raise _WrongError(
                f"masked must hold a prompt with {MASK} in it, such as {{prompt: '{{text}} It was {MASK}.'}}"
            )
        _known(masked, ("prompt", "answers", "context", "replace"), "masked: ")
        if "prompt" not in content:  # worded for masked models alone
            return _task({**{k: v for k, v in content.items() if k != "masked"}, **masked}, path)
    given = {key: read(content[key], key) for key, read in _READERS.items() if key in content}
    columns = columns_of(given.get("prompt", ""))
    if not columns:
        raise _WrongError('prompt must be text with at least one {column} in it, such as "{text} It was"')
    context = given.get("context", columns[0])
    if context not in columns:
        raise _WrongError(f"context {context!r} is not a column of the prompt{nearest(context, columns)}")
    kind = _kind_of_answer(content)
    if MASK in given["prompt"] and kind != "answers":
        raise _WrongError(f"a prompt with {MASK} needs answers that fill the mask")
    for key, known in {**_KINDS[kind], "splits": tuple(RULES)}.items():
        given[key] = content.get(key, known[0])
        if given[key] not in known:
            raise _WrongError(f"{key} {given[key]!r} does not suit it: choose {' or '.join(known)}")
    given["label"] = given.pop("target", given.get("label", "label" if kind in ("answers", "options") else ""))
    task = Task(**{"name": path.stem, "answers": None, **given, **_source(content, path)})
    if masked is None:
        return task
    shared = {k: v for k, v in content.items() if k not in ("masked", "context", "calibration", "replace")}
    return replace(task, masked=_task({**shared, **masked}, path))


def _kind_of_answer(content: dict[str, Any]) -> str:
    kinds = [kind for kind in _KINDS if kind in content]
    if len(kinds) > 1 or {"label", "target"} <= set(content) or {"label", "preference"} <= set(content):
        raise _WrongError(
            "give one of answers (with label), options (with label), target (free text) and preference, not several"
        )
    if not kinds and "label" in content:
        raise _WrongError("label needs answers or options beside it: say what the model answers for each label")
    return kinds[0] if kinds else "nothing"


def _source(content: dict[str, Any], path: Path) -> dict[str, Any]:
    files = {split: path.parent / _text(content[split], split) for split in _FILES if split in content}
    hub = content.get("hub")
    if hub is not None and files:
        raise _WrongError("give either files (train: and test:) or a data set of the hub (hub:)")
    if hub is None:
        return {"files": files}
    if not (isinstance(hub, dict) and {"path", "train", "test"} <= set(hub)):
        raise _WrongError("hub must be {path: ..., train: ..., test: ...}, with name: ... for a configuration")
    _known(hub, ("path", "name", "revision", "streaming", *_FILES, "label"), "hub: ")
    streaming = hub.get("streaming", False)
    if not isinstance(streaming, bool):
        raise _WrongError(f"hub: streaming must be true or false, got {streaming!r}")
    kept = {key: str(value) for key, value in hub.items() if key != "streaming"}
    return {"hub": kept, **({"streaming": True} if streaming else {})}


def _known(content: dict[str, Any], known: tuple[str, ...], where: str = "") -> None:
    for key in content:
        if key not in known:
            raise _WrongError(f"{where}unknown key {key!r} (known: {', '.join(known)}){nearest(str(key), known)}")


# --- values, by key ---------------------------------------------------------------------------------------------------


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise _WrongError(f"{key} must be text, got {value!r}: put it in quotes")
    return value


def _template(value: Any, key: str) -> str:
    try:
        columns_of(_text(value, key))
    except ValueError as error:
        raise _WrongError(f"{key} {error}") from None
    return str(value)


def _whole(value: Any, key: str) -> int:
    least = 1 if key == "max_new_tokens" else 0
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _WrongError(f"{key} must be a whole number of at least {least}, got {value!r}")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise _WrongError(f"{key} must be a positive number, got {value!r}: 0.1 is usual")
    return float(value)


def _options(value: Any, key: str) -> tuple[str, str]:
    if not isinstance(value, dict) or set(value) != {"each", "text"}:
        raise _WrongError('options must be {each: COLUMN, text: TEMPLATE}, such as {each: entities, text: "{option}"}')
    return str(value["each"]), _template(value["text"], key)


def _preference(value: Any, key: str) -> tuple[str, str]:
    if not isinstance(value, dict) or set(value) != {"chosen", "rejected"}:
        raise _WrongError("preference must be {chosen: COLUMN, rejected: COLUMN}")
    return str(value["chosen"]), str(value["rejected"])


def _answers(value: Any, key: str) -> dict[str, str]:
    if not isinstance(value, dict) or len({str(label) for label in value}) < max(2, len(value)):
        raise _WrongError(
            "answers must map at least two different label values to texts, such as {0: terrible, 1: great}"
        )
    for label, text in value.items():
        if not isinstance(text, str):
            raise _WrongError(
                f"the answer for {label!r} is {text!r}, not text: put it in quotes (YAML reads no as false)"
            )
        if not text.strip():
            raise _WrongError(f"the answer for {label!r} is empty: give the text that the model is to say")
        _template(text, f"the answer for {label!r}")
    answers = {str(label): text.strip() for label, text in value.items()}
    if len(set(answers.values())) < len(answers):
        raise _WrongError("two answers have the same text, so the model could not tell them apart")
    return answers


def _replacements(value: Any, key: str) -> dict[str, dict[str, str]]:
    if not isinstance(value, dict) or not all(isinstance(pairs, dict) for pairs in value.values()):
        raise _WrongError("replace must be {column: {text: text in its place}}")
    replace = {str(column): {str(old): str(new) for old, new in pairs.items()} for column, pairs in value.items()}
    for column, new in ((column, new) for column, pairs in replace.items() for new in pairs.values()):
        for name in columns_of(_template(new, f"{key}: {column}")):
            if name in replace:
                raise _WrongError(
                    f"replace: the new text for {column} names {name}, which is replaced itself: name another column"
                )
    return replace


# What the keys hold that are read one by one.
_READERS: dict[str, Callable[[Any, str], Any]] = {
    **dict.fromkeys(("name", "label", "target", "context", "stop"), _text),
    **dict.fromkeys(("prompt", "calibration"), _template),
    **dict.fromkeys(("dev_examples", "max_new_tokens"), _whole),
    "answers": _answers,
    "options": _options,
    "preference": _preference,
    "beta": _positive,
    "unlabelled": lambda value, key: str(value),
    "replace": _replacements,
}
_FILES = ("train", "dev", "test")
