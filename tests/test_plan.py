"""What a run would cost, and runs of a given time."""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from forwardtune import MeZO
from forwardtune.cli.costs import (
    Cost,
    Rehearsed,
    fill_window,
    passes_of_walk,
    seconds_behind,
    seconds_of_run,
    steps_within,
)
from forwardtune.durations import duration, seconds_of
from forwardtune.errors import InputError
from forwardtune.forgetting import token_losses
from forwardtune.method.rules import Adam, Momentum
from forwardtune.models import load_model
from forwardtune.noise import Noise
from forwardtune.trajectory import read_log
from support.command import Setting, cli, done, message_of, read, write_task


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("plan")))


def planned(setting: Setting, **changes: object) -> list[object]:
    return ["plan", *setting.eval(alone=True, **changes)[1:]]


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


def test_durations_read_well() -> None:
    for seconds, text in (
        (45, "45 s"), (89, "89 s"), (725, "12 min"), (3599, "1 h"), (3600, "1 h"), (5400, "1 h 30 min"),
        (12000, "3 h 20 min"), (8 * 3600, "8 h"), (187000, "2 d 4 h"),
    ):  # fmt: skip
        assert duration(seconds) == text


def test_plan_measures_and_says_how_to_go_on(setting: Setting) -> None:
    ran = done(*planned(setting, batch_size=4, json=True))
    facts = json.loads(ran.out)
    assert facts["steps"] == 1000
    assert facts["seconds_per_step"] > 0
    assert facts["seconds"] > 1000 * facts["seconds_per_step"]
    assert facts["memory_bytes"] <= facts["peak_memory_bytes"]
    assert (
        f"forwardtune train --model {setting.model} --task {setting.task} --device cpu --batch-size 4 --steps 1000"
        in ran.err
    )


def test_more_time_is_more_steps(setting: Setting) -> None:
    facts = json.loads(done(*planned(setting, time_budget="1h", json=True)).out)
    assert facts["steps"] > 1
    assert facts["seconds"] <= 3600 == facts["time_budget_seconds"]


COST = Cost(step=0.5, update=0.1, evaluation=0.01, bytes_now=0, bytes_inference=0, bytes_step=0)


def asked_for(**changes: object) -> Any:
    """A session as far as its time goes."""
    options = argparse.Namespace(
        lr="auto", eps=1e-3, no_before=False, eval_steps=None, dev_examples=None, batch_size=16, average="none",
        estimator="spsa", probes=1, probes_rise=0, normalize="none", assignment="shared", time_budget=1000.0, tune="all", lora_targets=None,
    )  # fmt: skip
    vars(options).update(changes)
    return argparse.Namespace(options=options, splits={"test": [0] * 50, "dev": [0] * 20})


def test_steps_within_is_the_largest_number_that_fits() -> None:
    session = asked_for()
    for budget in (10.0, 100.0, 1000.0):
        steps = steps_within(budget, COST, session)
        assert seconds_of_run(steps, COST, session) <= budget
        assert seconds_of_run(steps + 20, COST, session) > budget
    assert steps_within(1.0, COST, session) == 0
    # Ways back replay a step once at most, and the search tries the first eight with up to five rates here.
    beside = seconds_of_run(200, COST, session) - seconds_of_run(200, replace(COST, update=0.0), session)
    assert beside == pytest.approx((200 + 5 * 8) * 0.1)
    session.options.lr = 1e-6
    assert seconds_of_run(200, COST, session) == seconds_of_run(200, replace(COST, update=0.0), session)


@pytest.mark.parametrize(
    ("average", "replays", "measured"),
    [
        ("last:10", 1, 1),
        ("ema:0.9", 1, 1),
        ("auto", 4, 3),
    ],  # of a quarter, of half, of all, and of the best of them once more
)
def test_averages_are_replays_that_are_measured(average: str, replays: int, measured: int) -> None:
    plain, averaged = (seconds_of_run(100, COST, asked_for(lr=1e-6, average=one)) for one in ("none", average))
    assert averaged - plain == pytest.approx(replays * 100 * 0.1 + measured * 20 * 0.01)


@pytest.mark.parametrize(("probes", "rise", "steps"), [(4, 10, 30), (8, 100, 30), (3, 1, 5), (1, 7, 9)])
def test_rising_probes_cost_what_there_are_in_a_step(probes: int, rise: int, steps: int) -> None:
    net = torch.nn.Linear(2, 1)
    optimizer, taken = MeZO(net, lr=1e-9, probes=probes, probes_rise=rise), 0
    for _ in range(steps):
        optimizer.step(lambda: net(torch.ones(2)).sum())
        taken += len(optimizer.last.coefficients)
    session = asked_for(lr=1e-6, probes=probes, probes_rise=rise)
    cost = replace(COST, evaluation=0.0)
    assert seconds_of_run(steps, cost, session) == pytest.approx(0.5 * taken / probes)


def test_free_text_is_watched_by_its_loss_and_measured_once_more_at_the_end() -> None:
    """60 steps: before the first of them, and 20 times, 20 examples; nothing else differs."""
    session, watched = asked_for(), replace(COST, watched=0.002)
    saved = seconds_of_run(60, COST, session) - seconds_of_run(60, watched, session)
    assert saved == pytest.approx(20 * (21 * (0.01 - 0.002) - 0.01))


def test_what_is_spent_once_and_twice() -> None:
    """Layers are measured before the first step; the general text is read before and after all of them."""
    session, beside = asked_for(), replace(COST, general=3.0, layers=5.0)
    assert seconds_of_run(9, beside, session) - seconds_of_run(9, COST, session) == pytest.approx(2 * 3 + 5)
    assert seconds_behind(9, beside, session) - seconds_behind(9, COST, session) == pytest.approx(3)


def test_a_walk_along_the_errors_is_counted() -> None:
    """Its forward passes, those over the minibatches that A is taken from, in which late layers run twice, and five looks at the 20 examples of the development split."""
    session, walked = asked_for(), replace(COST, start=30.0)
    more = seconds_of_run(9, walked, session) - seconds_of_run(9, COST, session)
    assert more == pytest.approx(30.0 + 5 * 20 * COST.watching)
    for steps, passes in ((100, 100 + 16 * 5 / 3), (6, 16)):
        assert passes_of_walk(
            asked_for(tune="lora", lora_init="feedback", feedback_steps=steps).options
        ) == pytest.approx(passes)
    late = {"lora_targets": "late-down,late-attention", "feedback_steps": 100}
    attention = asked_for(tune="lora", lora_init="feedback", **late).options
    assert passes_of_walk(attention) == pytest.approx(100 * 1.5 + 16 * 5 / 3)
    assert passes_of_walk(asked_for(tune="lora", lora_init="eva").options) == 0


def test_plan_measures_general_text_and_layers(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so long a text that it is read in part " * 2000)
    changes = {"batch_size": 4, "lr": 1e-3, "steps": 5, "json": True, "method": "mezo"}
    ran = done(
        *planned(setting, **changes, general_text=tmp_path / "text.txt", modify="variance", modify_by="gradients")
    )
    facts = json.loads(ran.out)
    general, layers = facts["seconds_of_general_text"], facts["seconds_of_layers"]
    assert "s to read the general text" in ran.err
    assert "s to measure the layers' gradients" in ran.err
    began = time.perf_counter()
    token_losses(*load_model(str(setting.model)), (tmp_path / "text.txt").read_text())
    assert general == pytest.approx(time.perf_counter() - began, rel=0.8)
    assert layers > facts["seconds_per_step"]  # 24 passes and more, where a step has two
    assert facts["seconds"] > 5 * facts["seconds_per_step"] + 2 * general + layers
    plain = json.loads(done(*planned(setting, **changes)).out)
    assert plain["seconds_of_general_text"] == plain["seconds_of_layers"] == 0
    assert "nowhere.txt" in message_of(*planned(setting, general_text="nowhere.txt"))


def test_plan_is_of_one_process(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several would measure beside the others, and start every other way."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "start it without torchrun" in message_of(*planned(setting))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": None}, r"room for \d steps of .*, and finding a learning rate takes 10 steps or more: .*--lr"),
        (
            {"lr": None, "probes": 4},
            r"room for \d steps of .*, and finding a learning rate takes 3 steps or more: .*--lr",
        ),
        ({}, r"room for 0 steps of .*, and that is none: give --time-budget \d+s or more$"),
    ],
    ids=["auto", "auto, many probes", "given"],
)
def test_a_time_too_short_is_refused_before_anything_is_evaluated(
    setting: Setting, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    run = tmp_path / "run"
    asked = setting.train(run, steps=None, time_budget="0.01s", **changes)
    for ran in (cli(*asked), cli("plan", "--alone", *asked[1:5], *asked[7:])):
        assert ran.code == 2
        assert re.search(words, ran.err), ran.err
        assert "before" not in ran.err.replace("before or", "")
        assert not run.exists()


def test_a_run_of_a_given_time_ends_and_is_complete(setting: Setting, tmp_path: Path) -> None:
    """Of twice the least time that it advises, as this machine may become busier."""
    run, asked = tmp_path / "run", {"steps": None, "lr": None, "eps": None}
    (advised,) = re.findall(r"--time-budget (\d+)s or more", cli(*setting.train(run, time_budget="0.1s", **asked)).err)
    done(*setting.train(run, time_budget=f"{2 * int(advised)}s", **asked))
    assert any("search" in note.content for note in read_log(run / "steps.jsonl").notes)
    log = read_log(run / "steps.jsonl")
    assert log.end is not None
    assert log.steps == read(run / "metrics.json")["steps"] <= log.header["run"]["steps"]
    again = cli(*setting.resume(run))
    assert again.code == 0
    assert "is complete" in again.err


def test_measuring_moves_no_weight(setting: Setting, tmp_path: Path) -> None:
    """The base digest of a run that was measured first is that of one that was not."""
    hurried = {
        "steps": None,
        "time_budget": "1m",
        "lr": 1e-12,
        "eval_steps": 1,
        "patience": 1,
    }  # ends long before, on a busy machine too
    digests = []
    for name, changes in (("timed", hurried), ("told", {"steps": 2})):
        done(*setting.train(tmp_path / name, **changes))
        digests.append(read_log(tmp_path / name / "steps.jsonl").header["base"])
    assert digests[0] == digests[1]


@pytest.mark.filterwarnings("ignore:the tuned weights have not changed the loss")
@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize(
    "rule", [Momentum(state="window"), Adam(state="window", window=7), Momentum(state="exact"), "sgd", "sign"]
)
def test_a_rehearsed_step_moves_no_weight(rule: Any, dtype: torch.dtype) -> None:
    """Not even the sign of a zero; though it is the whole work of a step, of a full window too."""
    model = support.tiny_model(dtype=dtype)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.tensor([0.0, -0.0]).repeat(16))
    before = support.snapshot(model)
    optimizer = MeZO(model, lr=1e-3, weight_decay=0.1, rule=rule)
    optimizer.rule = rehearsed = Rehearsed(optimizer.rule)
    for loss in (math.nan, 0.5, 0.5):
        optimizer.step(lambda loss=loss: loss)
        fill_window(optimizer)
        support.assert_same_bits(model, before)
    assert len(optimizer.history.recent) == (optimizer.rule.window or 0) * optimizer.rule.remembers
    assert optimizer.history.taken == 2 * optimizer.rule.remembers
    assert rehearsed.seconds > 0
    assert rehearsed.seconds_beside > 0


#: Options that change what a step costs, and the directions that a weight takes part in, in each update of a long run.
COSTS: list[tuple[dict[str, object], int]] = [
    ({"method": "mezo"}, 1),
    ({}, 2),  # of low rank, one for two examples of different labels
    ({"stratify": "none"}, 4),  # one for each example
    ({"probes": 3, "estimator": "one_sided"}, 3),
    ({"probes": 3, "probes_rise": 100}, 3),
    ({"rule": "momentum", "momentum": 0.5, "rule_state": "window"}, 7),  # the least n with 0.5**n < 1%
    ({"rule": "momentum", "momentum": 0.5, "rule_state": "exact"}, 1),
    ({"rule": "adam", "rule_state": "window", "probes": 2}, 180),
    ({"rule": "sign", "objective": "accuracy"}, 1),  # of which most coefficients are 0
]


@pytest.mark.parametrize(("changes", "directions"), COSTS, ids=str)
def test_plan_times_the_update_of_a_long_run(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], directions: int
) -> None:
    """In units of drawing a number for every tuned weight. The first step fills the window."""
    drawn, by_step, true, true_apply = [0], [], Noise.update, MeZO.apply

    def update(self: Noise, weight: Any, updates: Any, **where: Any) -> Any:
        drawn[0] += weight.numel() * sum(size != 0 for step in updates for size in step.sizes)
        return true(self, weight, updates, **where)

    def apply(self: MeZO) -> float:
        drawn[0] = 0
        loss = true_apply(self)
        by_step.append(drawn[0] / self.tuned.numel)
        return loss

    monkeypatch.setattr(Noise, "update", update)
    monkeypatch.setattr(MeZO, "apply", apply)
    done(*planned(setting, batch_size=4, **changes))
    assert len(by_step) == 4
    assert set(by_step[1:]) == {directions}


def test_a_plan_comes_true(tmp_path: Path) -> None:
    """Steps of a run take the time that was said, though most of it is the update, for the table of positions is large.

    Without the update a fifth would have been said. The bounds leave room for a busy machine, on which one try of three will do.
    """
    settings = transformers.GPT2Config(**{**support.FAMILIES["gpt2"][2], "max_position_embeddings": 2**20})
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    setting = Setting(tmp_path / "model", write_task(tmp_path / "task"))
    tries = []
    for number in range(3):
        run = tmp_path / f"run-{number}"
        done(*setting.train(run, steps=6, move="all"))
        true = statistics.median(record.seconds for record in read_log(run / "steps.jsonl").records[1:])
        said = json.loads(done(*planned(setting, method="mezo", batch_size=4, move="all", json=True)).out)[
            "seconds_per_step"
        ]
        tries.append(said / true)
        if 0.45 < tries[-1] < 2.2:
            return
    pytest.fail(f"said over true: {tries}")


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_patience_ends_a_run(setting: Setting, tmp_path: Path, method: str) -> None:
    run, own = tmp_path / "run", {} if method == "mezo" else {"method": "adam", "eps": None}
    done(*setting.train(run, steps=400, eval_steps=2, patience=3, lr=1e-12, **own))
    metrics = read(run / "metrics.json")
    assert metrics["stopped"] == "patience"
    assert metrics["steps"] < 400
    assert (run / "model.safetensors").exists()
    if method == "mezo":
        assert "is complete" in cli(*setting.resume(run)).err


def test_wrong_option(setting: Setting, tmp_path: Path) -> None:
    for budget, words in (("soon", "'soon' is no length of time"), ("1m", "--steps and --time-budget both")):
        assert words in message_of(*setting.train(tmp_path / "run", time_budget=budget))
    assert not (tmp_path / "run").exists()
