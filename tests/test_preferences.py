"""Preferences: the loss by hand, the frozen reference, and what a run makes of pairs of texts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import support
from forwardtune import reference
from forwardtune.cli.session import open_session
from forwardtune.cli.tuned import prepare_model
from forwardtune.config import Train
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, plain_layout, prepare
from forwardtune.models import forward, load_model
from forwardtune.objectives import TaskObjective, option_likelihoods, preference_margins
from forwardtune.tasks import Example, Task
from forwardtune.tasks.batching import Layout
from forwardtune.tasks.encoding import Encoded, Encoder
from forwardtune.tasks.reader import read_task
from forwardtune.trajectory import read_log
from support.command import Setting, cli, done, message_of, read, weights, write_jsonl
from support.examples import CLOSE, TOKENIZER, every_layout, inputs_of, sharp_model

EOS = TOKENIZER.eos_token_id
TASK = Task("pairs", "{text}", "", None, "accuracy", loss="preference", preference=("good", "bad"), beta=0.7)
PAIRS = [
    ("the film", " was great", " was terrible and it was slow"),  # they begin alike
    ("a quick brown fox", " likes the dog", " likes the"),  # one is the other's beginning
    ("it", " was", " broke"),
    ("this product", " broke after one day", " was fun"),
    ("the same", " twice", " twice"),
]
ROWS = [
    {"text": text, "good": good, "bad": bad}
    for text, good, bad in [
        ("the film was", "great and fun", "slow"),
        ("a quick brown", "fox likes", "dog broke after one day"),
        ("this product", "was great", "was terrible"),
        ("I would", "buy it again", "maybe"),
    ]
] * 4


def encode(pairs: Sequence[tuple[str, str, str]] = PAIRS, tokenizer: Any = TOKENIZER) -> list[Encoded]:
    examples = [Example(prompt, (good, bad), (0,), context=(0, len(prompt))) for prompt, good, bad in pairs]
    return Encoder(tokenizer, 200)(TASK, examples)


@torch.no_grad()
def log_likelihood(model: Any, prompt: str, text: str, tokenizer: Any = TOKENIZER) -> float:
    """The definition: the sum over the text's tokens and its end, all logits, one text at a time."""
    tokens = [*tokenizer(prompt + text)["input_ids"], tokenizer.eos_token_id]
    alone = tokenizer(prompt)["input_ids"]
    begin = next((i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), len(alone))
    log_p = forward(model, input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[i - 1, tokens[i]]) for i in range(begin, len(tokens)))


def softplus(margin: float) -> float:
    """``-log sigmoid(margin)``."""
    return math.log1p(math.exp(-abs(margin))) + max(-margin, 0.0)


def difference(model: Any, pair: tuple[str, str, str], tokenizer: Any = TOKENIZER) -> float:
    prompt, good, bad = pair
    return log_likelihood(model, prompt, good, tokenizer) - log_likelihood(model, prompt, bad, tokenizer)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_end_of_a_text_is_part_of_it() -> None:
    for (prompt, *texts), found in zip(PAIRS, encode(), strict=True):
        assert found.right == (0,)
        for text, option in zip(texts, found.options, strict=True):
            assert found.prompt + option == [*TOKENIZER(prompt + text)["input_ids"], EOS]
    nameless = support.tokenizer()
    nameless.eos_token = None
    assert not any(EOS in option for found in encode(tokenizer=nameless) for option in found.options)
    choice = replace(TASK, loss="cross_entropy", preference=None, answers={"0": "a", "1": "b"})
    (found,) = Encoder(TOKENIZER, 200)(choice, [Example("the film", (" was", " broke"), (0,))])
    assert not any(EOS in option for option in found.options)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
@every_layout
def test_margins_and_losses_by_hand(family: str, layout: Layout | None) -> None:
    model, base = sharp_model(family), support.tiny_model(family)
    references = [tuple(log_likelihood(base, prompt, text) for text in texts) for prompt, *texts in PAIRS]
    batch = [replace(e, reference=r) for e, r in zip(encode(), references, strict=True)]
    inputs = {**prepare(model, TOKENIZER, batch, layout), "examples": batch}
    expected = [difference(model, pair) - difference(base, pair) for pair in PAIRS]
    assert min(expected) < -0.4 < 0.4 < max(expected)
    # Sums of about ten log-likelihoods, each as exact as a mean of them.
    close = {"rtol": 0.0, "atol": 20 * CLOSE["atol"]}
    margins = torch.tensor(expected)
    torch.testing.assert_close(preference_margins(model, inputs), margins, **close)
    losses = torch.tensor([softplus(0.7 * margin) for margin in expected])
    torch.testing.assert_close(TaskObjective("loss", TASK, TOKENIZER)(model, inputs), losses, **close)
    mixed = TaskObjective("accuracy + 0.1 * loss", TASK, TOKENIZER)
    right = torch.tensor([float(margin > 0) for margin in expected])
    # Two equal texts have no margin but rounding, which may fall to either side.
    with inputs_of(model) as shapes:
        found = mixed(model, inputs)
    torch.testing.assert_close(found[:-1], (-right + 0.1 * losses)[:-1], **close)
    assert len(shapes) == 1


@torch.no_grad()
def test_without_a_reference_the_likelier_text_wins() -> None:
    model, pairs = sharp_model(), PAIRS[:4]
    inputs = prepare(model, TOKENIZER, encode(pairs))
    assert "reference" not in inputs
    expected = [difference(model, pair) for pair in pairs]
    assert {value > 0 for value in expected} == {True, False}
    torch.testing.assert_close(preference_margins(model, inputs), torch.tensor(expected), rtol=0, atol=2e-4)
    outcomes: list[float] = []
    found = evaluate(model, TOKENIZER, TASK, encode(pairs), outcomes=outcomes, batch_size=3)
    assert outcomes == [float(value > 0) for value in expected]
    losses = [softplus(0.7 * value) for value in expected]
    assert found == {
        "accuracy": pytest.approx(sum(outcomes) / 4),
        "loss": pytest.approx(sum(losses) / 4, abs=2e-4),
        "examples": 4,
    }


@torch.no_grad()
def test_long_prompts_are_cut_and_texts_are_not() -> None:
    prompt = "the film was great and it was fun " * 5 + "it"
    example = Example(prompt, (" was great", " broke after one day"), (0,), context=(0, len(prompt)))
    encoder = Encoder(TOKENIZER, 30)
    (found,) = encoder(TASK, [example])
    assert encoder.truncated == 1
    assert max(len(found.prompt) + len(option) for option in found.options) <= 30
    begin = len(found.prompt) - found.scored
    assert [TOKENIZER.decode((found.prompt + o)[begin:]) for o in found.options] == [
        " was great<eos>",
        " broke after one day<eos>",
    ]


# --- task files --------------------------------------------------------------------------------------------------


def write_pairs(folder: Path, rows: Sequence[dict[str, Any]] = ROWS, **changes: str) -> Path:
    """A task file with pairs to train and to test on."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", rows)
    keys = {"train": "train.jsonl", "test": "test.jsonl", "prompt": "'{text}'", "dev_examples": "4"}
    keys |= {"preference": "{chosen: good, rejected: bad}", **changes}
    path = folder / "pairs.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
    return path


def test_task_file(tmp_path: Path) -> None:
    task = read_task(write_pairs(tmp_path))
    assert (task.loss, task.metric, task.preference, task.beta) == ("preference", "accuracy", ("good", "bad"), 0.1)
    assert not task.free_text
    assert not task.fixed_answers
    example = task.example(ROWS[0], "row 1")
    assert (example.prompt, example.options, example.right) == ("the film was", (" great and fun", " slow"), (0,))
    assert read_task(write_pairs(tmp_path, beta="2")).beta == 2.0
    spaced = read_task(write_pairs(tmp_path, prompt='"{text}\\n"'))
    assert spaced.example(ROWS[0], "row 1").options == ("great and fun", "slow")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "good": "b", "bat": "c"}, "has no column 'bad'.*it has text, good, bat.*did you mean bat"),
        ({"text": "a", "bad": "c"}, "has no column 'good'"),
        ({"text": "a", "good": "b", "bad": " "}, "column 'bad' is empty; fill it or drop the row"),
        ({"text": "a", "good": None, "bad": "c"}, "column 'good' is empty"),
    ],
)
def test_rows_that_miss_something_are_named(
    tiny_folder: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    task = write_pairs(tmp_path / "task", [*ROWS[:2], row])
    with pytest.raises(InputError, match=message):
        read_task(task).example(row, "row 3")
    assert "test.jsonl, example 3" in message_of(*Setting(tiny_folder, task).eval())


# --- the reference -----------------------------------------------------------------------------------------------


@pytest.fixture
def setting(tiny_folder: Path, tmp_path: Path) -> Setting:
    return Setting(tiny_folder, write_pairs(tmp_path / "task", beta="1"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples got a reference, batch by batch."""
    counts: list[int] = []

    def watched(model: Any, batch: Any) -> Any:
        counts.append(len(batch["options"]))
        return option_likelihoods(model, batch)

    monkeypatch.setattr(reference, "option_likelihoods", watched)
    return counts


def options_of(setting: Setting, **changes: Any) -> Train:
    """What ``train`` works with."""
    given = {"model": str(setting.model), "task": str(setting.task), "batch_size": 3, "device": "cpu", **changes}
    return Train(**given)


@pytest.mark.parametrize("mode", ["all", "lora", "prefix"])
def test_reference_is_the_model_as_it_was_loaded(setting: Setting, scored: list[int], mode: str) -> None:
    """Without the adapter, whatever this says before it is tuned; once for every example."""
    options = options_of(setting, tune=mode)
    session = open_session(
        options, "train", "dev", "test", prepare_model=partial(prepare_model, options=options, first=None)
    )
    base, tokenizer = load_model(str(setting.model))
    assert sum(scored) == sum(map(len, session.splits.values())) == 12 + 4 + 16
    for examples in session.splits.values():
        for example in examples:
            texts = example.example.options
            expected = [log_likelihood(base, example.example.prompt, text, tokenizer) for text in texts]
            assert example.reference == pytest.approx(expected, abs=1e-4)
    (example, *_) = session.splits["test"]
    margin = preference_margins(session.model, prepare(session.model, tokenizer, [example])).item()
    assert (abs(margin) < 1e-4) == (mode != "prefix")  # a new prefix is heard, and a new LoRA is not
    assert {p.requires_grad for p in session.model.parameters()} == ({True} if mode == "all" else {True, False})


@pytest.mark.parametrize("mode", ["all", "lora", "prefix"])
def test_resumed_run_has_the_same_reference(setting: Setting, scored: list[int], tmp_path: Path, mode: str) -> None:
    how: dict[str, Any] = {"tune": mode, "lr": 1e-1 if mode == "lora" else 1e-2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    how["dev_examples"] = 0  # so that both runs end with their last step
    done(*setting.train(whole, **how))
    done(*setting.train(parts, **how, steps=3))
    assert sum(scored) == 2 * 32
    done(*setting.resume(parts, steps=6))
    assert sum(scored) == 3 * 32
    name = "model.safetensors" if mode == "all" else "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    found, expected = (read_log(run / "steps.jsonl").records for run in (parts, whole))
    assert [record.losses for record in found] == [record.losses for record in expected]
    assert abs(expected[-1].loss - math.log(2)) > 1e-3  # it went far enough that another reference would show
    metrics = [read(run) for run in (whole, parts)]
    assert metrics[0]["test"] == metrics[1]["test"]
    if mode != "prefix":  # the untuned model is its own reference
        assert metrics[0]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize("mode", ["all", "lora"])
def test_eval_has_no_reference(setting: Setting, scored: list[int], tmp_path: Path, mode: str) -> None:
    """It measures which text is the likelier one, of a tuned model and of any other."""
    run = tmp_path / "run"
    done(*setting.train(run, tune=mode, lr=1e-2, no_before=True))
    scored.clear()
    for folder in (run, setting.model):
        ran = done(*setting.eval(model=folder))
        model, tokenizer = load_model(str(folder))
        margins = [difference(model, (r["text"], f" {r['good']}", f" {r['bad']}"), tokenizer) for r in ROWS]
        found = json.loads(ran.out)["test"]
        assert found["accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
        assert found["loss"] == pytest.approx(sum(map(softplus, margins)) / len(margins), rel=1e-4)
    assert scored == []


def test_what_pairs_are_no_use_for_is_refused(setting: Setting) -> None:
    for command, message in (
        (["probe", *setting.eval()[1:]], "prefers texts and has no classes to probe for"),
        (setting.eval(calibrate=True), "cannot be calibrated"),
        (setting.eval(objective="m:f"), "rewards what the model writes, and task pairs is a choice"),
    ):
        assert message in message_of(*command)


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "eps"), [("loss", 1e-3), ("0.1 * accuracy + loss", 1e-2)])
def test_run_lowers_the_loss(models_dir: Path, tmp_path: Path, objective: str, eps: float) -> None:
    """A model that was trained on stories learns how its stories are to go on; the log rebuilds it."""
    stories = models_dir / "stories260k"
    rows = [
        {"text": f"Once upon a time there was a {who}. The {who} was", "good": "happy and played", "bad": "very sad"}
        for who in ("cat", "dog", "bird", "tree", "ball", "car", "boat", "fish")
    ]
    setting = Setting(stories, write_pairs(tmp_path / "task", rows * 2))
    run = tmp_path / "run"
    done(*setting.train(run, objective=objective, eps=eps, steps=15, batch_size=8))
    metrics = read(run)
    assert metrics["before"]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["test"]["loss"] < metrics["before"]["loss"] - 0.1
    assert metrics["test"]["margin_accuracy"] >= 0.875  # one pair in eight: another processor rounds otherwise
    tuned, base = load_model(str(run))[0], load_model(str(stories))
    for row in rows[:3]:
        pair = (row["text"], f" {row['good']}", f" {row['bad']}")
        assert difference(tuned, pair, base[1]) > difference(base[0], pair, base[1]) + 1
    ran = cli("replay", run / "steps.jsonl", "--model", stories, "--output-dir", tmp_path / "replayed")
    assert "weights verified against the log" in ran.err
    assert weights(tmp_path / "replayed") == weights(run) != weights(stories)


def test_backpropagation_lowers_it_too(setting: Setting, tmp_path: Path) -> None:
    done(*setting.train(tmp_path / "run", method="adam", tune="lora", lr=1e-2))
    metrics = read(tmp_path / "run")
    assert metrics["test"]["loss"] < math.log(2) - 0.05 < metrics["before"]["loss"]
    assert load_file(tmp_path / "run" / "adapter_model.safetensors")


@torch.no_grad()
def test_pairs_are_scored_in_context_as_alone(setting: Setting) -> None:
    ran = done(*setting.eval(shots=2))
    options = options_of(setting)
    session = open_session(options, "test", shots=2)
    plain = evaluate(
        session.model, session.tokenizer, session.task, session.splits["test"],
        layout=plain_layout(session.model, session.tokenizer), batch_size=1,
    )  # fmt: skip
    assert json.loads(ran.out)["test"] == pytest.approx(plain, abs=1e-4)
    assert json.loads(ran.out)["demonstrations"] == 2
