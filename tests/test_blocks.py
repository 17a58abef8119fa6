"""Blocks of attention that run once more by themselves: their derivative is the model's, and what cannot be asked is left out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import support
from forwardtune.models import start_from_feedback, tune
from forwardtune.models.blocks import Block, able, blocks_of, noting
from forwardtune.models.feedback import _begun, _gradient, _learned
from forwardtune.models.late import row_of_layers
from forwardtune.models.principal import lora_layers
from forwardtune.models.shelf import Shelf
from forwardtune.models.way_back import WayBack
from support.models import SIZES

FAMILIES = {
    "llama": ["q_proj", "v_proj"], "opt": ["q_proj", "k_proj"], "bert": ["query", "value"], "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"], "gemma3": ["q_proj", "k_proj", "v_proj"],
}  # fmt: skip


def adapted(family: str, targets: list[str], dtype: torch.dtype = torch.float64) -> Any:
    model = tune(support.tiny_model(family, dtype), support.tokenizer(), "lora", lora_rank=3, lora_targets=targets)
    generator, own = torch.Generator().manual_seed(0), torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        for layer in lora_layers(model):
            for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
                a.weight.data = a.weight.to(own)
                b.weight.data = 0.1 * torch.randn(b.weight.shape, generator=generator).to(own)
    return model


def batch(rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    tokens, mask = support.token_batch(rows, length=length, seed=1), torch.ones(rows, length, dtype=torch.int64)
    mask[1, :4] = 0  # padding
    return {"input_ids": tokens, "attention_mask": mask}


def of(model: Any) -> list[Block]:
    return blocks_of(model, lora_layers(model), [model.get_submodule(name) for name in row_of_layers(model)])


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_true_error_it_is_the_true_gradient(family: str) -> None:
    model, given = adapted(family, FAMILIES[family]), batch()
    blocks = of(model)
    assert [block.end for block in blocks] == [model.get_submodule(name) for name in row_of_layers(model)]
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output

    hooks = [block.module.register_forward_hook(keep) for block in blocks]
    loss = model(**given).logits[:, -1].float().logsumexp(-1).sum()
    for hook in hooks:
        hook.remove()
    for block in blocks:
        out = outputs[block.module]
        error, *true = torch.autograd.grad(loss, [out, *block.b()], retain_graph=True)
        with torch.no_grad(), noting([block], Shelf()):
            model(**given)
        flat = error.flatten(0, -2).float()
        at = flat.abs().amax(1).nonzero()[:, 0]
        block.gradient(flat[at], at, len(flat))
        for b, expected in zip(block.b(), true, strict=True):
            assert expected.any()
            torch.testing.assert_close(b.grad, expected, rtol=1e-4, atol=1e-9)
            assert b.requires_grad
        assert block.called is None  # nothing is kept


def test_half_precision_holds_small_errors() -> None:
    model = adapted("llama", ["q_proj", "v_proj"], torch.float16)
    blocks = of(model)
    found = []
    for size in (1.0, 1e-9):
        with torch.no_grad(), noting(blocks[:1], Shelf()):
            model(**batch())
        blocks[0].gradient(torch.full((1, 32), size), torch.tensor([6]), batch()["input_ids"].numel())
        found.append([b.grad.float() for b in blocks[0].b()])
    for large, small in zip(*found, strict=True):
        assert large.any()
        torch.testing.assert_close(small * 1e9, large, rtol=1e-3, atol=1e-6)


def test_a_cache_is_left_out() -> None:
    model, given = adapted("llama", ["q_proj"]), batch()
    blocks = of(model)
    with torch.no_grad(), noting(blocks, Shelf()):
        out = model(**given, use_cache=True)
    length = out.past_key_values.get_seq_length()
    blocks[0].gradient(torch.ones(1, 32), torch.tensor([5]), given["input_ids"].numel())
    assert blocks[0].b()[0].grad.any()
    assert out.past_key_values.get_seq_length() == length


class Once(torch.autograd.Function):
    """A kernel without a backward pass."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()


def test_what_has_no_derivative_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = [r"mlp\.down_proj", "v_proj"]
    model = tune(support.tiny_model("llama"), support.tokenizer(), "lora", lora_targets=targets, freeze_a=True)
    projection = model.base_model.model.model.layers[0].self_attn.o_proj
    monkeypatch.setattr(projection, "forward", lambda x: F.linear(Once.apply(x), projection.weight))
    given = [{**batch(), "labels": batch()["input_ids"]}] * 3
    with pytest.warns(
        UserWarning, match="1 of 2 blocks have no derivative by themselves .*: B of LoRA in them starts at zero"
    ):
        start_from_feedback(model, given, steps=3)
    moved = {name: bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name}
    assert not moved["base_model.model.model.layers.0.self_attn.v_proj.lora_B.default.weight"]
    assert sum(moved.values()) == len(moved) - 1


def test_a_gradient_that_is_not_finite_is_none() -> None:
    model = adapted("llama", ["q_proj"])
    block = of(model)[0]
    with torch.no_grad(), noting([block], Shelf()):
        model(**batch())
    block.gradient(torch.full((1, 32), torch.nan), torch.tensor([5]), batch()["input_ids"].numel())
    assert block.b()[0].grad is None


def test_out_of_memory_is_no_kernel_without_a_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", ["q_proj"])
    blocks = of(model)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    with torch.no_grad(), noting(blocks, Shelf()):
        model(**batch())
    monkeypatch.setattr(blocks[1].module, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        able(blocks, 32)


def behind_norms() -> Any:
    """A model with norms between what its blocks give and the stream."""
    config = transformers.Olmo2Config(**{**SIZES, "num_hidden_layers": 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Olmo2ForCausalLM(config).eval()
        for name, p in model.named_parameters():
            p.data.mul_(3 if p.ndim > 1 else 1)
            if re.search("post_(attention|feedforward)_layernorm", name):
                p.data.copy_(torch.exp(torch.randn(p.shape)))
    return tune(model, None, "lora", lora_targets=["late-down", "late-attention"], freeze_a=True)


def test_norms_behind_a_block_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, given = torch.Generator().manual_seed(1), []
    for _ in range(24):
        tokens = torch.randint(5, 320, (6, 12), generator=generator)
        given.append({"input_ids": tokens, "labels": torch.where(torch.arange(12) < 9, -100, tokens)})

    def cosines() -> Tensor:
        model = behind_norms()
        with torch.no_grad():
            way, fed = _learned(model, given[:16], None)
            walk = _begun(model, given[0], None, 1e-2, fed, way)
        b = [b for block in walk.blocks for b in block.b()]
        true, found = [0.0] * len(b), [0.0] * len(b)
        for some in given[16:]:
            true = [t + g for t, g in zip(true, torch.autograd.grad(model(**some).loss, b), strict=True)]
            with torch.no_grad():
                assert _gradient(model, walk, some, None)
            found = [f + w.grad for f, w in zip(found, b, strict=True)]
        return torch.stack([F.cosine_similarity(t.flatten(), f.flatten(), 0) for t, f in zip(true, found, strict=True)])

    learned = cosines()
    monkeypatch.setattr(WayBack, "follow", lambda *_: None)
    assert learned.mean() > cosines().mean() + 0.1
    assert learned.min() > 0.1


def test_what_a_block_adds_to_the_stream_comes_back_as_what_its_layer_reads() -> None:
    targets = [r"mlp\.down_proj", "q_proj"]
    model = tune(support.tiny_model("llama"), support.tokenizer(), "lora", lora_targets=targets, freeze_a=True)
    given = [{**batch(), "labels": batch()["input_ids"]}] * 3
    with torch.no_grad():
        way, _fed = _learned(model, given, None)
        maps = way.maps(model.base_model.model.model.layers[1].mlp.down_proj)
    for block in of(model):
        assert block.module not in maps
    assert of(model)[1].end in maps


def test_a_block_that_did_not_run_on_these_tokens_takes_no_step() -> None:
    model = adapted("llama", ["q_proj"])
    blocks = of(model)
    blocks[0].gradient(torch.ones(1, 32), torch.tensor([5]), 27)
    assert blocks[0].b()[0].grad is None
    with pytest.warns(UserWarning, match="2 of 2 blocks have no derivative"):
        assert able(blocks, 32) == []
    with torch.no_grad(), noting(blocks, Shelf()):
        model(**batch())
    blocks[0].gradient(torch.ones(1, 32), torch.tensor([5]), 26)
    assert blocks[0].b()[0].grad is None
    with pytest.warns(UserWarning, match="1 of 2 blocks have no derivative"):
        assert able(blocks, 32) == blocks[1:]  # asked already, the first one has nothing left
