"""Fewer threads while other processes use the cores: when a trial is made, what it decides, and what a run keeps of it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from forwardtune import MeZOTrainer, cores
from forwardtune.cli import main
from forwardtune.cores import SharedCores, Use
from forwardtune.hf.log_keeper import noted_threads
from forwardtune.trajectory import read_log
from support.trainers import quiet_config

pytestmark = pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="reads the use of the cores as Linux tells it")


class Machine:
    """Two cores of which others use so many; a second passes with every look. Work takes what :attr:`takes` says."""

    def __init__(self) -> None:
        self.others, self.clock, self.busy = 0.0, 0.0, 1.0
        self.takes = {1: 2.0, 2: 1.0}
        self.trials: list[int] = []

    def use(self) -> Use:
        self.clock += 1.0
        self.busy += self.others + 1.0
        return Use(self.clock, self.clock, self.busy, 2)

    def work(self) -> None:
        self.trials.append(torch.get_num_threads())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    fake = Machine()

    def seconds(evaluate: Any) -> float:
        evaluate()
        return fake.takes[torch.get_num_threads()]

    monkeypatch.setattr(Use, "now", fake.use)
    monkeypatch.setattr(cores, "_seconds", seconds)
    monkeypatch.setattr(cores.time, "monotonic", lambda: fake.clock)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with support.threads(2):
        yield fake


def test_alone_nothing_is_tried(machine):
    shared = SharedCores()
    machine.others = 0.3  # now and then
    assert [shared.look(machine.work) for _ in range(50)] == [None] * 50
    assert machine.trials == []
    assert torch.get_num_threads() == 2


def test_beside_a_busy_process_one_thread_works_until_it_ends(machine):
    said: list[str] = []
    shared = SharedCores(said.append)
    machine.others, machine.takes = 1.0, {1: 2.0, 2: 9.0}
    assert shared.look(machine.work) == 1
    assert machine.trials == [2, 1]
    assert [shared.look(machine.work) for _ in range(20)] == [None] * 20
    assert torch.get_num_threads() == 1
    machine.others, machine.takes = 0.0, {1: 2.0, 2: 1.0}
    assert shared.look(machine.work) == 2
    assert torch.get_num_threads() == 2
    assert len(said) == 2
    assert "1 thread instead of 2" in said[0]
    assert "9 s" in said[0]
    assert "OMP_NUM_THREADS" in said[0]
    assert "2 threads instead of 1" in said[1]


@pytest.mark.parametrize(("others", "takes"), [(1.0, {1: 2.0, 2: 2.9}), (2.0, {1: 2.0, 2: 2.0})])
def test_threads_stay_where_fewer_do_not_save_much_and_trials_become_rare(machine, others, takes):
    shared = SharedCores()
    machine.others, machine.takes = others, takes
    assert [shared.look(machine.work) for _ in range(500)] == [None] * 500
    assert torch.get_num_threads() == 2
    spent = sum(takes[threads] for threads in machine.trials)
    assert 0 < spent < 0.1 * machine.clock
    machine.takes = {1: 2.0, 2: 9.0}
    assert 1 in [shared.look(machine.work) for _ in range(250)]


def test_a_number_of_threads_that_the_user_set_stays(machine, monkeypatch):
    """And nothing changes where the use of cores is not told, or there is one thread to begin with."""
    machine.others, machine.takes = 1.0, {1: 2.0, 2: 9.0}
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "2")
        shared = SharedCores()
        assert [shared.look(machine.work) for _ in range(5)] == [None] * 5
        shared.follow(1)
        assert torch.get_num_threads() == 2
    with monkeypatch.context() as patch:
        patch.setattr(Use, "now", lambda: None)
        assert SharedCores().look(machine.work) is None
    with support.threads(1):
        shared = SharedCores()
        assert [shared.look(machine.work) for _ in range(5)] == [None] * 5
        assert torch.get_num_threads() == 1


def test_the_use_of_the_cores_is_what_other_processes_do():
    """While this one sleeps, and not while it works."""
    before = Use.now()
    assert before is not None
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.5)
        during = Use.now()
    finally:
        rival.kill()
        rival.wait()
    assert during is not None
    assert during.own - before.own < 0.5
    assert 0.2 < during.by_others(before) <= during.cores + 0.1
    assert Use(2.0, 1.5, 11.5, 2).by_others(Use(1.0, 0.5, 10.0, 2)) == 0.5  # one second of it was our own


# --- in a run --------------------------------------------------------------------------------------------------------


class Objective:
    """The squares of the logits, which notes its evaluations in and out of steps."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.in_step = machine, False
        self.evaluations: list[int] = []
        self.steps: list[int] = []

    def begin_step(self, step: int, part: int) -> None:
        self.in_step = True
        self.steps.append(step)

    def end_step(self) -> None:
        self.in_step = False

    def __call__(self, model: Any, inputs: Any) -> torch.Tensor:
        if self.in_step:
            self.evaluations.append(torch.get_num_threads())
        else:
            self.machine.work()
        if self.in_step and self.steps[-1] == 2:
            self.machine.others, self.machine.takes = 1.0, {1: 2.0, 2: 9.0}
        return model(input_ids=inputs["input_ids"]).logits.float().pow(2).mean(dim=(1, 2))


def make(folder: Path, objective: Objective, **changes: Any) -> MeZOTrainer:
    data = [{"input_ids": row} for row in support.token_batch(16, 8)]
    settings = {"max_steps": 6, "learning_rate": 1e-4, "eps": 1e-3, "per_device_train_batch_size": 2, **changes}
    args = quiet_config(folder, **settings)
    return MeZOTrainer(model=support.tiny_model(), args=args, train_dataset=data, objective=objective)


@pytest.mark.parametrize(
    ("settings", "evaluations", "trials"),
    [
        ({}, [2] * 6 + [1] * 6, [2, 1]),
        # A step of several microbatches has one number of threads.
        ({"gradient_accumulation_steps": 2}, [2] * 12 + [1] * 12, [2, 1]),
        ({"share_cores": False}, [2] * 12, []),
    ],
    ids=str,
)
def test_a_run_changes_its_threads_keeps_a_note_and_gives_them_back(machine, tmp_path, settings, evaluations, trials):
    objective = Objective(machine)
    make(tmp_path, objective, **settings).train()
    assert objective.evaluations[2:] == evaluations  # the self-check's are of the first step, too
    assert machine.trials == trials
    notes = [(note.at, note.content) for note in read_log(tmp_path / "steps.jsonl").notes if "threads" in note.content]
    assert notes == ([(3, {"threads": 1, "from_step": 3})] if trials else [])
    assert torch.get_num_threads() == 2


def test_a_resumed_run_goes_on_with_the_threads_that_it_had(machine, tmp_path):
    make(tmp_path, Objective(machine), max_steps=4).train()
    log = read_log(tmp_path / "steps.jsonl")
    assert [noted_threads(log, steps) for steps in range(5)] == [None, None, None, 1, 1]
    assert torch.get_num_threads() == 2
    machine.trials.clear()
    objective = Objective(machine)
    make(tmp_path, objective).train(resume_from_checkpoint=True)
    assert objective.evaluations
    assert set(objective.evaluations) == {1}
    assert machine.trials == []


def test_a_run_that_began_with_fewer_threads_says_so(machine, tmp_path):
    machine.others, machine.takes = 1.0, {1: 2.0, 2: 9.0}
    trainer = make(tmp_path, objective := Objective(machine), max_steps=1)
    trainer.cores = SharedCores()
    assert trainer.cores.look(machine.work) == 1
    trainer.train()
    assert set(objective.evaluations) == {1}
    notes = [(note.at, note.content) for note in read_log(tmp_path / "steps.jsonl").notes]
    assert (0, {"threads": 1, "from_step": 0}) in notes
    assert torch.get_num_threads() == 1  # whoever lent what watches the cores goes on with it


def test_the_command_line_looks_before_its_first_evaluation_and_resumes_alike(machine, tiny_folder, tmp_path, capsys):
    machine.others, machine.takes = 1.0, {1: 2.0, 2: 9.0}
    where = ["train", "--output-dir", str(tmp_path / "run"), "--device", "cpu"]
    what = ["--model", str(tiny_folder), "--task", "reviews", "--lr", "1e-4", "--eps", "1e-3", "--dev-examples", "0"]
    sizes = ["--train-examples", "8", "--test-examples", "4", "--batch-size", "2"]
    assert main([*where, *what, *sizes, "--steps", "2"]) == 0
    assert torch.get_num_threads() == 1
    told = capsys.readouterr().err
    assert told.index("1 thread instead of 2") < told.index("before:")
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert noted_threads(log, 0) == 1
    torch.set_num_threads(2)
    machine.others = 0.0  # a run that is resumed does not try again before it goes on
    machine.takes = {1: 2.0, 2: 1.9}
    assert main([*where, "--resume", "--steps", "4"]) == 0
    assert torch.get_num_threads() == 1
    assert noted_threads(read_log(log.path), 4) == 1
    assert "instead of" not in capsys.readouterr().err
