"""``forwardtune train`` without a learning rate: what is measured, what is kept, and that a kill changes nothing."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from forwardtune.cli.session import Session
from forwardtune.trajectory import read_log, replay
from support.command import FREE_TEXT, REVIEWS, cli, done, read, write_jsonl, write_task
from support.logs import log_lines
from support.ranks import forked

STEPS, DEV = 60, 90


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    for name, count in (("train", 60), ("dev", DEV), ("test", 8)):
        reviews = [(i, *REVIEWS[i % len(REVIEWS)]) for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{text} {i}", "label": label} for i, text, label in reviews])
    lines = ["prompt: '{text} It was'", "answers: {0: terrible, 1: great}"]
    lines += [f"{name}: {name}.jsonl" for name in ("train", "dev", "test")]
    (folder / "task.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "task.yaml"


def command(model: Path, task: Path, folder: Path) -> list[object]:
    return [
        "train", "--model", model, "--task", task, "--steps", STEPS, "--batch-size", 2, "--device", "cpu", "--no-before",
        "--method", "forward", "--output-dir", folder,
    ]  # fmt: skip


def killed_after(steps: int, folder: Path, *arguments: object) -> None:
    """Run a command in a process that is killed when the log in its folder tells of so many steps."""
    running = forked(lambda: cli(*arguments).code)
    log = folder / "steps.jsonl"
    while running.is_alive() and (not log.exists() or log.read_bytes().count(b'"step":') < steps):
        time.sleep(0.002)
    running.kill()
    running.join()


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    done(*command(tiny_folder, task, folder))
    return folder


def test_twenty_measurements_of_some_examples_and_the_best_weights_stay(whole: Path) -> None:
    dev = log_lines(whole / "dev.jsonl")
    # Until step 8 the weights are untuned; it is where the search leads.
    assert [line["step"] for line in dev] == [0, 8, *range(9, STEPS + 1, STEPS // 20)]
    assert {line["dev"]["examples"] for line in dev} == {64}
    metrics = read(whole)
    best = min(dev, key=lambda line: line["dev"]["loss"])
    assert (metrics["best_step"], metrics["dev"]) == (best["step"], best["dev"])
    assert metrics["splits"]["dev"] == 64
    assert metrics["search_forwards"] <= 0.15 * 2 * STEPS
    log = read_log(whole / "steps.jsonl")
    heard = [(note.at, note.content["held_out"]) for note in log.notes if "held_out" in note.content]
    assert heard == [(line["step"], line["dev"]["loss"]) for line in dev]


@pytest.mark.parametrize("count", [1, 64, 89, 90, 200])
def test_development_examples_are_taken_from_all_of_the_split(count: int) -> None:
    session = Session(None, None, None, {"dev": list(range(DEV))}, None, argparse.Namespace())  # type: ignore[arg-type]
    session.limit("dev", count)
    kept = session.splits["dev"]
    assert len(kept) == min(count, DEV)
    gaps = [after - before for before, after in itertools.pairwise([*kept, DEV])]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("objective", ["loss", "accuracy", "accuracy + 0.1 * loss"])
def test_what_the_watch_hears_falls_where_the_run_gains(
    tiny_folder: Path, task: Path, tmp_path: Path, objective: str
) -> None:
    """The loss, or minus what should rise."""
    folder = tmp_path / "run"
    done(*command(tiny_folder, task, folder), "--objective", objective)
    dev = log_lines(folder / "dev.jsonl")
    expected = [(m["step"], m["dev"]["loss"] if objective == "loss" else -m["dev"]["accuracy"]) for m in dev]
    notes = read_log(folder / "steps.jsonl").notes
    assert [(note.at, note.content["held_out"]) for note in notes if "held_out" in note.content] == expected
    assert {loss < 0 for _, loss in expected} == {objective != "loss"}


@pytest.mark.parametrize("after", [3, 12, 30])
def test_a_killed_run_ends_with_the_same_bits(
    whole: Path, tiny_folder: Path, task: Path, tmp_path: Path, after: int
) -> None:
    folder = tmp_path / "run"
    killed_after(after, folder, *command(tiny_folder, task, folder))
    done("train", "--output-dir", folder, "--resume")
    for name in ("steps.jsonl", "dev.jsonl"):
        assert log_lines(folder / name) == log_lines(whole / name)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_where_nothing_is_better_the_weights_stay_untuned(
    tiny_folder: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter(range(1, 1000))
    true = Session.evaluate

    def worse(self: Session, what: str, split: str = "test", *args: Any, **kwargs: Any) -> dict[str, float]:
        result = true(self, what, split, *args, **kwargs)
        return {**result, "loss": float(next(measured))} if split == "dev" else result

    monkeypatch.setattr(Session, "evaluate", worse)
    ran = done(*command(tiny_folder, task, tmp_path / "run"))
    assert "the weights are untuned: no step was better" in ran.err
    assert read(tmp_path / "run")["best_step"] == 0
    tuned, untuned = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "run", tiny_folder)
    )
    assert all(torch.equal(tuned[name], untuned[name]) for name in untuned)
    assert "going back to step" not in ran.err  # the way back was the run's own, and needs no second model
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert (log.rollbacks[-1].at, log.rollbacks[-1].to) == (STEPS, 0)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert replay(log, model) == STEPS
    assert all(torch.equal(weight, untuned[name]) for name, weight in model.state_dict().items())


def test_nothing_is_written_beside_the_steps_unless_asked(tiny_folder: Path, tmp_path: Path) -> None:
    """The rate and the best step follow from the loss; to write for the metric may take longer than the steps."""
    task = write_task(tmp_path, **FREE_TEXT)
    watched, asked = tmp_path / "watched", tmp_path / "asked"
    done(*command(tiny_folder, task, watched), "--seed", 3)
    done(*command(tiny_folder, task, asked), "--seed", 3, "--eval-steps", STEPS // 20)
    few, all_of_it = log_lines(watched / "dev.jsonl"), log_lines(asked / "dev.jsonl")
    assert [line["dev"].keys() for line in few] == [{"loss", "examples"}] * len(few)
    assert all({"f1", "exact_match"} < line["dev"].keys() for line in all_of_it)
    assert [line["dev"]["loss"] for line in few] == [line["dev"]["loss"] for line in all_of_it]
    # Of the weights that are kept all is measured once, at the end.
    metrics, course = read(watched), log_lines(watched / "history.jsonl")
    assert metrics["dev"] == read(asked)["dev"]
    complete = [line["step"] for line in course if "f1" in line.get("dev", {})]
    assert complete == [metrics["best_step"]]
    # A run that is resumed goes on as it began.
    stopped = tmp_path / "stopped"
    killed_after(30, stopped, *command(tiny_folder, task, stopped), "--seed", 3)
    done("train", "--output-dir", stopped, "--resume")
    assert log_lines(stopped / "dev.jsonl") == few
    assert read(stopped)["dev"] == metrics["dev"]
