"""Reading a step log: every line is verified, and every way to be wrong has its message."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import LogError
from ..method.estimators import ESTIMATORS
from ..method.record import StepRecord
from ..method.rule import Rule
from ..method.rules import RULES, logged_rule
from ..noise import DIRECTIONS, NOISE_VERSION
from .format import ABSENT, READABLE, direction_content, estimator_of, noise_of, step_record, unseal


@dataclass(frozen=True)
class Rollback:
    """After ``at`` steps the weights, and what the rule remembers, went back to those after ``to`` steps.

    Raises:
        ValueError: ``to`` is no earlier step.
    """

    at: int
    to: int

    def __post_init__(self) -> None:
        if isinstance(self.to, bool) or not isinstance(self.to, int) or not 0 <= self.to < self.at:
            raise ValueError(f"it goes back to step {self.to!r}, after {self.at} steps")


@dataclass(frozen=True)
class Note:
    """What a program wanted to keep, after ``at`` steps: a decision, and what it was based on."""

    at: int
    content: dict[str, Any]


@dataclass(frozen=True)
class Log:
    """A verified step log.

    Attributes:
        path: where it was read.
        header: the first line, without its checksum.
        records: one for each step, in order from step 0.
        step_checks: for each step, the checksum of its line, or of the last rollback between it and the next step.
        rollbacks: in order.
        folds: after how many steps each the weights were folded at another time than a refresh, in order.
        notes: in order.
        end: the last line, if the run closed its log: number of steps and digest of the tuned weights.
        length: bytes up to the end of the last whole line; anything behind it is a torn line.
        check: checksum of the last whole line.
        torn: whether the file ends in a torn line.
    """

    path: Path
    header: dict[str, Any]
    records: list[StepRecord]
    step_checks: list[str]
    rollbacks: list[Rollback]
    folds: list[int]
    notes: list[Note]
    end: dict[str, Any] | None
    length: int
    check: str
    torn: bool

    @property
    def steps(self) -> int:
        """Number of steps, skipped ones and undone ones included."""
        return len(self.records)


def read_log(path: str | PathLike[str]) -> Log:
    """Read and verify a step log. A torn last line, the trace of a kill in mid-write, is left out.

    Raises:
        LogError: no such file, not a step log, written by a newer version, altered or incomplete.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LogError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise LogError(f"{path} is a folder: name the steps.jsonl in it") from None
    except OSError as error:
        raise LogError(f"{path} cannot be read: {error.strerror}") from None
    *lines, rest = data.split(b"\n")
    if not lines:
        begin = b'{"format"'
        if data[: len(begin)] != begin[: len(data)]:
            kind = "an exported trajectory" if path.suffix == ".safetensors" else "something else"
            raise LogError(f"{path} is not a step log but {kind}: name a steps.jsonl")
        raise LogError(
            f"{path}: the first line, which describes the run, is missing or cut off. No step was logged, so nothing "
            "is lost: delete the file and start again"
        )
    header, check = _open(path, 1, "", lines[0])
    check_header(path, header)
    estimator = estimator_of(header)
    records: list[StepRecord] = []
    step_checks: list[str] = []
    rollbacks: list[Rollback] = []
    folds: list[int] = []
    notes: list[Note] = []
    end: dict[str, Any] | None = None
    for number, line in enumerate(lines[1:], start=2):
        content, check = _open(path, number, check, line)
        if "end" in content:
            end = content
            continue
        if "note" in content:
            if not isinstance(content["note"], dict):
                raise _refused(path, number, "its note is no object")
            notes.append(Note(len(records), content["note"]))
            continue
        if "rollback" in content:
            try:
                rollbacks.append(Rollback(len(records), content["rollback"]))
            except ValueError as error:
                raise _refused(path, number, str(error)) from None
            step_checks[-1] = check
            end = None
            continue
        if "fold" in content:
            if content["fold"] != len(records) or not records or header.get("fold") != "refresh":
                raise _refused(
                    path, number, f"it folds what waits after {content['fold']} steps, not after {len(records)}"
                )
            folds.append(len(records))
            step_checks[-1] = check
            continue
        if content.get("step") != len(records):
            raise _refused(path, number, f"it holds step {content.get('step')}, but step {len(records)} comes next")
        try:
            records.append(step_record(content, header, estimator, records[-1].unread if records else {}))
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, struct.error):
            raise _refused(path, number, "a field of the step is missing or of another kind") from None
        step_checks.append(check)
        end = None
    return Log(
        path, header, records, step_checks, rollbacks, folds, notes, end, len(data) - len(rest), check, torn=bool(rest)
    )


def _open(path: Path, number: int, previous: str, line: bytes) -> tuple[dict[str, Any], str]:
    try:
        return unseal(previous, line.decode())
    except LogError as error:
        raise _refused(path, number, str(error)) from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise _refused(path, number, "it is not the JSON that was written there") from None


def _refused(path: Path, number: int, why: str) -> LogError:
    return LogError(
        f"{path}, line {number}: {why}. Restore the file from a copy; the lines before this one are intact "
        f"(head -n {number - 1} keeps them, at the price of the steps that follow)"
        if number > 1
        else f"{path}, line 1: {why}. This is not a step log, or not an intact one: restore the file from a copy"
    )


def check_header(path: Path, header: dict[str, Any]) -> None:
    """Raise LogError unless this version of the package can read what the header announces."""
    for key, ours, what in (("format", READABLE, "log format"), ("noise", (NOISE_VERSION,), "noise")):
        theirs = header.get(key)
        if theirs not in ours:
            raise LogError(
                f"{path} has version {theirs} of the {what}, this forwardtune reads version {ours[-1]}: "
                f"use the forwardtune that wrote it ({header.get('versions', {}).get('forwardtune', 'unknown')}), or a newer one"
            )
    derived = header.get("assignment", ABSENT["assignment"]) != "shared"
    known_names: list[tuple[str, Mapping[str, Any]]] = [
        ("direction", DIRECTIONS),
        ("rule", RULES),
        *([("estimator", ESTIMATORS)] if derived else []),
    ]
    for key, known in known_names:
        if header[key] not in known:
            raise LogError(
                f"{path} uses the {key} {header[key]!r}, which is not known here: upgrade forwardtune, or, if it is your own, "
                f"import the module that calls register_{key} for it before the log is read"
            )
    if direction_content(DIRECTIONS[header["direction"]]).get("direction_table") != header.get("direction_table"):
        raise LogError(
            f"{path} was written with another table of the direction {header['direction']!r}: register the one that the run had"
        )
    try:
        noise_of(header)
        estimator_of(header)
    except (KeyError, TypeError, ValueError) as error:
        raise LogError(f"{path} has a header that is not whole ({error}): restore the file from a copy") from None
    rule_of(path, header)


def rule_of(path: Path, header: dict[str, Any]) -> Rule:
    """The rule that a header names, with its settings. Raises LogError if they are not a whole rule's."""
    settings = header.get("rule_settings", ABSENT["rule_settings"])
    try:
        rule = logged_rule(header["rule"], settings)
    except (TypeError, ValueError) as error:
        raise LogError(f"{path} uses the rule {header['rule']!r} otherwise than this forwardtune: {error}") from None
    if rule.settings() != settings or not rule.is_resolved:
        raise LogError(
            f"{path} uses the rule {header['rule']!r} with the settings {settings}, which are not all that it has: "
            "use the forwardtune that wrote it, or restore the file from a copy"
        )
    return rule
