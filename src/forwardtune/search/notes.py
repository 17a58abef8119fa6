"""L4: what a step log says of the search: the plan, what was measured, what was found."""

from __future__ import annotations

from typing import Any

from ..trajectory import Log


def plan_of(log: Log) -> dict[str, Any]:
    """What was planned when the run began."""
    return next((note.content["plan"] for note in log.notes if "plan" in note.content), {})


def has_searched(log: Log, steps: int) -> bool:
    """Whether the learning rate was found within so many steps."""
    return any("search" in note.content and note.at <= steps for note in log.notes)


def has_measured(log: Log) -> bool:
    """Whether held-out examples were measured after the last step."""
    return any("held_out" in note.content and note.at == log.steps for note in log.notes)


def found(log: Log) -> dict[str, Any]:
    """What a run found, for people: learning rates, eps, forward passes of the search, how often it went back."""
    plan = plan_of(log)
    search = next((note.content["search"] for note in log.notes if "search" in note.content), None)
    spent = plan.get("eps", {}).get("evaluations", 0)
    if search is not None:
        spent += plan["batches"] * len(search["tried"])
    rates = [max(record.lr) for record in log.records]
    return {
        "learning_rate": {"first": rates[0], "last": rates[-1]} if rates else None,
        "eps": log.header["eps"],
        "search_forwards": spent,
        "rollbacks": len(log.rollbacks),
    }
