"""Rewards: TRL's signature, whatever a function may do wrong, and runs that are rewarded for what they write."""

from __future__ import annotations

import functools
import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import support
from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate
from forwardtune.hf.config import MeZOConfig
from forwardtune.hf.trainer import MeZOTrainer
from forwardtune.models import tune
from forwardtune.objectives import Reward, RewardError, Sampling, TaskObjective, generate, load_reward
from forwardtune.tasks import Example, Task
from forwardtune.tasks.encoding import Encoded, Encoder
from forwardtune.tasks.reader import read_task
from forwardtune.trajectory import read_log
from support.command import FREE_TEXT, Setting, cli, done, message_of, read, weights, write_jsonl, write_task
from support.examples import TOKENIZER, talking_model
from support.trainers import QUIET

EXAMPLES = [Example(f"Q{i}:", row={"name": f"n{i}", "age": 10 + i, "prompts": "a column"}) for i in range(3)]
COMPLETIONS = ["zero", "one", "the second"]
TASK = Task("said", "{text}", "", None, "reward", loss="none", stop="", max_new_tokens=6)

Write = Callable[[str, str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module into the current folder, in place of one of that name, and gives the name back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return name

    return write


# --- the signature -----------------------------------------------------------------------------------------------


def plain(prompts: list[str], completions: list[str], name: list[str], age: list[int]) -> list[float]:
    assert prompts == ["Q0:", "Q1:", "Q2:"]
    assert all(type(column) is list for column in (prompts, completions, name, age))
    return [len(c) + a + int(n[1:]) for c, n, a in zip(completions, name, age, strict=True)]


def everything(completions: list[str], **columns: Any) -> list[float]:
    assert columns.keys() == {"prompts", "name", "age"}
    return plain(completions=completions, **columns)


class Judge:
    def __call__(self, completions: list[str], *, age: list[int], name: list[str], bonus: float = 0.0) -> list[float]:
        return [bonus + score for score in plain(["Q0:", "Q1:", "Q2:"], completions, name, age)]


def with_tokens(completions: list[str], **columns: Any) -> list[int]:
    assert columns.keys() == {"prompts", "completion_ids", "name", "age"}  # the data's own of that name is not given
    return [len(ids) for ids in columns["completion_ids"]]


def curriculum(completions: list[str], trainer_state: Any = None, log_extra: Any = None) -> list[float]:
    """What only TRL's trainer can give may be left out."""
    assert trainer_state is log_extra is None
    return [1.0] * len(completions)


def eat(completions: list[str]) -> list[float]:
    """Disturbs what the next function is given."""
    return [float(len(completions.pop(0))) for _ in range(3)]


@pytest.mark.parametrize(
    ("function", "ids", "expected"),
    [
        (plain, None, [14.0, 15.0, 24.0]),
        (plain, [[1, 2], [], [3]], [14.0, 15.0, 24.0]),  # does not take them
        (everything, None, [14.0, 15.0, 24.0]),
        (Judge(), None, [14.0, 15.0, 24.0]),
        (functools.partial(Judge(), bonus=0.0), None, [14.0, 15.0, 24.0]),
        (
            lambda completions, name, **rest: plain(rest["prompts"], completions, name, rest["age"]),
            None,
            [14.0, 15.0, 24.0],
        ),
        (lambda age, completions: [a + len(c) for c, a in zip(completions, age, strict=True)], None, [14, 14, 22]),
        (lambda completions, completion_ids: [len(i) for i in completion_ids], [[1, 2], [], [3]], [2, 0, 1]),
        (with_tokens, [[1, 2], [], [3]], [2, 0, 1]),
        (curriculum, None, [1, 1, 1]),
        (eat, None, [4, 3, 10]),
    ],
)
def test_columns_come_by_name_as_lists(function: Any, ids: Any, expected: list[float]) -> None:
    rows = EXAMPLES
    if ids is not None:
        rows = [Example(e.prompt, row={**e.row, "completion_ids": "a column", "trainer_state": 1}) for e in EXAMPLES]
    assert Reward(function, "r")(rows, COMPLETIONS, ids) == expected
    assert COMPLETIONS == ["zero", "one", "the second"]


async def later(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


class Later:
    async def __call__(self, completions: list[str]) -> list[float]:
        return [0.0] * len(completions)


class Runs:
    """What a function that was not written as a reward would do with a column."""

    def __call__(self, command: list[str], **columns: Any) -> list[float]:
        raise AssertionError(command)


ASYNC, NO_JUDGE = (
    "is an async function, which is not awaited here: give a plain function",
    "takes no parameter called completions",
)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (later, ASYNC),
        (Later(), ASYNC),
        (functools.partial(later), ASYNC),
        (
            lambda completions, trainer_state: [],
            "takes trainer_state, which TRL's trainer alone has: give it a default",
        ),
        (lambda completions, *, log_metric, **rest: [], "takes log_metric, which .*such as log_metric=None"),
        (Runs(), f"{NO_JUDGE}, so it was not written to judge"),
        (functools.partial(Runs()), NO_JUDGE),
        (lambda **columns: [], f"{NO_JUDGE}.*as in def reward"),
        (lambda *completions: [], NO_JUDGE),
        (lambda prompts: [], NO_JUDGE),
        (np.dot, NO_JUDGE),
        (subprocess.getoutput, "is getoutput of the standard library: .*'subprocess'.*of your own"),
        (functools.partial(subprocess.getoutput, encoding="utf-8"), "is getoutput of the standard library"),
        (subprocess.Popen, "is Popen of the standard library"),
        (exec, "is exec of the standard library: 'builtins'"),
        (dict, "is dict of the standard library"),
    ],
)
def test_what_was_not_written_as_a_reward_or_needs_trls_trainer_is_refused(function: Any, message: str) -> None:
    """It might do anything with the columns."""
    with pytest.raises(InputError, match=f"^reward mine:f {message}"):
        Reward(function, "mine:f")


@pytest.mark.parametrize(
    "values",
    [
        [1, True, 0.5],
        (1.0, 1.0, 0.5),
        (x for x in (1, 1, 0.5)),
        np.array([1.0, 1.0, 0.5], dtype=np.float32),
        np.array([[1.0], [1.0], [0.5]]),
        [np.float64(1), np.int32(1), np.float16(0.5)],
        torch.tensor([1.0, 1.0, 0.5], dtype=torch.bfloat16),
        torch.tensor([[1.0], [1.0], [0.5]], requires_grad=True),
        [torch.tensor(1), torch.tensor(1.0), np.array(0.5)],
        [Fraction(1), 1, Fraction(1, 2)],
    ],
    ids=lambda values: type(values).__name__,
)
def test_numbers_of_every_kind_are_rewards(values: Any) -> None:
    found = Reward(lambda completions: values, "r")(EXAMPLES, COMPLETIONS)
    assert found == [1.0, 1.0, 0.5]
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, object, 0.0], "returned <class 'object'>, which is not a number, for 'one': return a list"),
        ([1.0, 0.0, "1.0"], "returned '1.0', which is not a number, for 'the second'"),
        ("123", "returned '123' for 3 completions, the first of them 'zero'"),
        ({"a": 1, "b": 2, "c": 3}, "returned {'a': 1, 'b': 2, 'c': 3} for 3 completions"),
        (None, "returned None for 3 completions, the first of them 'zero': return a list with a number, or None"),
        (0.5, "returned 0.5 for 3 completions"),
        (torch.tensor(0.5), "raised TypeError: iteration over a 0-d tensor.*'zero'"),
        ([1.0, 2.0], "returned 2 rewards for 3 completions, the first of them 'zero'"),
        ([], "returned 0 rewards for 3 completions"),
        (np.zeros(4), "returned 4 rewards for 3 completions"),
        ([1.0, [2.0], 3.0], r"returned \[2.0\], which is not a number, for 'one'"),
        ([1.0, np.ones(2), 3.0], r"returned array\(.*which is not a number, for 'one'"),
        (torch.ones(3, 2), r"returned tensor\(.*which is not a number, for 'zero'"),
        ([1.0, np.str_("2"), 3.0], "which is not a number, for 'one'"),
        ([1.0, float("nan"), 3.0], "is nan for 'one': return a finite number"),
        (torch.tensor([1.0, 2.0, -torch.inf]), "is -inf for 'the second': return a finite number"),
        ([10**400, 1, 1], "which is not a number, for 'zero'"),
        ([1j, 1, 1], "which is not a number, for 'zero'"),
    ],
    ids=str,
)
def test_what_is_no_list_of_rewards_is_refused_with_the_completion(values: Any, message: str) -> None:
    with pytest.raises(RewardError, match=rf"(?s)^reward mine:f .*{message}") as caught:
        Reward(lambda completions: values, "mine:f")(EXAMPLES, COMPLETIONS)
    assert isinstance(caught.value, InputError)


def fails(completions: list[str]) -> list[float]:
    raise KeyError("answer")


def fails_late(completions: list[str]) -> Any:
    yield 1.0
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "KeyError: 'answer'. It was given 3 completions, .* 'zero': mend .* resume the run$"),
        (fails_late, "KeyError: 'answer'. It was given 3 completions, .* 'zero': mend .* resume the run$"),
        (
            lambda completions: [float(len(completion[0]["content"])) for completion in completions],
            r"TypeError: .*\(completions are texts here, not lists of messages\)",
        ),
    ],
    ids=["at once", "late", "messages"],
)
def test_function_that_raises_is_told_with_a_completion(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"^reward mine:f raised {message}") as caught:
        Reward(function, "mine:f")(EXAMPLES, COMPLETIONS)
    assert isinstance(caught.value.__cause__, KeyError if "KeyError" in message else TypeError)


def test_column_that_the_data_do_not_have() -> None:
    message = r"^reward mine:f takes 'nam', and the data have no such column \(they have name, age\); did you mean name"
    for function in (lambda completions, nam: [], lambda completions, *, nam, age, **rest: []):
        reward = Reward(function, "mine:f")
        with pytest.raises(RewardError, match=message):
            reward.require(EXAMPLES[0].row)
        with pytest.raises(RewardError, match=message):
            reward(EXAMPLES, COMPLETIONS)
    rows = [Example("", row={"a": 1}), Example("", row={"b": 2}), Example("", row={})]  # of several kinds
    seen: list[Any] = []
    Reward(lambda completions, b: seen.append(b) or [0, 0, 0], "r")(rows, COMPLETIONS)
    assert seen == [[None, 2, None]]
    for function in (lambda completions, city=None: [], lambda completions, prompts, completion_ids, **city: []):
        Reward(function, "mine:f").require(EXAMPLES[0].row)


def test_ctrl_c_in_a_reward_is_none_of_our_business() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reward(interrupted, "r")(EXAMPLES, COMPLETIONS)


def test_long_completions_are_shortened_in_messages() -> None:
    with pytest.raises(RewardError) as caught:
        Reward(lambda completions: ["?"], "r")(EXAMPLES[:1], ["y" * 10_000])
    assert "yyy" in str(caught.value)
    assert len(str(caught.value)) < 500


# --- finding the function ----------------------------------------------------------------------------------------


def test_module_is_found_in_the_current_folder(write: Write, tmp_path: Path) -> None:
    before = list(sys.path)
    write("near_rewards", "def brevity(completions):\n    return [-len(c) for c in completions]\n")
    reward = load_reward("near_rewards:brevity", 0.5)
    assert reward(EXAMPLES, COMPLETIONS) == [-4, -3, -10]
    assert (reward.name, reward.weight) == ("near_rewards:brevity", 0.5)
    assert sys.path == before
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "short.py").write_text("from near_rewards import brevity as mean\n")
    assert load_reward("judges.short:mean").name == "judges.short:mean"


def test_file_is_a_module_too(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds what lies beside it, is read once, and is not mistaken for another module of its name."""
    write("beside", "factor = 2\n")
    write(
        "json",
        "from beside import factor\ndef brevity(completions):\n    return [-factor * len(c) for c in completions]",
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = list(sys.path)
    terms = TaskObjective(f"../json.py:brevity+0.5 * {tmp_path}/json.py:brevity", TASK, TOKENIZER).terms
    assert [term.name for term in terms] == ["../json.py:brevity", f"{tmp_path}/json.py:brevity"]
    assert [term.weight for term in terms] == [1.0, 0.5]
    for term in terms:
        assert term.reward is not None
        assert term.reward(EXAMPLES, COMPLETIONS) == [-8, -6, -20]
    assert terms[0].reward._function is terms[1].reward._function  # type: ignore[union-attr]
    assert sys.path == before
    assert "JSONDecodeError" in dir(json)
    for name, message in (
        ("../none.py:f", "there is no file ../none.py: check the path, which is relative to"),
        ("../json.py:brevty", "has no function 'brevty'; did you mean brevity"),
    ):
        with pytest.raises(InputError, match=message):
            load_reward(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("far_away:f", None, "module 'far_away' could not be imported .*: run the command where far_away.py is"),
        ("subprocess:getoutput", None, "'subprocess' is a module of the standard library"),
        ("xml.sax:parse", None, "'xml.sax' is a module of the standard library"),
        ("taken_rewards:getoutput", "from subprocess import getoutput", "is getoutput of the standard library"),
        ("no_function", None, "'no_function' is not a reward: give it as module:function, such as rewards:brevity"),
        ("typo_rewards:brevty", "def brevity(completions): ...", "has no function 'brevty'.*did you mean brevity"),
        ("const_rewards:factor", "factor = 2\ndef f(completions): ...", "has no function 'factor'; it has f"),
        ("lost_rewards:f", "import not_installed_here", "could not be imported .No module named 'not_installed_here'"),
        ("bad_rewards:f", "def f(:", "module 'bad_rewards' raised SyntaxError when it was imported"),
        ("rude_rewards:f", "1 / 0", "module 'rude_rewards' raised ZeroDivisionError when it was imported .*: mend it"),
    ],
)
def test_what_cannot_be_loaded_is_refused(write: Write, name: str, text: str | None, message: str) -> None:
    before = list(sys.path)
    if text is not None:
        write(name.split(":")[0], text)
    with pytest.raises(InputError, match=f"(?i){message}"):
        load_reward(name)
    assert sys.path == before


# --- steps -------------------------------------------------------------------------------------------------------


def encoded(count: int = 4) -> list[Encoded]:
    examples = [Example(text, row={"text": text}) for text in support.TEXT[:count]]
    return Encoder(TOKENIZER, 200)(TASK, examples)


class Sometimes:
    """Rewards short texts; fails at a call."""

    def __init__(self, fail_at: int = -1, values: Any = None) -> None:
        self.calls, self.fail_at, self.values = 0, fail_at, values
        self.given: list[list[str]] = []

    def __call__(self, completions: Sequence[str]) -> Any:
        self.calls += 1
        self.given.append(list(completions))
        if self.calls == self.fail_at:
            if self.values is None:
                raise ZeroDivisionError
            return self.values
        return [-len(completion) for completion in completions]


def rewarded(function: Any, monkeypatch: pytest.MonkeyPatch, temperature: float = 0.0) -> TaskObjective:
    """An objective of a function that was loaded."""
    monkeypatch.setattr("forwardtune.objectives.mixture.load_reward", lambda name, weight: Reward(function, name))
    return TaskObjective("here:f", TASK, TOKENIZER, Sampling(temperature, 2**32 - 1))


def step(optimizer: MeZO, objective: TaskObjective, model: Any, batch: dict[str, Any]) -> float:
    objective.begin_step(optimizer.next_step)
    return optimizer.step(lambda: objective(model, batch).mean())


@pytest.mark.parametrize("perturbation", ["copy", "scratch"])
@pytest.mark.parametrize("fail_at", [1, 2, 4])
@pytest.mark.parametrize("values", [None, [1.0]], ids=["raises", "returns-nonsense"])
def test_failure_leaves_the_weights_as_they_were(
    monkeypatch: pytest.MonkeyPatch, perturbation: str, fail_at: int, values: Any
) -> None:
    """At either side of a probe. Mended, the step goes as if nothing had happened."""
    batch = {"examples": encoded()}
    model, untroubled = talking_model(), talking_model()
    optimizer = support.trusted(MeZO(model, lr=1e-3, eps=1e-2, perturbation=perturbation, seed=1))
    reward = Sometimes(fail_at, values)
    objective = rewarded(reward, monkeypatch, temperature=1.0)
    while reward.calls < fail_at - 2:
        step(optimizer, objective, model, batch)
    before = support.snapshot(model)
    with pytest.raises(RewardError):
        step(optimizer, objective, model, batch)
    support.assert_same_bits(model, before)
    assert optimizer.next_step == (fail_at - 1) // 2
    step(optimizer, objective, model, batch)
    reference = support.trusted(MeZO(untroubled, lr=1e-3, eps=1e-2, perturbation=perturbation, seed=1))
    objective = rewarded(Sometimes(), monkeypatch, temperature=1.0)
    for _ in range(optimizer.next_step):
        step(reference, objective, untroubled, batch)
    support.assert_same_bits(model, support.snapshot(untroubled))
    assert any(reference.last.coefficients)


def test_both_sides_of_every_probe_draw_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, random_state_untouched: None
) -> None:
    """With hardly any perturbation they write the same; the next step draws others."""
    batch, model, reward = {"examples": encoded()}, talking_model(), Sometimes()
    objective = rewarded(reward, monkeypatch, temperature=1.0)
    optimizer = support.trusted(MeZO(model, lr=1e-9, eps=1e-9, probes=2, perturbation="copy", seed=1))
    for _ in range(2):
        step(optimizer, objective, model, batch)
        assert optimizer.last.flat
    first, second = reward.given[:4], reward.given[4:]
    assert all(texts == first[0] for texts in first)
    assert all(texts == second[0] for texts in second)
    assert first[0] != second[0]
    other = TaskObjective("here:f", TASK, TOKENIZER, Sampling(1.0, 4))  # another run
    other(model, batch)
    assert reward.given[-1] not in (first[0], second[0])


def test_every_microbatch_of_every_step_draws_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the same prompt, in two microbatches of a step, would be answered alike. Steps and microbatches may be many."""
    model, reward = talking_model(), Sometimes()
    objective = rewarded(reward, monkeypatch, temperature=1.0)
    parts = [(step, part) for step in (0, 1, 2, 5000, 10**6) for part in (0, 1, 2, 7, 1000)]
    for at in (*parts, *parts):
        objective.begin_step(*at)
        objective(model, {"examples": encoded()})
    texts = [tuple(given) for given in reward.given]
    assert texts[: len(parts)] == texts[len(parts) :]
    assert len(set(texts)) == len(parts)


def test_trainer_logs_mean_and_spread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reward = Sometimes()
    how = {**QUIET, "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "eps": 1e-2}
    how |= {"logging_strategy": "steps", "logging_steps": 1, "perturbation": "copy", "remove_unused_columns": False}
    config = MeZOConfig(output_dir=str(tmp_path), **how)
    trainer = MeZOTrainer(
        model=talking_model(),
        args=config,
        train_dataset=encoded(),
        data_collator=lambda examples: {"examples": examples},
        objective=rewarded(reward, monkeypatch, temperature=1.0),
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    given = reward.given[2:]  # the self-check's are no part of the step
    for number, line in enumerate(lines):
        values = [-len(text) for texts in given[2 * number : 2 * number + 2] for text in texts]
        assert line["objective/here:f/mean"] == pytest.approx(np.mean(values))
        assert line["objective/here:f/std"] == pytest.approx(np.std(values))
        assert line["loss"] == pytest.approx(-line["objective/here:f/mean"], abs=1e-4)  # Trainer rounds


# --- rewards that do not judge everything ------------------------------------------------------------------------


SOME = """
def of_short(completions, text, **columns):
    return [-len(c) if len(t) < 30 else None for c, t in zip(completions, text)]

def of_long(completions, text, **columns):
    return [1 if len(t) >= 30 else None for t in text]

def of_none(completions, **columns):
    return [None for _ in completions]

def counted(completions, completion_ids, **columns):
    return [len(ids) for ids in completion_ids]
"""


def test_reward_of_none_adds_nothing(write: Write) -> None:
    name, model, batch = write("some_rewards", SOME), talking_model(), {"examples": encoded()}
    short = [len(example.example.row["text"]) < 30 for example in batch["examples"]]
    assert 0 < sum(short) < len(short)
    said = generate(model, TOKENIZER, TASK, [example.prompt for example in batch["examples"]])
    objective = TaskObjective(f"{name}:of_short + 3 * {name}:of_long", TASK, TOKENIZER)
    found = objective(model, batch).tolist()
    assert found == [len(text) if is_short else -3 for text, is_short in zip(said, short, strict=True)]
    judged = [-len(text) for text, is_short in zip(said, short, strict=True) if is_short]
    mean, std = pytest.approx(np.mean(judged)), pytest.approx(np.std(judged))
    assert objective.take_statistics() == {
        f"{name}:of_short": {"mean": mean, "std": std, "none": 4 - len(judged)},
        f"{name}:of_long": {"mean": 1.0, "std": 0.0, "none": len(judged)},
    }


def test_completions_that_no_reward_judges_are_said_once(write: Write) -> None:
    name, model, batch = write("some_rewards", SOME), talking_model(), {"examples": encoded()}
    objective = TaskObjective(f"{name}:of_none", TASK, TOKENIZER)
    with pytest.warns(UserWarning, match="all rewards are None for 4 of 4 completions. They count as 0") as warned:
        found = [objective(model, batch).tolist() for _ in range(2)]
    assert found == [[0.0] * 4] * 2
    assert len(warned) == 1
    statistics = objective.take_statistics()[f"{name}:of_none"]
    assert np.isnan([statistics["mean"], statistics["std"]]).all()
    assert statistics["none"] == 8
    measured = evaluate(model, TOKENIZER, TASK, batch["examples"], rewards=[load_reward(f"{name}:of_none")])
    assert np.isnan(measured["reward"])


def test_measured_means_are_over_what_is_judged(write: Write) -> None:
    name, model, examples = write("some_rewards", SOME), talking_model(), encoded()
    rewards = [load_reward(f"{name}:{function}", 2.0) for function in ("of_short", "of_long")]
    outcomes: list[float] = []
    completions: list[str] = []
    how: dict[str, Any] = {"batch_size": 1, "outcomes": outcomes, "completions": completions}
    both = evaluate(model, TOKENIZER, TASK, examples, rewards=rewards, **how)
    assert completions == generate(model, TOKENIZER, TASK, [example.prompt for example in examples])
    short = [len(example.example.row["text"]) < 30 for example in examples]
    assert outcomes == [-2 * len(t) if is_short else 2 for t, is_short in zip(completions, short, strict=True)]
    judged = [-len(text) for text, is_short in zip(completions, short, strict=True) if is_short]
    assert both == {
        f"{name}:of_short": pytest.approx(np.mean(judged)),
        f"{name}:of_long": 1.0,
        "reward": pytest.approx(np.mean(outcomes)),
        "examples": 4,
    }
    alone = evaluate(model, TOKENIZER, TASK, examples, rewards=rewards[:1], **how)
    assert alone["reward"] == pytest.approx(2 * np.mean(judged))
    assert outcomes == [-2 * len(t) if is_short else 0 for t, is_short in zip(completions, short, strict=True)]


def test_tokens_reach_the_reward_in_training_and_evaluation(write: Write) -> None:
    name, model, examples = write("some_rewards", SOME), talking_model(), encoded()
    objective = TaskObjective(f"{name}:counted", TASK, TOKENIZER)
    count = TASK.max_new_tokens
    assert objective(model, {"examples": examples}).tolist() == [-count] * 4
    found = evaluate(model, TOKENIZER, TASK, examples, rewards=[load_reward(f"{name}:counted")])
    assert found["reward"] == count


# --- tasks -------------------------------------------------------------------------------------------------------


def reward_task(folder: Path, **changes: str) -> Path:
    more = {"stop": "''", "max_new_tokens": "5", **changes}
    return write_task(folder, answers=None, **more)


def test_task_of_a_prompt_alone_is_one_for_rewards(tmp_path: Path) -> None:
    task = read_task(reward_task(tmp_path))
    assert (task.metric, task.loss, task.label, task.free_text) == ("reward", "none", "", True)
    row = {"text": "a fox", "other": 3}
    example = task.example(row, "row 1")
    assert (example.prompt, example.options, example.targets, example.row) == ("a fox It was", (), (), row)
    (found,) = Encoder(TOKENIZER, 100)(task, [example])
    assert TOKENIZER.decode(found.prompt) == "a fox It was"
    assert (found.options, found.example) == ([], example)
    # Room is kept for what is to be written.
    n = len(found.prompt)
    assert Encoder(TOKENIZER, n + 5)(task, [example])[0].prompt == found.prompt
    assert len(Encoder(TOKENIZER, n + 4)(task, [example])[0].prompt) < n
    with pytest.raises(InputError, match="answers of 5 tokens"):
        Encoder(TOKENIZER, 6)(task, [example])
    with pytest.raises(InputError, match="label needs answers or options beside it"):
        read_task(reward_task(tmp_path, label="label"))
    with pytest.raises(InputError, match="metric 'f1' does not suit"):
        read_task(reward_task(tmp_path, metric="f1"))


def test_conversation_is_no_prompt(tmp_path: Path) -> None:
    task = read_task(reward_task(tmp_path))
    messages = [{"role": "user", "content": "a fox"}]
    with pytest.raises(InputError, match=r"^row 1: column 'text' holds a list of messages.*apply_chat_template"):
        task.example({"text": messages}, "row 1")
    assert task.example({"text": ["a", "b"]}, "row 1").prompt == "['a', 'b'] It was"


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tiny_folder: Path, tmp_path: Path) -> Setting:
    return Setting(tiny_folder, reward_task(tmp_path / "task"))


SHORT = "def short(completions, **columns):\n    return [-len(c) for c in completions]\n"
FAILING = """
calls = 0
def short(completions, **columns):
    global calls
    calls += 1
    if calls == 8:  # the self-check takes two
        return ["short"] * len(completions)
    return [-len(c) for c in completions]
"""


def test_run_goes_on_when_the_reward_was_mended(setting: Setting, write: Write, tmp_path: Path) -> None:
    """And ends with the bits of a run that nothing happened to."""
    how: dict[str, Any] = {"temperature": 1, "eps": 1e-2, "no_before": True}
    name = write("mended_rewards", FAILING)
    message = message_of(*setting.train(tmp_path / "run", objective=f"{name}:short", **how))
    assert "reward mended_rewards:short returned 'short', which is not a number, for '" in message
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert (log.steps, log.end, log.torn) == (2, None, False)  # it failed at the second side of the third
    write("mended_rewards", SHORT)
    done(*setting.resume(tmp_path / "run", objective=f"{name}:short"))
    done(*setting.train(tmp_path / "whole", objective=f"{name}:short", **how))
    assert weights(tmp_path / "run") == weights(tmp_path / "whole") != weights(setting.model)
    for file in ("objective.jsonl", "dev.jsonl"):
        assert (tmp_path / "run" / file).read_text() == (tmp_path / "whole" / file).read_text()
    coefficients = [record.coefficients for record in read_log(tmp_path / "run" / "steps.jsonl").records]
    assert coefficients == [record.coefficients for record in read_log(tmp_path / "whole" / "steps.jsonl").records]
    assert any(any(c) for c in coefficients)
    assert log.header["run"].items() >= {"objective": f"{name}:short", "temperature": 1.0}.items()
    assert "has --objective mended_rewards:short, not loss" in message_of(
        *setting.resume(tmp_path / "run", objective="loss")
    )


def test_log_alone_does_not_get_a_reward_imported(setting: Setting, write: Write, tmp_path: Path) -> None:
    """A folder that a stranger made names code; who resumes it must name it too."""
    name, run = write("trap_rewards", SHORT), tmp_path / "the run"
    objective = f"0.5 * {name}:short + loss"
    task = write_task(tmp_path / "free", **FREE_TEXT)
    done(*Setting(setting.model, task).train(run, objective=objective, steps=1, eps=1e-2, no_before=True))
    write(name, SHORT + "open('sprung', 'w').close()\n")
    command = f"forwardtune train --output-dir '{run}' --resume --objective '{objective}'"
    assert f"is not imported because a log names it. If you know it, name it again: {command}" in message_of(
        *setting.resume(run, steps=2)
    )
    assert name not in sys.modules
    assert not (tmp_path / "sprung").exists()
    done(*shlex.split(command)[1:], "--steps", 2)
    assert (tmp_path / "sprung").exists()


def test_reward_of_a_column_that_is_not_there_is_refused_before_the_model_is_loaded(
    setting: Setting, write: Write, tmp_path: Path
) -> None:
    name = write("city_rewards", "def f(completions, city): return city\n")
    for command in (setting.train(tmp_path / "run"), ["eval", "--model", "./none", "--task", setting.task]):
        command[2] = "./none"
        message = message_of(*command, "--objective", f"{name}:f")
        assert f"reward {name}:f takes 'city', and the data have no such column (they have " in message


def test_several_rewards_have_weights_and_one_text(setting: Setting, write: Write, tmp_path: Path) -> None:
    name = write("several_rewards", SHORT + "def es(completions):\n    return [c.count('e') for c in completions]\n")
    objective = f"0.5 * {name}:short + 2*{name}:es"
    test = json.loads(done(*setting.eval(objective=objective)).out)["test"]
    assert test["reward"] == pytest.approx(0.5 * test[f"{name}:short"] + 2 * test[f"{name}:es"])
    done(*setting.train(tmp_path / "run", objective=objective, eps=1e-2, steps=3))
    metrics = read(tmp_path / "run")
    assert (metrics["metric"], metrics["before"]) == ("reward", test)
    outcomes = read(tmp_path / "run" / "outcomes.json")
    assert np.mean(outcomes["before"]) == pytest.approx(test["reward"])
    losses = [record.loss for record in read_log(tmp_path / "run" / "steps.jsonl").records]
    for line in map(json.loads, (tmp_path / "run" / "objective.jsonl").read_text().splitlines()):
        parts = line["objective"]
        assert parts.keys() == {f"{name}:short", f"{name}:es"}
        whole = 0.5 * parts[f"{name}:short"]["mean"] + 2 * parts[f"{name}:es"]["mean"]
        assert losses[line["step"] - 1] == pytest.approx(-whole, abs=1e-5)


def test_rewards_of_a_task_with_targets_decide_what_counts(setting: Setting, write: Write, tmp_path: Path) -> None:
    """Which step is best and how many examples came out better goes by the reward, not by F1."""
    name = write("target_rewards", SHORT)
    task = write_task(tmp_path / "free", **FREE_TEXT)
    done(*Setting(setting.model, task).train(tmp_path / "run", objective=f"{name}:short + 0.1 * loss", steps=2))
    metrics = read(tmp_path / "run")
    assert metrics["metric"] == "reward"
    assert metrics["test"].keys() == {"reward", "f1", "exact_match", "loss", "examples"}
    outcomes = read(tmp_path / "run" / "outcomes.json")
    for when, what in (("before", "before"), ("after", "test")):
        assert np.mean(outcomes[when]) == pytest.approx(metrics[what]["reward"])
        assert np.mean(outcomes[when]) < -1  # no F1


@pytest.mark.parametrize(("mode", "told"), [("all", "a copy, 0 MiB"), ("lora", "a copy, 0 MiB"), ("prefix", "a copy")])
def test_texts_are_written_by_a_perturbed_copy(
    setting: Setting, write: Write, tmp_path: Path, mode: str, told: str
) -> None:
    name = write("copy_rewards", SHORT)
    asked = {"objective": f"{name}:short", "steps": 2, "tune": mode}
    ran = done(*setting.train(tmp_path / "run", **asked, temperature=1))
    assert told in ran.err
    assert read(tmp_path / "run")["perturbation"] == "copy"
    again = tmp_path / "replayed"
    done("replay", tmp_path / "run" / "steps.jsonl", "--model", setting.model, "--output-dir", again)
    kept = "model" if mode == "all" else "adapter_model"
    assert (again / f"{kept}.safetensors").read_bytes() == (tmp_path / "run" / f"{kept}.safetensors").read_bytes()
    ran = done(*setting.train(tmp_path / "chosen", **asked, perturbation="scratch"))
    assert "a copy" not in ran.err
    assert read(tmp_path / "chosen")["perturbation"] == "scratch"


def test_copy_and_scratch_write_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of the perturbed weights, whichever way these were perturbed; adapters too."""
    for mode in ("all", "lora", "prefix"):
        given = []
        for perturbation in ("copy", "scratch"):
            model = talking_model() if mode == "all" else tune(talking_model(), TOKENIZER, mode, seed=1)
            reward = Sometimes()
            optimizer = support.trusted(MeZO(model, lr=1e-9, eps=0.3, perturbation=perturbation, seed=1))
            step(optimizer, rewarded(reward, monkeypatch), model, {"examples": encoded()})
            given.append(reward.given)
        assert given[0] == given[1]
        if mode != "lora":  # B is 0 and A alone cannot be heard unless B moves too, as it does
            assert given[0][0] != given[0][1]


def test_completions_are_kept(setting: Setting, write: Write, tmp_path: Path) -> None:
    """Those of the test examples before and after, and of every second step; a resumed run writes the same.

    Without --log-completions none are.
    """
    name = write("kept_rewards", SHORT)
    how: dict[str, Any] = {"objective": f"{name}:short", "temperature": 1, "eps": 1e-2, "log_completions": 2}
    done(*setting.train(tmp_path / "run", **how, steps=5))
    lines = read(tmp_path / "run" / "completions.jsonl")
    tests = read(tmp_path / "run")["splits"]["test"]
    batch = (len(lines) - 2 * tests) // 2
    expected = [(0, "test")] * tests + [(2, "train")] * batch + [(4, "train")] * batch + [(5, "test")] * tests
    assert batch > 0
    assert [(line["step"], line["split"]) for line in lines] == expected
    for line in lines:
        assert line.keys() == {"step", "split", "prompt", "completion", "objective"}
        reward = "reward" if line["split"] == "test" else f"{name}:short"
        assert line["objective"] == {reward: -len(line["completion"])}
        assert line["prompt"].endswith(" It was")
    outcomes = read(tmp_path / "run" / "outcomes.json")
    assert [-len(line["completion"]) for line in lines if line["step"] == 0] == outcomes["before"]
    assert [-len(line["completion"]) for line in lines if line["step"] == 5] == outcomes["after"]
    done(*setting.train(tmp_path / "parts", **how, steps=3))
    done(*setting.resume(tmp_path / "parts", steps=5, objective=f"{name}:short"))
    parts = read(tmp_path / "parts" / "completions.jsonl")
    assert [line for line in parts if line["step"] != 3] == lines
    assert weights(tmp_path / "parts") == weights(tmp_path / "run")
    done(*setting.train(tmp_path / "none", objective=f"{name}:short", steps=1, no_before=True))
    assert not (tmp_path / "none" / "completions.jsonl").exists()


@pytest.mark.parametrize("task", ["rewards", "choice"])
def test_options_of_generated_text_belong_to_it(setting: Setting, tmp_path: Path, task: str) -> None:
    run = tmp_path / "run"
    if task == "rewards":
        for command in (setting.train(run), setting.eval()):
            assert "neither answers nor a target: give --objective module:function" in message_of(*command)
    else:
        choice = Setting(setting.model, write_task(tmp_path / "choice"))
        for objective, option, words in (
            (None, "temperature", "--temperature is of sampled text"),
            ("accuracy", "temperature", "--temperature is of sampled text"),
            ("accuracy", "log_completions", "--log-completions is of generated text"),
        ):
            assert words in message_of(*choice.train(run, objective=objective, **{option: 1}))
    assert not run.exists()


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the example, which is the current one."""
    folder = Path(__file__).parents[1] / "examples" / "reward"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    return folder


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ('{"name": "Anna", "age": 67}', 1.0),
        ('{\n  "age": 1,\n  "name": "B"\n}', 1.0),
        ('{"name": "Anna", "age": 67, "sea": true}', 0.5),
        ('{"Name": "Anna"}', 0.5),
        ("[1, 2]", 0.1),
        ('{"name": "Anna", "age": }', 0.4),
        ('{"name": "Anna", "ag', 0.2),
        ("{", 0.1),
        ("", 0.0),
    ],
)
def test_example_rewards_what_it_says(example: Path, completion: str, worth: float) -> None:
    row = {"name": "Anna", "age": 67}
    assert load_reward("rewards:valid_json")([Example("", row=row)], [completion]) == [pytest.approx(worth)]
    facts = ("Anna" in completion) / 2 + ("67" in completion) / 2
    assert load_reward("rewards:true_facts")([Example("", row=row)], [completion]) == [facts]


def test_example_from_end_to_end(example: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """With a model that knows nothing; the report is made of what the run wrote."""
    objective = "rewards:valid_json + 0.5 * rewards:true_facts"
    how: dict[str, Any] = {"objective": objective, "test_examples": 3, "log_completions": 1, "steps": 3}
    done(*Setting(tiny_folder, example / "people.yaml").train(tmp_path / "run", **how))
    command = [sys.executable, example / "report.py", tmp_path / "run", "--output-dir", tmp_path / "report"]
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "report" / "reward.png").read_bytes().startswith(b"\x89PNG")
    results = read(tmp_path / "report" / "results.json")
    metrics = read(tmp_path / "run")
    assert (results["before"], results["test"]) == (metrics["before"], metrics["test"])
    assert [line["step"] for line in results["course"]] == [1, 2, 3]
    samples = (tmp_path / "report" / "samples.md").read_text()
    assert samples.count("Before, reward 0.") == samples.count("After, reward 0.") == 3
    assert samples.count("Write the name and the age as a JSON object.") == 3


def test_rewarded_stories_become_shorter(models_dir: Path, write: Write, tmp_path: Path) -> None:
    """A model that can tell stories, tuned by its reward alone; the log rebuilds what came of it."""
    stories = models_dir / "stories260k"
    rows = [{"who": who} for who in ("cat", "dog", "bird", "tree", "ball", "car", "boat", "fish")]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", rows * 2)
    task = tmp_path / "stories.yaml"
    task.write_text(
        'prompt: "Once upon a time there was a {who}. The {who} was"\n'
        "train: train.jsonl\ntest: test.jsonl\nmax_new_tokens: 12\ndev_examples: 0\n"
    )
    name = write("story_rewards", SHORT)
    setting = Setting(stories, task)
    done(*setting.train(tmp_path / "run", objective=f"{name}:short", steps=25, batch_size=8, temperature=1))
    metrics = read(tmp_path / "run")
    assert metrics["test"]["reward"] > metrics["before"]["reward"] + 5  # letters, of about thirty
    assert metrics["sign_test"]["better"] > metrics["sign_test"]["worse"]
    measured = done(*setting.eval(model=tmp_path / "run", objective=f"{name}:short", batch_size=8))
    assert json.loads(measured.out)["test"] == metrics["test"]
    rebuilt = cli("replay", tmp_path / "run" / "steps.jsonl", "--model", stories, "--output-dir", tmp_path / "replayed")
    assert "weights verified against the log" in rebuilt.err
    assert weights(tmp_path / "replayed") == weights(tmp_path / "run") != weights(stories)
