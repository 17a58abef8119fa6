"""The parser of the command line: options by their whole names, and a hint for what is no option."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import nearest

# What other tools call an option of ours.
_ELSEWHERE = {
    "adapter": "tune",
    "bs": "batch-size",
    "checkpoint-steps": "save-steps",
    "data": "data-dir",
    "dataset": "task",
    "dataset-name": "task",
    "epochs": "steps",
    "epsilon": "eps",
    "eval-every": "eval-steps",
    "evaluation-steps": "eval-steps",
    "learning-rate": "lr",
    "lora-r": "lora-rank",
    "lr-schedule": "lr-scheduler",
    "lr-scheduler-type": "lr-scheduler",
    "max-iters": "steps",
    "max-seq-length": "max-length",
    "max-steps": "steps",
    "max-time": "time-budget",
    "max-train-samples": "train-examples",
    "model-id": "model",
    "model-name": "model",
    "model-name-or-path": "model",
    "num-epochs": "steps",
    "num-train-epochs": "steps",
    "optim": "method",
    "optimizer": "method",
    "out": "output-dir",
    "output": "output-dir",
    "per-device-train-batch-size": "batch-size",
    "r": "lora-rank",
    "reward": "objective",
    "reward-funcs": "objective",
    "target-modules": "lora-targets",
    "task-name": "task",
    "torch-dtype": "dtype",
    "train-batch-size": "batch-size",
    "trainer": "method",
    "wd": "weight-decay",
    "zo-eps": "eps",
}


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, which name another one, or none, once an option is added.

    An option that does not exist is refused by the command that it was given to, with the one that was probably meant.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

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
    ours = f"--{_ELSEWHERE.get(name, name)}"
    if ours in known:
        beside = " (an epoch is training examples / batch size of them)" if name.endswith("epochs") else ""
        return f"; did you mean {ours}?{beside}"
    begun = [one for one in known if one.startswith(f"--{name}")]
    if len(begun) == 1:
        return f"; did you mean {begun[0]}?"
    return f"; it may be short for {' or '.join(begun)}" if begun else nearest(f"--{name}", known)
