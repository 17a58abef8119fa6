"""Learning rate and eps found in a loop of one's own: the course of a Trainer on the same minibatches, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import support
from forwardtune import AutoLR, MeZO, StepLog, replay
from forwardtune.errors import InputError
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.method.rules import Momentum
from forwardtune.trajectory import LogError, read_log
from support.logs import log_lines
from support.trainers import KilledError
from test_automatic import DATA, OPPOSED, SAME, make, opposed, wanted

COURSES: dict[str, dict[str, Any]] = {
    "rises and falls": {"data": DATA, "max_steps": 90},
    "a schedule": {"data": DATA, "max_steps": 90, "lr_scheduler_type": "linear"},
    "momentum": {"data": SAME, "max_steps": 48, "rule": "momentum"},
    "nothing is better": {"data": OPPOSED, "objective": opposed, "max_steps": 48},
    "too short for a search": {"data": DATA, "max_steps": 5},
    "directions of examples": {"data": DATA, "max_steps": 90, "assignment": "example", "perturbation": "side_path"},
}


class Loop:
    """A run of :class:`AutoLR` over given minibatches, with the model, data and settings of a Trainer's run."""

    def __init__(
        self, path: Path, *, data: Any, max_steps: int, objective: Any = wanted, rule: str = "sgd",
        assignment: str = "shared", perturbation: str = "scratch", **schedule: Any,
    ) -> None:  # fmt: skip
        self.path, self.steps, self._objective = path, max_steps, objective
        self._by_example = assignment == "example"
        self.model = support.tiny_model()
        decayed = set(MeZOTrainer.get_decay_parameter_names(None, self.model))
        groups: list[dict[str, Any]] = [{"params": []}, {"params": []}]
        for name, parameter in self.model.named_parameters():
            groups[name not in decayed]["params"].append(parameter)
        chosen = Momentum(0.9) if rule == "momentum" else rule
        self.optimizer = MeZO(
            groups,
            lr=1e-6,
            eps=1e-3,
            seed=3,
            rule=chosen,
            module=self.model,
            assignment=assignment,
            perturbation=perturbation,
        )
        course = LambdaLR(self.optimizer, lambda step: (max_steps - step) / max_steps) if schedule else None
        self.settings = {
            "steps": max_steps,
            "held_out": self.held_out,
            "scheduler": course,
            "announce": lambda text: None,
        }
        self._dev = data[16:]

    def losses(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        return self._objective(self.model, {name: torch.tensor([row[name] for row in rows]) for name in rows[0]})

    def loss(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        return self.losses(rows) if self._by_example else self.losses(rows).mean()

    def held_out(self, batches: int) -> float:
        wanted = min(len(self._dev), 4 * batches)
        rows = [self._dev[i * len(self._dev) // wanted] for i in range(wanted)]
        losses = [float(self.losses(rows[i : i + 4]).mean()) for i in range(0, wanted, 4)]
        return sum(losses) / len(losses)

    def begin(self, *, resume: bool = False) -> AutoLR:
        made: Callable[..., AutoLR] = AutoLR.resume if resume else AutoLR
        return made(self.optimizer, self.path, **self.settings)

    def play(self, minibatches: list[Any], auto: AutoLR, *, kill: int | None = None) -> None:
        with auto:
            for number in range(self.optimizer.next_step, self.steps):
                if number == kill:
                    raise KilledError
                auto.step(lambda number=number: self.loss(minibatches[number]))


def trained(folder: Path, settings: dict[str, Any]) -> list[Any]:
    """Run a Trainer; returns the minibatches that it saw."""
    trainer, seen = make(folder, **settings), []
    true = trainer.training_step

    def training_step(model: Any, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        columns = {name: inputs[name].tolist() for name in ("input_ids", "labels")}
        seen.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
        return true(model, inputs, *args)

    trainer.training_step = training_step  # type: ignore[method-assign]
    trainer.train()
    return seen


@pytest.mark.parametrize("course", COURSES)
def test_the_course_is_that_of_trainer(tmp_path: Path, course: str) -> None:
    minibatches = trained(tmp_path / "trainer", COURSES[course])
    loop = Loop(tmp_path / "loop" / "steps.jsonl", **COURSES[course])
    loop.play(minibatches, loop.begin())
    assert log_lines(tmp_path / "loop") == log_lines(tmp_path / "trainer")
    assert [path.name for path in (tmp_path / "loop").iterdir()] == ["steps.jsonl"]
    again = support.tiny_model()
    assert replay(loop.path, again) == loop.steps
    support.assert_same_bits(again, support.snapshot(loop.model))


@pytest.mark.parametrize("course", ["a schedule", "directions of examples"])
def test_a_killed_run_resumes_to_the_same_lines(tmp_path: Path, course: str) -> None:
    """Killed while steps are held, right after they were taken, after a way back, and where a run went on behind a loss that was hardly
    worse."""
    settings, minibatches = COURSES[course], [DATA[i : i + 4] for i in (0, 4, 8, 12)] * 23
    whole = Loop(tmp_path / "whole" / "steps.jsonl", **settings)
    whole.play(minibatches, whole.begin())
    log = read_log(whole.path)
    back = log.rollbacks[0].at
    on = gone_on(log)
    assert bool(on) == (course == "directions of examples")
    for after in (3, 8, back, back + 1, *(step + 1 for step in on[:2])):
        folder = tmp_path / str(after)
        loop = Loop(folder / "steps.jsonl", **settings)
        with pytest.raises(KilledError):
            loop.play(minibatches, loop.begin(), kill=after)
        loop = Loop(folder / "steps.jsonl", **settings)
        loop.play(minibatches, loop.begin(resume=True))
        assert log_lines(folder) == log_lines(tmp_path / "whole")
        assert [path.name for path in folder.iterdir()] == ["steps.jsonl"]


def gone_on(log: Any) -> list[int]:
    """The measured steps that were not the best so far, behind which the run went on."""
    best, on, back = math.inf, [], {rollback.at for rollback in log.rollbacks}
    for note in log.notes:
        if "held_out" in note.content:
            loss = float(note.content["held_out"])
            if loss > best and note.at not in back:
                on.append(note.at)
            best = min(best, loss)
    return on


def test_steps_that_are_held_when_the_loop_ends_were_not_taken(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "steps.jsonl", data=SAME, max_steps=48)
    with loop.begin() as auto:
        for _ in range(3):
            auto.step(lambda: loop.loss(SAME[:4]))
    log = read_log(loop.path)
    assert log.end is not None
    assert log.end["end"] == log.steps == loop.optimizer.next_step == 0
    support.assert_same_bits(loop.model, support.snapshot(support.tiny_model()))


def test_eps_may_be_given(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "steps.jsonl", data=SAME, max_steps=48)
    loop.settings["find_eps"] = False
    loop.begin().close()
    log = read_log(loop.path)
    assert log.header["eps"] == 1e-3
    assert log.notes[0].content["plan"].keys() == {"held", "batches", "tries", "every"}


def test_a_run_ends_after_the_steps_that_it_was_planned_for(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "steps.jsonl", data=DATA, max_steps=5)
    with loop.begin() as auto:
        for _ in range(5):
            auto.step(lambda: loop.loss(DATA[:4]))
        with pytest.raises(RuntimeError, match="has taken its 5 steps"):
            auto.step(lambda: loop.loss(DATA[:4]))


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    path, net = tmp_path / "steps.jsonl", torch.nn.Linear(3, 1)
    asked: dict[str, Any] = {"steps": 20, "held_out": lambda batches: net(torch.ones(3)).square()}
    groups = [{"params": [net.weight], "lr": 1e-3}, {"params": [net.bias], "lr": 1e-2}]
    with pytest.raises(InputError, match=r"rates of their own \(1.0e-03, 1.0e-02\)"):
        AutoLR(MeZO(groups, module=net), path, **asked)
    stepped = MeZO(net)
    stepped.step(lambda: net(torch.ones(3)).square())
    with pytest.raises(InputError, match="has taken 1 steps already"):
        AutoLR(stepped, path, **asked)
    with StepLog(path, MeZO(net)):
        pass
    with pytest.raises(LogError, match="already holds a run"):
        AutoLR(MeZO(net), path, **asked)
    with pytest.raises(LogError, match="a learning rate of its own"):
        AutoLR.resume(MeZO(net), path, **asked)
    assert [left.name for left in tmp_path.iterdir()] == ["steps.jsonl"]  # and no lock
