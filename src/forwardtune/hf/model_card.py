"""L6: what the model card of a run says: the method, what the run found, and how its weights are rebuilt."""

from __future__ import annotations

import re
from typing import Any

from ..averages import NONE
from ..trajectory import Log

# In the card that transformers writes.
_LIST = re.compile(r"(?<=The following hyperparameters were used during training:\n)(?:[^\n#]+\n)*")
_AFTER = "\n### Framework versions\n"


def describe(card: str, log: Log, steps: int, average: str = NONE) -> str:
    """transformers' model card of a run, with MeZO in the place of the optimizer that it names.

    Args:
        card: the text that transformers wrote.
        log: the run's step log, finished or not.
        steps: the model has the weights after so many steps, or an average of those up to there.
    """
    method = {f"- {name}": value for name, value in method_facts(log).items()}

    def mended(listed: re.Match[str]) -> str:
        others = [line for line in listed[0].splitlines() if line.split(":")[0] not in {*method, "- optimizer"}]
        return "\n".join([*(f"{name}: {value}" for name, value in method.items()), *others]) + "\n"

    before, mark, after = _LIST.sub(mended, card, count=1).partition(_AFTER)
    return f"{before.rstrip()}\n\n{rebuilding(log, steps, average)}{mark}{after}"


def method_facts(log: Log) -> dict[str, Any]:
    """The settings that decide what the log's steps mean, and the learning rates that they were taken with."""
    header = log.header
    rule = ", ".join(f"{name}={value}" for name, value in header.get("rule_settings", {}).items())
    rates = [max(record.lr) for record in log.records]
    spread = f"{rates[0]:.3g} at first, {rates[-1]:.3g} at last" if rates and len(set(rates)) > 1 else None
    searched = any("search" in note.content for note in log.notes)
    return {
        "method": "MeZO (forward passes only, no backpropagation; https://arxiv.org/abs/2305.17333)",
        "rule": f"{header['rule']} ({rule})" if rule else header["rule"],
        "learning_rate": f"{spread or (f'{rates[0]:.3g}' if rates else 'none yet')}{', found by the run' if searched else ''}",
        "eps": f"{header['eps']:.3g}",
        "estimator": f"{header['estimator']}, probes a step: {header['probes']}, {header['direction']}"
        + (f", normalised by {header['normalize']}" if "normalize" in header else "")
        + "".join(f", {name} {header[name]}" for name in ("active_layers", "sparsity", "modify") if name in header),
        "weight_decay": max(group["weight_decay"] for group in header["groups"]),
        "seed": header["seed"],
        "training_steps": f"{log.steps}, {sum(record.skipped for record in log.records)} of them skipped"
        + (f"; ways back: {len(log.rollbacks)}" if log.rollbacks else ""),
    }


def rebuilding(log: Log, steps: int, average: str = NONE) -> str:
    """How the weights after so many steps, or an average of those up to there, are rebuilt."""
    digest = log.end["digest"] if log.end is not None else "not there yet: the run has not ended"
    whole = steps == log.steps and log.end is not None
    named = ("" if whole else f", steps={steps}") + ("" if average == NONE else f', average="{average}"')
    call = f'replay("{log.path.name}", model{named})'
    return (
        "### Step log\n\n"
        f"`{log.path.name}` holds every step, and rebuilds the weights from those that the run began with, bit for bit and without data:\n\n"
        "```python\n"
        "from forwardtune import replay\n\n"
        f"{call}  # model: as the run began with it, in {', '.join(sorted({t['dtype'] for t in log.header['tensors']}))}\n"
        "```\n\n"
        f"- {'weights after' if average == NONE else f'the average {average} of the weights up to'} step {steps} of {log.steps}\n"
        f"- SHA-256 of the tuned weights before the run: `{log.header['base']}`\n"
        f"- SHA-256 of the tuned weights after the last step: `{digest}`\n"
        f"- checksum of the log's last line: `{log.check}`\n"
    )
