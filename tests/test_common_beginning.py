"""What all examples of a minibatch begin with is processed once, and each is scored as it is alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import support
from forwardtune import MeZO, MeZOConfig, MeZOTrainer
from forwardtune.cli import callbacks
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare, with_common_beginning
from forwardtune.models import tune
from forwardtune.objectives import Reward, Sampling, TaskObjective, option_scores
from forwardtune.tasks import Task
from forwardtune.tasks.batching import Layout, collate, common_beginning
from forwardtune.tasks.encoding import Encoded
from support.command import Setting, done, weights, write_task
from support.examples import CHOICE, CLOSE, TOKENIZER, encoded, inputs_of, sharp_model, sharpened, talking_model, tokens
from support.packaged import HYBRIDS, PACKAGES, WINDOWS, build
from support.trainers import QUIET

INSTRUCTION = tokens(20, 77)
BARE = Task("bare", "{text}", "", None, "reward", loss="none", stop="", max_new_tokens=4)
SAID = "say in one word whether the person who wrote this liked the film, or did not like it at all: "


def told(count: int = 6, words: int = 1, instruction: list[int] = INSTRUCTION) -> list[Encoded]:
    """Examples of different lengths behind an instruction."""
    own = [encoded(2 + 3 * i % 11, words, 1 + words // 2, label=i % 2) for i in range(count)]
    return [replace(e, prompt=[*instruction, *e.prompt]) for e in own]


def begun(model: Any, examples: list[Encoded], **how: Any) -> Layout:
    return with_common_beginning(model, TOKENIZER, examples, find_layout(model, TOKENIZER, examples), **how)


def scores(model: Any, examples: list[Encoded], layout: Layout) -> torch.Tensor:
    with torch.no_grad():
        return option_scores(model, prepare(model, TOKENIZER, examples, layout))


# --- where tokens stand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("context", [0, 3])
def test_rows_by_hand(offset: int, context: int) -> None:
    """16 common tokens, then a prompt of 2 with options of 3 and 2 tokens, then a prompt of 1."""
    common = list(range(100, 116))
    batch = [Encoded([*common, 11, 12], [[21, 22, 23], [31, 32]]), Encoded([*common, 41], [[51], [61]])]
    inputs = collate(batch, Layout(9, first_position=offset, context=context, begun=True))
    assert inputs["input_ids"].tolist() == [[*common, 11, 12, 21, 22, 31, 41]]
    positions = [*range(16), 16, 17, 18, 19, 18, 16]
    assert inputs["position_ids"].tolist() == [[p + offset + context for p in positions]]
    own = ["1.....", "11....", "111...", "1111..", "11..1.", ".....1"]
    seen = ["1" * (i + 1) + "." * (21 - i) for i in range(16)] + ["1" * 16 + line for line in own]
    expected = [[True] * context + [c == "1" for c in line] for line in seen]
    assert (inputs["attention_mask"][0, 0] == 0).tolist() == expected
    assert inputs["common"] == 16
    assert "examples_at" not in inputs  # the beginning belongs to all of them
    assert inputs["positions"].tolist() == [17, 18, 19, 20, 21]


@pytest.mark.parametrize("count", [2, 5, 16, 40])
def test_rows_are_few_and_about_as_long(count: int) -> None:
    examples = told(count, words=3)
    inputs = collate(examples, Layout(0, begun=True))
    rows, length = inputs["input_ids"].shape
    own = [e.length - 20 for e in examples]
    assert inputs["input_ids"][:, :20].tolist() == [INSTRUCTION] * rows
    assert (rows - 1) * 60 < sum(own) <= rows * (length - 20)
    assert length - 20 <= 60 + max(own)
    assert rows * (length - 20) - sum(own) < rows * max(own)
    predicted: dict[int, list[int]] = {}
    for slot, token in zip(inputs["slots"].tolist(), inputs["tokens"].tolist(), strict=True):
        predicted.setdefault(slot, []).append(token)
    assert list(predicted.values()) == [option for e in examples for option in e.options]


def test_what_predicts_an_answer_is_nobody_elses() -> None:
    alike = [Encoded([*INSTRUCTION, 9], [[7], [8]]) for _ in range(3)]
    assert common_beginning(alike) == INSTRUCTION
    assert common_beginning([replace(e, scored=3) for e in alike]) == INSTRUCTION[:17]
    assert common_beginning([replace(e, scored=6) for e in alike]) == []


@pytest.mark.parametrize(
    "examples",
    [
        told(1),
        told(instruction=tokens(15, 3)),
        [replace(e, prompt=[*e.prompt, *tokens(70, 3)]) for e in told(4)],
        [*told(5), encoded(30, 1, 1)],
    ],
    ids=["alone", "short", "a small share", "not all"],
)
def test_where_it_would_not_pay_nothing_changes(examples: list[Encoded]) -> None:
    plainly, asked = (collate(examples, Layout(0, begun=begun)) for begun in (False, True))
    assert plainly.keys() == asked.keys()
    assert all(support.same_bits(plainly[name], asked[name]) for name in plainly)
    model = sharp_model("llama")
    layout = find_layout(model, TOKENIZER, examples)
    with inputs_of(model) as seen:
        assert with_common_beginning(model, TOKENIZER, examples, layout) == layout
    assert not seen


# --- scores -------------------------------------------------------------------------------------------------------

# What keeps a state, which takes no mask.
APART = {*HYBRIDS, "packaged_qwen3_5", "packaged_qwen3_5_moe", "mamba"}
CAUSAL = sorted({*support.FAMILIES, *HYBRIDS, *(f"packaged_{name}" for name in PACKAGES)} - {"t5", "bert", "roberta"})


def model_of(family: str) -> Any:
    name = family.removeprefix("packaged_")
    table = support.FAMILIES if family in support.FAMILIES else HYBRIDS if family in HYBRIDS else PACKAGES
    model = sharpened(build(table, name))
    has_experts = any("Experts" in type(module).__name__ for module in model.modules())
    return model if has_experts else model.double()  # products of grouped matrices are not there in float64


@pytest.mark.parametrize("family", CAUSAL)
def test_scores_are_those_of_rows_apart(family: str) -> None:
    """In float64 where the model can; models that cannot take such rows keep what they had."""
    model, examples = model_of(family), [*told(3), *told(3, words=3)]
    layout = begun(model, examples)
    assert layout.begun == (family not in APART)
    with inputs_of(model) as seen:
        found = scores(model, examples, layout)
    torch.testing.assert_close(
        found,
        scores(model, examples, plain_layout(model, TOKENIZER)),
        rtol=0,
        atol=1e-6 if model.dtype == torch.float64 else 1e-4,
    )
    if layout.begun:
        assert seen[0][0] * seen[0][1] < sum(e.length for e in examples) - 60


def test_a_state_is_not_tried_in_half_precision() -> None:
    """Which hides how little a state carries over from the text before it."""
    model = sharpened(build(HYBRIDS, "falcon_h1")).to(torch.bfloat16)
    plain = plain_layout(model, TOKENIZER)
    assert find_layout(model, TOKENIZER, told(words=3)) == plain
    assert find_layout(model, TOKENIZER, told()) == replace(plain, shared=True)  # where nothing is to be kept apart


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_no_beginning_is_longer_than_a_window(family: str) -> None:
    model = sharpened(build(WINDOWS, family))
    assert not begun(model, told()).begun


def test_a_window_that_nobody_told_of_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with a beginning are longer than an example, and such a model does not see it from their end."""
    model, examples = sharp_model("llama"), told(12)
    forward = type(model).forward

    def nearsighted(self: Any, input_ids: Any, attention_mask: Any = None, **how: Any) -> Any:
        length = input_ids.shape[1]
        far = torch.ones(length, length).tril(-40).bool()
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask.masked_fill(far, torch.finfo(attention_mask.dtype).min)
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **how)

    monkeypatch.setattr(type(model), "forward", nearsighted)
    layout = find_layout(model, TOKENIZER, examples)
    assert layout.packed
    assert begun(model, examples) == layout


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tuned_prefix_stands_before_it() -> None:
    model = tune(sharp_model("llama"), TOKENIZER, "prefix")
    layout = begun(model, told())
    assert layout.begun
    torch.testing.assert_close(
        scores(model, told(), layout), scores(model, told(), plain_layout(model, TOKENIZER)), **CLOSE
    )


# --- steps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"perturbation": "copy"}, {"perturbation": "side_path", "rank": 2}], ids=str)
def test_a_step_sees_the_losses_of_rows_apart(how: dict[str, Any]) -> None:
    losses = []
    for together in (True, False):
        model, examples = sharp_model("llama", torch.float64), told(words=2)
        batch = prepare(model, TOKENIZER, examples, begun(model, examples) if together else None)
        objective = TaskObjective("loss", CHOICE, TOKENIZER)
        optimizer = MeZO(model, lr=1e-3, eps=1e-2, **how)
        with inputs_of(model) as seen:
            optimizer.step(lambda m=model, b=batch, o=objective: o(m, b).mean())
        losses.append(optimizer.last.losses)
        most = max(map(math.prod, seen))
        assert (most < sum(e.length for e in examples) - 60) == together
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_direction_of_each_example_is_refused_what_is_common() -> None:
    model, examples = sharp_model("llama"), told()
    batch = prepare(model, TOKENIZER, examples, begun(model, examples))
    objective = TaskObjective("loss", CHOICE, TOKENIZER)
    with pytest.raises(TypeError, match="the losses of 6 examples"):
        MeZO(model, lr=1e-3, eps=1e-2, assignment="example").step(lambda: objective(model, batch))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the command line's minibatches were made into."""
    made: list[dict[str, Any]] = []

    def collated(*arguments: Any) -> dict[str, Any]:
        made.append(collate(*arguments))
        return made[-1]

    monkeypatch.setattr(callbacks, "collate", collated)
    return made


@pytest.mark.parametrize("assignment", ["shared", "example"])
def test_command_line_puts_it_once_for_a_shared_direction(
    tiny_folder: Path, tmp_path: Path, batches: list[dict[str, Any]], assignment: str
) -> None:
    setting = Setting(tiny_folder, write_task(tmp_path / "task", prompt=f"'{SAID}{{text}} It was'"))
    how: dict[str, Any] = {"assignment": assignment, "dev_examples": 0, "no_before": True}
    done(*setting.train(tmp_path / "whole", **how, steps=3))
    done(*setting.train(tmp_path / "parts", **how, steps=1))
    done(*setting.resume(tmp_path / "parts", steps=3))
    assert all(("common" in batch) == (assignment == "shared") for batch in batches)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


@pytest.mark.parametrize("assignment", ["shared", "example"])
def test_preferences_that_begin_alike(tmp_path: Path, assignment: str) -> None:
    rows = [{"prompt": SAID + t, "chosen": f" {t} yes", "rejected": " no"} for t in ("a fox", "it was fun", "no")] * 2
    config = MeZOConfig(str(tmp_path), max_steps=1, learning_rate=1e-4, eps=1e-3, assignment=assignment, **QUIET)
    trainer = MeZOTrainer(model=sharp_model("llama"), args=config, train_dataset=rows, processing_class=TOKENIZER)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert ("common" in batch) == (assignment == "shared")
    trainer.train()


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_behind_it_is_written_as_without(tmp_path: Path, temperature: float) -> None:
    """At perturbed weights, whose keys and values are made anew at each point."""
    (tmp_path / "lengths.py").write_text("def length(completions):\n    return [len(text) for text in completions]\n")
    found = {}
    for together in (True, False):
        model, examples = talking_model("llama").double(), [replace(e, options=[]) for e in told()]
        batch = prepare(model, TOKENIZER, examples, begun(model, examples, generates=True) if together else None)
        batch["examples"] = examples
        objective = TaskObjective(
            f"{tmp_path / 'lengths.py'}:length", BARE, TOKENIZER, Sampling(temperature), sample_steps=1
        )
        objective.begin_step(0)
        optimizer = MeZO(model, lr=1e-3, eps=0.1)
        with inputs_of(model) as seen:
            optimizer.step(lambda o=objective, m=model, b=batch: o(m, b).mean())
        texts = [sample["completion"] for sample in objective.take_samples()]
        found[together] = optimizer.last.losses, texts, sum(rows * width for rows, width in seen)
    assert found[True][:2] == found[False][:2]
    assert len(set(found[True][1])) > 2
    assert found[True][2] < 0.6 * found[False][2]


def test_requests_without_answers_are_evaluated_behind_it() -> None:
    model, examples = talking_model("llama"), [replace(e, options=[]) for e in told()]
    lengths = Reward(lambda completions: [float(len(text)) for text in completions], "length")
    written: dict[bool, list[str]] = {True: [], False: []}
    for together, layout in ((True, None), (False, plain_layout(model, TOKENIZER))):
        with inputs_of(model) as seen:
            evaluate(model, TOKENIZER, BARE, examples, layout=layout, rewards=[lengths], completions=written[together])
        if together:
            assert (1, 20) in seen
            assert all(width < 20 for rows, width in seen if rows == len(examples))
    assert written[True] == written[False]


def test_model_that_cannot_go_on_from_a_cache_writes_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sharp_model("llama")
    forward = type(model).forward

    def without(
        self: Any, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
    ) -> Any:
        return forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        )

    monkeypatch.setattr(type(model), "forward", without)
    assert begun(model, told()).begun
    assert not begun(model, told(), generates=True).begun
