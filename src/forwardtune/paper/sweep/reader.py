"""Reading a sweep file: everything that can be wrong in it is said before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import COMMANDS as DESCRIBED
from ...config import Option
from ...config import options as options_of
from ...errors import InputError, nearest
from ...tasks import get_task
from ...tasks.yaml_file import read_yaml
from .plan import Run, Sweep, folder_of, label, slug

#: Commands that leave a metrics.json.
COMMANDS = ("eval", "probe", "train")
_KEYS = ("name", "model", "tasks", "seeds", "options", "task-options", "methods", "keep-models")
_METHOD_KEYS = ("command", "tasks", "seeds")
# Options that the sweep gives itself, and what to write instead.
_OWN = {
    "model": "give model: at the top of the file",
    "task": "give tasks: a list",
    "seed": "give seeds: a list",
    "output-dir": "each run has a folder of its own",
    "resume": "an unfinished run is resumed anyway",
    "json": "each run writes metrics.json anyway",
    "help": "leave it out",
}

# Command -> its options, by their names in a file.
_OPTIONS = {command: {one.key: one for one in options_of(DESCRIBED[command]).values()} for command in COMMANDS}


@dataclass
class _Method:
    name: str
    command: str
    tasks: list[str]
    seeds: list[int]
    options: dict[str, Any]


def read_sweep(path: Path, data_dir: str | None = None) -> Sweep:
    """Read a sweep file and lay out its runs.

    Runs are ordered by seed, then by task: the table is complete for one seed before the next begins.

    Args:
        path: the sweep file.
        data_dir: given as ``--data-dir`` to every run whose task does not bring its data.

    Raises:
        InputError: the file is missing, or anything in it cannot be used.
    """
    content = read_yaml(path, "sweep file", "model, tasks and methods")
    try:
        return _sweep(content, path, data_dir)
    except InputError as error:
        raise InputError(f"sweep file {path}: {error}") from None


def _sweep(content: dict[str, Any], path: Path, data_dir: str | None) -> Sweep:
    _known(content, _KEYS, "key")
    for key in ("model", "tasks", "methods"):
        if not content.get(key):
            raise InputError(f"{key} is missing: add {key}: at the top level")
    models = _texts(content["model"], "model")
    tasks = _texts(content["tasks"], "tasks")
    found = {task: get_task(task) for task in tasks}
    metrics = {name: task.metric for name, task in found.items()}
    seeds = _seeds(content.get("seeds", [0]), "seeds")
    name = content.get("name", path.stem)
    keep_models = content.get("keep-models", False)
    if not isinstance(name, str):
        raise InputError(f"name must be text, got {name!r}: put it in quotes")
    if not isinstance(keep_models, bool):
        raise InputError(f"keep-models must be true or false, got {keep_models!r}")

    methods = [
        _method(str(name), _mapping(entry, f"method {name}"), tasks, seeds)
        for name, entry in _mapping(content["methods"], "methods").items()
    ]
    shared = _shared(content.get("options", {}), "options", methods)
    by_task = _mapping(content.get("task-options", {}), "task-options")
    _known(by_task, tasks, "task-options of a task")
    by_task = {task: _shared(entry, f"task-options of {task}", methods) for task, entry in by_task.items()}
    names = [method.name for method in methods]
    for what, named in (("models", map(label, models)), ("tasks", map(label, tasks)), ("methods", names)):
        _require_folders(what, named)

    runs: list[tuple[int, Run]] = []
    order = list(dict.fromkeys(seed for method in methods for seed in method.seeds))
    for model, task, method in itertools.product(models, tasks, methods):
        if task not in method.tasks:
            continue
        # A file that does not name the method means the paper's, whatever train takes by itself.
        usual = {"method": "mezo"} if "method" in _OPTIONS[method.command] else {}
        merged = {**usual, **shared, **method.options, **by_task.get(task, {})}
        if data_dir is not None and not found[task].files:
            merged["data-dir"] = data_dir
        accepted = _OPTIONS[method.command]
        given = {
            option: _values(value, accepted[option], f"method {method.name}, task {label(task)}")
            for option, value in merged.items()
            if option in accepted
        }
        axes = [option for option, value in merged.items() if option in given and isinstance(value, list)]
        parts = [label(model)] * (len(models) > 1) + [label(task), method.name]
        for values, seed in itertools.product(itertools.product(*(given[option] for option in axes)), method.seeds):
            point = dict(zip(axes, values, strict=True))
            options = {option: point.get(option, value[0]) for option, value in given.items()}
            options = {option: value for option, value in options.items() if value is not False}
            folder = folder_of(parts, point, seed)
            run = Run(folder, method.command, model, task, method.name, seed, point, options)
            runs.append((order.index(seed), run))
    folders: dict[str, Run] = {}
    for _, run in runs:
        if (other := folders.setdefault(run.folder, run)) is not run:
            raise InputError(
                f"{other.title!r} and {run.title!r} would share the folder {run.folder}: make them two methods"
            )
    runs.sort(key=lambda ranked: ranked[0])
    return Sweep(name, models, tasks, metrics, names, keep_models, [run for _, run in runs])


def _method(name: str, entry: dict[str, Any], tasks: list[str], seeds: list[int]) -> _Method:
    where = f"method {name}"
    command = entry.get("command")
    if command not in COMMANDS:
        hint = nearest(str(command), COMMANDS) if command else ""
        raise InputError(
            f"{where} must have command: {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}, got {command}{hint}"
        )
    own = _texts(entry["tasks"], f"{where}, tasks") if "tasks" in entry else tasks
    _known(own, tasks, f"{where}: task", "add it to tasks: at the top")
    options = {key: value for key, value in entry.items() if key not in _METHOD_KEYS}
    _known_options(options, _OPTIONS[command], where, f"forwardtune {command}")
    return _Method(
        name, command, own, _seeds(entry["seeds"], f"{where}, seeds") if "seeds" in entry else seeds, options
    )


def _shared(entry: Any, where: str, methods: list[_Method]) -> dict[str, Any]:
    """Options for several commands: each takes those that it has, and each option must have a taker."""
    options = dict(_mapping(entry, where))
    used = list(dict.fromkeys(method.command for method in methods))
    known = {key: one for command in used for key, one in _OPTIONS[command].items()}
    _known_options(options, known, where, f"forwardtune {' | '.join(used)}")
    return options


def _known_options(options: Mapping[str, Any], known: Mapping[str, Any], where: str, command: str) -> None:
    for option in options:
        if option in _OWN:
            raise InputError(f"{where}: the sweep sets --{option} itself: {_OWN[option]}")
        if option not in known:
            raise InputError(
                f"{where}: {command} has no option --{option}{nearest(str(option), [*known, *_METHOD_KEYS])} "
                f"(forwardtune {command.split()[1]} --help lists them)"
            )


def _values(value: Any, option: Option, where: str) -> list[Any]:
    """One value, or a grid axis of several, as the command line would read them."""
    values = [option.of_file(each, where) for each in (value if isinstance(value, list) else [value])]
    if not values:
        raise InputError(f"{where}: {option.key} is an empty list: give at least one value")
    return _once(values, f"{where}: {option.key}", "value")


def _known(names: Any, known: Any, what: str, remedy: str = "") -> None:
    for name in names:
        if name not in known:
            hint = nearest(str(name), map(str, known)) or (f": {remedy}" if remedy else "")
            raise InputError(f"unknown {what} {name!r} (known: {', '.join(map(str, known))}){hint}")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold keys with values, got {value!r}")
    return value


def _texts(value: Any, where: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(each, str) and each for each in values):
        raise InputError(f"{where} must be a name or a list of names, got {value!r}")
    return _once(values, where, "name")


def _seeds(value: Any, where: str) -> list[int]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(each) is int and 0 <= each < 2**32 for each in values):
        raise InputError(f"{where} must be whole numbers from 0 to 4294967295, got {value!r}")
    return _once(values, where, "seed")


def _once(values: list[Any], where: str, what: str) -> list[Any]:
    if len({(type(each), each) for each in values}) < len(values):
        raise InputError(f"{where} has the same {what} twice: leave one out")
    return values


def _require_folders(what: str, names: Iterable[str]) -> None:
    """Raise InputError if two names would have one folder."""
    slugs: dict[str, str] = {}
    for name in names:
        other = slugs.setdefault(slug(name), name)
        if other is not name:
            raise InputError(f"{what} {other!r} and {name!r} would share the folder {slug(name)!r}: rename one")
