"""LoRA whose A starts from what of the inputs goes with the errors: what A is, what it costs, and what a run keeps of it."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import support
from forwardtune.errors import InputError
from forwardtune.models import error_directions, load_model, start_from_errors, tune
from forwardtune.models.error_directions import _sketch
from forwardtune.trajectory import read_log
from support.command import STEPS, Setting, cli, done, write_task

RANK, TARGETS = 4, [r"mlp\.down_proj"]
ERRORS = {
    "tune": "lora",
    "lora_rank": RANK,
    "lora_init": "errors",
    "freeze_a": True,
    "lora_targets": TARGETS[0],
    "lr": 1e-1,
    "eps": 1e-2,
}


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    tokens = support.token_batch(9, length=12, seed=1)
    return [
        {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some} for some in tokens.chunk(count)
    ]


def adapted(family: str = "llama", targets: Any = TARGETS, dtype: torch.dtype = torch.float32, rank: int = RANK) -> Any:
    return tune(support.tiny_model(family, dtype), support.tokenizer(), "lora", lora_rank=rank, lora_targets=targets)


def rows_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.named_parameters() if "lora_A" in name}


def choice(model: Any, batch: Any) -> Tensor:
    """A choice between two words, on the last token."""
    logits = model(input_ids=batch["input_ids"]).logits[:, -1, [3, 5]]
    return F.cross_entropy(logits, batch["input_ids"][:, 0] % 2, reduction="none")


def by_backpropagation(model: Any, given: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every layer the mean input and ``sum e (x - mu)^T`` over the tokens with an error, with e from a backward pass."""
    inputs: dict[str, list[Tensor]] = {}
    errors: list[Tensor] = []
    last: list[Tensor] = []
    layers = {name: module for name, module in model.named_modules() if name.endswith("down_proj")}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].detach().flatten(0, 1))
        )
        for name, layer in layers.items()
    ]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(lambda _, x: last.append(x[0])))
    for batch in given:
        loss = model(**batch).loss
        errors.append(torch.autograd.grad(loss, last[-1])[0].flatten(0, 1))
    for hook in hooks:
        hook.remove()
    e = torch.cat(errors).double()
    at = e.abs().amax(1) > 0
    found = {}
    for name, seen in inputs.items():
        x = torch.cat(seen).double()[at]
        found[f"{name}.lora_A.default.weight"] = x.mean(0), e[at].T @ (x - x.mean(0))
    return found


def test_rows_are_the_mean_and_what_goes_with_the_errors(random_state_untouched: None) -> None:
    model = adapted(dtype=torch.float64)
    expected = by_backpropagation(model, batches())
    start_from_errors(model, batches())
    found = rows_of(model)
    assert found.keys() == expected.keys()
    for name, a in found.items():
        mean, products = expected[name]
        unit = a / a.norm(dim=1, keepdim=True)
        assert torch.allclose(unit @ unit.T, torch.eye(RANK, dtype=torch.float64), atol=1e-5), name
        assert abs(float(unit[0] @ mean / mean.norm())) == pytest.approx(1, abs=1e-6)
        best = torch.linalg.svd(products).Vh[: RANK - 1]
        span = torch.linalg.qr(torch.cat([mean[None], best]).T)[0][:, 1:]
        kept = (unit[1:] @ span).square().sum() / (RANK - 1)
        assert kept > 0.999, name


def test_a_choice_between_two_words_has_one_direction_beside_the_mean() -> None:
    model = adapted()
    given = batches()
    start_from_errors(model, given, choice)
    for name, a in rows_of(model).items():
        assert a.any(dim=1).tolist() == [True, True, False, False], name
    # And a step along it moves the difference of the two words more than one of the same length elsewhere.
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("1.mlp.down_proj"))
    weight = layer.base_layer.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(sum(choice(model, batch).sum() for batch in given), weight)
    a = rows_of(model)[f"{name}.lora_A.default.weight"].float()[:2]
    inside = torch.linalg.qr(a.T)[0]
    assert (gradient @ inside).norm() > 0.9 * gradient.norm()  # the last layer adds to the head's input itself


def test_it_asks_no_layer_for_a_gradient_and_leaves_nothing_behind() -> None:
    model = adapted()
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    seen: list[bool] = []
    hooks = [
        m.register_forward_hook(lambda _, x, out: seen.append(out.requires_grad))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    start_from_errors(model, batches())
    for hook in hooks:
        hook.remove()
    assert seen.count(True) == 3  # the head's, of three batches
    before = rows_of(model)

    def fails(model: Any, batch: Any) -> Tensor:
        model(**batch)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        start_from_errors(model, batches(), fails)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == tuned
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(a, before[name]) for name, a in rows_of(model).items())
    assert all(p.grad is None for p in model.parameters())


def test_padding_and_batches_change_nothing() -> None:
    models = []
    for given in (batches(1), batches(3)):
        ids = given[0]["input_ids"]
        padded = {
            **given[0],
            "input_ids": torch.cat([ids, ids[:, :2]], 1),
            "labels": torch.cat([ids, torch.full_like(ids[:, :2], -100)], 1),
        }
        padded["attention_mask"] = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :2])], 1)
        model = adapted(dtype=torch.float64)
        # Sums of losses, as means over other numbers of tokens weigh batches differently.
        own = lambda model, batch: model(**batch).loss * len(batch["labels"])  # noqa: E731
        start_from_errors(model, [padded, *given[1:]], own)
        models.append(rows_of(model))
    for name, a in models[0].items():
        other = models[1][name]
        assert torch.allclose((a @ other.T).square().sum(), (a @ a.T).square().sum(), rtol=1e-3), name


def test_inputs_of_tokens_that_predict_nothing_are_not_kept() -> None:
    """Where a batch says which tokens predict; what A becomes does not depend on it, nor on whether it is right."""
    given = batches()
    for batch in given:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :9] = -100
    kept: list[int] = []
    shown = error_directions._shown

    def noted(*args: Any) -> Any:
        found = shown(*args)
        kept.extend(len(x) for _, x in found[0].inputs.values())
        return found

    def own(model: Any, batch: Any) -> Tensor:
        return model(input_ids=batch["input_ids"], labels=batch.get("wanted", batch.get("labels"))).loss

    cases = {
        "labels": given,
        "positions": [
            {"input_ids": b["input_ids"], "wanted": b["labels"], "positions": (b["labels"].roll(-1, 1) != -100).flatten().nonzero()[:, 0].flip(0)}
            for b in given
        ],
        "nothing": [{"input_ids": b["input_ids"], "wanted": b["labels"]} for b in given],
        "others": [{"input_ids": b["input_ids"], "wanted": b["labels"], "labels": b["labels"].roll(3, 1)} for b in given],
    }  # fmt: skip
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(error_directions, "_shown", noted)
        for name, some in cases.items():
            kept.clear()
            model = adapted(dtype=torch.float64)
            start_from_errors(model, some, own)
            rows[name] = rows_of(model), list(kept)
    layers, whole = 2, 3 * 12  # of a batch of three rows
    assert rows["nothing"][1] == [whole] * layers * 3
    assert rows["labels"][1] == [3 * 4] * layers * 3  # three labels, and the token before the first
    assert rows["positions"][1] == [3 * 3] * layers * 3
    assert rows["others"][1].count(whole) == layers * 3  # once more
    for name in ("labels", "positions", "others"):
        assert all(torch.equal(a, rows["nothing"][0][layer]) for layer, a in rows[name][0].items()), name


def test_layers_whose_tokens_are_not_the_heads_keep_their_a() -> None:
    how = peft.LoraConfig(r=RANK, target_modules=["wo"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(support.tiny_model("t5"), how)
    before = rows_of(model)
    ids = support.token_batch(3, 12)
    start_from_errors(model, [{"input_ids": ids, "decoder_input_ids": ids[:, :7], "labels": ids[:, :7].contiguous()}])
    for name, a in rows_of(model).items():
        assert torch.equal(a, before[name]) == ("encoder" in name), name


@pytest.mark.parametrize("family", ["bert", "opt", "gpt_neox"])
def test_other_families(family: str) -> None:
    targets = {"bert": [r"intermediate\.dense"], "opt": ["fc2"], "gpt_neox": ["dense_4h_to_h"]}[family]
    model = adapted(family, targets)
    before = rows_of(model)
    start_from_errors(model, batches())
    assert all(not torch.equal(a, before[name]) for name, a in rows_of(model).items() if "layer.0" not in name)
    assert all(a.isfinite().all() for a in rows_of(model).values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:::bitsandbytes", "ignore:::torchao", "ignore:::peft")
def test_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    if not find_spec({"nf4": "bitsandbytes", "int8": "torchao"}[kind]):
        pytest.skip("needs its package")
    from support.quantised import save_dense

    save_dense(tmp_path / "dense")
    model, tokenizer = load_model(str(tmp_path / "dense"), quantize=kind)
    how = {"lora_rank": RANK, "lora_targets": TARGETS, "freeze_a": True}
    model = tune(model, tokenizer, "lora", lora_init="errors", inputs=batches(), **how)
    assert all(a.isfinite().all() and a.any(dim=1).all() for a in rows_of(model).values())
    assert {n.rpartition(".lora_")[2][0] for n, p in model.named_parameters() if p.requires_grad} == {"B"}


def test_what_cannot_start_so_is_refused() -> None:
    with pytest.raises(InputError, match="raise the rank"):
        start_from_errors(adapted(rank=1), batches())
    with pytest.raises(InputError, match="a few batches"):
        start_from_errors(adapted(), [])
    with pytest.raises(InputError, match="no LoRA layer"):
        start_from_errors(support.tiny_model(), batches())
    with pytest.raises(InputError, match="a loss that has a gradient"):
        start_from_errors(adapted(), batches(), lambda model, batch: model(**batch).loss.detach())
    model = adapted()
    model.get_base_model().get_output_embeddings = lambda: None
    with pytest.raises(InputError, match="no vocabulary head"):
        start_from_errors(model, batches())
    with pytest.raises(InputError, match="belong together"):
        tune(support.tiny_model(), support.tokenizer(), "lora", lora_init="errors")


def test_a_run_keeps_its_a_and_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    setting = Setting(tiny_folder, write_task(tmp_path / "task"))
    own = {"assignment": "example", "rank": 0, "stratify": "label", **ERRORS}
    ran = cli(*setting.train(tmp_path / "whole", **own))
    assert ran.code == 0, ran.err
    assert re.search(rf"A from the errors of \d+ training examples, \d of {RANK} rows", ran.err)
    done(*setting.train(tmp_path / "part", **{**own, "steps": STEPS - 2}))
    done(*setting.resume(tmp_path / "part", steps=STEPS))
    whole, part = (read_log(tmp_path / name / "steps.jsonl") for name in ("whole", "part"))
    assert part.end["digest"] == whole.end["digest"]
    assert whole.header["group_size"] == 2
    saved = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    initial = load_file(tmp_path / "whole" / "initial.safetensors")
    for name, tensor in saved.items():
        begun = initial[name.replace(".weight", ".default.weight")]
        assert support.same_bits(tensor, begun) == ("lora_A" in name), name
    again = ("replay", tmp_path / "whole", "--model", setting.model, "--output-dir", tmp_path / "again")
    done(*again)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_sketch_keeps_the_leading_directions() -> None:
    draw = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 6, dtype=torch.float64, generator=draw))[0] for n in (500, 40))
    products = left @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 0.1, 0.1, 0.1], dtype=torch.float64)) @ right.T
    sketch = _sketch(500, 4)
    assert sketch.shape == (500, 96)
    found = torch.linalg.svd(sketch.T @ products).Vh[:3]
    assert (found @ right[:, :3]).square().sum() > 2.9
    assert torch.equal(_sketch(20, 4), torch.eye(20, dtype=torch.float64))
