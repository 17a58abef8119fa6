"""``forwardtune compare``: two runs over the same test examples, example by example."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..evaluation import sign_test
from ..run_folder import METRICS, PREDICTIONS, RunFolder, read_lines

# Examples that are shown, and the length of an input in them.
_SHOWN, _INPUT = 10, 300


@dataclass(frozen=True)
class Pair:
    """One example as both runs answered it."""

    first: dict[str, Any]
    second: dict[str, Any]

    @property
    def outcomes(self) -> tuple[float, float]:
        """How well each answered: right or wrong, else the task's metric or the reward."""
        name = "score" if "score" in self.first else "right"
        return float(self.first[name]), float(self.second[name])


def run(parsed: argparse.Namespace) -> None:
    """Say which is better, whether that could be chance, and which examples flipped."""
    folders = [Path(name) for name in parsed.runs]
    pairs, missing = _pairs(*folders)
    first, second = zip(*(pair.outcomes for pair in pairs), strict=True)
    test = sign_test(first, second)
    flips = [pair for pair in pairs if pair.outcomes[0] != pair.outcomes[1]]
    flips.sort(key=lambda pair: pair.outcomes[0] - pair.outcomes[1])
    facts: dict[str, Any] = {
        "runs": [str(folder) for folder in folders],
        "examples": len(pairs),
        "not_shared": missing,
        "metric": RunFolder(folders[0]).metrics.get("metric"),
        "means": [sum(values) / len(pairs) for values in (first, second)],
        "sign_test": test,
        "flipped": [_flip(pair) for pair in flips],
    }
    if parsed.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    names = [str(folder) for folder in folders]
    print(f"{len(pairs)} test examples" + (f"; {missing} that only one of them has are left out" if missing else ""))
    for name, mean in zip(names, facts["means"], strict=True):
        print(f"{facts['metric'] or 'right'} {mean:.4f}  {name}")
    print(
        f"{test['better']:.0f} examples came out better in the second, {test['worse']:.0f} worse: "
        f"p = {test['p_value']:.2g} by the sign test"
    )
    for pair in flips if parsed.all else flips[:_SHOWN]:
        flip = _flip(pair)
        print(f"\n{_short(flip['input'])}")
        print(f"  right answer: {flip['gold']}" if "gold" in flip else "  no right answer is known")
        for name, answer, value in zip(names, flip["answers"], pair.outcomes, strict=True):
            print(f"  {value:.4g}  {_short(str(answer))}  ({name})")
    if not parsed.all and len(flips) > _SHOWN:
        print(f"\n{len(flips) - _SHOWN} more: --all shows them, --json gives them to programs")


def _pairs(one: Path, other: Path) -> tuple[list[Pair], int]:
    """The examples that both runs answered, and how many only one of them did.

    Raises:
        InputError: a run has no predictions, or they are of other examples, or of another kind of answer.
    """
    found = []
    for folder in (one, other):
        RunFolder(folder)
        lines = [line for line in read_lines(folder / PREDICTIONS) if {"answer", "completion"} & line.keys()]
        if not lines:
            raise InputError(
                f"{folder} has no {PREDICTIONS} of a finished run: finish it, or measure its model again with "
                "forwardtune eval --output-dir"
            )
        seen: dict[str, int] = {}
        keyed = {}
        for line in lines:  # the same question may stand there twice
            key = json.dumps([line["input"], line.get("gold")])
            seen[key] = seen.get(key, 0) + 1
            keyed[key, seen[key]] = line
        found.append(keyed)
    first, second = found
    shared = [key for key in first if key in second]
    if not shared:
        raise InputError(
            f"{one} and {other} were measured on other test examples: compare runs of the same task and data"
        )
    pairs = [Pair(first[key], second[key]) for key in shared]
    if any(
        ("score" in pair.first, "right" in pair.first) != ("score" in pair.second, "right" in pair.second)
        for pair in pairs
    ):
        raise InputError(f"{one} and {other} answer in other ways ({METRICS} says how each was measured)")
    return pairs, len(first) + len(second) - 2 * len(shared)


def _flip(pair: Pair) -> dict[str, Any]:
    kept: dict[str, Any] = {name: pair.first[name] for name in ("example", "input", "gold") if name in pair.first}
    said = [side.get("answer", side.get("completion")) for side in (pair.first, pair.second)]
    return {**kept, "answers": said, "outcomes": list(pair.outcomes)}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _INPUT else f"{line[: _INPUT // 2]} ... {line[-_INPUT // 2 :]}"
