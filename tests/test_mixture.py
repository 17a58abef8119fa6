"""Objectives that a user names: what is read, what is refused, their values by hand, and what is kept of them."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

import support
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, find_layout, prepare
from forwardtune.hf.config import MeZOConfig
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.objectives import Reward, TaskObjective, generate
from forwardtune.objectives.mixture import parse
from forwardtune.tasks import Task, metrics
from forwardtune.tasks.encoding import Encoded
from forwardtune.trajectory import read_log
from support.command import FREE_TEXT, Setting, cli, done, read, weights, write_task
from support.examples import CHOICE, TOKENIZER, encoded, inputs_of, naive_scores, sharp_model, talking_model, tokens
from support.trainers import QUIET

FREE = Task("free", "{text}", "answer", None, "f1", loss="likelihood", stop="", max_new_tokens=6)
DROP = Task("drop", "{text}", "answer", None, "drop_f1", loss="likelihood", stop="", max_new_tokens=6)
BARE = Task("bare", "{text}", "", None, "reward", loss="none", stop="", max_new_tokens=6)
PAIRS = Task("pairs", "{text}", "", None, "accuracy", loss="preference", preference=("good", "bad"))

MODULE = """
def short(completions, **columns):
    return [-len(c) for c in completions]

def es(completions):
    return [c.count("e") for c in completions]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with rewards in the current folder."""
    (tmp_path / "mixed_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mixed_rewards", raising=False)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specification", "task", "terms"),
    [
        ("loss", CHOICE, [(1, "loss")]),
        (" accuracy ", CHOICE, [(1, "accuracy")]),
        ("accuracy + 0.1 * loss", CHOICE, [(1, "accuracy"), (0.1, "loss")]),
        ("accuracy+0.1*loss", CHOICE, [(1, "accuracy"), (0.1, "loss")]),
        ("1e-1*loss+accuracy", CHOICE, [(0.1, "loss"), (1, "accuracy")]),
        ("1e+1*loss+2E+2 *accuracy", CHOICE, [(10, "loss"), (200, "accuracy")]),
        (".5*  loss\n+  3. * accuracy", CHOICE, [(0.5, "loss"), (3, "accuracy")]),
        ("loss", FREE, [(1, "loss")]),
        ("f1 + exact_match", FREE, [(1, "f1"), (1, "exact_match")]),
        ("drop_exact_match", DROP, [(1, "drop_exact_match")]),
        ("accuracy", PAIRS, [(1, "accuracy")]),
        ("mixed_rewards:short", BARE, [(1, "mixed_rewards:short")]),
        (
            "mixed_rewards:short+1e-1*mixed_rewards:es+f1",
            FREE,
            [(1, "mixed_rewards:short"), (0.1, "mixed_rewards:es"), (1, "f1")],
        ),
    ],
)
def test_specifications_are_read(specification: str, task: Task, terms: list[tuple[float, str]]) -> None:
    found = parse(specification, task)
    assert [(term.weight, term.name) for term in found] == terms
    assert [term.reward is not None for term in found] == [":" in name for _, name in terms]
    assert all(term.reward is None or term.reward.weight == term.weight for term in found)
    text = task in (FREE, DROP, BARE) and terms != [(1, "loss")]
    assert TaskObjective(specification, task, TOKENIZER).generates == text


@pytest.mark.parametrize(
    ("specification", "task", "message"),
    [
        ("", CHOICE, "cannot be read at ''"),
        ("accuracy +", CHOICE, "cannot be read at ''"),
        ("accuracy loss", CHOICE, "cannot be read at 'accuracy loss': give names joined by [+]"),
        ("loss * 0.1", CHOICE, "cannot be read at 'loss [*] 0.1'.*such as accuracy [+] 0.1 [*] loss"),
        ("0.1 loss", CHOICE, "cannot be read at '0.1 loss'"),
        ("2 * 3 * loss", CHOICE, "cannot be read"),
        ("accuracy - 0.1 * loss", CHOICE, "cannot be read at 'accuracy - 0.1 [*] loss'.*positive factor"),
        ("-accuracy", CHOICE, "cannot be read at '-accuracy'.*positive factor"),
        ("nan * loss", CHOICE, "cannot be read at 'nan [*] loss'"),
        ("-1 * accuracy", CHOICE, "the factor -1 of accuracy is not a positive number.*no minus sign is needed"),
        ("0 * accuracy", CHOICE, "the factor 0 of accuracy is not a positive number"),
        ("1e999 * loss", CHOICE, "the factor 1e999 of loss is not a positive number"),
        ("1-1 * loss", CHOICE, "the factor 1-1 of loss is not a positive number"),
        ("e * loss", CHOICE, "the factor e of loss is not a positive number"),
        ("loss + loss", CHOICE, "names a term twice: give it once"),
        ("mixed_rewards:es + mixed_rewards:es", BARE, "names a term twice"),
        ("acuracy", CHOICE, "'acuracy' does not suit task choice: choose from accuracy, loss.*did you mean accuracy"),
        ("Loss", CHOICE, "'Loss' does not suit task choice.*did you mean loss"),
        ("f1", CHOICE, "'f1' does not suit task choice: choose from accuracy, loss"),
        ("drop_f1", FREE, "'drop_f1' does not suit task free: choose from f1, exact_match, loss, or module:function"),
        ("f1", DROP, "'f1' does not suit task drop: choose from drop_f1, drop_exact_match, loss"),
        ("accuracy", FREE, "'accuracy' does not suit task free"),
        ("loss", BARE, "'loss' does not suit task bare: .*module:function"),
        ("f1", BARE, "'f1' does not suit task bare"),
        ("mixed_rewards:short", CHOICE, "rewards what the model writes, and task choice is a choice: give a task with"),
        ("mixed_rewards:short", PAIRS, "task pairs is a choice"),
        ("mixed_rewards:shrt", BARE, "has no function 'shrt'.*did you mean short"),
        ("nowhere:short", BARE, "module 'nowhere' could not be imported"),
        ("mixed_rewards:", BARE, "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_specification_is_said(specification: str, task: Task, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        parse(specification, task)


# --- values ------------------------------------------------------------------------------------------------------


CHOICES = [encoded(3, 1, 5, label=1), encoded(11, 4, 2), encoded(1, 1, 1), encoded(5, 2, 2, label=1)]


@torch.no_grad()
@pytest.mark.parametrize("specification", ["loss", "accuracy", "accuracy + 0.1 * loss", "3 * loss + 2*accuracy"])
def test_accuracy_and_loss_by_hand_in_one_forward(specification: str) -> None:
    model = sharp_model()
    right_too = Encoded(tokens(7, 7), [tokens(2, i) for i in (1, 2, 3)], (2, 0, 1))
    batch = [*CHOICES, right_too]  # whichever it chooses of the last is right
    inputs = {**prepare(model, TOKENIZER, batch, find_layout(model, TOKENIZER, batch)), "examples": batch}
    scores = naive_scores(model, batch)
    accuracy = torch.tensor([float(int(row.argmax()) in e.right) for row, e in zip(scores, batch, strict=True)])
    assert 0 < accuracy[:-1].mean() < 1 == accuracy[-1]
    loss = torch.stack([-row[: len(e.options)].log_softmax(0)[e.label] for row, e in zip(scores, batch, strict=True)])
    expected = {
        "loss": loss,
        "accuracy": -accuracy,
        "accuracy + 0.1 * loss": -accuracy + 0.1 * loss,
        "3 * loss + 2*accuracy": 3 * loss - 2 * accuracy,
    }[specification]
    objective = TaskObjective(specification, CHOICE, TOKENIZER)
    with inputs_of(model) as shapes:
        found = objective(model, inputs)
    assert len(shapes) == 1
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5)
    assert (found.dtype, found.shape) == (torch.float32, (5,))
    statistics = objective.take_statistics()
    for name, values in (("accuracy", accuracy), ("loss", loss)):
        if name in specification:
            assert statistics.pop(name) == {
                "mean": pytest.approx(float(values.mean()), abs=1e-5),
                "std": pytest.approx(float(values.std(correction=0)), abs=1e-5),
            }
    assert statistics == objective.take_statistics() == {}


def test_loss_alone_has_a_gradient() -> None:
    model = sharp_model()
    inputs = prepare(model, TOKENIZER, CHOICES)
    TaskObjective("accuracy + 0.1 * loss", CHOICE, TOKENIZER)(model, inputs).mean().backward()
    mixed = model.lm_head.weight.grad.clone()
    model.zero_grad()
    TaskObjective("loss", CHOICE, TOKENIZER)(model, inputs).mean().backward()
    torch.testing.assert_close(mixed, 0.1 * model.lm_head.weight.grad)
    assert mixed.abs().max() > 0
    assert not TaskObjective("accuracy", CHOICE, TOKENIZER)(model, inputs).requires_grad


@torch.no_grad()
def test_metrics_of_text_by_hand() -> None:
    """The best of several truths counts, and texts are generated once for all terms."""
    model = talking_model()
    prompts = [tokens(n, n) for n in (4, 7, 5)]
    said = generate(model, TOKENIZER, FREE, prompts)
    truths = [("unsaid", said[0]), ("nothing like it", f"{said[1]} {said[1]} more"), ("none of it",)]
    batch = [Encoded(p, [tokens(3, 9)], texts=t) for p, t in zip(prompts, truths, strict=True)]
    inputs = {**prepare(model, TOKENIZER, batch), "examples": batch}
    f1 = [max(metrics.f1(s, t) for t in ts) for s, ts in zip(said, truths, strict=True)]
    assert f1[0] == 1 > f1[1] > metrics.f1(said[1], truths[1][0])
    match = [1.0, 0.0, 0.0]
    assert TaskObjective("f1", FREE, TOKENIZER)(model, inputs).tolist() == pytest.approx([-x for x in f1])
    short, es = [-len(s) for s in said], [s.count("e") for s in said]
    loss = [-float(row[0]) for row in naive_scores(model, batch)]
    objective = TaskObjective(
        "2*f1+exact_match + 0.1*loss+ 1e-2*mixed_rewards:short + mixed_rewards:es", FREE, TOKENIZER
    )
    with inputs_of(model) as shapes:
        found = objective(model, inputs)
    assert [rows for rows, _ in shapes] == [3] * (
        FREE.max_new_tokens + 1
    )  # every token once, and the likelihood of the target
    expected = [-2 * f - m + 0.1 * x - 0.01 * s - e for f, m, x, s, e in zip(f1, match, loss, short, es, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=3e-5)
    statistics = objective.take_statistics()
    assert list(statistics) == ["f1", "exact_match", "loss", "mixed_rewards:short", "mixed_rewards:es"]
    assert statistics["mixed_rewards:short"] == {
        "mean": pytest.approx(np.mean(short)),
        "std": pytest.approx(np.std(short)),
    }


def test_evaluation_writes_once_for_several_rewards() -> None:
    model = talking_model()
    examples = [Encoded(tokens(n, n), []) for n in (4, 7, 5)]
    rewards = [Reward(lambda completions: [len(c) for c in completions], name) for name in ("a", "b")]
    outcomes: list[float] = []
    with inputs_of(model) as shapes:
        found = evaluate(model, TOKENIZER, BARE, examples, rewards=rewards, outcomes=outcomes)
    assert [rows for rows, _ in shapes] == [3] * BARE.max_new_tokens
    said = generate(model, TOKENIZER, BARE, [example.prompt for example in examples])
    assert outcomes == [2 * len(text) for text in said]
    mean = np.mean([len(text) for text in said])
    assert found == {"a": mean, "b": mean, "reward": 2 * mean, "examples": 3}


# --- what is kept ------------------------------------------------------------------------------------------------


def test_statistics_cover_what_was_seen_since_the_last_look() -> None:
    model, objective = sharp_model(), TaskObjective("loss", CHOICE, TOKENIZER)
    halves = [prepare(model, TOKENIZER, CHOICES[:2]), prepare(model, TOKENIZER, CHOICES[2:])]
    with torch.no_grad():
        values = [value for half in halves for value in objective(model, half).tolist()]
        assert objective.take_statistics()["loss"] == {
            "mean": pytest.approx(np.mean(values)),
            "std": pytest.approx(np.std(values)),
        }
        objective(model, halves[0])
        assert objective.take_statistics()["loss"]["mean"] == pytest.approx(np.mean(values[:2]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_statistics_survive_a_loss_that_is_not_finite(value: float) -> None:
    model, objective = sharp_model(), TaskObjective("accuracy + loss", CHOICE, TOKENIZER)
    with torch.no_grad():
        model.lm_head.weight[5] = value
        objective(model, prepare(model, TOKENIZER, CHOICES))
    found = objective.take_statistics()
    assert not math.isfinite(found["loss"]["mean"])
    assert 0 <= found["accuracy"]["mean"] <= 1


@pytest.mark.parametrize(
    ("objective", "how"),
    [
        ("loss", {}),
        ("accuracy + 0.5 * loss", {"probes": 2}),
        ("accuracy + 0.5 * loss", {"perturbation": "copy"}),
        ("2 * f1 + 0.5*loss", {}),
        ("mixed_rewards:short + mixed_rewards:es", {"tune": "lora", "temperature": 1, "eps": 1e-1}),
    ],
)
def test_course_of_a_run_is_one_story(tiny_folder: Path, tmp_path: Path, objective: str, how: dict[str, Any]) -> None:
    free = "f1" in objective or ":" in objective
    setting = Setting(tiny_folder, write_task(tmp_path / "task", **(FREE_TEXT if free else {})))
    run = tmp_path / "run"
    ran = done(*setting.train(run, objective=objective, **{"eps": 1e-2, **how}))
    records = read_log(run / "steps.jsonl").records
    kept = read(run / "objective.jsonl")
    history = read(run / "history.jsonl")
    assert [line["step"] for line in kept] == [record.step + 1 for record in records]
    terms = [(t.weight if t.name == "loss" else -t.weight, t.name) for t in TaskObjective(
        objective, FREE if free else CHOICE, TOKENIZER
    ).terms]  # fmt: skip
    for line, record, whole in zip(kept, records, history, strict=False):
        assert whole["objective"] == line["objective"]
        assert list(line["objective"]) == [name for _, name in terms]
        assert whole["loss"] == record.loss
        # Both are means over the same examples at the same points; the losses are added in float32.
        assert record.loss == pytest.approx(sum(w * line["objective"][n]["mean"] for w, n in terms), abs=2e-5)
        assert all(values["std"] >= 0 for values in line["objective"].values())
    if "loss" in objective:  # which moves the weights in every step
        assert "both sides" not in ran.err
        assert "moved nothing" not in ran.err
        metrics, kind = read(run), {"f1", "exact_match"} if free else {"accuracy"}
        assert metrics["zero_coefficient_steps"] == 0
        assert metrics["metric"] in kind
        assert metrics["dev"].keys() == {*kind, "loss", "examples"}
        of_classes = set() if free else {"macro_f1", "calibration_error"}
        assert metrics["test"].keys() == metrics["dev"].keys() | of_classes
        assert metrics["test"]["loss"] != metrics["before"]["loss"]


def test_resumed_run_tells_the_same_course(tiny_folder: Path, tmp_path: Path) -> None:
    """The first step of either run has evaluations of a self-check, which are no part of it."""
    setting = Setting(tiny_folder, write_task(tmp_path / "task"))
    how: dict[str, Any] = {"objective": "accuracy + 0.1 * loss", "eps": 1e-2, "dev_examples": 0}
    done(*setting.train(tmp_path / "whole", **how))
    done(*setting.train(tmp_path / "parts", **how, steps=2))
    with open(tmp_path / "parts" / "objective.jsonl", "a", encoding="utf-8") as file:  # as a kill may leave it
        file.write('{"step": 3, "objective": {}}\n{"step": 4, "obj')
    done(*setting.resume(tmp_path / "parts", steps=6))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    assert (tmp_path / "parts" / "objective.jsonl").read_text() == (tmp_path / "whole" / "objective.jsonl").read_text()
    assert len((tmp_path / "whole" / "objective.jsonl").read_text().splitlines()) == 6


def test_steps_are_told_to_the_objective(tmp_path: Path) -> None:
    """Once for each microbatch, before it is evaluated."""

    class Told:
        def __init__(self) -> None:
            self.steps: list[tuple[int, int]] = []

        def begin_step(self, step: int, part: int) -> None:
            self.steps.append((step, part))

        def __call__(self, model: Any, inputs: Any) -> float:
            return float(model(input_ids=inputs["input_ids"]).logits.float().pow(2).mean())

    rows = [{"input_ids": row, "labels": row} for row in support.token_batch(18, 6).tolist()]
    told = Told()
    how = {**QUIET, "max_steps": 3, "learning_rate": 1e-4, "eps": 1e-3}  # held-out examples are measured at a step, too
    how |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    config = MeZOConfig(output_dir=str(tmp_path / "run"), **how)
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(len(told.steps))

    MeZOTrainer(
        model=support.tiny_model(), args=config, train_dataset=rows, objective=told, callbacks=[Watch()]
    ).train()
    assert told.steps == [(step, part) for step in range(3) for part in range(3)]
    assert seen == [3, 6, 9]


# --- steps that move nothing -------------------------------------------------------------------------------------


def test_steps_without_a_coefficient_are_counted_and_advised(tiny_folder: Path, tmp_path: Path) -> None:
    """Not only at the end of a long run; and the bar counts with it."""
    setting = Setting(tiny_folder, write_task(tmp_path / "task"))
    run = tmp_path / "run"
    ran = done(*setting.train(run, objective="accuracy", eps=1e-6, steps=30))
    assert ran.err.index("in 25 of 25 steps (100%)") < ran.err.index(
        "in 30 of 30 steps (100%) both sides of the probe had the same objective"
    )
    for help in ("--probes", "--batch-size", "--eps", "'accuracy + 0.1 * loss'"):
        assert help in ran.err.rpartition("both sides")[2]
    assert "30 moved nothing" in ran.err
    assert "objective 0." in ran.err or "objective 1." in ran.err
    metrics = read(run)
    assert (metrics["zero_coefficient_steps"], metrics["skipped_steps"]) == (30, 0)
    assert weights(run) == weights(tiny_folder)
    assert metrics["before"] == metrics["test"]
    assert json.loads(cli("inspect", run / "steps.jsonl", "--json").out)["zero_coefficient_steps"] == 30
    assert "zero coefficient steps: 30" in cli("inspect", run).out
