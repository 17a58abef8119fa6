"""LoRA whose A starts from the principal directions of the inputs: what A is, what is tuned beside it, and what a run keeps of it."""

from __future__ import annotations

import json
import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import support
from forwardtune import MeZO, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError, LogError
from forwardtune.models import load_model, start_from_inputs, tune
from forwardtune.trajectory import read_log
from support.command import STEPS, Setting, done, message_of, read, write_task
from support.trainers import Kill, KilledError, quiet_config

RANK, WIDTH = 4, support.SIZES["hidden_size"]
EVA = {"tune": "lora", "lora_rank": RANK, "lora_init": "eva", "freeze_a": True, "lr": 1e-1, "eps": 1e-2}


def batches(count: int = 3, **changes: Any) -> list[dict[str, Tensor]]:
    tokens = support.token_batch(8, length=12, seed=1)
    return [{"input_ids": some, "attention_mask": torch.ones_like(some), **changes} for some in tokens.chunk(count)]


def adapted(inputs: Any = None, init: str = "eva", **changes: Any) -> Any:
    """A tiny model with LoRA, whose A is from inputs."""
    how = {"lora_rank": RANK, "lora_init": init, "freeze_a": True, **changes}
    given = (inputs or batches()) if init == "eva" else None
    return tune(support.tiny_model(), support.tokenizer(), "lora", inputs=given, **how)


def directions(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def inputs_of(model: Any, name: str, given: list[dict[str, Tensor]]) -> Tensor:
    """What a layer is given, shape (tokens, width), padding left out."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name.rpartition(".lora_A")[0])
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in given:
            model(**batch)
    handle.remove()
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, given, strict=True)]).double()


# --- what A is ---------------------------------------------------------------------------------------------------


def test_rows_are_the_leading_eigenvectors_of_the_second_moment(random_state_untouched: None) -> None:
    model = adapted()
    found = directions(model)
    assert len(found) == 4  # query and value projections of two layers
    for name, a in found.items():
        assert a.dtype == torch.float32
        scale = math.sqrt(RANK / (3 * WIDTH))
        assert torch.allclose(a @ a.T, torch.eye(RANK) * scale**2, atol=1e-6)
        x = inputs_of(model, name, batches())
        kept = (x @ a.T.double() / scale).square().sum()
        # No other subspace holds more of the inputs; the sketches of the batches may lose a little.
        assert kept >= 0.98 * torch.linalg.eigvalsh(x.T @ x)[-RANK:].sum()
        assert kept > 1.5 * RANK / WIDTH * x.square().sum()


def test_one_batch_loses_nothing() -> None:
    (batch,) = batches(1)
    model = adapted([batch])
    for name, a in directions(model).items():
        x = inputs_of(model, name, [batch])
        expected = torch.linalg.svd(x).Vh[:RANK]
        overlap = a.double() @ expected.T / math.sqrt(RANK / (3 * WIDTH))
        assert torch.allclose(overlap.abs(), torch.eye(RANK, dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("says", ["attention_mask", "examples_at"])
def test_padding_does_not_count(says: str) -> None:
    (batch,) = batches(1)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    padded = {
        "input_ids": torch.cat([ids, torch.full_like(ids, 7)], dim=1),
        "attention_mask": torch.cat([mask, torch.zeros_like(mask)], dim=1),
    }
    forward = None
    if says == "examples_at":
        whose = torch.arange(len(ids))[:, None].expand_as(ids)
        padded["examples_at"] = torch.cat([whose, torch.full_like(ids, -1)], dim=1)
        forward = lambda model, one: model(input_ids=one["input_ids"])  # noqa: E731
    model, plain = adapted(init="default"), adapted([batch])
    start_from_inputs(model, [padded], forward)
    for name, a in directions(model).items():
        other = directions(plain)[name]
        assert torch.allclose((a @ other.T).square(), (other @ other.T).square(), atol=1e-6), name


def test_more_directions_than_tokens_are_filled_up() -> None:
    one = [{"input_ids": torch.tensor([[5]])}]
    for a in directions(adapted(one)).values():
        assert torch.allclose(a @ a.T * (3 * WIDTH / RANK), torch.eye(RANK), atol=1e-5)


def test_it_starts_as_the_model_and_tunes_b_alone(random_state_untouched: None) -> None:
    base = support.tiny_model()
    before = support.snapshot(base)
    (batch,) = batches(1)
    logits = base(**batch).logits
    model = tune(base, support.tokenizer(), "lora", lora_init="eva", freeze_a=True, inputs=batches())
    assert torch.equal(model(**batch).logits, logits)
    assert {name.rpartition(".lora_")[2][0] for name, p in model.named_parameters() if p.requires_grad} == {"B"}
    assert not any(module._forward_pre_hooks for module in model.modules())
    support.assert_same_bits(model.unload(), before)


def test_frozen_a_and_gaussian_a() -> None:
    plain, gaussian = (adapted(init=init, freeze_a=False) for init in ("default", "gaussian"))
    assert {"A", "B"} == {n.rpartition(".lora_")[2][0] for n, p in plain.named_parameters() if p.requires_grad}
    assert gaussian.peft_config["default"].init_lora_weights == "gaussian"
    spread = torch.cat([a.flatten() for a in directions(gaussian).values()]).std()
    assert abs(spread - 1 / RANK) < 0.05


def test_all_linear_layers_are_targets() -> None:
    model = adapted(lora_targets=["all-linear"])
    assert {name.split(".")[-4] for name in directions(model)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_targets_may_be_patterns_of_names() -> None:
    model = adapted(lora_targets=[r"layers\.1\.mlp\.(up|down)_proj", "k_proj"])
    assert {".".join(name.split(".")[4:7]).removesuffix(".lora_A") for name in directions(model)} == {
        "1.mlp.up_proj", "1.mlp.down_proj", "0.self_attn.k_proj", "1.self_attn.k_proj"
    }  # fmt: skip
    with pytest.raises(InputError, match="neither a layer's name nor a regular expression"):
        adapted(lora_targets=["(up"])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore:::bitsandbytes", "ignore:::torchao", "ignore:::peft")
def test_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    if not find_spec({"nf4": "bitsandbytes", "int8": "torchao"}[kind]):
        pytest.skip("needs its package")
    from support.quantised import save_dense

    def model() -> Any:
        loaded, tokenizer = load_model(str(tmp_path / "dense"), quantize=kind)
        return tune(loaded, tokenizer, "lora", lora_rank=RANK, lora_init="eva", freeze_a=True, inputs=batches())

    save_dense(tmp_path / "dense")
    one, two = model(), model()
    optimizer = MeZO(one, lr=1e-1, eps=1e-2)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for batch in batches():
            optimizer.step(lambda batch=batch: one(**batch, labels=batch["input_ids"]).loss)
    replay(read_log(tmp_path / "steps.jsonl"), two)
    for name, p in two.named_parameters():
        if "lora_" in name:
            assert support.same_bits(p, dict(one.named_parameters())[name]), name


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"lora_init": "gausian", "inputs": None}, r"not as 'gausian'; did you mean gaussian\?"),
        ({"inputs": None}, "belong together"),
        ({"lora_init": "default"}, "belong together"),
        ({"inputs": []}, "a few batches"),
        ({"lora_rank": WIDTH + 1}, f"rank of {WIDTH + 1} is above the width {WIDTH}"),
    ],
    ids=str,
)
def test_what_has_no_principal_directions_is_refused(how: dict[str, Any], words: str) -> None:
    given = {"lora_rank": RANK, "lora_init": "eva", "inputs": batches(), **how}
    with pytest.raises(InputError, match=words):
        tune(support.tiny_model(), support.tokenizer(), "lora", **given)


def test_models_without_layers_to_start_are_refused() -> None:
    with pytest.raises(InputError, match="no LoRA layer"):
        start_from_inputs(support.tiny_model(), batches())
    model, targets = support.tiny_model("qwen3_moe"), ["q_proj", "experts"]
    with pytest.raises(InputError, match="experts in one tensor"):
        tune(model, support.tokenizer(), "lora", lora_targets=targets, lora_init="eva", inputs=batches())


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def run(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done(*setting.train(folder, assignment="example", rank=0, eval_steps=2, **EVA))
    return folder


def test_run_keeps_its_a(setting: Setting, run: Path, tmp_path: Path) -> None:
    initial, saved = load_file(run / "initial.safetensors"), load_file(run / "adapter_model.safetensors")
    log = read_log(run / "steps.jsonl")
    tensors = {tensor["name"] for tensor in log.header["tensors"]}
    assert all("lora_B" in name for name in tensors)
    assert initial.keys() == tensors | {name.replace("lora_B", "lora_A") for name in tensors}
    assert (log.header["run"]["lora_init"], log.header["run"]["freeze_a"]) == ("eva", True)
    assert len(log.header["frozen"]) == 64
    for name, tensor in saved.items():
        begun = initial[name.replace(".weight", ".default.weight")]
        assert support.same_bits(tensor, begun) == ("lora_A" in name), name
    ran = done("eval", "--model", run, "--task", setting.task, "--batch-size", 4, "--device", "cpu")
    assert json.loads(ran.out)["test"] == read(run)["test"]


def test_replay_needs_no_data(setting: Setting, run: Path, tmp_path: Path) -> None:
    steps = read(run)["best_step"]
    done("replay", run, "--model", setting.model, "--steps", steps, "--output-dir", tmp_path / "again")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (run / weights).read_bytes()


def test_killed_run_goes_on_with_the_same_bits(setting: Setting, run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    done(*setting.train(part, assignment="example", rank=0, eval_steps=2, **{**EVA, "steps": STEPS - 2}))
    done(*setting.resume(part, steps=STEPS))
    assert read_log(part / "steps.jsonl").end["digest"] == read_log(run / "steps.jsonl").end["digest"]


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_another_a_is_refused(setting: Setting, run: Path, tmp_path: Path, damage: str) -> None:
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    initial = copied / "initial.safetensors"
    tensors = load_file(initial)
    initial.unlink()
    if damage == "another":
        save_file({name: t + ("lora_A" in name) for name, t in tensors.items()}, initial)
    words = {"missing": "is missing.*restore the file", "another": "another A"}[damage]
    arguments = ["replay", copied, "--model", setting.model, "--output-dir", tmp_path / "new"]
    for command in (arguments, setting.resume(copied, steps=STEPS + 1)):
        assert re.search(words, message_of(*command), re.DOTALL)


# --- in Python ---------------------------------------------------------------------------------------------------


def trainer(model: Any, folder: Path, **options: Any) -> MeZOTrainer:
    rows = [{"input_ids": row, "labels": row} for row in support.token_batch(8).tolist()]
    config = quiet_config(folder, **{"max_steps": 4, "learning_rate": 1e-1, "eps": 1e-2, **options})
    return MeZOTrainer(model=model, args=config, train_dataset=rows)


@pytest.mark.parametrize("options", [{}, {"assignment": "example", "rank": 0}], ids=["shared", "example"])
def test_trainer_goes_on_beside_the_same_a(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(adapted(), tmp_path / "whole", **options)
    whole.train()
    killed = trainer(adapted(), tmp_path / "run", **options)
    killed.add_callback(Kill(2))
    with pytest.raises(KilledError):
        killed.train()
    again = trainer(adapted(), tmp_path / "run", **options)
    again.train(resume_from_checkpoint=True)
    assert read_log(again.step_log).end["digest"] == read_log(whole.step_log).end["digest"]
    other = trainer(adapted(init="default"), tmp_path / "run", max_steps=6, **options)
    with pytest.raises(LogError, match="another A"):
        other.train(resume_from_checkpoint=True)


def test_peft_model_of_the_users_own(tmp_path: Path) -> None:
    """Its frozen A is in the digest, and stays as it is."""
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(support.tiny_model(), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = {name: a.clone() for name, a in directions(model).items()}
    own = trainer(model, tmp_path)
    own.train()
    log = read_log(own.step_log)
    assert log.header["frozen"]
    assert log.end["digest"] != log.header["base"]
    assert all(support.same_bits(a, before[name]) for name, a in directions(model).items())
