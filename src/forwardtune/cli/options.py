"""The options of a command, made from what describes its run (:mod:`forwardtune.config`)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .. import config
from ..config import Option
from ..refusals import describe


def flag(name: str) -> str:
    """What a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """An option for every setting of the command's run. One that is not given is no attribute of what is parsed."""
    for name, one in config.options(config.COMMANDS[command]).items():
        how: dict[str, Any] = {"help": _help(one), "default": argparse.SUPPRESS}
        if one.read is bool:
            how["action"] = "store_true"
        else:
            how |= {"type": _reader(one), "choices": one.choices, "metavar": one.metavar}
        parser.add_argument(flag(name), **how)
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def given(parsed: argparse.Namespace, command: str) -> dict[str, Any]:
    """The settings that were given, by name."""
    return {name: getattr(parsed, name) for name in config.options(config.COMMANDS[command]) if hasattr(parsed, name)}


def describe_run(parsed: argparse.Namespace, command: str) -> Any:
    """The description of the run that a command line asks for. Raises InputError for what has no meaning."""
    return describe(command, given(parsed, command), spell=flag)


def _help(one: Option) -> str:
    shown = one.shown or ("" if one.default in (None, False) else str(one.default).removesuffix(".0"))
    return one.help + (f" [{shown}]" if shown else "")


def _reader(one: Option) -> Callable[[str], Any]:
    if one.read in (int, float, str):
        return one.read

    def read(text: str) -> Any:
        assert one.read is not None
        try:
            return one.read(text)
        except ValueError as error:  # whose message argparse would not show
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
