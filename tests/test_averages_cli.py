"""``--average``: what a run leaves, and what its log and its export are replayed to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forwardtune.cli.session import Session
from forwardtune.trajectory import read_log
from support.command import REVIEWS, cli, done, message_of, read, weights, write_jsonl

STEPS = 16


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    for name, count in (("train", 40), ("dev", 12), ("test", 8)):
        reviews = [(i, *REVIEWS[i % len(REVIEWS)]) for i in range(count)]
        write_jsonl(folder / f"{name}.jsonl", [{"text": f"{text} {i}", "label": label} for i, text, label in reviews])
    lines = ["prompt: '{text} It was'", "answers: {0: terrible, 1: great}"]
    lines += [f"{name}: {name}.jsonl" for name in ("train", "dev", "test")]
    (folder / "task.yaml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "task.yaml"


def train(model: Path, task: Path, folder: Path, *more: object) -> str:
    return done(
        "train", "--model", model, "--task", task, "--steps", STEPS, "--batch-size", 2, "--device", "cpu", "--no-before",
        "--lr", 1e-3, "--eps", 1e-3, "--output-dir", folder, *more,
    ).err  # fmt: skip


@pytest.mark.parametrize("tune", ["all", "lora"])
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_a_named_average_is_what_the_run_leaves_and_what_replay_rebuilds(
    tiny_folder: Path, task: Path, tmp_path: Path, tune: str, rule: str
) -> None:
    folder, again, exported = tmp_path / "run", tmp_path / "again", tmp_path / "exported"
    more = ["--average", "last:5", "--tune", tune, "--rule", rule, "--dtype", "bfloat16"]
    told = train(tiny_folder, task, folder, *more)
    assert "the weights are the average last:5 of those of the run" in told
    metrics = read(folder)
    assert metrics["average"] == "last:5"
    assert "best_step" not in metrics
    (note,) = [note for note in read_log(folder / "steps.jsonl").notes if "average" in note.content]
    assert (note.at, note.content["average"]["of"]) == (STEPS, "last:5")
    assert "--average last:5" in (folder / "README.md").read_text()
    assert 'average="last:5")' in (folder / "README.md").read_text()

    base = ["--model", tiny_folder]
    told = done("replay", folder, *base, "--output-dir", again, "--average", "last:5").err
    assert "16 steps replayed to the average last:5 of their weights, weights verified against the log" in told
    done("export", folder, "--output", folder / "t.safetensors", "--average", "last:5")
    done("replay", folder / "t.safetensors", *base, "--output-dir", exported)
    done("replay", folder, *base, "--output-dir", tmp_path / "plain")
    name = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    same = [(place / name).read_bytes() for place in (folder, again, exported)]
    assert same[0] == same[1] == same[2] != (tmp_path / "plain" / name).read_bytes()
    assert "last:5 of 16" in done("inspect", folder).out


@pytest.mark.parametrize(("best", "left"), [("last:4", "last:4"), ("last:16", "last:16"), (None, None)])
def test_auto_takes_an_average_that_is_better_on_the_dev_split(
    tiny_folder: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: str | None, left: str | None
) -> None:
    true = Session.evaluate

    def chosen(self: Session, what: str, split: str = "test", **kept: Any) -> dict[str, float]:
        found = true(self, what, split, **kept)
        if split == "dev":
            found["loss"] = 0.1 if what == f"average {best}" else 1.0
        return found

    monkeypatch.setattr(Session, "evaluate", chosen)
    folder, again = tmp_path / "run", tmp_path / "again"
    told = train(tiny_folder, task, folder, "--method", "forward", "--average", "auto", "--eval-steps", 8)
    metrics, log = read(folder), read_log(folder / "steps.jsonl")
    notes = [note.content["average"] for note in log.notes if "average" in note.content]
    if left is None:
        assert "no average is better on the dev split" in told
        assert (metrics.get("average"), metrics["best_step"], notes) == (None, 8, [])
        done("replay", folder, "--model", tiny_folder, "--output-dir", again, "--steps", 8)
    else:
        assert metrics["average"] == notes[0]["of"] == left
        assert metrics["dev"]["loss"] == 0.1
        assert notes[0]["tried"] == {text: -0.1 if text == best else -1.0 for text in ("last:4", "last:8", "last:16")}
        done("replay", folder, "--model", tiny_folder, "--output-dir", again, "--average", left)
    assert weights(folder) == weights(again)


def test_what_is_no_average_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    wrong = "'last' is no average of weights: write last:200"
    assert wrong in message_of(
        "train", "--model", "absent", "--task", "absent", "--output-dir", tmp_path / "a", "--average", "last"
    )
    for command in (["replay", "absent", "--model", "absent", "--output-dir", "out"], ["export", "absent"]):
        assert wrong in cli(*command, "--average", "last").err


def test_replay_refuses_what_the_run_has_not_before_the_model_is_loaded(
    tiny_folder: Path, task: Path, tmp_path: Path
) -> None:
    train(tiny_folder, task, tmp_path / "run", "--rule", "adam")
    told = message_of(
        "replay", tmp_path / "run", "--model", "absent", "--output-dir", tmp_path / "out", "--average", "last:2"
    )
    assert "tune with the rule sgd or momentum to average" in told
    assert not (tmp_path / "out").exists()
