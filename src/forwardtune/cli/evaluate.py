"""``forwardtune eval | probe``: what a model does on a task without tuning, or after it."""

from __future__ import annotations

import argparse
from typing import Any

from .. import memory
from ..errors import InputError
from ..paper.extra import PROBING, require
from .options import ask
from .results import conclude, new_folder
from .session import Session, open_session


def run_eval(parsed: argparse.Namespace) -> None:
    """Evaluate and print one JSON object on stdout."""
    options = ask(parsed, "eval").describe()
    _new(parsed)
    session = open_session(options, "test", shots=options.shots, calibrate=options.calibrate)
    name = "icl" if options.shots else "zero-shot"
    metrics = session.facts("eval", f"{name}-calibrated" if options.calibrate else name)
    if options.shots:
        metrics["demonstrations"] = session.demonstrations
    conclude(_measure(session, metrics), parsed)


def run_probe(parsed: argparse.Namespace) -> None:
    """Fit a linear probe, evaluate with it and print one JSON object on stdout."""
    from ..paper.baselines import probe

    require("linear probes", PROBING)
    options = ask(parsed, "probe").describe()
    _new(parsed)
    session = open_session(options, "train", "dev", "test")
    if session.task.preference is not None:  # its right text is always the first
        raise InputError(
            f"task {session.task.name} prefers texts and has no classes to probe for: use forwardtune eval"
        )
    metrics = session.facts("probe", "probe")
    # For answers of many tokens there are about as many classes as tokens: one strength, and a bound on the work.
    few: dict[str, Any] = {} if session.task.fixed_answers else {"grid": (1e-2,), "max_iterations": 100}
    with probe(
        session.model,
        session.tokenizer,
        session.task,
        session.splits["train"],
        session.splits.get("dev"),
        batch_size=options.batch_size,
        layout=session.layout,
        **few,
    ) as fitted:
        metrics["C"] = fitted.C
        conclude(_measure(session, metrics), parsed)


def _measure(session: Session, metrics: dict[str, Any]) -> dict[str, Any]:
    metrics["inference_peak_memory_bytes"] = session.inference_peak()
    memory.reset_peak(session.model.device)
    metrics["test"] = session.evaluate("evaluating")
    metrics["peak_memory_bytes"] = memory.peak(session.model.device)
    return metrics


def _new(parsed: argparse.Namespace) -> None:
    if parsed.output_dir:
        new_folder(parsed.output_dir)
