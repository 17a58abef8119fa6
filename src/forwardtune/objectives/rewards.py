"""Rewards: functions of what the model writes, in TRL's signature."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, nearest
from ..tasks.task import Example

RewardFunction = Callable[..., Sequence[float]]


class RewardError(InputError):
    """A reward function failed, or returned something that is no list of rewards."""


class Reward:
    """A reward function ``reward(prompts, completions, **columns) -> list[float]``; higher is better.

    ``prompts`` and ``completions`` are lists of texts, and every column of the data is a list as long. Columns that the
    function does not take are left out.

    Args:
        function: the function.
        name: for messages and logs.
        weight: its factor in a sum of several.
    """

    def __init__(self, function: RewardFunction, name: str, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._taken = None if takes_all else {p.name for p in parameters}

    def __call__(self, examples: Sequence[Example], completions: Sequence[str]) -> list[float]:
        """The reward of each completion.

        Raises:
            RewardError: the function raised, or did not return one finite number for each completion.
        """
        columns: dict[str, list[Any]] = {
            key: [example.row.get(key) for example in examples] for key in examples[0].row if key not in _OWN
        }
        columns |= {"prompts": [example.prompt for example in examples], "completions": list(completions)}
        if self._taken is not None:
            columns = {key: values for key, values in columns.items() if key in self._taken}
        try:
            returned = self._function(**columns)
            is_list = isinstance(returned, Iterable) and not isinstance(returned, (str, bytes, Mapping))
            rewards = list(returned) if is_list else []
        except Exception as error:
            raise RewardError(
                f"reward {self.name} raised {type(error).__name__}: {error}. It was given {len(completions)} "
                f"completions, the first of them {completions[0]!r:.200}: mend the function, then go on with --resume"
            ) from error
        if not is_list or len(rewards) != len(completions):
            found = f"{len(rewards)} rewards" if is_list else f"{returned!r:.100}"
            raise RewardError(
                f"reward {self.name} returned {found} for {len(completions)} completions, the first of them "
                f"{completions[0]!r:.200}: return a list with a number for each completion"
            )
        return [self._number(reward, completion) for reward, completion in zip(rewards, completions, strict=True)]

    def _number(self, reward: Any, completion: str) -> float:
        try:
            value = reward.item() if hasattr(reward, "item") else reward  # of numpy and torch
            if isinstance(value, (str, bytes)):  # float() would read them
                raise TypeError
            value = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise RewardError(
                f"reward {self.name} returned {reward!r:.100}, which is not a number, for {completion!r:.200}: return a "
                "list with a number for each completion"
            ) from None
        if not math.isfinite(value):
            raise RewardError(f"reward {self.name} is {value} for {completion!r:.200}: return a finite number")
        return value


# Columns that TRL's signature has a meaning of its own for.
_OWN = ("prompts", "completions")


def load_reward(name: str, weight: float = 1.0) -> Reward:
    """The reward function ``module:function``; the module is looked for in the current folder too.

    Raises:
        InputError: no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{name!r} is not a reward: give it as module:function, such as rewards:brevity")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"reward {name}: module {module_name!r} could not be imported ({error}): run the command where "
            f"{module_name}.py is, or install it"
        ) from None
    except Exception as error:  # whatever the user's module does
        raise InputError(
            f"reward {name}: module {module_name!r} raised {type(error).__name__} when it was imported ({error}): mend it"
        ) from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"reward {name}: module {module_name!r} has no function {function_name!r}"
                         f"{nearest(function_name, known) or '; it has ' + ', '.join(known)}")  # fmt: skip
    return Reward(function, name, weight)
