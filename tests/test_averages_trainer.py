"""``MeZOConfig(average=...)``: the model that a trainer leaves, and that its log rebuilds, killed on the way or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import support
from forwardtune import MeZOConfig, MeZOTrainer, replay
from forwardtune.errors import InputError
from forwardtune.hf import averaging
from forwardtune.trajectory import read_log
from support import snapshot
from support.trainers import Kill, KilledError, quiet_config

STEPS = 8
DATA = [{"input_ids": row, "labels": row} for row in support.token_batch(12, 6).tolist()]


def make(folder: Path, callbacks: list[Any] | None = None, evaluated: Any = DATA[:4], **changes: Any) -> MeZOTrainer:
    args = quiet_config(folder, **{"max_steps": STEPS, "learning_rate": 1e-2, "eps": 1e-3, **changes})
    return MeZOTrainer(
        model=support.tiny_model(), args=args, train_dataset=DATA, eval_dataset=evaluated, callbacks=callbacks
    )


def rebuilt(folder: Path, **how: Any) -> dict[str, torch.Tensor]:
    model = support.tiny_model()
    replay(folder / "steps.jsonl", model, **how)
    return snapshot(model)


def notes(folder: Path) -> list[dict[str, Any]]:
    return [n.content["average"] for n in read_log(folder / "steps.jsonl").notes if "average" in n.content]


@pytest.mark.parametrize("lr", [1e-2, "auto"])
def test_the_model_has_the_average_and_replay_rebuilds_it(tmp_path: Path, lr: Any) -> None:
    steps = 40 if lr == "auto" else STEPS
    trainer = make(tmp_path, average="last:3", learning_rate=lr, max_steps=steps)
    trainer.train()
    support.assert_same_bits(trainer.model, rebuilt(tmp_path, average="last:3"))
    assert [note["of"] for note in notes(tmp_path)] == ["last:3"]
    assert not list(tmp_path.glob("*.weights"))
    trainer.create_model_card()
    assert 'average="last:3")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("save", [{}, {"save_strategy": "steps", "save_steps": 2}], ids=["replay", "checkpoint"])
@pytest.mark.parametrize("after", [3, STEPS])
def test_a_killed_run_ends_with_the_same_average(tmp_path: Path, after: int, save: dict[str, Any]) -> None:
    make(tmp_path / "whole", average="ema:0.7").train()
    with pytest.raises(KilledError):
        make(tmp_path / "run", [Kill(after)], average="ema:0.7", **save).train()
    trainer = make(tmp_path / "run", average="ema:0.7", **save)
    trainer.train(resume_from_checkpoint=True)
    support.assert_same_bits(trainer.model, rebuilt(tmp_path / "whole", average="ema:0.7"))


@pytest.mark.parametrize("best", [0, 1, 3])
def test_auto_leaves_what_is_best_on_the_evaluated_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    losses = [5.0, float("nan"), 5.0, 5.0]
    losses[best] = 1.0
    given = iter(losses)
    monkeypatch.setattr(averaging, "held_out", lambda trainer, batches: lambda: next(given))
    trainer = make(tmp_path, average="auto", load_best_model_at_end=best == 0, eval_strategy="steps", eval_steps=2,
                   save_strategy="steps", save_steps=2)  # fmt: skip
    trainer.train()
    text = ["none", "last:2", "last:4", "last:8"][best]
    steps = trainer.state.best_global_step if best == 0 else STEPS
    support.assert_same_bits(trainer.model, rebuilt(tmp_path, average=text, steps=steps))
    assert [note["of"] for note in notes(tmp_path)] == ([] if best == 0 else [text])


def test_auto_measures_the_weights_of_the_averages(tmp_path: Path) -> None:
    trainer = make(tmp_path, average="auto")
    trainer.train()
    ids = torch.tensor([row["input_ids"] for row in DATA[:4]])

    def loss(average: str) -> float:
        model = support.tiny_model()
        replay(tmp_path / "steps.jsonl", model, average=average)
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    tried = {text: loss(text) for text in ("none", "last:2", "last:4", "last:8")}
    best = min(tried, key=lambda text: tried[text])
    assert trainer.averaging.taken == best
    if best != "none":
        assert notes(tmp_path)[0]["tried"] == pytest.approx(tried, rel=1e-5)
    support.assert_same_bits(trainer.model, rebuilt(tmp_path, average=best))


def test_what_cannot_be_averaged_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'adam' does not add up directions"):
        MeZOConfig(str(tmp_path), average="last:3", rule="adam")
    with pytest.raises(InputError, match="is no average of weights"):
        MeZOConfig(str(tmp_path), average="last")
    with pytest.raises(InputError, match="average='auto' is chosen on eval_dataset"):
        make(tmp_path, average="auto", evaluated=None).train()
    assert not (tmp_path / "steps.jsonl").exists()
