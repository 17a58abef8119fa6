"""Adapters where they are in the way of how models are packaged: on experts in one tensor, and on tied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import support
from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.method.estimators import Query
from forwardtune.models import forward, load_model, lora_modules, save_model, tune
from forwardtune.points import Copy, Scratch
from support.command import Setting, done, message_of, write_task
from support.packaged import EXPERTS, HYBRIDS, PACKAGES, WINDOWS, build

pytest.importorskip("peft", reason="needs peft")
# What peft and transformers say to each other.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TIED = "tied to the embedding.*LoRA adapts the head alone"


def filled(model: Any) -> Any:
    """The adapter with numbers of a size that shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    support.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "experts"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("family", EXPERTS)
def test_lora_reaches_experts_and_comes_back(family, targets, tmp_path):
    base, _ = load_model(str(saved(build(EXPERTS, family), tmp_path / "base")))
    ids = support.token_batch(2, 6)
    plain = logits(base, ids)
    model = filled(tune(base, support.tokenizer(), "lora", lora_rank=2, lora_targets=targets))
    wanted = {"gate_up_proj", "down_proj"} if "experts" in targets else {"down_proj"}
    assert lora_modules(model) == dict.fromkeys(wanted | ({"q_proj"} & set(targets)), 2)
    tuned = logits(model, ids)
    assert not torch.allclose(tuned, plain, atol=1e-3)

    optimizer = MeZO(model, lr=1e-30)
    optimizer.estimate(support.closure_for(model, ids))
    assert type(optimizer.perturbation) is Scratch
    points = []
    for kind in (Scratch, Copy):
        with torch.no_grad(), kind(optimizer.tuned, optimizer.noise) as perturbation:
            perturbation.shift(0, Query(0, 1e-1))
            points.append(model(input_ids=ids).logits.clone())
    assert torch.equal(*points)
    assert not torch.equal(points[0], tuned)

    save_model(model, support.tokenizer(), tmp_path / "adapter")
    again, _ = load_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, ids), tuned)
    assert torch.allclose(logits(again.merge_and_unload(), ids), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("query", "names"), [(None, ["kv_b_proj", "q_proj"]), (8, ["kv_b_proj", "q_b_proj"])])
def test_lora_adapts_latent_attention_by_itself(query, names):
    latent = {"kv_lora_rank": 8, "q_lora_rank": query, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    sizes = {**support.SIZES, "num_key_value_heads": 4, "pad_token_id": 0}
    table = {"v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**sizes, **latent, **experts})}
    model = tune(build(table, "v3"), support.tokenizer(), "lora", lora_rank=2)
    assert list(lora_modules(model)) == names


def test_a_target_that_is_neither_is_refused():
    with pytest.raises(InputError, match="no linear layer is called 'expert'"):
        tune(build(EXPERTS, "qwen3_moe"), support.tokenizer(), "lora", lora_targets=["expert"])
    with pytest.raises(InputError, match="no linear layer is called 'experts'"):
        tune(support.tiny_model("llama"), support.tokenizer(), "lora", lora_targets=["experts"])


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"], ["lm_head"]], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_an_adapter_on_a_tied_model_merges_to_equal_scores(family, targets, tmp_path):
    base, tokenizer = load_model(str(support.save_tiny_model(tmp_path / "base", family)))
    ids = support.token_batch()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    if targets and "lm_head" in targets:
        with pytest.warns(UserWarning, match=TIED):
            model = tune(base, tokenizer, "lora", lora_targets=targets)
    else:
        model = tune(base, tokenizer, "lora", lora_targets=targets)
    tuned = logits(filled(model), ids)
    save_model(model, tokenizer, tmp_path / "adapter")

    again, _ = load_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, ids), tuned)
    embedding = again.get_input_embeddings().weight.clone()
    merged = again.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert torch.allclose(logits(merged, ids), tuned, **close)
    saved(merged, tmp_path / "merged")
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"))[0], ids), tuned, **close)


def test_the_command_line_says_what_is_adapted(tmp_path):
    setting = Setting(saved(build(EXPERTS, "qwen3_moe"), tmp_path / "model"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "attention", steps=1, no_before=True, tune="lora", dev_examples=0))
    assert (
        "LoRA on q_proj (2), v_proj (2); not on the experts, 196,608 weights: --lora-targets NAMES,experts" in ran.err
    )
    ran = done(
        *setting.train(tmp_path / "experts", steps=2, no_before=True, tune="lora", lora_targets="v_proj,experts", dev_examples=0)
    )  # fmt: skip
    assert "LoRA on down_proj (2), gate_up_proj (2), v_proj (2)\n" in ran.err
    loss = json.loads((tmp_path / "experts" / "metrics.json").read_text())["test"]["loss"]
    again = json.loads(done(*setting.eval(model=tmp_path / "experts")).out)
    assert again["test"]["loss"] == pytest.approx(loss, abs=1e-6)
    log = tmp_path / "experts" / "steps.jsonl"
    done("replay", log, "--model", setting.model, "--output-dir", tmp_path / "replayed")
    names = ("experts", "replayed")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names)
    assert first == second


# --- prefixes ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:texts are longer than what sees the prefix")
@pytest.mark.parametrize("family", WINDOWS)
def test_a_prefix_works_in_front_of_sliding_windows(family):
    model = tune(build(WINDOWS, family), support.tokenizer(), "prefix", prefix_length=3)
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    for length in (8, 40):  # within the window, and beyond it
        ids = support.token_batch(1, length)
        before = forward_logits(model, ids)
        assert torch.allclose(before, logits_of_peft(model, ids), atol=1e-5)
        with torch.no_grad():
            weight.add_(1.0)
        after = forward_logits(model, ids)
        assert not torch.allclose(after[:, :8], before[:, :8], atol=1e-4)
    optimizer = MeZO(model, lr=1e-3)
    optimizer.step(lambda: forward(model, input_ids=ids).logits.float().square().mean())
    assert any(optimizer.last.coefficients)


def forward_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return forward(model, input_ids=ids).logits


def logits_of_peft(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_prefix_is_refused_where_layers_keep_a_state(family):
    stateful = 1 if family not in ("falcon_h1", "zamba2", "mamba", "mamba2") else 2
    with pytest.raises(InputError, match=f"by a prefix: {stateful} of its layers keep a state.*Choose lora"):
        tune(build(HYBRIDS, family), support.tokenizer(), "prefix")


def test_a_prefix_is_refused_before_anything_is_written(tmp_path):
    setting = Setting(saved(build(HYBRIDS, "lfm2"), tmp_path / "model"), write_task(tmp_path / "task"))
    assert "keep a state" in message_of(*setting.train(tmp_path / "run", tune="prefix"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "mamba"])
def test_lora_tunes_a_hybrid(family, tmp_path):
    targets = {"mamba": "in_proj"}.get(family, "q_proj,v_proj")
    setting = Setting(saved(build(HYBRIDS, family), tmp_path / "model"), write_task(tmp_path / "task"))
    done(*setting.train(tmp_path / "run", steps=2, no_before=True, tune="lora", lora_targets=targets, dev_examples=0))
    loss = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["loss"]
    again = json.loads(done(*setting.eval(model=tmp_path / "run")).out)
    assert again["test"]["loss"] == pytest.approx(loss, abs=1e-6)


def test_an_adapter_on_layers_that_text_does_not_enter_is_frozen_there(tmp_path):
    """The vision tower has query and value projections too."""
    setting = Setting(saved(build(PACKAGES, "gemma3"), tmp_path / "model"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "run", steps=2, no_before=True, tune="lora", dev_examples=0))
    assert "text does not enter base_model.model.model.vision_tower:" in ran.err
    header = json.loads((tmp_path / "run" / "steps.jsonl").read_text().splitlines()[0])
    assert not [tensor["name"] for tensor in header["tensors"] if "vision" in tensor["name"]]
    done("replay", tmp_path / "run" / "steps.jsonl", "--model", setting.model, "--output-dir", tmp_path / "again")
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert first == second
