"""L6: the weights that a run of :class:`~forwardtune.hf.trainer.MeZOTrainer` began with, on disk, and the average that it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..averages import AUTO, NONE, candidates
from ..errors import InputError
from ..files import plain
from ..optimizer import MeZO
from ..trajectory import Log, read_log
from ..trajectory.log import add_note
from ..trajectory.point import keep_base, keep_point, restore
from ..trajectory.replay import apply_updates
from ..trajectory.updates import Trajectory, standing, trajectory_of
from .automatic import held_out

# The tuned weights that the run began with, on disk until it is over: as large as what is tuned.
_BASE = "base.weights"


class Averaging:
    """Keeps what a run began with on disk, and puts an average in the place of its weights when it is over.

    Args:
        trainer: the :class:`~forwardtune.hf.trainer.MeZOTrainer`, whose ``args.average`` says which.

    Attributes:
        taken: the average that the model has; ``none`` if it has the run's own weights.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.taken = NONE

    @property
    def _path(self) -> Path:
        return Path(self._trainer.run_folder / _BASE)

    @property
    def keeps_base(self) -> bool:
        """Whether the weights that the run began with are needed later: for an average, or for decay towards them."""
        args = self._trainer.args
        return bool(args.average != NONE or args.decay_towards == "base")

    def require(self) -> None:
        """Raise InputError where there is nothing to choose an average by."""
        self.taken = NONE
        if self._trainer.args.average == AUTO and self._trainer.eval_dataset is None:
            raise InputError(
                "average='auto' is chosen on eval_dataset: pass one, or name an average, such as 'last:100'"
            )

    def begin(self, optimizer: MeZO, base: str) -> None:
        """A run begins at the optimizer's weights, whose digest this is, or goes on."""
        if self.keeps_base and optimizer.next_step == 0:
            keep_base(self._path, optimizer, base)
        elif self.keeps_base:
            optimizer.tuned.base = self._path

    def keep(self, optimizer: MeZO, log: Log) -> None:
        """A run will be resumed, whose base weights the optimizer has."""
        if self.keeps_base:
            keep_point(self._path, optimizer, log)
            optimizer.tuned.base = self._path

    def take(self, steps: int | None) -> None:
        """Move the model to the average, or to the best of some on ``eval_dataset``, if that is better than what it has.

        Args:
            steps: it has the weights after so many steps; None: after all.
        """
        trainer = self._trainer
        log = read_log(trainer.step_log)
        if not self.keeps_base or log.end is None:
            return
        if trainer.args.average != NONE:
            self._average(log, steps)
        self._path.unlink(missing_ok=True)

    def _average(self, log: Log, steps: int | None) -> None:
        trainer = self._trainer
        trajectory, text = trajectory_of(log), trainer.args.average
        if text == AUTO:
            measure = held_out(trainer, 1 << 30)  # on all of it
            tried = {NONE: measure()}
            for one in candidates(sum(standing(log.rollbacks, log.steps))):
                self._move(trajectory, one, log.steps)
                tried[one] = measure()
            text = min(tried, key=lambda one: (tried[one] != tried[one], tried[one]))  # NaN is worst
        else:
            tried = {}
        self._move(trajectory, text, log.steps if steps is None or text != NONE else steps)
        self.taken = text
        if text != NONE and text not in trajectory.averages:
            add_note(
                log.path,
                {
                    "average": {
                        "of": text,
                        "digest": trainer.mezo.tuned.digest(),
                        "tried": {one: plain(loss) for one, loss in tried.items()},
                    }
                },
            )

    def _move(self, trajectory: Trajectory, text: str, steps: int) -> None:
        tuned, averaged = self._trainer.mezo.tuned, trajectory.averaged(text, steps)
        restore(self._path, tuned)
        apply_updates(averaged, tuned, averaged.first(steps), None, keep=False)
