"""The parser of the command line: options by their whole names, and a hint for what is no option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import nearest

# An option of ours: what other tools call it.
_ELSEWHERE = {
    "batch-size": "bs per-device-train-batch-size train-batch-size",
    "data-dir": "data",
    "data": "data-file data-files dataset dataset-name train-file",
    "dtype": "torch-dtype",
    "eps": "epsilon zo-eps",
    "eval-steps": "eval-every evaluation-steps",
    "lora-rank": "lora-r r",
    "lora-targets": "target-modules",
    "lr": "learning-rate",
    "lr-scheduler": "lr-schedule lr-scheduler-type",
    "max-length": "max-seq-length",
    "method": "optim optimizer trainer",
    "model": "model-id model-name model-name-or-path",
    "objective": "reward reward-funcs",
    "output-dir": "out output",
    "save-steps": "checkpoint-steps",
    "steps": "max-iters max-steps",
    "epochs": "num-epochs num-train-epochs",
    "task": "task-name",
    "time-budget": "max-time",
    "train-examples": "max-train-samples",
    "tune": "adapter",
    "weight-decay": "wd",
}


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, which name another one, or none, once an option is added.

    An option that does not exist is refused by the command that it was given to, with the one that was probably meant.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})
        self._optionals.title = "other options"

    def format_help(self) -> str:
        """As argparse writes it, with what belongs to no group at the end."""
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse does it, with the word that was probably meant."""
        if action.choices is not None and value not in action.choices:
            known = [str(one) for one in action.choices]
            raise argparse.ArgumentError(
                action, f"invalid choice: {value!r} (choose from {', '.join(known)}){nearest(str(value), known)}"
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does it, but nothing may stay unknown."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return namespace, unknown

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        first = next((one for one in unknown if one.startswith("-")), unknown[0])
        given = first.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint(given, known) if given.startswith('-') else ''}")


def hint(given: str, known: Sequence[str]) -> str:
    """``"; did you mean --X?"`` for an option that is none of the known ones, or nothing."""
    name = given.lstrip("-").replace("_", "-").lower()
    ours = f"--{next((ours for ours, others in _ELSEWHERE.items() if name in others.split()), name)}"
    if ours in known:
        return f"; did you mean {ours}?"
    begun = [one for one in known if one.startswith(f"--{name}")]
    if len(begun) == 1:
        return f"; did you mean {begun[0]}?"
    return f"; it may be short for {' or '.join(begun)}" if begun else nearest(f"--{name}", known)
