"""L6: the step log of a run of :class:`~forwardtune.hf.trainer.MeZOTrainer`, and going on with a run that was stopped."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType, TrainOutput, has_length

from ..files import read_json, write_json
from ..optimizer import MeZO
from ..search.driver import set_rates
from ..search.notes import has_measured, has_searched, plan_of
from ..trajectory import LogError, StepLog, read_log
from ..trajectory.lock import LogLock
from ..trajectory.log import cut_log, require_no_log, require_same_run
from ..trajectory.reader import Log
from ..trajectory.replay import apply_log

_TRAINER_STATE, _OPTIMIZER, _SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
# What a checkpoint says of the log that it belongs to.
_LOG_OF_CHECKPOINT = "step_log.json"
_PLATEAU = {SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that Trainer saved to the end (it writes its own state last).

    Attributes:
        folder: where it lies.
        steps: steps of the run that it holds.
        check: checksum of the log's last line by then that moved the weights; None in checkpoints written without one.
        is_whole: whether it holds the states of optimizer and scheduler as well, which ``save_only_model`` leaves out.
    """

    folder: Path
    steps: int
    check: str | None
    is_whole: bool

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint in a folder; None if there is none, or one that was cut short."""
        steps = read_json(folder / _TRAINER_STATE).get("global_step")
        if not isinstance(steps, int):
            return None
        is_whole = all((folder / name).is_file() for name in (_OPTIMIZER, _SCHEDULER))
        return cls(folder, steps, read_json(folder / _LOG_OF_CHECKPOINT).get("check"), is_whole)

    def is_of(self, log: Log) -> bool:
        """Whether it follows from the log's steps, and not from others that were taken in their place."""
        return 0 < self.steps <= log.steps and self.check in (None, log.step_checks[self.steps - 1])


def checkpoints_of(log: Log) -> dict[int, Checkpoint]:
    """The complete checkpoints of a log, by their steps."""
    found = (Checkpoint.read(folder) for folder in log.path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return {checkpoint.steps: checkpoint for checkpoint in found if checkpoint is not None and checkpoint.is_of(log)}


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
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._log: StepLog | None = None
        self._lock: LogLock | None = None
        #: The log of the run that is resumed, until it is open.
        self.continues: Log | None = None
        #: The number of threads, if it was changed in this step.
        self.changed_threads: int | None = None
        self._pass = 0
        self._passes: dict[int, int] = {}

    def lock(self) -> LogLock:
        """The lock of the run's log, from now until :meth:`close`. Raises LogError if another process has it."""
        if self._lock is None:
            self._lock = LogLock(self._trainer.step_log)
        return self._lock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, before = self._trainer, self.continues
        optimizer, automatic, lock = trainer.mezo, trainer.automatic, self.lock()
        if before is not None:
            threads = noted_threads(before, before.steps)
            if trainer.cores is not None:
                trainer.cores.follow(threads)
            self._log = StepLog.resume(before.path, optimizer, lock=lock)
            if threads is not None:
                self._note_threads()
            automatic.resume(self._log, before)
            if not automatic.finds_lr and before.steps:
                self._settle_rates(before)
        else:
            require_no_log(trainer.step_log)  # before anything is measured
            plan = automatic.prepare(state.max_steps)
            self._log = StepLog(trainer.step_log, optimizer, trainer._run, lock=lock)
            automatic.begin(self._log, plan)
            if trainer.cores is not None and torch.get_num_threads() < trainer.cores.most:
                self._note_threads()
        self.continues = None
        self._passes = {0: 0} if before is None else _passes(before)
        length = None if before is None or args.ignore_data_skip else steps_in_pass(before)
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

    def _settle_rates(self, log: Log) -> None:
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
            write_json(folder / _LOG_OF_CHECKPOINT, {"check": self._log.step_check})

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


class Resumption:
    """Going on with the run in a trainer's output folder.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer`.
        wanted: True for the last logged step, or the path of a checkpoint of the run.
        lock: the log's.

    Raises:
        LogError: the log is damaged, cannot be gone on with as the trainer is set up, or ``wanted`` is none of its checkpoints.
    """

    def __init__(self, trainer: Any, wanted: str | Literal[True], lock: LogLock) -> None:
        self._trainer = trainer
        self._lock = lock
        #: The log, cut to the step from which the run goes on.
        self.log = self._cut(wanted)

    def _cut(self, wanted: str | Literal[True]) -> Log:
        args, automatic = self._trainer.args, self._trainer.automatic
        log = read_log(self._trainer.step_log)
        steps = log.steps
        saved = checkpoints_of(log)
        if wanted is not True:
            steps = self._steps_of(Path(wanted), log)
        elif args.load_best_model_at_end and log.steps and log.steps not in saved:
            # The kill may have come before the last step was evaluated and saved: do that step again.
            steps = log.steps - 1
        elif (
            automatic.finds_lr
            and automatic.is_measured
            and log.steps
            and not has_measured(log)
            and log.steps not in saved
        ):
            steps = log.steps - 1  # likewise, and the rate that is found follows from the evaluation
        if args.lr_scheduler_type in _PLATEAU and not (steps in saved and saved[steps].is_whole):
            whole = [checkpoint for _, checkpoint in sorted(saved.items()) if checkpoint.is_whole]
            raise LogError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} depends on evaluations, which the step log does not "
                f"hold: resume from a checkpoint by its path ({whole[-1].folder if whole else 'there is none'})"
            )
        if automatic.finds_lr and "held" not in plan_of(log):
            raise LogError(f"the run in {log.path} has a learning rate of its own: pass it instead of 'auto'")
        first = log.records[0].lr[0] if log.records else None
        if not automatic.finds_lr and args.lr_scheduler_type in _PLATEAU and self._trainer.given_rates(1)[0] != first:
            raise LogError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} goes on from the learning rate that it has come to: leave "
                f"learning_rate at {first}, or start a new run"
            )
        if automatic.finds_lr and not has_searched(log, steps):
            steps = 0  # the first steps are all estimated at the base weights, and none was taken before all were
        log = cut_log(log, steps) if steps < log.steps else log
        if not args.ignore_data_skip:
            steps_in_pass(log)
        return log

    def _steps_of(self, folder: Path, log: Log) -> int:
        """The steps of a checkpoint that was asked for."""
        if folder.resolve().parent != log.path.parent.resolve():
            raise LogError(
                f"{folder} is not a checkpoint of the run in {log.path}, which goes on from its own alone: set output_dir to "
                f"{folder.parent} to go on with that run, or load that checkpoint as the base model of a new one"
            )
        checkpoint = Checkpoint.read(folder)
        if checkpoint is None or not checkpoint.is_of(log):
            raise LogError(f"{folder} is not a complete checkpoint of the run in {log.path}: choose another one")
        return checkpoint.steps

    @property
    def is_over(self) -> bool:
        """Whether the run has taken all its steps."""
        return self.log.steps >= self._max_steps()

    def finish(self) -> TrainOutput:
        """Bring the model to the end of a run that has taken all its steps, and close its log if a kill did not."""
        trainer, log = self._trainer, self.log
        optimizer, automatic = self._optimizer(), trainer.automatic
        trainer.state = self._state()
        trainer.state.global_step = trainer.state.max_steps = log.steps
        if log.end is None:
            automatic.keep_point(optimizer, log)
        step_log = StepLog.resume(log.path, optimizer, lock=self._lock)
        try:
            if log.end is None:
                automatic.resume(step_log, log)  # the last step may not have been judged
                step_log.finish()
            automatic.finish()
        finally:
            step_log.close()
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
        losses = [record.loss for record in log.records if not record.skipped]
        return TrainOutput(log.steps, sum(losses) / max(1, len(losses)), {})

    def checkpoint(self) -> str | None:
        """The checkpoint at the log's end, made by replay if there is none; None if no step was taken."""
        log, automatic = self.log, self._trainer.automatic
        if log.steps == 0:
            return None
        if automatic.finds_lr:
            automatic.keep_point(self._optimizer(), log)
        existing = checkpoints_of(log).get(log.steps)
        return str(existing.folder if existing is not None and existing.is_whole else self._by_replay())

    def _by_replay(self) -> Path:
        """Bring the model from its base weights to the log's end, and save that as Trainer would have."""
        trainer, log = self._trainer, self.log
        optimizer = self._optimizer()
        require_same_run(log, optimizer)
        apply_log(log, optimizer)
        max_steps = self._max_steps()
        state = self._state()
        state.global_step = log.steps
        state.compute_steps(trainer.args, max_steps)
        state.train_batch_size = trainer.args.train_batch_size
        scheduler = trainer.create_scheduler(max_steps, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer's steps were taken by replay, unseen by the scheduler
            for _ in range(log.steps):
                scheduler.step()
        folder = log.path.parent / f"{PREFIX_CHECKPOINT_DIR}-{log.steps}"
        shutil.rmtree(folder, ignore_errors=True)  # what a kill in mid-save left, or other steps, or a model alone
        trainer.save_model(str(folder))
        write_json(folder / _LOG_OF_CHECKPOINT, {"check": log.step_checks[-1]})
        torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / _SCHEDULER)
        state.save_to_json(str(folder / _TRAINER_STATE))
        trainer.forget_own()
        return folder

    def _optimizer(self) -> MeZO:
        self._trainer.create_optimizer()
        optimizer = self._trainer.mezo
        assert isinstance(optimizer, MeZO)
        return optimizer

    def _state(self) -> TrainerState:
        """Trainer's own state at the last checkpoint, or a new one."""
        saved = checkpoints_of(self.log)
        if not saved:
            stateful = [*self._trainer.callback_handler.callbacks, self._trainer.control]
            return TrainerState(stateful_callbacks=[item for item in stateful if isinstance(item, ExportableState)])
        return TrainerState.load_from_json(str(saved[max(saved)].folder / _TRAINER_STATE))

    def _max_steps(self) -> int:
        trainer = self._trainer
        return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])
