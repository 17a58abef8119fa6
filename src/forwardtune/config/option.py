"""What a setting of a run is, and how a dataclass declares one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..errors import InputError, nearest

#: In place of a number: to be found by the run itself (:mod:`forwardtune.search.automatic`).
AUTO = "auto"


def number_or_auto(value: Any) -> float | str:
    """A positive number, or ``"auto"``. Raises ValueError for anything else."""
    if value == AUTO:
        return AUTO
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{value!r} is neither a positive number nor 'auto'")
    return number


if TYPE_CHECKING:
    NumberOrAuto = float | str
else:
    NumberOrAuto = number_or_auto  # an argument's text is read by calling its type, here and in HfArgumentParser


@dataclass(frozen=True)
class Bounds:
    """Which numbers a setting may be, in words that follow its name, and one that it may not be."""

    words: str
    allow: Callable[[Any], bool]
    wrong: Any


POSITIVE = Bounds("must be positive", lambda value: 0 < value < math.inf, 0)
NOT_NEGATIVE = Bounds("must not be negative", lambda value: value >= 0, -1)
FINITE = Bounds("must be a number that is not negative", lambda value: 0 <= value < math.inf, -1.0)
FRACTION = Bounds("must be a number from 0 up to 1, 1 excluded,", lambda value: 0 <= value < 1, 1.0)
SEED = Bounds("must be from 0 to 4294967295", lambda value: 0 <= value < 2**32, -1)


@dataclass(frozen=True)
class Option:
    """One setting of a run.

    Attributes:
        help: one line for people, without the default.
        shown: the default in words, where its value does not say it.
        choices: all that it may be.
        bounds: of a number.
        only: another setting -> its values with which this one has an effect. All must hold.
        defaults: method -> default, where it is not the field's.
        free: a resumed run may have another value; everything else comes from its log.
        is_place: it may name a file or a folder.
        required: it has no default that a run could have.
        argument: what :class:`~forwardtune.hf.trainer.MeZOConfig` calls it, if that has it under another name or as transformers' own.
        metavar: stands for the value in the help.
        read: text -> value; ``bool`` for a flag.
        name, default: the field's.
    """

    help: str
    shown: str = ""
    choices: tuple[str, ...] | None = None
    bounds: Bounds | None = None
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    free: bool = False
    is_place: bool = False
    required: bool = False
    argument: str | None = None
    metavar: str | None = None
    read: Callable[[str], Any] | None = None
    name: str = ""
    default: Any = None

    @property
    def key(self) -> str:
        """Its name in files and, after two dashes, on the command line."""
        return self.name.replace("_", "-")

    def of_file(self, value: Any, where: str) -> Any:
        """The value that a YAML file gives it, read as the command line reads text.

        Raises:
            InputError: it cannot be that; the message begins with ``where``.
        """
        wrong = f"{where}: {self.key} cannot be {value!r}"
        if self.read is bool:
            if not isinstance(value, bool):
                raise InputError(f"{wrong}: it is a flag, write true or false")
            return value
        if value is None or isinstance(value, bool | dict | list):
            raise InputError(
                f"{wrong}: give a number or text (YAML reads yes, no, on and off as true and false: quote them)"
            )
        assert self.read is not None
        try:
            result = self.read(str(value))  # YAML 1.1 reads 1e-6 as text
        except ValueError as error:
            kinds: dict[Any, str] = {int: "it must be a whole number", float: "it must be a number"}
            raise InputError(f"{wrong}: {kinds.get(self.read, error)}") from None
        if self.choices is not None and result not in self.choices:
            raise InputError(f"{wrong}: choose {', '.join(self.choices)}{nearest(str(value), self.choices)}")
        return result


class _Help(str):
    """The help of a field, which carries all else that is declared: HfArgumentParser hands whatever metadata hold to argparse."""

    option: Option


def option(default: Any, help: str, **how: Any) -> Any:
    """A field that is a setting; ``how`` are attributes of :class:`Option`."""
    text = _Help(help)
    text.option = Option(help, **how)
    return field(default=default, metadata={"help": text})


def options(kind: Any) -> dict[str, Option]:
    """The settings among a dataclass's fields, by name."""
    hints = get_type_hints(kind)
    found = {}
    for one in fields(kind):
        if isinstance(text := one.metadata.get("help"), _Help):
            declared = text.option
            types = [part for part in get_args(hints[one.name]) if part is not NoneType] or [hints[one.name]]
            found[one.name] = replace(
                declared,
                name=one.name,
                default=None if one.default is MISSING else one.default,
                read=declared.read or types[0],
            )
    return found
