"""LoRA that starts where a walk along the errors ends: its gradient, what it costs, when it goes back, and what a run keeps of it."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import support
from forwardtune.cli.session import Session
from forwardtune.errors import InputError
from forwardtune.models import lacks_place, load_model, start_from_errors, start_from_feedback, tune
from forwardtune.models.error_directions import taken
from forwardtune.models.feedback import _begun, _gradient, _learned, _step, rehearsed
from forwardtune.points.side_path import ROUGH, TOLERANCE, tolerance
from forwardtune.trajectory import read_log
from support.command import STEPS, Setting, cli, done, write_task
from support.models import SIZES

RANK = 4
DOWN = {"llama": [r"mlp\.down_proj"], "opt": ["fc2"], "gpt_neox": ["dense_4h_to_h"], "bert": [r"\d\.output\.dense"]}


def batches(count: int = 6, dtype: Any = None) -> list[dict[str, Tensor]]:
    tokens = support.token_batch(4 * count, length=10, seed=1)
    return [{"input_ids": some, "attention_mask": torch.ones_like(some)} for some in tokens.chunk(count)]


def adapted(family: str = "llama", targets: Any = None, dtype: torch.dtype = torch.float32, rank: int = RANK) -> Any:
    model = support.tiny_model(family, dtype)
    return tune(model, support.tokenizer(), "lora", lora_rank=rank, lora_targets=targets or DOWN[family], freeze_a=True)


def choice(model: Any, batch: Any) -> Tensor:
    """A choice between two words, on the last token, by the first one."""
    logits = model(**batch).logits[:, -1, [3, 5]]
    return F.cross_entropy(logits, batch["input_ids"][:, 0] % 2, reduction="none")


def b_of(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if ".lora_B." in name}


def mean_loss(model: Any, given: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return float(torch.cat([choice(model, batch) for batch in given]).mean())


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_the_gradient_is_exact_in_the_last_layer_and_goes_downhill_in_those_before(family: str) -> None:
    model = adapted(family, dtype=torch.float64)
    given = batches()
    walk = _begun(model, given[0], choice, 1e-2, taken(model, given, choice, fill=True))
    for _ in range(2):  # at B = 0, and behind a step
        b = b_of(model)
        expected = dict(zip(b, torch.autograd.grad(choice(model, given[0]).mean(), [*b.values()]), strict=True))
        with torch.no_grad():
            _step(model, walk, given[0], choice)
        found = {name: b.grad for name, b in b_of(model).items()}
        assert found.keys() == expected.keys()
        last = max(found)
        torch.testing.assert_close(found[last], expected[last], rtol=1e-4, atol=1e-7)
        for name, gradient in found.items():
            assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.5, name


def test_a_has_the_mean_the_errors_and_principal_inputs_at_right_angles() -> None:
    plain, filled = adapted(rank=6), adapted(rank=6)
    start_from_errors(plain, batches(), choice)
    start_from_errors(filled, batches(), choice, fill=True)
    for (name, a), b in zip(
        ((n, p) for n, p in filled.named_parameters() if "lora_A" in n),
        (p for n, p in plain.named_parameters() if "lora_A" in n),
        strict=True,
    ):
        unit = F.normalize(a.double(), dim=1)
        torch.testing.assert_close(unit @ unit.T, torch.eye(6, dtype=torch.float64), atol=1e-5, rtol=0)
        assert b.any(dim=1).tolist() == [True, True, False, False, False, False], name
        own = F.normalize(b[:2].double(), dim=1)
        torch.testing.assert_close((unit[:2] @ own.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-4, rtol=0)


def test_coordinates_are_of_one_size() -> None:
    """In all layers, whatever the size of their inputs, measured on the tokens that A was taken from."""
    model, given = adapted(rank=4, dtype=torch.float64), batches()
    seen: dict[Any, list[Tensor]] = {}
    layers = [m for n, m in model.named_modules() if n.endswith("mlp.down_proj")]
    start_from_errors(model, given, choice, fill=True)
    for layer in layers:
        layer.register_forward_pre_hook(lambda m, x: seen.setdefault(m, []).append(x[0].detach()[:, -1]))
    mean_loss(model, given)
    for layer in layers:
        x = torch.cat(seen[layer])
        coordinates = layer.scaling["default"] * x @ layer.lora_A["default"].weight.double().T
        assert float(coordinates[:, 0].mean().abs()) == pytest.approx(1, rel=1e-3)
        torch.testing.assert_close(coordinates[:, 1:].std(0, correction=0), torch.ones(3).double(), rtol=0.1, atol=0)


def test_a_rehearsal_leaves_the_adapter_as_it_was() -> None:
    """Whatever the walk did to it, and where its losses fail on the way, too."""
    model, given = adapted(), batches(3)
    start_from_feedback(model, given, choice, steps=3)  # B is not zero
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = [name for name, p in model.named_parameters() if p.requires_grad]
    seen: list[int] = []
    ticks = iter(range(100))

    def counted(model: Any, batch: Any) -> Tensor:
        seen.append(len(batch["input_ids"]))
        if len(seen) == 7:
            raise RuntimeError("no room")
        return choice(model, batch)

    longest = {name: torch.cat([tensor] * 2) for name, tensor in given[0].items()}
    first, step = rehearsed(model, longest, given[1:], counted, counted, lambda: float(next(ticks)))
    assert seen == [8, 8, 8, 4, 4]  # A and the way back, how long a step is, and steps
    assert (first, step) == (1, 1)
    with pytest.raises(RuntimeError, match="no room"):
        rehearsed(model, longest, given[1:], counted, counted, lambda: float(next(ticks)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == tuned
    assert all(p.grad is None for p in model.parameters())


def test_it_learns_in_forward_passes_and_asks_no_layer_for_a_gradient() -> None:
    model, given = adapted(), batches(8)
    before, seen = mean_loss(model, given), []
    hooks = [
        m.register_forward_hook(lambda m, _, out: seen.append((m, out.requires_grad)))
        for m in model.modules()
        if isinstance(m, nn.Linear)
    ]
    tuned = {name for name, p in model.named_parameters() if p.requires_grad}
    start_from_feedback(model, given * 4, choice, steps=24, rate=0.5)
    for hook in hooks:
        hook.remove()
    assert mean_loss(model, given) < before - 0.05
    head = model.get_output_embeddings()
    assert {m is head for m, grad in seen if grad} == {True}
    assert sum(m is head for m, _ in seen) == 16 + 1 + 24  # for A, for the sizes, and the steps
    assert {name for name, p in model.named_parameters() if p.requires_grad} == tuned
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_walk_that_makes_things_worse_is_undone() -> None:
    model = adapted()
    start_from_feedback(model, batches(8), choice, steps=8, watched=iter([1.0, 2.0, 3.0, 4.0, 5.0]).__next__)
    assert not any(b.any() for b in b_of(model).values())
    model, nothing = adapted(), float("nan")
    start_from_feedback(
        model, batches(8), choice, steps=8, watched=iter([nothing, nothing, 2.0, nothing, 3.0]).__next__
    )
    assert all(b.any() for b in b_of(model).values())  # of the second stretch alone
    model, kept, losses = adapted(), [], iter([5.0, 3.0, 4.0, 2.0, 6.0])

    def watched() -> float:
        kept.append({name: b.detach().clone() for name, b in b_of(model).items()})
        return next(losses)

    start_from_feedback(model, batches(8), choice, steps=8, watched=watched)
    assert len(kept) == 5
    assert all(torch.equal(b, kept[3][name]) for name, b in b_of(model).items())
    stretches = [sum(float((kept[i][n] - kept[j][n]).square().sum()) for n in kept[0]) for i, j in ((2, 1), (3, 1))]
    assert stretches[1] < 0.2 * stretches[0]  # a third of the rate, squared, and it falls


def test_a_rate_is_a_share_of_what_the_layers_add_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, outputs = adapted(), batches(5), []
    layers = [m for n, m in model.named_modules() if n.endswith("mlp.down_proj")]
    hooks = [m.register_forward_hook(lambda _, __, out: outputs.append(out.detach())) for m in layers]
    mean_loss(model, given[:1])
    for hook in hooks:
        hook.remove()
    usual = [float(out.flatten(0, 1).square().mean(1).median().sqrt()) for out in outputs]
    rates, step = [], torch.optim.Adam.step

    def noted(optimizer: torch.optim.Adam, *args: Any) -> Any:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    start_from_feedback(model, given, choice, steps=5, rate=0.1)
    first = 0.1 * (usual[0] ** 2 + usual[1] ** 2) ** 0.5 / 2
    assert rates == pytest.approx([first * left for left in (1, 0.8, 0.6, 0.4, 0.2)], rel=1e-5)


@pytest.mark.parametrize("given", [5, 8])
def test_fewer_batches_than_steps_are_watched_at_their_end(given: int) -> None:
    model, looks = adapted(), []

    def watched() -> float:
        looks.append({name: b.detach().clone() for name, b in b_of(model).items()})
        return -float(len(looks))

    start_from_feedback(model, batches(given), choice, steps=12, watched=watched)
    assert len(looks) == 1 + -(-given // 3)
    assert all(torch.equal(b, looks[-1][name]) for name, b in b_of(model).items())


def test_losses_that_are_not_finite_take_no_step() -> None:
    model = adapted()
    broken = lambda model, batch: choice(model, batch) * (torch.nan if bool(batch["broken"]) else 1.0)  # noqa: E731
    given = [{**batch, "broken": k % 2} for k, batch in enumerate(batches(8))]
    own = lambda model, batch: broken(lambda **b: model(**{k: v for k, v in b.items() if k != "broken"}), batch)  # noqa: E731
    fine, model = adapted(), adapted()
    walks = [_begun(m, given[0], own, 1e-2, taken(m, batches(2), choice, fill=True)) for m in (fine, model)]
    with torch.no_grad():
        for batch in given:
            _step(model, walks[1], batch, own)
            if not batch["broken"]:
                _step(fine, walks[0], batch, own)
    assert all(b.any() for b in b_of(model).values())
    assert all(torch.equal(b, b_of(fine)[name]) for name, b in b_of(model).items())


@pytest.mark.parametrize("family", ["bert", "opt", "gpt_neox", "gpt2"])
def test_other_families(family: str) -> None:
    model, given = adapted(family, DOWN.get(family, [r"mlp\.c_proj"])), batches(8)
    before = mean_loss(model, given)
    start_from_feedback(model, given * 2, choice, steps=16, rate=0.2)
    assert mean_loss(model, given) < before


def test_a_model_that_adds_to_the_last_output_in_its_place() -> None:
    """Falcon adds what attention gave."""
    sizes = {name: size for name, size in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes)).eval()
    model = tune(model, support.tokenizer(), "lora", lora_targets=["late-down"], freeze_a=True)
    start_from_feedback(model, batches(), choice, steps=6)
    assert all(b.any() for b in b_of(model).values())


def test_experts_in_one_tensor_of_the_same_name_are_no_place() -> None:
    """peft would take the name for theirs."""
    config = transformers.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
        first_k_dense_replace=1, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
    )  # fmt: skip
    why = lacks_place(transformers.DeepseekV3ForCausalLM(config))
    assert why == "DeepseekV3ForCausalLM has experts in one tensor of the same name"
    assert lacks_place(support.tiny_model("llama")) is None


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:::bitsandbytes", "ignore:::torchao", "ignore:::peft")
def test_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    if not find_spec({"nf4": "bitsandbytes", "int8": "torchao"}[kind]):
        pytest.skip("needs its package")
    from support.quantised import save_dense

    save_dense(tmp_path / "dense")
    model, tokenizer = load_model(str(tmp_path / "dense"), quantize=kind)
    model = tune(model, tokenizer, "lora", lora_rank=RANK, lora_targets=["late-down"], freeze_a=True)
    given = batches(8)
    before = mean_loss(model, given)
    start_from_feedback(model, given * 2, choice, steps=16, rate=0.2)
    assert mean_loss(model, given) < before


def test_what_cannot_start_so_is_refused() -> None:
    for beside in ("up_proj", "q_proj"):  # queries are as wide as the stream
        with pytest.raises(InputError, match="along the stream that layers add to, and no layer with an adapter does"):
            start_from_feedback(adapted(targets=[beside]), batches(), choice)
    for wrong in ({"steps": 0}, {"rate": 0.0}, {"rate": float("inf")}):
        with pytest.raises(InputError, match="positive number of steps and rate"):
            start_from_feedback(adapted(), batches(), choice, **wrong)
    with pytest.raises(InputError, match="a few batches"):
        start_from_feedback(adapted(), [], choice)
    with pytest.raises(InputError, match="belong together"):
        tune(support.tiny_model(), support.tokenizer(), "lora", lora_init="feedback")


def test_every_layer_of_late_blocks_learns_and_those_before_keep_b_at_zero() -> None:
    """Errors reach no further back than the first layer that adds to the stream."""
    model = adapted(targets=[r"layers\.1\..*o_proj", "q_proj", "v_proj", "up_proj", r"layers\.1\..*down_proj"])
    start_from_feedback(model, batches(8), choice, steps=8)
    for name, b in b_of(model).items():
        assert bool(b.any()) == (".layers.1." in name), name


def test_what_lies_inside_a_block_goes_downhill_too() -> None:
    model, given = adapted(targets=[*DOWN["llama"], "q_proj", "v_proj"], dtype=torch.float64), batches(16)
    with torch.no_grad():
        way, fed = _learned(model, given, choice)
        walk = _begun(model, given[0], choice, 1e-2, fed, way)
    inside = [b for block in walk.blocks for b in block.b()]
    assert len(inside) == 4
    true = torch.autograd.grad(choice(model, given[1]).mean(), inside)
    with torch.no_grad():
        assert _gradient(model, walk, given[1], choice)
    for b, expected in zip(inside, true, strict=True):
        assert torch.cosine_similarity(b.grad.flatten().double(), expected.flatten().double(), 0) > 0.5


def test_tune_starts_from_batches_with_labels() -> None:
    given = [{**batch, "labels": batch["input_ids"]} for batch in batches(8)]
    model = tune(
        support.tiny_model(),
        None,
        "lora",
        lora_rank=RANK,
        lora_targets=["late-down"],
        lora_init="feedback",
        inputs=given,
    )
    assert all(b.any() for b in b_of(model).values())


def test_a_float32_adapter_over_half_precision_is_held_to_what_half_precision_can_show() -> None:
    """As its losses are rounded like the activations that it adds to."""
    for dtype, expected in ((torch.bfloat16, ROUGH), (torch.float32, TOLERANCE[torch.float32])):
        model = adapted(dtype=dtype)
        b = list(b_of(model).values())
        assert {p.dtype for p in b} == {torch.float32}
        assert tolerance(b, model) == expected
    assert tolerance(b, None) == TOLERANCE[torch.float32]


FEEDBACK = {
    "tune": "lora", "lora_rank": RANK, "lora_init": "feedback", "freeze_a": True, "lora_targets": "late-down", "assignment": "example", "rank": 0,
    "stratify": "label", "lr": 1e-1, "eps": 1e-2, "feedback_steps": 6,
}  # fmt: skip


def test_a_run_starts_there_and_goes_on(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tiny_folder, write_task(tmp_path / "task"))
    peaks: list[int] = []
    peak_of = Session.peak_of

    def noted(session: Session, work: Any) -> int:
        peaks.append(
            peak_of(session, work) + (10**12 if not peaks else 0)
        )  # the walk's, as if it took more than the steps
        return peaks[-1]

    monkeypatch.setattr(Session, "peak_of", noted)
    ran = cli(*setting.train(tmp_path / "whole", **FEEDBACK))
    assert ran.code == 0, ran.err
    memory = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert [memory["peak_memory_bytes"], memory["inference_peak_memory_bytes"]] == peaks
    assert "starting from 6 minibatches' errors" in ran.err
    assert "errors: 100%|##########| 13/13" in ran.err
    assert re.search(r"dev loss \d\.\d+ -> \d\.\d+", ran.err)
    done(*setting.train(tmp_path / "part", **{**FEEDBACK, "steps": STEPS - 2}))
    done(*setting.resume(tmp_path / "part", steps=STEPS))
    whole, part = (read_log(tmp_path / name / "steps.jsonl") for name in ("whole", "part"))
    assert part.end["digest"] == whole.end["digest"]
    initial = load_file(tmp_path / "whole" / "initial.safetensors")
    assert all(b.any() for name, b in initial.items() if ".lora_B." in name)
    again = ("replay", tmp_path / "whole", "--model", setting.model, "--output-dir", tmp_path / "again")
    done(*again)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    plain = {**FEEDBACK, "lora_init": "default", "feedback_steps": None}
    done(*setting.train(tmp_path / "plain", **plain))
    measured = [json.loads((tmp_path / name / "metrics.json").read_text())["before"] for name in ("whole", "plain")]
    assert measured[0] == measured[1]  # of the untuned model


def test_steps_of_the_walk_belong_to_it(tiny_folder: Path, tmp_path: Path) -> None:
    setting = Setting(tiny_folder, write_task(tmp_path / "task"))
    ran = cli(*setting.train(tmp_path / "run", tune="lora", feedback_steps=3))
    assert ran.code == 2
    assert "--feedback-steps" in ran.err
