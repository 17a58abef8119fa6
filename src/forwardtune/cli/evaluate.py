"""``forwardtune eval | probe``: what a model does on a task without tuning, or after it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import memory
from ..errors import InputError
from ..forgetting import measured, read_general
from ..paper.extra import PROBING, require
from ..run_folder import METRICS
from ..workers import workers_of_launch
from .options import ask
from .predicted import examine, show_classes, write_predictions
from .results import new_folder, plain, write_json
from .session import Session, open_session


def run_eval(parsed: argparse.Namespace) -> None:
    """Evaluate and print one JSON object on stdout."""
    options = _described(parsed, "eval")
    general = None if options.general_text is None else read_general(options.general_text)
    session = open_session(
        options, "test", shots=options.shots, calibrate=options.calibrate, workers=workers_of_launch()
    )
    name = "icl" if options.shots else "zero-shot"
    if general is not None:
        losses = session.general_losses("general text", general)
    metrics = session.facts("eval", f"{name}-calibrated" if options.calibrate else name)
    if options.shots:
        metrics["demonstrations"] = session.demonstrations
    if general is not None:
        metrics["general_text"] = {"text": options.general_text, "tokens": len(losses), **measured(losses)}
    _conclude(session, metrics, parsed)


def run_probe(parsed: argparse.Namespace) -> None:
    """Fit a linear probe, evaluate with it and print one JSON object on stdout."""
    from ..paper.baselines import probe

    require("linear probes", PROBING)
    options = _described(parsed, "probe")
    session = open_session(options, "train", "dev", "test", workers=workers_of_launch())
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
        _conclude(session, metrics, parsed)


def _described(parsed: argparse.Namespace, command: str) -> Any:
    options = ask(parsed, command).describe()
    if parsed.output_dir:
        new_folder(parsed.output_dir)
    return options


def _conclude(session: Session, metrics: dict[str, Any], parsed: argparse.Namespace) -> None:
    """Measure the test split, write it to the run's folder, if it has one, and print it on stdout."""
    metrics["inference_peak_memory_bytes"] = session.inference_peak()
    memory.reset_peak(session.model.device)
    examined = examine(session, "evaluating")
    metrics["test"] = examined.measured
    if examined.classes:
        metrics["by_class"] = {"test": examined.classes}
    metrics["peak_memory_bytes"] = memory.peak(session.model.device)
    if parsed.output_dir and session.workers.is_first:
        folder = Path(parsed.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / METRICS, metrics)
        write_predictions(folder, session, None, examined.answers)
    show_classes(examined.classes)
    print(json.dumps(plain(metrics)))
