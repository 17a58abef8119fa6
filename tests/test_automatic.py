"""Runs that find their learning rate and eps: the search, the way back, and resuming to the same bits."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback

import support
from forwardtune.hf import automatic
from forwardtune.hf.automatic import held_out
from forwardtune.hf.config import MeZOConfig
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.models import tune
from forwardtune.search.budget import Plan
from forwardtune.search.driver import RETURN_POINT
from forwardtune.search.guard import FALL, RISE
from forwardtune.search.notes import found
from forwardtune.trajectory import LogError, read_log, replay
from support.logs import log_lines
from support.trainers import QUIET, Kill, KilledError

STEPS = 48
DATA = [{"input_ids": row, "labels": row} for row in support.token_batch(24, 6).tolist()]
# Without the noise of minibatches, 48 steps are enough to see what a rate does.
SAME = DATA[:1] * 24
# Held out is what training makes worse.
OPPOSED = SAME[:16] + [{**SAME[0], "labels": [0] * 6}] * 8


def wanted(model: Any, inputs: Any) -> torch.Tensor:
    """How far one number that the model computes is from where it should be, shape (batch,)."""
    return (model(input_ids=inputs["input_ids"]).logits.float()[..., :16].mean(dim=(1, 2)) * 10 - 1).pow(2)


def opposed(model: Any, inputs: Any) -> torch.Tensor:
    """The same, but minus that on the last rows of ``OPPOSED``: whatever helps with the others is worse there."""
    return torch.where(inputs["labels"][:, 0] == 0, -1.0, 1.0) * wanted(model, inputs)


def make(
    folder: Path, *, callbacks: Any = (), data: Any = SAME, objective: Any = wanted, **changes: Any
) -> MeZOTrainer:
    small = {"max_steps": STEPS, "per_device_train_batch_size": 4, "seed": 3}
    args = MeZOConfig(**{"output_dir": str(folder), **QUIET, **small, **changes})
    split = {"train_dataset": data[:16], "eval_dataset": data[16:]}
    trainer = MeZOTrainer(support.tiny_model(), args, objective=objective, callbacks=list(callbacks), **split)
    trainer.automatic.announce = lambda text: None
    return trainer


def run(folder: Path, resume: bool | None = None, **changes: Any) -> MeZOTrainer:
    trainer = make(folder, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_the_loss_falls_with_no_setting_at_all(whole: Path) -> None:
    log = read_log(whole / "steps.jsonl")
    search = next(note for note in log.notes if "search" in note.content)
    tried = {size: float(loss) for size, loss in search.content["search"]["tried"]}
    assert search.at == 8
    assert min(tried.values()) < tried[0.0]
    assert {record.lr[0] for record in log.records[:8]} == {min(tried, key=lambda size: tried[size])}
    facts = found(log)
    assert 0 < facts["search_forwards"] <= 0.15 * 2 * STEPS
    assert facts["learning_rate"]["first"] > 0
    assert not (whole / RETURN_POINT).exists()
    trainer = make(whole / "unused")
    before = held_out(trainer, 2)()
    assert replay(log, trainer.model) == STEPS
    assert held_out(trainer, 2)() < 0.8 * before


def test_the_first_steps_are_estimated_at_the_base_weights(whole: Path) -> None:
    """With rate 0 a run stays there: it sees the same losses."""
    log = read_log(whole / "steps.jsonl")
    still = run(whole.parent / "still", learning_rate=1e-30, eps=log.header["eps"])
    records = read_log(still.step_log).records
    assert [r.losses for r in log.records[:8]] == [r.losses for r in records[:8]]
    assert log.records[8].losses != records[8].losses


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 50, 100, 1000, 20000])
@pytest.mark.parametrize("evaluations", [2, 3, 9, 32])
@pytest.mark.parametrize("find_eps", [True, False])
def test_budgets(steps: int, evaluations: int, find_eps: bool) -> None:
    plan = Plan.of(steps, evaluations, find_eps=find_eps)
    tries = plan.tries if plan.tries >= 3 else 0
    assert 10 * plan.scales + tries * plan.batches <= 0.15 * steps * evaluations
    assert 1 <= plan.held <= max(1, steps // 5)


@pytest.mark.parametrize("after", [0, 3, 8, 9, 17, 30, 47])
def test_a_killed_run_resumes_to_the_same_lines(whole: Path, tmp_path: Path, after: int) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, callbacks=[Kill(after, at_begin=True)])
    run(tmp_path, resume=True)
    assert log_lines(tmp_path) == log_lines(whole)


EVALUATED = {"eval_strategy": "steps", "eval_steps": 6, "data": DATA}


@pytest.fixture(scope="module")
def whole_evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    run(folder, **EVALUATED)
    return folder


@pytest.mark.parametrize("after", [0, 8, 13])
def test_a_killed_run_that_trainer_evaluates_resumes_to_the_same_lines(
    whole_evaluated: Path, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, callbacks=[Kill(after, at_begin=True)], **EVALUATED)
    run(tmp_path, resume=True, **EVALUATED)
    assert log_lines(tmp_path) == log_lines(whole_evaluated)


def test_the_rate_rises_and_falls_with_held_out_losses(tmp_path: Path) -> None:
    """Minibatches that differ: the held-out loss goes up and down."""
    whole = tmp_path / "whole"
    run(whole, data=DATA, max_steps=90)
    log = read_log(whole / "steps.jsonl")
    assert len(log.rollbacks) > 1
    best, backs = math.inf, []
    for note in log.notes:
        if "search" in note.content:
            best = min(loss for _, loss in note.content["search"]["tried"])
        if "held_out" in note.content:
            loss = float(note.content["held_out"])
            worse, best = loss > best, min(loss, best)
            backs += [note.at] * worse
            if note.at < 90:  # else no step follows
                factor = log.records[note.at].lr[0] / log.records[note.at - 1].lr[0]
                assert any(factor == pytest.approx(one) for one in ([1, 1 / FALL] if worse else [RISE]))
    assert 0 < len(backs) < sum("held_out" in note.content for note in log.notes)
    assert [back.at for back in log.rollbacks] == backs
    assert replay(log, support.tiny_model()) == 90  # compares the digest
    for after in (log.rollbacks[0].at, log.rollbacks[0].at + 1, log.rollbacks[1].at + 2):
        folder = tmp_path / str(after)
        with pytest.raises(KilledError):
            run(folder, data=DATA, max_steps=90, callbacks=[Kill(after, at_begin=True)])
        run(folder, resume=True, data=DATA, max_steps=90)
        assert log_lines(folder) == log_lines(whole)


def test_a_diverging_run_goes_back(tmp_path: Path) -> None:
    """Weights that jump away in mid-run stand for a learning rate that was good only at the start."""

    class Push(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 20:
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] *= 3e3

    trainer = make(tmp_path, callbacks=[Push()], eval_strategy="steps", eval_steps=40)  # no held-out loss comes before
    told: list[str] = []
    trainer.automatic.announce = told.append
    trainer.train()
    log = read_log(tmp_path / "steps.jsonl")
    assert any("left its range" in text for text in told)
    assert log.rollbacks
    assert log.rollbacks[0].to <= 20 < log.rollbacks[0].at <= 30
    assert log.records[-1].loss < log.records[0].loss


@pytest.mark.parametrize("rule", ["momentum", "adam", "sign"])
def test_every_rule_finds_a_rate(tmp_path: Path, rule: str) -> None:
    run(tmp_path, rule=rule)
    log = read_log(tmp_path / "steps.jsonl")
    first, last = (sum(r.loss for r in part) / 8 for part in (log.records[:8], log.records[-8:]))
    assert last < first
    assert replay(log, support.tiny_model()) == STEPS


def test_a_schedule_goes_on_from_the_rate_that_was_found(tmp_path: Path) -> None:
    run(tmp_path, lr_scheduler_type="linear")
    log = read_log(tmp_path / "steps.jsonl")
    found_rate = log.records[0].lr[0]
    heard = {note.at for note in log.notes if "held_out" in note.content}
    before = found_rate
    for record in log.records[8:]:
        rate = record.lr[0] / (1 - record.step / STEPS)  # what it would be without the schedule
        factors = [RISE, 1 / FALL, 1.0] if record.step in heard else [1.0]
        assert any(rate / before == pytest.approx(factor) for factor in factors)
        before = rate


def test_a_number_means_that_number(tmp_path: Path) -> None:
    run(tmp_path, learning_rate=1e-4, eps=2e-3)
    log = read_log(tmp_path / "steps.jsonl")
    assert {record.lr for record in log.records} == {(1e-4, 1e-4)}
    assert (log.header["eps"], log.notes, log.rollbacks) == (2e-3, [], [])


@pytest.mark.parametrize(("rate", "steps", "warned"), [(1e-6, STEPS, False), (2e-3, STEPS, True), (1.0, 6, True)])
def test_a_given_rate_that_diverges_is_warned_of_once_and_kept(
    tmp_path: Path, rate: float, steps: int, warned: bool
) -> None:
    told: list[str] = []
    trainer = make(tmp_path, learning_rate=rate, eps=1e-3, max_steps=steps)
    trainer.automatic.announce = told.append
    trainer.train()
    assert {record.lr[0] for record in read_log(trainer.step_log).records} == {rate}
    assert ["lower the learning rate" in text for text in told] == [True] * warned


@pytest.mark.filterwarnings("ignore:the tuned weights have not changed the loss")
@pytest.mark.parametrize(
    ("eps", "steps", "lora", "expected"),
    [
        (1e-3, 100, False, None),
        (1e-12, 20, False, None),  # too short to be worth ten passes
        (1e-12, 100, False, r"is below the spacing of weights in float32, which keeps \d+% of a .*a larger eps"),
        # An adapter holds every perturbation, but what it adds is rounded in the model's dtype.
        (1e-6, 100, True, r"moves the loss by \de-\d\d, .* rounding in bfloat16 and float32 is up to \de-\d\d: choose"),
    ],
)
def test_a_given_eps_below_the_noise_is_warned_of(
    tmp_path: Path, eps: float, steps: int, lora: bool, expected: str | None
) -> None:
    told: list[str] = []
    trainer = make(tmp_path / "told", learning_rate=1e-9, eps=eps, max_steps=steps)
    if lora:
        trainer.model = tune(trainer.model.to(torch.bfloat16), None, "lora")
    trainer.automatic.announce = told.append
    trainer.train()
    assert len(told) == (expected is not None)
    assert expected is None or re.match(f"eps {eps:.1e} {expected}", told[0]), told


def test_the_check_of_a_given_eps_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "checked", learning_rate=1e-4, eps=1e-3, max_steps=100)
    monkeypatch.setattr(automatic, "can_hold_out", lambda trainer: False)
    run(tmp_path / "not", learning_rate=1e-4, eps=1e-3, max_steps=100)
    assert log_lines(tmp_path / "checked") == log_lines(tmp_path / "not")


def test_evaluations_of_trainer_are_heard(tmp_path: Path) -> None:
    trainer = run(tmp_path, eval_strategy="steps", eval_steps=6)
    heard = [
        (note.at, note.content["held_out"]) for note in read_log(trainer.step_log).notes if "held_out" in note.content
    ]
    logged = [(line["step"], line["eval_loss"]) for line in trainer.state.log_history if "eval_loss" in line]
    assert [step for step, _ in logged] == sorted({0, 8, *range(6, STEPS + 1, 6)})  # and the jump
    assert heard == [pair for pair in logged if pair[0] == 0 or pair[0] >= 8]


@pytest.mark.parametrize(("rows", "batches"), [(24, 1), (24, 3), (7, 1), (5, 4), (3, 1)])
def test_held_out_examples_come_from_all_of_the_data(tmp_path: Path, rows: int, batches: int) -> None:
    """Data are often sorted, by class or by length: the rows lie evenly, and none comes twice."""
    seen: list[int] = []

    def look(model: Any, inputs: Any) -> torch.Tensor:
        seen.extend(inputs["input_ids"][:, 0].tolist())
        return torch.zeros(len(inputs["input_ids"]))

    trainer = make(tmp_path, objective=look)
    trainer.eval_dataset = [{"input_ids": [row] * 6, "labels": [row] * 6} for row in range(rows)]
    measure = held_out(trainer, batches)
    measure()
    first = list(seen)
    measure()
    assert seen == first * 2
    count = min(rows, 4 * batches)
    assert len(first) == count
    assert first[0] == 0
    gaps = [after - before for before, after in itertools.pairwise([*first, rows])]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


def test_of_several_evaluation_sets_the_first_is_heard(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=6)
    trainer.eval_dataset = {"a": SAME[16:], "b": OPPOSED[16:]}
    trainer.train()
    heard = [note.content["held_out"] for note in read_log(trainer.step_log).notes if "held_out" in note.content]
    logged = [line for line in trainer.state.log_history if "eval_a_loss" in line and not 0 < line["step"] < 8]
    assert heard == [line["eval_a_loss"] for line in logged]
    assert len(heard) > 2


# Steps that the run's own twenty measurements, or Trainer's, divide, or leave a rest of, or that are too few for a search.
@pytest.mark.parametrize("steps", [48, 45, 5])
@pytest.mark.parametrize("evaluated", [{}, {"eval_strategy": "steps", "eval_steps": 6}, {"eval_strategy": "epoch"}])
def test_weights_that_are_worse_than_the_untuned_ones_are_not_kept(
    tmp_path: Path, steps: int, evaluated: dict[str, Any]
) -> None:
    trainer = run(tmp_path, data=OPPOSED, objective=opposed, max_steps=steps, **evaluated)
    log = read_log(trainer.step_log)
    assert (log.rollbacks[-1].at, log.rollbacks[-1].to) == (steps, 0)
    assert any(record.coefficients and record.lr[0] for record in log.records)
    support.assert_same_bits(trainer.model, support.snapshot(support.tiny_model()))
    again = support.tiny_model()
    assert replay(log, again) == steps
    support.assert_same_bits(again, support.snapshot(support.tiny_model()))


@pytest.fixture(scope="module", params=[{}, {"eval_strategy": "steps", "eval_steps": 6}], ids=["own", "evaluated"])
def going_back(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a run that ends untuned, and with what one in progress has beside its log; and what was asked for."""
    asked = {"data": OPPOSED, "objective": opposed, **request.param}
    folder = tmp_path_factory.mktemp("going-back")
    run(folder / "whole", **asked)
    with pytest.raises(KilledError):
        run(folder / "killed", callbacks=[Kill(STEPS - 1, at_begin=True)], **asked)
    return folder, asked


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_kill_at_the_end_changes_nothing(going_back: tuple[Path, dict[str, Any]], tmp_path: Path, lost: int) -> None:
    """Before the end line, before the way back, and before the last measurement."""
    folder, asked = going_back
    shutil.copytree(folder / "killed", tmp_path / "killed")
    written = (folder / "whole" / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "killed" / "steps.jsonl").write_bytes(b"".join(written[:-lost]))
    trainer = run(tmp_path / "killed", resume=True, **asked)
    assert log_lines(tmp_path / "killed") == log_lines(folder / "whole")
    assert not (tmp_path / "killed" / RETURN_POINT).exists()
    support.assert_same_bits(trainer.model, support.snapshot(support.tiny_model()))


def test_a_run_that_ended_with_a_way_back_is_extended(tmp_path: Path) -> None:
    """Its last checkpoint was saved before the evaluation that led back."""
    evaluated = {"eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 12}
    asked = {"data": OPPOSED, "objective": opposed, **evaluated}
    first = run(tmp_path, max_steps=12, **asked)
    assert read_log(first.step_log).rollbacks[-1].at == 12
    trainer = run(tmp_path, resume=True, max_steps=24, **asked)
    assert replay(trainer.step_log, support.tiny_model()) == 24  # compares the digest


def test_auto_and_numbers_come_from_a_command_line(tmp_path: Path) -> None:
    parser = HfArgumentParser((MeZOConfig,))
    (config,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert (config.learning_rate, config.eps) == ("auto", "auto")
    (config,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--learning_rate", "1e-5", "--eps", "auto"]
    )
    assert (config.learning_rate, config.eps) == (1e-5, "auto")
    assert "perturbation scale, or auto" in parser.format_help()


@pytest.mark.parametrize("value", [0, -1.0, "fast", math.nan, math.inf, None])
def test_anything_else_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: .* is neither a positive number nor 'auto'"):
        MeZOConfig(output_dir=str(tmp_path), learning_rate=value)


def test_a_run_with_a_rate_of_its_own_is_not_resumed_with_auto(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, learning_rate=1e-4, callbacks=[Kill(20, at_begin=True)])
    with pytest.raises(LogError, match="a learning rate of its own: pass it"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("eps", ["auto", 1e-3])
@pytest.mark.filterwarnings("ignore:eps ")
def test_runs_with_a_direction_for_each_example_find_their_rate_and_are_resumed(tmp_path: Path, eps: Any) -> None:
    settings = {"assignment": "example", "learning_rate": "auto", "eps": eps, "max_steps": 110}
    whole = run(tmp_path / "whole", **settings)
    log = read_log(whole.step_log)
    assert found(log)["learning_rate"]["first"] > 0
    assert {record.examples for record in log.records} == {4}
    trainer = make(tmp_path / "killed", callbacks=[Kill(13)], **settings)
    with pytest.raises(KilledError):
        trainer.train()
    again = run(tmp_path / "killed", resume=True, **settings)
    assert log_lines(again.step_log) == log_lines(whole.step_log)
    support.assert_same_bits(again.model, support.snapshot(whole.model))
