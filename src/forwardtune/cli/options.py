"""The options of a command, made from what describes its run (:mod:`forwardtune.config`), and the file of ``--config``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import COMMANDS, SCHEMA, Option, describe, group_of, options
from ..errors import InputError
from .parser import hint

# What the file of --config may say beside the settings of a run.
_BESIDE = ("version", "output-dir")


def flag(name: str) -> str:
    """What a setting is called on the command line."""
    return f"--{name.replace('_', '-')}"


def add_options(
    parser: argparse.ArgumentParser, command: str, *, first: Sequence[str] = (), json: bool = True
) -> argparse._ArgumentGroup:
    """An option for every setting of the command's run, in groups. One that is not given is no attribute of what is parsed.

    Args:
        first: the settings that matter first.

    Returns:
        The group of these.
    """
    declared = options(COMMANDS[command])
    groups = {"": parser.add_argument_group("what matters first" if first else "options")}
    for name in [*(name for name in first if name in declared), *(name for name in declared if name not in first)]:
        one = declared[name]
        how: dict[str, Any] = {"help": _help(one, "method" in declared), "default": argparse.SUPPRESS}
        if one.read is bool:
            how["action"] = "store_true"
        else:
            how |= {"type": typed(one.read), "choices": one.choices, "metavar": one.metavar}
        title = group_of(COMMANDS[command], name) if first and name not in first else ""
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(flag(name), **how)
    if json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    return groups[""]


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that names a file with settings."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with any of these options, without their dashes; options given here win",
    )


@dataclass(frozen=True)
class Asked:
    """What a command line and its file ask for.

    Attributes:
        settings: those that were given, by name.
        output_dir: where the run's files go.
        file: of ``--config``.
        in_file: the settings that came from it.
    """

    command: str
    settings: dict[str, Any]
    output_dir: str | None = None
    file: str | None = None
    in_file: frozenset[str] = frozenset()

    def value(self, name: str) -> Any:
        """One setting, as it was given or by default."""
        return self.settings.get(name, options(COMMANDS[self.command])[name].default)

    def describe(self, settings: dict[str, Any] | None = None, *, resumed: bool = False) -> Any:
        """The description of the run. Raises InputError for what has no meaning.

        Args:
            settings: in place of those that were given.
            resumed: they come from the log of a run that goes on.
        """
        named = set()

        def spell(name: str) -> str:
            named.add(name)
            return flag(name)

        try:
            return describe(self.command, self.settings if settings is None else settings, resumed=resumed, spell=spell)
        except InputError as error:
            if named & self.in_file:
                raise InputError(f"{self.file}: {error}") from None
            raise


def ask(parsed: argparse.Namespace, command: str) -> Asked:
    """What was asked for: by options, and else by the file of ``--config``.

    Raises:
        InputError: the file cannot be used.
    """
    given = {name: getattr(parsed, name) for name in options(COMMANDS[command]) if hasattr(parsed, name)}
    output_dir, file = getattr(parsed, "output_dir", None), getattr(parsed, "config", None)
    if file is None:
        return Asked(command, given, output_dir)
    content = read_config(file, command)
    named = content.pop("output_dir", None)
    return Asked(command, {**content, **given}, output_dir or named, file, frozenset(content.keys() - given.keys()))


def read_config(file: str, command: str) -> dict[str, Any]:
    """The settings in a file of ``--config``, by name, and ``output_dir``.

    Raises:
        InputError: it is not there, has a key that is no option, or a value that an option cannot have.
    """
    from ..tasks.yaml_file import read_yaml

    content = read_yaml(Path(file), "file of --config", "model, task and steps")
    version = content.pop("version", SCHEMA)
    if type(version) is not int or version != SCHEMA:
        raise InputError(f"{file}: version {version!r} is of another forwardtune, and this one reads version {SCHEMA}")
    declared = {one.key: one for one in options(COMMANDS[command]).values()}
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key == "output-dir":
            if not isinstance(value, str) or not value:
                raise InputError(f"{file}: output-dir cannot be {value!r}: give the name of a folder, in quotes")
            settings["output_dir"] = value
        elif key in declared:
            settings[declared[key].name] = declared[key].of_file(value, file)
        elif key in ("config", "resume", "json"):
            raise InputError(f"{file}: {key} is an option of the command line alone: give --{key} there")
        else:
            known = [f"--{name}" for name in (*declared, *_BESIDE)]
            meant = (
                hint(f"--{key}", known).replace("--", "") or ": keys are the options of the command line, without --"
            )
            raise InputError(f"{file}: unknown key {key!r}{meant}")
    return settings


def _help(one: Option, has_method: bool) -> str:
    shown = one.shown
    if not shown and one.default is not None and one.default is not False:
        shown = _number(one.default)
        if has_method:
            shown += "".join(
                f"; {method} {_number(value)}" for method, value in one.defaults.items() if value is not None
            )
    return one.help + (f" [{shown}]" if shown else "")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def typed(reader: Callable[[str], Any] | None) -> Callable[[str], Any]:
    """What reads the text of an option, as argparse wants it."""
    assert reader is not None
    if reader in (int, float, str):
        return reader

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:  # whose message argparse would not show
            raise argparse.ArgumentTypeError(str(error)) from None

    return read
