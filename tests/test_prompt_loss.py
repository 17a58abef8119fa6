"""A loss over prompts beside that of answers: its tokens, its value in every layout, and what of a run it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import support
from forwardtune.errors import InputError
from forwardtune.evaluation import find_layout, prepare, training_objective
from forwardtune.models import start_from_feedback, tune
from forwardtune.objectives import WithPrompts, option_scores, refuse_prompts
from forwardtune.objectives.prompts import TOKENS, with_prompts
from forwardtune.tasks import Task
from forwardtune.tasks.batching import Layout
from forwardtune.tasks.encoding import Encoded
from forwardtune.trajectory import read_log
from support.command import FREE_TEXT, Setting, cli, done, message_of, write_task
from support.examples import CHOICE, CLOSE, TOKENIZER, encoded, every_layout, sharp_model

FREE = Task("free", "{text}", "answer", None, "f1", loss="likelihood", stop="", max_new_tokens=6)
BATCHES = {
    FREE.name: [encoded(9, 3), encoded(4, 1), encoded(12, 2), encoded(7, 4, scored=2)],
    CHOICE.name: [encoded(8, 2, 1, label=1), encoded(11, 1, 3), encoded(5, 4, 4)],
}


def first_of_prompts(model: Any, batch: list[Encoded]) -> torch.Tensor:
    """By the definition: each prompt alone, its first predictions."""
    losses = []
    for example in batch:
        prompt = example.prompt[: len(example.prompt) - example.scored]
        ids = torch.tensor(prompt)[: TOKENS + 1]
        losses.append(F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1].float(), ids[1:]))
    return torch.stack(losses)


@torch.no_grad()
@every_layout
@pytest.mark.parametrize("task", [FREE, CHOICE], ids=lambda task: task.name)
def test_it_is_the_likelihood_of_tokens_of_the_prompt_beside_the_tasks_loss(task: Task, layout: Layout | None) -> None:
    model, batch = sharp_model(), BATCHES[task.name]
    inputs = prepare(model, TOKENIZER, batch, layout)
    more = option_scores(model, with_prompts(inputs))
    torch.testing.assert_close(more[:, :-1], option_scores(model, inputs), **CLOSE)
    torch.testing.assert_close(-more[:, -1], first_of_prompts(model, batch), **CLOSE)
    # And as an objective, with tokens at random; a weight of 0 leaves the task's.
    own = training_objective(task)(model, inputs)
    torch.testing.assert_close(WithPrompts(task, 0.0)(model, inputs), own, **CLOSE)
    one, other = WithPrompts(task, 0.5, seed=3), WithPrompts(task, 1.0, seed=3)
    half, whole = one(model, inputs), other(model, inputs)
    torch.testing.assert_close(2 * (half - own), whole - own, **CLOSE)
    assert (whole > own).all()
    assert not torch.equal(one(model, inputs), half)  # others than those of the first minibatch
    assert not torch.equal(WithPrompts(task, 1.0, seed=4)(model, inputs), whole)


@every_layout
def test_tokens_are_drawn_from_the_prompt_alone_and_each_once(layout: Layout | None) -> None:
    model, batch = sharp_model(), BATCHES[FREE.name]
    inputs, generator = prepare(model, TOKENIZER, batch, layout), torch.Generator().manual_seed(0)
    seen: dict[int, set[int]] = {number: set() for number in range(len(batch))}
    ids, examples = inputs["input_ids"].flatten(), inputs["examples_at"].flatten()
    for _ in range(60):
        more = with_prompts(inputs, generator)
        places = more["positions"][len(inputs["positions"]) :].tolist()
        tokens = more["tokens"][len(inputs["tokens"]) :].tolist()
        slots = more["slots"][len(inputs["slots"]) :].tolist()
        assert len(set(places)) == len(places)
        for place, token, slot in zip(places, tokens, slots, strict=True):
            number = int(examples[place])
            assert more["options"][number, -1] == slot
            assert token == ids[place + 1]
            begin = int((examples == number).nonzero()[0, 0])
            seen[number].add(place - begin)
    for number, example in enumerate(batch):
        assert seen[number] == set(range(len(example.prompt) - example.scored - 1)), number


@torch.no_grad()
def test_a_prompt_of_one_token_has_no_such_loss() -> None:
    model, batch = sharp_model(), [encoded(1, 2), encoded(6, 2)]
    inputs = prepare(model, TOKENIZER, batch)
    own, more = training_objective(FREE)(model, inputs), WithPrompts(FREE, 1.0)(model, inputs)
    assert torch.equal(own[0], more[0])
    assert more[1] > own[1]


def test_where_prompts_have_no_such_loss_it_is_refused() -> None:
    with pytest.raises(InputError, match="a masked model does not predict a prompt"):
        refuse_prompts(support.tiny_model("bert"), CHOICE)
    preferences = Task("pairs", "{text}", "", None, "accuracy", loss="preference", preference=("a", "b"))
    with pytest.raises(InputError, match="keeps it near itself"):
        refuse_prompts(support.tiny_model("llama"), preferences)
    refuse_prompts(support.tiny_model("llama"), FREE)


def test_steps_lower_it_and_a_starts_from_the_answers_alone() -> None:
    """With it prompts become likelier than without."""
    batch = [encoded(12, 2) for _ in range(4)]
    found: dict[float, tuple[Any, float, float]] = {}
    for weight in (0.0, 3.0):
        model = tune(sharp_model(), TOKENIZER, "lora", lora_rank=4, lora_targets=["late-down"], freeze_a=True)
        inputs = [prepare(model, TOKENIZER, batch, find_layout(model, TOKENIZER, batch))] * 30
        objective = training_objective(FREE)
        lowered = WithPrompts(FREE, weight) if weight else None
        start_from_feedback(model, inputs, objective, lowered=lowered, steps=30)
        with torch.no_grad():
            prompts = -option_scores(model, with_prompts(inputs[0]))[:, -1].mean()
            answers = objective(model, inputs[0]).mean()
        a = {name: p.detach() for name, p in model.named_parameters() if ".lora_A." in name}
        found[weight] = a, float(prompts), float(answers)
    assert all(torch.equal(a, found[3.0][0][name]) for name, a in found[0.0][0].items())
    assert found[3.0][1] < found[0.0][1] - 0.1
    assert found[3.0][2] < float(training_objective(FREE)(sharp_model(), inputs[0]).detach().mean())


def test_a_run_on_text_has_it_and_one_on_labels_has_not(tmp_path: Path, tiny_folder: Path) -> None:
    labels = Setting(tiny_folder, write_task(tmp_path / "task of labels"))
    text = Setting(tiny_folder, write_task(tmp_path / "task of text", **FREE_TEXT))

    def begun(setting: Setting, name: str, **changes: object) -> tuple[Any, bytes]:
        folder = tmp_path / name
        done(*setting.train(folder, method="feedback", feedback_steps=3, steps=2, no_before=True, **changes))
        return read_log(folder / "steps.jsonl").header["run"], (folder / "initial.safetensors").read_bytes()

    run, walked = begun(text, "usual")
    assert run["prompt_loss_weight"] == 0.3
    named, without = begun(text, "none", prompt_loss_weight=0)
    assert named["prompt_loss_weight"] == 0
    assert walked != without
    assert begun(text, "same", prompt_loss_weight=0.3)[1] == walked
    of_labels, plain = begun(labels, "labels")
    assert "prompt_loss_weight" not in of_labels
    assert begun(labels, "wanted", prompt_loss_weight=0.3)[1] != plain
    done(*text.resume(tmp_path / "usual", steps=3))
    assert "prompt-loss-weight" in message_of(*labels.train(tmp_path / "mezo", prompt_loss_weight=0.3))
    assert cli("plan", "--model", tiny_folder, "--task", text.task, "--batch-size", 4, "--no-weights").code == 0
