"""What describes a run, from what was given of it or recorded, and what is recorded of it and handed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError
from .option import options
from .refusals import refusal_of
from .runs import COMMANDS, MeZOSettings, Train


def describe(
    command: str, given: Mapping[str, Any], *, resumed: bool = False, spell: Callable[[str], str] = str
) -> Any:
    """The description of a command's run.

    Args:
        given: settings by name; None counts as not given.
        resumed: they come from the log of a run that goes on, in which nothing tells what was given from what was default.
        spell: a setting's name -> what the user knows it by.

    Raises:
        InputError: they have no meaning together, or a number is out of bounds.
    """
    run = with_defaults(command, given)
    names = frozenset() if resumed else frozenset(name for name, value in given.items() if value is not None)
    if (refusal := refusal_of(command, run, names)) is not None:
        raise InputError(refusal.message(run, spell))
    return run


def with_defaults(command: str, given: Mapping[str, Any]) -> Any:
    """The description of a command's run, with defaults for what was not given. Nothing is refused."""
    declared = options(COMMANDS[command])
    known = {name: value for name, value in given.items() if value is not None}
    method = known.get("method") or usual_method(known)
    known = {**known, "method": method} if "method" in declared else known
    return COMMANDS[command](**{name: one.defaults.get(method, one.default) for name, one in declared.items()} | known)


#: Who gives one of these says how the method shall be, and gets the rest of it as the paper has it.
_OF_THE_METHOD = frozenset(
    (
        "probes", "probes_rise", "estimator", "normalize", "rule", "direction", "assignment", "rank", "refresh", "fold", "perturbation",
        "probes_per_pass",
        "active_layers", "sparsity", "modify", "modify_by",
    )
)  # fmt: skip


def usual_method(given: Mapping[str, Any]) -> str:
    """The method of a run that does not name one: ``feedback``, if nothing else is said of the method, of what is tuned or of the objective."""
    if given.keys() & _OF_THE_METHOD or given.get("objective", "loss") != "loss":
        return "mezo"
    if "tune" in given:
        return "forward" if given["tune"] == "late-mlp" and "quantize" not in given else "mezo"
    if "offload" in given:  # the walk reads the head's weights backwards, when they have left
        return "forward"
    return "feedback" if given.get("lora_init", "feedback") == "feedback" else "mezo"


def recorded(run: Any) -> Train:
    """The description that a step log's header has; what it does not say is default, or as it was before there was a choice."""
    known = {"method": "mezo", "stratify": "none", **(run if isinstance(run, dict) else {})}
    described: Train = with_defaults("train", {name: known[name] for name in options(Train) if name in known})
    return described


def settings(run: Any) -> dict[str, Any]:
    """What is recorded of a run in the step log's header and in ``metrics.json``."""
    return {name: value for name in options(type(run)) if (value := getattr(run, name)) is not None}


def arguments(run: Any) -> dict[str, Any]:
    """A run's settings that are arguments of :class:`~forwardtune.hf.trainer.MeZOConfig`, by its names for them."""
    own = options(MeZOSettings)
    names = {name: one.argument or (name if name in own else None) for name, one in options(type(run)).items()}
    return {argument: getattr(run, name) for name, argument in names.items() if argument is not None}
