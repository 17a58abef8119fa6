"""Trained models: what holds for tiny random ones holds for them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import support
from forwardtune import MeZO, MeZOConfig, MeZOTrainer
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare
from forwardtune.method.rules import sgd
from forwardtune.models import EMBEDDED_MODEL, context_length, load_model, save_model
from forwardtune.objectives import option_cross_entropy
from forwardtune.tasks import get_task, load_split, load_splits
from forwardtune.tasks.batching import common_beginning
from forwardtune.tasks.encoding import Encoder
from forwardtune.trajectory import StepLog, replay
from support.examples import inputs_of

pytestmark = pytest.mark.real_model

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    """The embedded model in bfloat16; tests may move its weights by a step."""
    return load_model(EMBEDDED_MODEL, dtype="bfloat16")


def story_loss(model: Any, tokenizer: Any) -> Callable[[], torch.Tensor]:
    tokens = tokenizer(STORY, return_tensors="pt")["input_ids"]
    return lambda: model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_story_model_is_estimated_untouched_and_replayed_bit_for_bit(
    models_dir: Path, tmp_path: Path, dtype: str
) -> None:
    folder = str(models_dir / "stories260k")
    model, tokenizer = load_model(folder, dtype=dtype)
    closure = story_loss(model, tokenizer)
    assert closure() < 2  # it has read such stories; untrained it would be at log(512) = 6.2
    optimizer = MeZO(model, lr=1e-4, probes=2, weight_decay=0.1)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for _ in range(4):
            before = support.snapshot(model)
            optimizer.estimate(closure)
            support.assert_same_bits(model, before)
            optimizer.step()
            assert optimizer.last.unchanged < optimizer.tuned.numel
    assert optimizer.perturbation.name == "scratch"
    base, _ = load_model(folder, dtype=dtype)
    assert replay(tmp_path / "steps.jsonl", base) == 4
    support.assert_same_bits(base, support.snapshot(model))


def test_embedded_model_is_what_it_says(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    assert 130e6 < sum(parameter.numel() for parameter in model.parameters()) < 140e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert context_length(model) >= 2048
    with torch.no_grad():
        # A language model that read its language: random weights would be at log(49152) = 10.8.
        assert story_loss(model, tokenizer)() < 3


def test_step_moves_the_embedded_model_by_the_update_alone(smollm: tuple[Any, Any]) -> None:
    model, tokenizer = smollm
    task = get_task("reviews")
    examples = Encoder(tokenizer, 256)(task, load_split(task, "train", limit=4).examples)
    batch = prepare(model, tokenizer, examples)
    optimizer = MeZO(model, lr=1e-5, seed=11)
    watched = [*optimizer.tuned[:1], *optimizer.tuned[1::40]]  # the embedding, and some of all kinds
    expected = [tensor.parameter.detach().clone() for tensor in watched]
    optimizer.step(lambda: option_cross_entropy(model, batch).mean())
    assert optimizer.perturbation.name == "scratch"
    update = sgd(0, optimizer.last.coefficients, 1e-5)
    for tensor, weight in zip(watched, expected, strict=True):
        assert optimizer.noise.update(weight, [update], tensor=tensor.id) < weight.numel()
        assert support.same_bits(tensor.parameter.data, weight), tensor.name


def test_trainer_takes_the_embedded_model_for_what_it_is(smollm: tuple[Any, Any], tmp_path: Path) -> None:
    """Trainer refuses quantised models; this one came from a quantised file."""
    model, tokenizer = smollm
    rows = [{key: torch.tensor(value) for key, value in tokenizer(STORY).items()}]
    config = MeZOConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    MeZOTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    assert not getattr(model, "is_quantized", False)


def test_saved_folder_is_an_ordinary_checkpoint(smollm: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = smollm
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    support.assert_same_bits(again, support.snapshot(model))
    assert AutoTokenizer.from_pretrained(tmp_path)(STORY)["input_ids"] == tokenizer(STORY)["input_ids"]
    assert load_model(str(tmp_path))[0].dtype == torch.bfloat16


def test_embedded_model_honours_positions_and_masks(smollm: tuple[Any, Any]) -> None:
    """Answers of several tokens, which share their prompt only if the model does."""
    model, tokenizer = smollm
    task = get_task("reviews")
    task = type(task)(**{**vars(task), "answers": {"negative": "really quite terrible", "positive": "just so great"}})
    examples = Encoder(tokenizer, 256)(task, load_split(task, "test", limit=2).examples)
    assert min(len(option) for example in examples for option in example.options) > 1
    assert find_layout(model, tokenizer, examples).shared


@pytest.mark.parametrize("shots", [0, 8])
def test_embedded_model_is_evaluated_on_real_data(smollm: tuple[Any, Any], data_dir: Path, shots: int) -> None:
    """As in rows apart; demonstrations are processed once."""
    model, tokenizer = smollm
    task = get_task("sst2")
    encoder = Encoder(tokenizer, 512, load_split(task, "train", data_dir=data_dir, limit=8).examples[:shots])
    test = load_split(task, "test", data_dir=data_dir, limit=8).examples
    examples, bare = encoder(task, test), encoder.calibrations(task, test) if shots else None
    assert encoder.demonstrated == shots
    assert [tokenizer.decode(option) for option in examples[0].options] == [" terrible", " great"]
    found, seen = [], []
    for layout in (find_layout(model, tokenizer, examples), plain_layout(model, tokenizer)):
        with inputs_of(model) as shapes:
            found.append(evaluate(model, tokenizer, task, examples, calibrations=bare, layout=layout, batch_size=3))
        seen.append(sum(math.prod(shape) for shape in shapes))
    result, plain = found
    assert result["examples"] == 8
    assert result["accuracy"] * 8 == round(result["accuracy"] * 8)
    # bfloat16 logits of size 16 are rounded to 2**-4; a loss is a difference of two (calibrated: of four), and the mean is
    # of eight.
    assert result["loss"] == pytest.approx(plain["loss"], abs=2**-3 if shots else 2**-4)
    assert 0 < result["loss"] < 4
    assert not shots or seen[0] < seen[1] / 2


def test_rounding_is_not_taken_for_demonstrations_that_nobody_sees(smollm: tuple[Any, Any], data_dir: Path) -> None:
    """With these ones bfloat16's logits, an eighth apart, turn over to their neighbours on the way through a cache."""
    model, tokenizer = smollm
    task = get_task("sst2")
    splits = load_splits(task, data_dir=str(data_dir), dev_examples=0, train_examples=48, test_examples=32)
    examples = Encoder(tokenizer, 512, splits["train"].examples[:4])(task, splits["test"].examples[:4])
    layout = replace(plain_layout(model, tokenizer), shared=True, packed=True)
    with inputs_of(model) as shapes:
        evaluate(model, tokenizer, task, examples, layout=layout)
    assert (1, len(common_beginning(examples))) in shapes
