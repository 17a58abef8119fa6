"""A run of ``forwardtune train`` that goes on: its settings are those of its log, but for what may change."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..config import Train
from ..config import options as options_of
from ..errors import InputError
from ..models import EMBEDDED_MODEL
from ..processes import Launch
from ..run_folder import LOG
from ..tasks import get_task, task_names
from ..tasks.chat import CHAT
from ..tasks.splits import DEFAULT_RULE
from ..trajectory import Log, read_log
from ..trajectory.shared import any_has_log
from ..workers import Alone
from .options import flag
from .results import resume_command

#: Where the step log keeps the rule that drew the splits; logs that do not say were drawn by the default one.
RULE = "split_rule"


def starts_again(folder: Path, workers: Alone) -> bool:
    """Whether a launcher has started this run again, which then goes on."""
    return Launch.read().restarts > 0 and any_has_log(folder / LOG, workers)


def is_done(options: Train, log: Log, metrics: dict[str, Any]) -> bool:
    """Whether a run has all its steps, or ended early as it was told to, and no more are asked for."""
    steps = options.steps
    if steps is None:  # other epochs are asked for
        return False
    return bool(log.steps >= steps or ("stopped" in metrics and steps <= log.header["run"]["steps"]))


def resumed(asked: dict[str, Any], folder: Path) -> tuple[Log, dict[str, Any]]:
    """The log of the run in the folder, and the run's settings: the log's, with what was asked for that may change."""
    if asked.get("method") == "adam":
        raise InputError("--method adam keeps no step log to resume from: run it again in a new folder")
    if not (folder / "steps.jsonl").is_file():
        raise InputError(f"{folder} holds no run to resume (no steps.jsonl): start one without --resume")
    log = read_log(folder / "steps.jsonl")
    header = log.header["run"]
    if "task" not in header:
        raise InputError(
            f"the run in {folder} was not started by forwardtune train: go on with it in Python, by "
            "MeZOTrainer.train(resume_from_checkpoint=True), StepLog.resume or AutoLR.resume"
        )
    objective = str(header.get("objective"))
    if "objective" not in asked and ":" in objective:  # a log may come from anyone
        raise InputError(
            f"the run in {folder} is rewarded by {objective}, which is code, and is not imported because a log names it. "
            f"If you know it, name it again: {resume_command(folder, objective)}"
        )
    run = {}
    for name, one in options_of(Train).items():
        recorded, wanted = header.get(name), asked.get(name)
        if one.is_place and not one.free:
            recorded = absolute({name: recorded})[name]
            if recorded is not None and Path(recorded).is_absolute() and not Path(recorded).exists():
                if wanted is None:
                    raise InputError(
                        f"the run in {folder} has --{name} {recorded}, which is not there: say where it is now"
                    )
                if Path(wanted).name == Path(recorded).name:
                    recorded = wanted  # it was moved; a model is known by the digest of its weights
        if wanted is not None and wanted != recorded and not one.free:
            raise InputError(
                f"the run in {folder} has {flag(name)} {recorded}, not {wanted}: leave the option out to "
                "resume it, or start another run in another folder"
            )
        run[name] = recorded if wanted is None else wanted
    for length, other in (("epochs", "steps"), ("steps", "epochs")):
        if asked.get(length) is not None and asked.get(other) is None:
            run[other] = None
    recorded, rule = header.get(RULE, DEFAULT_RULE), get_task(run["task"], run["data"]).splits
    if recorded != rule:
        raise InputError(
            f"the run in {folder} has splits drawn by the rule {recorded}, and task {run['task']} now says {rule}: resume "
            f"it with a task file that says 'splits: {recorded}', or start another run in another folder"
        )
    return log, run


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, in which what is a file or a folder here has a path that holds anywhere."""
    absolute = dict(settings)
    for name, value in settings.items():
        if options_of(Train)[name].is_place and value not in (None, EMBEDDED_MODEL, CHAT, *task_names()):
            path = Path(value).expanduser()
            absolute[name] = os.path.abspath(path) if path.exists() else value
    return absolute
