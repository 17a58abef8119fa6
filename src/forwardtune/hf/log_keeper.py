"""L6: the step log of a run of :class:`~forwardtune.hf.trainer.MeZOTrainer`, and what its notes say beside the search's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..files import write_json
from ..search.driver import set_rates
from ..search.notes import plan_of
from ..trajectory import LogError, StepLog
from ..trajectory.lock import LogLock
from ..trajectory.log import require_no_log
from ..trajectory.reader import Log

#: What a checkpoint says of the log that it belongs to.
LOG_OF_CHECKPOINT = "step_log.json"


def steps_in_pass(log: Log) -> int | None:
    """Steps that a pass over data without a length takes; None as long as no pass has ended.

    Raises:
        LogError: passes differ, so that nobody knows at which batch the last step was.
    """
    begun = _passes(log)
    lengths = {begun[number] - begun[number - 1] for number in begun if number}
    if len(lengths) > 1 or (lengths and log.steps - begun[max(begun)] > max(lengths)):
        raise LogError(
            f"{log.path}: passes over the training data took different numbers of steps ({', '.join(map(str, sorted(lengths)))}), so "
            "the batches that were used cannot be skipped. Pass a dataset with a length, or ignore_data_skip=True to begin "
            "with the first batch again"
        )
    return max(lengths, default=None)


def _passes(log: Log) -> dict[int, int]:
    """By the number of a pass over data without a length, the step that it began with."""
    notes = (note.content["pass"] for note in log.notes if "pass" in note.content)
    return {0: 0} | {note["number"]: note["step"] for note in notes}


def noted_threads(log: Log, steps: int) -> int | None:
    """The number of threads with which a run went on after so many steps; None if that was the largest."""
    noted = (note.content for note in reversed(log.notes) if "threads" in note.content)
    return next((int(content["threads"]) for content in noted if content["from_step"] <= steps), None)


class LogKeeper(TrainerCallback):
    """Opens a run's step log when the optimizer is ready, and closes it.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer` whose run it is.

    Attributes:
        continues: the log of the run that is resumed, until it is open.
        changed_threads: the number of threads, if it was changed in this step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._log: StepLog | None = None
        self._lock: LogLock | None = None
        self.continues: Log | None = None
        self.changed_threads: int | None = None
        self._pass = 0
        self._passes: dict[int, int] = {}

    def lock(self) -> LogLock:
        """The lock of the run's log, from now until :meth:`close`. Raises LogError if another process has it."""
        if self._lock is None:
            self._lock = LogLock(self._trainer.step_log)
        return self._lock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, before, self.continues = self._trainer, self.continues, None
        optimizer, automatic, cores, lock = trainer.mezo, trainer.automatic, trainer.cores, self.lock()
        if before is not None:
            threads = noted_threads(before, before.steps)
            if cores is not None:
                cores.follow(threads)
            self._log = StepLog.resume(before.path, optimizer, lock=lock)
            trainer.averaging.begin(optimizer, self._log.base)
            if threads is not None:
                self._note_threads()
            automatic.begin(self._log, plan_of(before), before)
            if not automatic.finds_lr and before.steps:
                self._take_given_rates(before)
            self._passes = _passes(before)
            length = None if args.ignore_data_skip else steps_in_pass(before)
        else:
            if trainer.workers.any(trainer.step_log.exists()):
                require_no_log(trainer.step_log)  # before anything is measured
                raise LogError(
                    f"another rank's folder in {trainer.args.output_dir} already holds a run: resume it, or choose another folder"
                )
            optimizer.meet()
            plan = automatic.plan(state.max_steps)
            run = {**(trainer._run or {}), "frozen": trainer.frozen} if trainer.frozen else trainer._run
            self._log = StepLog(trainer.step_log, optimizer, run, lock=lock)
            trainer.run_logs.opened(trainer.step_log)
            trainer.averaging.begin(optimizer, self._log.base)
            automatic.begin(self._log, plan)
            if cores is not None and torch.get_num_threads() < cores.most:
                self._note_threads()
            self._passes, length = {0: 0}, None
        self._pass = -1 if length is None else state.global_step // length - 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.changed_threads is not None:
            self.changed_threads = None
            self._note_threads()

    def _note_threads(self) -> None:
        assert self._log is not None
        self._log.note({"threads": torch.get_num_threads(), "from_step": self._trainer.mezo.next_step})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where a pass over data without a length begins: no number of batches says it when the run is resumed."""
        self._pass += 1
        if has_length(kwargs["train_dataloader"]):
            return
        optimizer = self._trainer.mezo
        if optimizer.gathering:  # the data ended within a step: no part of the next pass
            optimizer.zero_grad()
        if self._log is not None and self._pass not in self._passes and not args.ignore_data_skip:
            self._passes[self._pass] = state.global_step
            self._log.note({"pass": {"number": self._pass, "step": state.global_step}})

    def _take_given_rates(self, log: Log) -> None:
        """Let the learning rate that was given hold from here on, in place of the one that Trainer found in a checkpoint."""
        trainer = self._trainer
        scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        bases, given = getattr(scheduler, "base_lrs", None), trainer.given_rates(len(trainer.mezo.param_groups))
        if bases is not None and list(bases) != given:
            set_rates(trainer.mezo, scheduler, given)
        if not isinstance(scheduler, LambdaLR):
            return
        before = log.records[-1].lr
        # What the last step's would have been with the present settings.
        now = [lr * course(log.steps - 1) for lr, course in zip(given, scheduler.lr_lambdas, strict=True)]
        if not all(map(math.isclose, before, now)):
            trainer.automatic.announce(
                f"the learning rate changes with step {log.steps}: the last one was taken with {max(before):.1e}, where it would "
                f"now have been {max(now):.1e}"
            )

    def mark(self, folder: Path) -> None:
        """Write into a checkpoint which steps of the log it follows from."""
        if self._log is not None and self._log.step_check is not None:
            write_json(folder / LOG_OF_CHECKPOINT, {"check": self._log.step_check})

    def finish(self) -> None:
        """The run has taken its last step: write the log's end line."""
        if self._log is not None:
            self._trainer.automatic.stop()
            self._log.finish()
            self._trainer.automatic.finish()
            self._close_log()

    def close(self) -> None:
        """Close the log, with or without an end line, and let others write it."""
        self.continues = None
        self._close_log()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
