"""Language models inside vision-language checkpoints: they load, are tuned on text, and come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import support
from forwardtune import MeZOTrainer, replay
from forwardtune.errors import InputError
from forwardtune.models import freeze_unreached, load_model, model_kind
from forwardtune.tasks.media import require_text
from support.command import Setting, done, message_of, read, write_jsonl, write_task
from support.packaged import PACKAGES, build
from support.trainers import Kill, KilledError, quiet_config

# Where transformers has a class of the language model alone, that is what loads.
ALONE = {"qwen3_5", "qwen3_5_moe", "llama4", "mllama"}


def saved(family: str, folder: Path) -> Path:
    build(PACKAGES, family).save_pretrained(folder)
    support.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", PACKAGES)
def test_the_language_model_of_a_package_loads(family, tmp_path):
    whole, ids, told = build(PACKAGES, family), support.token_batch(2, 7), []
    model, _ = load_model(str(saved(family, tmp_path)), announce=told.append)
    assert model_kind(model) == "causal"
    vision = [name for name, _ in model.named_parameters() if "vision" in name or "visual" in name]
    assert (not vision) == (family in ALONE)
    assert any("inside" in text and type(whole).__name__ in text for text in told) == (family in ALONE)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "qwen3_5_moe", "llama4", "mllama", "qwen3_vl"])
def test_it_is_tuned_on_text_and_comes_back(family, tmp_path):
    setting = Setting(saved(family, tmp_path / "model"), write_task(tmp_path / "task"))
    done(*setting.train(tmp_path / "run", steps=2, eval_steps=None, no_before=True))
    tuned = read(tmp_path / "run")["test"]["loss"]
    again = json.loads(done(*setting.eval(model=tmp_path / "run")).out)
    assert again["test"]["loss"] == pytest.approx(tuned, abs=1e-6)


IMAGES = {
    "of datasets": {"bytes": b"..", "path": None},
    "in a message": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
    "as bytes": b"\x89PNG",
    "a sound": {"array": [0.0], "sampling_rate": 16000, "path": None},
}


@pytest.mark.parametrize("value", IMAGES.values(), ids=IMAGES)
def test_images_in_the_data_are_refused(value):
    with pytest.raises(
        InputError, match=r"data, example 2: column 'picture' holds an image.*use data without that column"
    ):
        require_text(
            [{"text": "a", "picture": None}, {"text": "b", "picture": value}],
            lambda number: f"data, example {number + 1}",
        )
    require_text(
        [{"text": "a", "path": "a.png", "spans": [{"start": 1, "end": 2}]}],
        lambda number: f"data, example {number + 1}",
    )


def test_images_are_refused_before_a_model_is_opened(tmp_path):
    task = write_task(tmp_path / "task")
    message = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}}]}]
    write_jsonl(task.parent / "train.jsonl", [{"text": "a", "label": 1, "messages": message}] * 8)
    said = message_of(*Setting(tmp_path / "none", task).train(tmp_path / "run"))
    assert "train.jsonl, example 1: column 'messages' holds an image" in said
    assert not (tmp_path / "run").exists()


def header_of(run: Path) -> dict:
    return json.loads((run / "steps.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(("family", "parts"), [
    ("gemma3", ["model.vision_tower", "model.multi_modal_projector"]),
    ("mllama", ["model.layers.1"]),  # cross-attention to an image
    ("qwen3_vl", ["model.visual"]),
])  # fmt: skip
def test_a_part_that_text_does_not_enter_is_frozen_and_named(family, parts, tmp_path):
    setting = Setting(saved(family, tmp_path / "model"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "run", steps=2, no_before=True, weight_decay=0.1, dev_examples=0))
    assert f"text does not enter {', '.join(parts)}:" in ran.err
    header = header_of(tmp_path / "run")
    assert header["run"]["frozen"] == parts
    frozen = {t["name"] for t in header["tensors"] if t["name"].startswith(tuple(f"{part}." for part in parts))}
    assert not frozen

    before, after = (load_model(str(tmp_path / name))[0] for name in ("model", "run"))
    moved = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        stays = name.startswith(tuple(f"{part}." for part in parts))
        assert support.same_bits(parameter, moved[name]) == stays, name

    done(*setting.resume(tmp_path / "run", steps=3))
    done("replay", tmp_path / "run" / "steps.jsonl", "--model", setting.model, "--output-dir", tmp_path / "again")
    names = ("run", "again")
    resumed, replayed = (dict(load_model(str(tmp_path / name))[0].named_parameters()) for name in names)
    assert [name for name, parameter in resumed.items() if not support.same_bits(parameter, replayed[name])] == []


def rows(**columns) -> list[dict]:
    return [{"input_ids": row, "labels": row, **columns} for row in support.token_batch(8).tolist()]


def trainer(model, folder: Path, **options) -> MeZOTrainer:
    data = options.pop("train_dataset", None) or rows()
    settings = {"max_steps": 4, "learning_rate": 1e-3, "eps": 1e-2, "weight_decay": 0.1}
    return MeZOTrainer(model=model, args=quiet_config(folder, **{**settings, **options}), train_dataset=data)


@pytest.mark.parametrize(("family", "parts"), [
    ("gemma3", ["model.vision_tower", "model.multi_modal_projector"]), ("qwen3_vl", ["model.visual"]),
])  # fmt: skip
def test_a_trainer_leaves_out_what_text_does_not_enter(family, parts, tmp_path, caplog):
    model = build(PACKAGES, family)
    before = support.snapshot(model)
    whole = trainer(model, tmp_path / "whole")
    whole.train()
    assert f"text does not enter {', '.join(parts)}: these" in caplog.text
    inside = tuple(f"{part}." for part in parts)
    header = header_of(tmp_path / "whole")
    assert header["run"]["frozen"] == parts
    assert not [tensor["name"] for tensor in header["tensors"] if tensor["name"].startswith(inside)]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad  # whoever tunes it on images next finds it as it was
        assert support.same_bits(parameter, before[name]) == name.startswith(inside), name

    killed = trainer(build(PACKAGES, family), tmp_path / "run")
    killed.add_callback(Kill(2))
    with pytest.raises(KilledError):
        killed.train()
    resumed = trainer(build(PACKAGES, family), tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.frozen == parts
    support.assert_same_bits(resumed.model, support.snapshot(model))
    again = build(PACKAGES, family)
    assert replay(resumed.step_log, again) == 4
    support.assert_same_bits(again, support.snapshot(model))


@pytest.mark.parametrize("how", [{"train_dataset": rows(pixel_values=[0.0])}, {"move": "all"}], ids=["images", "all"])
def test_a_trainer_leaves_nothing_out_of_other_data(how, tmp_path):
    own = trainer(build(PACKAGES, "gemma3"), tmp_path, **how)
    assert len(own.create_optimizer().tuned) == len(list(own.model.parameters()))
    assert own.frozen == []


def test_everything_moves_where_that_is_wanted(tmp_path):
    """As in the paper."""
    setting = Setting(saved("gemma3", tmp_path / "model"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "run", steps=2, no_before=True, move="all"))
    assert "text does not enter" not in ran.err
    before, after = (load_model(str(tmp_path / name))[0] for name in ("model", "run"))
    moved = dict(after.named_parameters())
    assert not any(support.same_bits(parameter, moved[name]) for name, parameter in before.named_parameters())


def test_what_longer_texts_alone_enter_is_no_part():
    """As layers that sum up what lies far behind."""
    from torch import nn

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far, self.eye = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, input_ids, attention_mask):
            hidden = self.near(input_ids[:, :2].float())
            return self.far(hidden) if input_ids.shape[1] > 100 else hidden

    assert freeze_unreached(Far()) == {"eye": 6}


def test_experts_of_a_list_are_no_part():
    """Other texts may be routed to them."""
    from torch import nn

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
            self.eye = nn.Linear(2, 2)

        def forward(self, input_ids, attention_mask):
            return self.experts[1](input_ids[:, :2].float())

    model = Routed()
    assert freeze_unreached(model) == {"eye": 6}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"eye.weight", "eye.bias"}


def test_attention_is_torchs_own_unless_another_is_asked_for(tmp_path):
    folder = str(support.save_tiny_model(tmp_path))
    ids = support.token_batch()
    models = {name: load_model(folder, attn_implementation=name)[0] for name in (None, "sdpa", "eager")}
    assert [model.config._attn_implementation for model in models.values()] == ["sdpa", "sdpa", "eager"]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in models.values()]
    assert torch.equal(logits[0], logits[1])
    assert torch.allclose(logits[0], logits[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "words"), [
    ("nonsense", "is not supported"), ("flash_attention_2", "FlashAttention2"), ("flex_attention", "ends the process on a CPU"),
])  # fmt: skip
def test_attention_that_is_not_there_is_refused(name, words, tmp_path):
    setting = Setting(support.save_tiny_model(tmp_path / "model"), write_task(tmp_path / "task"))
    said = message_of(*setting.train(tmp_path / "run", attn_implementation=name))
    assert words in said
    assert "sdpa" in said  # what to do
    assert not (tmp_path / "run").exists()
