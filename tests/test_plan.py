"""What a run would cost, and runs of a given time."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

import support
from forwardtune import MeZO
from forwardtune.cli import plan
from forwardtune.cli.plan import Cost, fill_window, seconds_of_run, steps_within
from forwardtune.durations import duration, seconds_of
from forwardtune.errors import InputError
from forwardtune.rules import Adam, Momentum
from forwardtune.trajectory import read_log
from test_cli import Setting, cli, write_task
from test_methods import read

pytestmark = pytest.mark.usefixtures("short_collections")


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("plan")))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("2d", 172800)],
)
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-5m", "soon", "30 m", "1x", "m", "1e3"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="no length of time: write it as 90s"):
        seconds_of(text)


def test_whole_hours_are_short() -> None:
    assert [duration(s) for s in (3600, 8 * 3600, 5400)] == ["1 h", "8 h", "1 h 30 min"]


def test_plan_measures_and_says_how_to_go_on(setting: Setting) -> None:
    ran = cli("plan", "--model", setting.model, "--task", setting.task, "--batch-size", 4, "--device", "cpu", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["steps"] == 1000
    assert facts["seconds_per_step"] > 0
    assert facts["seconds"] > 1000 * facts["seconds_per_step"]
    assert facts["memory_bytes"] <= facts["peak_memory_bytes"]
    assert (
        f"forwardtune train --model {setting.model} --task {setting.task} --device cpu --batch-size 4 --steps 1000"
        in ran.err
    )


def test_plan_is_of_mezo(setting: Setting) -> None:
    ran = cli("plan", "--model", setting.model, "--task", setting.task, "--method", "adam")
    assert ran.code == 2
    assert "plan measures steps of --method mezo" in ran.err


def test_more_time_is_more_steps(setting: Setting) -> None:
    ran = cli(
        "plan", "--model", setting.model, "--task", setting.task, "--device", "cpu", "--time-budget", "1h", "--json"
    )
    facts = json.loads(ran.out)
    assert facts["steps"] > 1
    assert facts["seconds"] <= 3600 == facts["time_budget_seconds"]


def test_steps_within_is_the_largest_number_that_fits() -> None:
    class Session:
        options = argparse.Namespace(
            lr="auto", eps=1e-3, no_before=False, eval_steps=None, dev_examples=None, batch_size=16
        )
        splits = {"test": [0] * 50, "dev": [0] * 20}

    cost = Cost(step=0.5, evaluation=0.01, bytes_now=0, bytes_inference=0, bytes_step=0)
    for budget in (10.0, 100.0, 1000.0):
        steps = steps_within(budget, cost, Session())  # type: ignore[arg-type]
        assert seconds_of_run(steps, cost, Session()) <= budget  # type: ignore[arg-type]
        assert seconds_of_run(steps + 20, cost, Session()) > budget  # type: ignore[arg-type]


def test_a_run_of_a_given_time_ends_and_is_complete(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = cli(*setting.train(run, steps=None, lr=None, eps=None, time_budget="4s"))
    assert ran.code == 0, ran.err
    log = read_log(run / "steps.jsonl")
    assert log.end is not None
    assert log.steps == read(run / "metrics.json")["steps"] <= log.header["run"]["steps"]
    again = cli(*setting.resume(run))
    assert again.code == 0
    assert "is complete" in again.err


def test_measuring_moves_no_weight(setting: Setting, tmp_path: Path) -> None:
    """The base digest of a run that was measured first is that of one that was not."""
    digests = []
    for name, changes in (("timed", {"steps": None, "time_budget": "3s"}), ("told", {"steps": 2})):
        assert cli(*setting.train(tmp_path / name, **changes)).code == 0
        digests.append(read_log(tmp_path / name / "steps.jsonl").header["base"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "rule", [Momentum(state="window"), Adam(state="window", window=7), Momentum(state="exact"), "sgd"]
)
def test_a_window_is_timed_full(rule: Any) -> None:
    model = support.tiny_model()
    before = support.snapshot(model)
    optimizer = MeZO(model, lr=1e-3, rule=rule)
    optimizer.step(lambda: 0.5)
    fill_window(optimizer)
    optimizer.step(lambda: 0.5)
    assert len(optimizer.history.recent) == (getattr(optimizer.rule, "window", None) or 0)
    support.assert_same_bits(model, before)


def test_plan_times_steps_with_a_full_window(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of the long run costs from its first step on; one that fills while it is timed would be too cheap."""
    remembered = []

    class Watched(MeZO):
        def step(self, closure: Any) -> Any:
            remembered.append(len(self.history.recent))
            return super().step(closure)

    monkeypatch.setattr(plan, "MeZO", Watched)
    asked = ("--model", setting.model, "--task", setting.task, "--batch-size", 4, "--device", "cpu")
    assert cli("plan", *asked, "--rule", "momentum", "--rule-state", "window").code == 0
    first, *timed = remembered
    assert first == 0
    assert len(timed) >= 3
    assert set(timed) == {44}  # the least n with 0.9**n < 1%


def test_patience_ends_a_run(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = cli(*setting.train(run, steps=400, eval_steps=2, patience=3, lr=1e-12))
    assert ran.code == 0, ran.err
    metrics = read(run / "metrics.json")
    assert metrics["stopped"] == "patience"
    assert metrics["steps"] < 400
    assert "is complete" in cli(*setting.resume(run)).err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time_budget": "soon"}, "'soon' is no length of time"),
        ({"time_budget": "1m"}, "--steps and --time-budget both"),
        ({"patience": 2}, "--patience counts measurements.*--eval-steps"),
        ({"patience": 0, "eval_steps": 1}, "--patience must be positive"),
        ({"method": "adam", "time_budget": "1m", "steps": None}, "--time-budget belongs to --method mezo"),
    ],
    ids=str,
)
def test_wrong_option(setting: Setting, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    ran = cli(*setting.train(tmp_path / "run", **changes))
    assert ran.code == 2
    assert re.search(words, ran.err, re.DOTALL), ran.err
    assert not (tmp_path / "run").exists()
