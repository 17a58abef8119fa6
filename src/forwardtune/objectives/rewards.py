"""Rewards: functions of what the model writes, in TRL's signature."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..tasks.task import Example

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(InputError):
    """A reward function failed, or returned something that is no list of rewards."""


class Reward:
    """A reward function ``reward(prompts, completions, **columns) -> list[float | None]``; higher is better.

    ``prompts`` and ``completions`` are lists of texts, ``completion_ids`` lists of their tokens, and every column of the
    data is a list as long. What the function does not take is left out. None is the reward of a completion that the
    function does not judge. ``name`` is for messages and logs, and ``weight`` its factor in a sum of several.

    The function must name ``completions`` among its parameters and must not be one of the standard library. Columns are
    data from anywhere, and a function that was not written as a reward may do anything with them:
    ``subprocess.getoutput(cmd)`` would run a column called ``cmd``.

    Raises:
        InputError: the function does not take ``completions`` by name, is of the standard library, is a coroutine, or
            wants what TRL's trainer alone has.
    """

    def __init__(self, function: RewardFunction, name: str, weight: float = 1.0) -> None:
        self.name, self.weight, self._function = name, weight, function
        call = getattr(function, "__call__", None)  # noqa: B004  # of an object, whose method may be the coroutine
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call):
            raise InputError(f"reward {name} is an async function, which is not awaited here: give a plain function")
        parameters = _parameters(function, name)
        required = [p.name for p in parameters if p.kind in _BY_NAME and p.default is p.empty]
        if foreign := [one for one in required if one in _FOREIGN]:
            raise InputError(
                f"reward {name} takes {foreign[0]}, which TRL's trainer alone has: give it a default, such as "
                f"{foreign[0]}=None, and do without it there"
            )
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._taken = None if takes_all else {p.name for p in parameters}
        self._columns = [one for one in required if one not in _OWN]

    def require(self, columns: Iterable[str]) -> None:
        """Check that a row has the columns that the function takes without a default. Raises RewardError if not."""
        known = [str(column) for column in columns if column not in _OWN]
        for name in self._columns:
            if name not in known:
                raise RewardError(
                    f"reward {self.name} takes {name!r}, and the data have no such column (they have "
                    f"{', '.join(known) or 'none'}){nearest(name, known)}. Rename it, give it a default, or add the column to every row"
                )

    def __call__(
        self,
        examples: Sequence[Example],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[float | None]:
        """The reward of each completion; None where the function does not judge it.

        Raises:
            RewardError: the function raised, or did not return one finite number, or None, for each completion.
        """
        columns: dict[str, list[Any]] = {
            key: [example.row.get(key) for example in examples]
            for key in dict.fromkeys(chain.from_iterable(example.row for example in examples))
            if key not in _OWN
        }
        self.require(columns)
        columns |= {"prompts": [example.prompt for example in examples], "completions": list(completions)}
        if completion_ids is not None:
            columns["completion_ids"] = [list(ids) for ids in completion_ids]
        if self._taken is not None:
            columns = {key: values for key, values in columns.items() if key in self._taken}
        first = f"the first of them {next(iter(completions), '')!r:.200}"
        try:
            returned = self._function(**columns)
            is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
            rewards = list(returned) if is_list else []
        except Exception as error:
            # A function for TRL's conversational data takes the text out of messages.
            hint = " (completions are texts here, not lists of messages)" if _expects_messages(error) else ""
            raise RewardError(
                f"reward {self.name} raised {type(error).__name__}: {error}{hint}. It was given {len(completions)} "
                f"completions, {first}: mend the function, then resume the run"
            ) from error
        if not is_list or len(rewards) != len(completions):
            found = f"{len(rewards)} rewards" if is_list else f"{returned!r:.100}"
            raise RewardError(
                f"reward {self.name} returned {found} for {len(completions)} completions, {first}: {_WANTED}"
            )
        return [self._number(reward, completion) for reward, completion in zip(rewards, completions, strict=True)]

    def _number(self, reward: Any, completion: str) -> float | None:
        if reward is None:
            return None
        try:
            value = reward.item() if hasattr(reward, "item") else reward  # of numpy and torch
            if isinstance(value, (str, bytes)):  # float() would read them
                raise TypeError
            value = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise RewardError(
                f"reward {self.name} returned {reward!r:.100}, which is not a number, for {completion!r:.200}: {_WANTED}"
            ) from None
        if not math.isfinite(value):
            raise RewardError(
                f"reward {self.name} is {value} for {completion!r:.200}: return a finite number, or None where the "
                "reward does not apply"
            )
        return value


_WANTED = "return a list with a number, or None, for each completion"
# Columns that TRL's signature has a meaning of its own for.
_OWN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
# Of these, what only TRL's trainer could give.
_FOREIGN = _OWN[3:]
# How a parameter can be given by its name.
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(function: RewardFunction, name: str) -> list[inspect.Parameter]:
    """The parameters of a function that was written to be a reward."""
    whole: Any = function
    while isinstance(whole, functools.partial):
        whole = whole.func
    module = getattr(whole, "__module__", None) or type(whole).__module__
    _require_own(module, f"reward {name} is {getattr(whole, '__name__', whole)} of the standard library")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        parameters = []
    if not any(p.name == "completions" and p.kind in _BY_NAME for p in parameters):
        raise InputError(
            f"reward {name} takes no parameter called completions, so it was not written to judge what a model writes: "
            "give it one, as in def reward(completions, **columns)"
        )
    return parameters


def _require_own(module: str, what: str) -> None:
    """Raise InputError if a module, by its name, is one of the standard library."""
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise InputError(
            f"{what}: {module!r} is a module of the standard library, whose functions were not written to judge "
            "completions: give a function of your own, in a module with another name"
        )


def _expects_messages(error: Exception) -> bool:
    # text["content"], and text[0] of an empty one.
    said = ("string indices must be integers", "string index out of range")
    return isinstance(error, (TypeError, IndexError)) and str(error).startswith(said)


def load_reward(name: str, weight: float = 1.0) -> Reward:
    """The reward function ``module:function``, or ``path/to/file.py:function``.

    The module is looked for in the current folder too; a file is imported by itself, with its folder in the search path.

    Raises:
        InputError: no such module, file or function, or one that is no reward.
    """
    where, _, function_name = name.rpartition(":")
    if not where or not function_name:
        raise InputError(f"{name!r} is not a reward: give it as module:function, such as rewards:brevity")
    is_file = where.endswith(".py")
    if not is_file:
        _require_own(where, f"reward {name}")  # importing is running, so it comes after this
    if is_file and not Path(where).is_file():
        raise InputError(f"reward {name}: there is no file {where}: check the path, which is relative to {Path.cwd()}")
    folder = str(Path(where).resolve().parent if is_file else Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = _import_file(Path(where)) if is_file else importlib.import_module(where)
    except ImportError as error:
        elsewhere = f"run the command where {where}.py is, give its path as {where}.py:{function_name}, or "
        raise InputError(
            f"reward {name}: module {where!r} could not be imported ({error}): {'' if is_file else elsewhere}install what "
            "is missing"
        ) from None
    except Exception as error:  # whatever the user's module does
        raise InputError(
            f"reward {name}: module {where!r} raised {type(error).__name__} when it was imported ({error}): mend it"
        ) from error
    finally:
        sys.path.remove(folder)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = nearest(function_name, known) or f"; it has {', '.join(known)}"
        raise InputError(f"reward {name}: module {where!r} has no function {function_name!r}{near}")
    return Reward(function, name, weight)


def _import_file(path: Path) -> Any:
    """The module in a file, imported once, which no other module of the file's name stands in for."""
    name = f"{path.stem}@{path.resolve()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
