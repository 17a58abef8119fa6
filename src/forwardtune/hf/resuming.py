"""L6: going on with a run of :class:`~forwardtune.hf.trainer.MeZOTrainer` that was stopped."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType, TrainOutput

from ..files import read_json, write_json
from ..optimizer import MeZO
from ..search.notes import has_measured, has_searched, plan_of
from ..trajectory import LogError, StepLog, read_log
from ..trajectory.lock import LogLock
from ..trajectory.log import cut_log, require_same_run
from ..trajectory.reader import Log
from ..trajectory.replay import apply_log
from ..trajectory.updates import folded_steps
from .log_keeper import LOG_OF_CHECKPOINT, steps_in_pass
from .sharing import writing

_TRAINER_STATE, _OPTIMIZER, _SCHEDULER = "trainer_state.json", "optimizer.pt", "scheduler.pt"
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
    def read(cls, folder: Path, log: Log) -> Checkpoint | None:
        """The checkpoint in a folder; None if there is none, one that was cut short, or one that does not follow from the log's
        steps but from others that were taken in their place."""
        steps, check = (
            read_json(folder / _TRAINER_STATE).get("global_step"),
            read_json(folder / LOG_OF_CHECKPOINT).get("check"),
        )
        if not isinstance(steps, int) or not 0 < steps <= log.steps or check not in (None, log.step_checks[steps - 1]):
            return None
        return cls(folder, steps, check, all((folder / name).is_file() for name in (_OPTIMIZER, _SCHEDULER)))


def checkpoints_of(log: Log) -> dict[int, Checkpoint]:
    """The complete checkpoints of a log, by their steps, in their order."""
    found = (Checkpoint.read(folder, log) for folder in log.path.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return {saved.steps: saved for saved in sorted(filter(None, found), key=lambda saved: saved.steps)}


class Resumption:
    """Going on with the run in a trainer's output folder.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer`.
        wanted: True for the last logged step, or the path of a checkpoint of the run.
        lock: the log's.

    Attributes:
        log: the run's log, cut to the step from which the run goes on.

    Raises:
        LogError: the log is damaged, cannot be gone on with as the trainer is set up, or ``wanted`` is none of its checkpoints.
    """

    def __init__(self, trainer: Any, wanted: str | Literal[True], lock: LogLock) -> None:
        self._trainer, self._lock = trainer, lock
        args, automatic = trainer.args, trainer.automatic
        log = read_log(trainer.step_log)
        saved = checkpoints_of(log)
        steps = trainer.workers.first(lambda: self._steps(log, saved, wanted))  # rank 0 has the checkpoints
        if automatic.finds_lr and "held" not in plan_of(log):
            raise LogError(f"the run in {log.path} has a learning rate of its own: pass it instead of 'auto'")
        if automatic.finds_lr and not has_searched(log, steps):
            steps = 0  # the first steps are all estimated at the base weights, and none was taken before all were
        self.log = cut_log(log, steps) if steps < log.steps else log
        if not args.ignore_data_skip:
            steps_in_pass(self.log)
        # Of the checkpoints, which rank 0 has.
        self._saved_state = trainer.workers.first(lambda: asdict(self._own_state()))

    def _steps(self, log: Log, saved: dict[int, Checkpoint], wanted: str | Literal[True]) -> int:
        """The steps from which the run goes on."""
        args, automatic = self._trainer.args, self._trainer.automatic
        steps = log.steps
        # An evaluation of the last step decides which step is best, or what becomes of the rate that is found.
        is_awaited = args.load_best_model_at_end or (
            automatic.finds_lr and automatic.is_measured and not has_measured(log)
        )
        if wanted is not True:
            steps = _steps_of(Path(wanted), log)
        elif is_awaited and steps and steps not in saved:
            steps -= 1  # the kill may have come before it: do that step again
        steps = folded_steps(log, steps)
        if args.lr_scheduler_type in _PLATEAU:
            self._require_plateau(log, steps, saved)
        return steps

    def _require_plateau(self, log: Log, steps: int, saved: dict[int, Checkpoint]) -> None:
        """Raise LogError unless a schedule that follows evaluations can go on as it was."""
        scheduler, first = self._trainer.args.lr_scheduler_type, log.records[0].lr[0] if log.records else None
        if not (steps in saved and saved[steps].is_whole):
            whole = [checkpoint for checkpoint in saved.values() if checkpoint.is_whole]
            raise LogError(
                f"lr_scheduler_type={scheduler!r} depends on evaluations, which the step log does not "
                f"hold: resume from a checkpoint by its path ({whole[-1].folder if whole else 'there is none'})"
            )
        if not self._trainer.automatic.finds_lr and self._trainer.given_rates(1)[0] != first:
            raise LogError(
                f"lr_scheduler_type={scheduler!r} goes on from the learning rate that it has come to: leave "
                f"learning_rate at {first}, or start a new run"
            )

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
        trainer.averaging.keep(optimizer, log)
        if log.end is None:
            automatic.keep_point(optimizer, log)
        step_log = StepLog.resume(log.path, optimizer, lock=self._lock)
        try:
            if log.end is None:
                automatic.begin(step_log, plan_of(log), log)  # the last step may not have been judged
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
        if self._trainer.averaging.keeps_base:
            self._trainer.averaging.keep(self._optimizer(), log)
        existing = self._trainer.workers.first(self._existing)
        # Several workers replay at the same time, each into its own folder.
        return existing if existing is not None and Path(existing).is_dir() else str(self._by_replay())

    def _existing(self) -> str | None:
        existing = checkpoints_of(self.log).get(self.log.steps)
        return str(existing.folder) if existing is not None and existing.is_whole else None

    def _by_replay(self) -> Path:
        """Bring the model from its base weights to the log's end, and save that as Trainer would have."""
        trainer, log, max_steps = self._trainer, self.log, self._max_steps()
        optimizer, state = self._optimizer(), self._state()
        require_same_run(log, optimizer)
        apply_log(log, optimizer)
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
        with writing(trainer):
            trainer.save_model(str(folder), _internal_call=not trainer.workers.is_first)
        write_json(folder / LOG_OF_CHECKPOINT, {"check": log.step_checks[-1]})
        torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
        torch.save(scheduler.state_dict(), folder / _SCHEDULER)
        state.save_to_json(str(folder / _TRAINER_STATE))
        trainer.forget_own()
        return folder

    def _optimizer(self) -> MeZO:
        self._trainer.create_optimizer()
        optimizer: MeZO = self._trainer.mezo
        return optimizer

    def _state(self) -> TrainerState:
        return TrainerState(**self._saved_state) if self._trainer.workers.count > 1 else self._own_state()

    def _own_state(self) -> TrainerState:
        """Trainer's own state at the last checkpoint, or a new one."""
        saved = checkpoints_of(self.log)
        if saved:
            return TrainerState.load_from_json(str(saved[max(saved)].folder / _TRAINER_STATE))
        stateful = [*self._trainer.callback_handler.callbacks, self._trainer.control]
        return TrainerState(stateful_callbacks=[item for item in stateful if isinstance(item, ExportableState)])

    def _max_steps(self) -> int:
        trainer = self._trainer
        return int(trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1])


def _steps_of(folder: Path, log: Log) -> int:
    """The steps of a checkpoint that was asked for."""
    if folder.resolve().parent != log.path.parent.resolve():
        raise LogError(
            f"{folder} is not a checkpoint of the run in {log.path}, which goes on from its own alone: set output_dir to "
            f"{folder.parent} to go on with that run, or load that checkpoint as the base model of a new one"
        )
    checkpoint = Checkpoint.read(folder, log)
    if checkpoint is None:
        raise LogError(f"{folder} is not a complete checkpoint of the run in {log.path}: choose another one")
    return checkpoint.steps
