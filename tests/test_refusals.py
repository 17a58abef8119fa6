"""Settings without meaning are refused by a table, before a model or a data set is looked for.

The tests are made from the table: a row that is added is tested, and one whose example is refused for another reason is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forwardtune.cli.methods import METHODS
from forwardtune.cli.options import flag
from forwardtune.config import COMMANDS, Refusal, describe, options, refusal_of, refusals, with_defaults
from forwardtune.errors import InputError
from forwardtune.method.estimators import ESTIMATORS, NORMALIZATIONS
from forwardtune.method.moments import STATES
from forwardtune.method.rules import RULES
from forwardtune.names import ON_BAD_ROW
from forwardtune.noise.directions import SPECIFIED
from support.command import cli, refused

ROWS = [(command, row) for command in COMMANDS for row in refusals(command)]
# Neither is there.
ABSENT = {"model": "absent/model", "task": "absent.yaml"}


# What a command wants beside its settings.
BESIDE = {
    "plan": [],
    "generate": ["--prompt", "a"],
    "chat": [],
    "predict": ["--input", "absent.csv", "--output", "out.csv"],
}


def absent(command: str) -> dict[str, str]:
    return {name: value for name, value in ABSENT.items() if name in options(COMMANDS[command])}


def settings_of(command: str, row: Refusal) -> dict[str, Any]:
    """The row's example, as it is read."""
    given = {name: value for name, value in {**absent(command), **row.example}.items() if value is not None}
    declared = options(COMMANDS[command])
    return {name: read(str(value)) for name, value in given.items() if (read := declared[name].read)}


def flags(settings: Mapping[str, Any]) -> list[str]:
    return [
        part for name, value in settings.items() for part in (flag(name), *(() if value is True else (str(value),)))
    ]


def named(value: object) -> str:
    if not isinstance(value, Refusal):
        return str(value)
    return "-".join(f"{name}={wrong}" for name, wrong in value.example.items())


@pytest.mark.parametrize(("command", "row"), ROWS, ids=named)
def test_command_line_is_refused_by_its_row_before_anything_is_opened(
    tmp_path: Path, command: str, row: Refusal
) -> None:
    settings = settings_of(command, row)
    assert refusal_of(command, with_defaults(command, settings), frozenset(settings)) is row
    with refused(tmp_path, "") as ran:
        place = BESIDE.get(command, ["--output-dir", tmp_path / "run"])
        ran(told := cli(command, *place, *flags(settings)))
    assert told.err == f"forwardtune: error: {row.message(with_defaults(command, settings), flag)}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_belongs_to_a_setting_is_taken_beside_it(command: str) -> None:
    declared = options(COMMANDS[command])
    for name, one in declared.items():
        needed = {other: values[-1] for other, values in one.only.items()}
        value = next((choice for choice in one.choices or () if choice != "none"), one.default)
        value = "tensorboard" if name == "report_to" else value
        beside = {"normalize": {"probes": 2}, "patience": {"eval_steps": 2}, "momentum": {"rank": 2}}.get(name, {})
        if name == "quantize" and "tune" in declared:
            beside = {"tune": "lora"}
        if value is None and one.read:
            value = one.read("1m" if name == "time_budget" else "1")
        describe(command, {**absent(command), **beside, **needed, name: value})


def test_a_message_has_the_names_that_the_user_knows() -> None:
    with pytest.raises(InputError, match=r"^momentum belongs to rule momentum or rule muon: leave it out$"):
        describe("train", {**ABSENT, "momentum": 0.5})
    with pytest.raises(InputError, match=r"^--momentum belongs to --rule momentum or --rule muon: leave it out$"):
        describe("train", {**ABSENT, "momentum": 0.5}, spell=flag)


def test_choices_are_those_of_the_method() -> None:
    """They are named without torch in the declaration, and registered with it in the method."""
    rules = [name for name, rule in RULES.items() if rule.__module__.startswith("forwardtune.")]
    registered = {"estimator": ESTIMATORS, "normalize": NORMALIZATIONS, "rule": rules, "rule_state": STATES}
    registered |= {"direction": SPECIFIED, "on_bad_row": ON_BAD_ROW, "method": METHODS}
    declared = options(COMMANDS["train"])
    assert {name: declared[name].choices for name in registered} == {n: tuple(each) for n, each in registered.items()}
