"""What a run is that says nothing of its method, and which weights it tunes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forwardtune import replay
from forwardtune.cli.dev import usual_patience
from forwardtune.config import describe
from forwardtune.errors import InputError
from forwardtune.models import load_model, tune
from forwardtune.models.late import late_down, late_mlp
from forwardtune.tasks import get_task
from forwardtune.trajectory import Log, read_log
from support import save_tiny_model, tiny_model
from support.command import STEPS, Setting, cli, done, read, refused, weights, write_task

# Of two layers, the second two thirds are both; so each name is one of layer 0.
MATRICES = {
    "llama": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gemma3": {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "opt": {"fc1", "fc2"},
    "gpt2": {"mlp.c_fc", "mlp.c_proj"},
    "gpt_neox": {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    "bert": {"intermediate.dense", "output.dense"},
    "mixtral": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
    "qwen3_moe": {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"},
}


@pytest.mark.parametrize("family", MATRICES)
def test_late_mlp_is_the_feed_forward_matrices(family: str) -> None:
    names = late_mlp(tiny_model(family))
    found = {name.split(".0.", 1)[1].removesuffix(".weight") for name in names if ".0." in name}
    assert found == MATRICES[family]
    assert len(names) == 2 * len(found)


BACK = {
    "llama": "mlp.down_proj", "gemma3": "mlp.down_proj", "opt": "fc2", "gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "bert": "output.dense",
}  # fmt: skip


@pytest.mark.parametrize("family", BACK)
def test_late_down_leads_back_to_the_width(family: str) -> None:
    model = tiny_model(family)
    found = late_down(model)
    assert {name.split(".0.", 1)[1] for name in found if ".0." in name} == {BACK[family]}
    assert len(found) == 2
    adapted = tune(model, None, "lora", lora_targets=["late-down"])
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2


ATTENTION = {
    "llama": {"self_attn.q_proj", "self_attn.v_proj"}, "opt": {"self_attn.q_proj", "self_attn.v_proj"}, "gpt2": {"attn.c_attn"},
    "gpt_neox": {"attention.query_key_value"}, "bert": {"attention.self.query", "attention.self.value"},
}  # fmt: skip


@pytest.mark.parametrize("family", ATTENTION)
def test_late_attention_is_queries_and_values(family: str) -> None:
    adapted = tune(tiny_model(family), None, "lora", lora_targets=["late-attention"])
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert {
        name.split(".0.", 1)[1].removesuffix(".lora_A.default.weight") for name in names if ".0." in name
    } == ATTENTION[family]
    both = tune(tiny_model(family), None, "lora", lora_targets=["late-down", "late-attention"])
    assert sum("lora_A" in name for name, _ in both.named_parameters()) == len(names) + 2


def test_models_without_such_layers_say_so() -> None:
    with pytest.raises(InputError, match=r"has no query and value projections in late layers\. Layers are"):
        tune(tiny_model("mamba"), None, "lora", lora_targets=["late-attention"])
    with pytest.raises(InputError, match="which late-down stands for: name the targets"):
        tune(tiny_model("mixtral"), None, "lora", lora_targets=["late-down"])


def test_the_first_third_of_the_layers_is_left_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=40, num_hidden_layers=6, num_attention_heads=2
    )
    names = late_mlp(transformers.LlamaForCausalLM(config))
    assert {int(name.split(".")[2]) for name in names} == {2, 3, 4, 5}


def test_a_model_without_feed_forward_blocks_tunes_all_matrices_of_these_layers() -> None:
    names = late_mlp(tiny_model("mamba"))
    assert any("in_proj" in name for name in names)
    assert not any("norm" in name for name in names)


def test_tune_says_what_lacks() -> None:
    with pytest.raises(InputError, match="no layers in a row, of which late-mlp"):
        late_mlp(_Flat())


class _Flat(torch.nn.Module):
    class config:  # noqa: N801
        hidden_size = 4

        @classmethod
        def get_text_config(cls) -> Any:
            return cls


def test_only_these_require_grad() -> None:
    model = tiny_model("llama")
    tune(model, None, "late-mlp")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(late_mlp(model))


#: What is given -> the method.
PLAIN = {"model": "m", "task": "sst2"}
MEANT: list[tuple[dict[str, Any], str]] = [
    ({}, "feedback"),
    ({"lr": 1e-4, "steps": 3, "eps": 1e-3}, "feedback"),
    ({"lora_rank": 16, "feedback_steps": 5}, "feedback"),
    ({"quantize": "nf4"}, "feedback"),
    ({"tune": "late-mlp"}, "forward"),
    ({"offload": "disk"}, "forward"),
    *(({name: value}, "mezo") for name, value in {
        "tune": "all", "assignment": "shared", "rank": 4, "rule": "sign", "perturbation": "copy", "direction": "rademacher",
        "objective": "accuracy", "estimator": "one_sided", "probes": 2,
    }.items()),
    ({"tune": "lora"}, "mezo"),
    ({"tune": "lora", "lora_init": "eva"}, "mezo"),
    ({"tune": "lora", "quantize": "nf4"}, "mezo"),
    ({"method": "forward", "tune": "all"}, "forward"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "method"), MEANT, ids=lambda value: str(value))
def test_who_says_how_the_method_shall_be_gets_the_papers(given: dict[str, Any], method: str) -> None:
    run = describe("train", {**PLAIN, **given})
    assert run.method == method
    assert run.assignment == given.get("assignment", "shared" if method == "mezo" else "example")
    assert run.tune == given.get("tune", {"feedback": "lora", "forward": "late-mlp", "mezo": "all"}[method])
    if method == "feedback":
        assert (run.lora_targets, run.lora_init, run.freeze_a, run.rank) == ("late-down", "feedback", True, 0)
    elif run.tune == "lora":
        assert run.lora_targets is None
        assert not run.freeze_a


def adapted_layers(log: Log) -> set[str]:
    return {re.sub(r".*\.(\w+)\.lora_B.*", r"\1", tensor["name"]) for tensor in log.header["tensors"]}


def test_a_run_by_default_learns_and_replays(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "run", method=None, feedback_steps=4))
    assert "starting from 4 minibatches' errors" in ran.err
    assert read(tmp_path / "run")["method"] == "feedback"
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert log.header["assignment"] == "example"
    assert adapted_layers(log) == {"down_proj"}
    done("replay", tmp_path / "run", "--model", setting.model, "--output-dir", tmp_path / "again")
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "again" / adapter).read_bytes() == (tmp_path / "run" / adapter).read_bytes()


def test_a_model_without_a_place_for_feedback_gets_forward(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "mixtral"), write_task(tmp_path / "task"))
    ran = done(*setting.train(tmp_path / "run", method=None))
    assert (
        "MixtralForCausalLM has no linear layers that lead from a feed-forward block back: the method is forward"
        in ran.err
    )
    assert read(tmp_path / "run")["method"] == "forward"
    assert read_log(tmp_path / "run" / "steps.jsonl").header["run"]["tune"] == "late-mlp"
    done(*setting.resume(tmp_path / "run", steps=STEPS + 2))
    named = cli(*setting.train(tmp_path / "named", method="feedback"))
    assert named.code == 2
    assert "no linear layers that lead from a feed-forward block back" in named.err


def free_text(setting: Setting) -> Path:
    """The task, its label a text to be written."""
    free = setting.task.with_name("free.yaml")
    free.write_text(re.sub(r"answers:.*\n", "target: label\nmax_new_tokens: 3\n", setting.task.read_text()))
    return free


def test_free_text_starts_from_the_errors_too(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    of_text = Setting(setting.model, free_text(setting))
    ran = done(*of_text.train(tmp_path / "run", method=None, feedback_steps=3, steps=2))
    assert "starting from 3 minibatches' errors" in ran.err
    assert read(tmp_path / "run")["method"] == "feedback"
    begun = load_file(tmp_path / "run" / "initial.safetensors")
    assert all(b.any() for name, b in begun.items() if ".lora_B." in name)
    assert adapted_layers(read_log(tmp_path / "run" / "steps.jsonl")) == {"down_proj", "q_proj", "v_proj"}
    done(*of_text.resume(tmp_path / "run", steps=3))
    done(*of_text.train(tmp_path / "named", method="feedback", lora_targets="late-down", feedback_steps=3, steps=2))
    assert adapted_layers(read_log(tmp_path / "named" / "steps.jsonl")) == {"down_proj"}


def test_layers_that_add_nothing_to_the_stream_alone_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    with refused(tmp_path, "no layer with an adapter does: choose late-down") as ran:
        ran(cli(*setting.train(tmp_path / "run", method="feedback", lora_targets="late-attention")))
    done(*setting.train(tmp_path / "run", method="mezo", tune="lora", lora_targets="late-attention", steps=2))


def test_the_walk_lowers_the_loss_and_the_steps_raise_an_objective_of_text(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    of_text = Setting(setting.model, free_text(setting))
    done(*of_text.train(tmp_path / "loss", method="feedback", feedback_steps=3, steps=2))
    ran = done(*of_text.train(tmp_path / "f1", method="feedback", objective="f1", feedback_steps=3, steps=2))
    assert "starting from 3 minibatches' errors" in ran.err
    begun = [(tmp_path / name / "initial.safetensors").read_bytes() for name in ("loss", "f1")]
    assert begun[0] == begun[1]
    losses = [[step.loss for step in read_log(tmp_path / name / "steps.jsonl").records] for name in ("loss", "f1")]
    assert losses[0] != losses[1]
    assert all(-1 <= loss <= 0 for loss in losses[1])  # F1, to be raised


def test_plan_names_the_way_that_was_decided_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    for task in (setting.task, free_text(setting)):
        ran = done("plan", "--model", setting.model, "--task", task, "--no-weights", "--json", "--batch-size", 4)
        titles = [row["way"] for row in json.loads(ran.out)["ways"]]
        assert titles[:2] == ["LoRA that starts from the errors", "late feed-forward matrices"]
    # models without a place are experts', whose routing asks for values: with weights this test takes two minutes
    monkeypatch.setattr("forwardtune.cli.tuned.lacks_place", lambda model: "there is no place")
    ran = done("plan", "--model", setting.model, "--task", setting.task, "--no-weights", "--json", "--batch-size", 4)
    titles = [row["way"] for row in json.loads(ran.out)["ways"]]
    assert titles[0] == "late feed-forward matrices"
    assert titles.count("late feed-forward matrices") == 1


def test_a_run_of_late_matrices_learns_and_replays(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    done(*setting.train(tmp_path / "run", method="forward"))
    assert read(tmp_path / "run")["method"] == "forward"
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert log.header["assignment"] == "example"
    assert log.header["run"]["tune"] == "late-mlp"
    assert all(tensor["name"].split(".mlp.")[1:] for tensor in log.header["tensors"])
    model, tokenizer = load_model(str(setting.model))
    before = weights(setting.model)
    replay(log, tune(model, tokenizer, "late-mlp"))
    tuned, _ = load_model(str(tmp_path / "run"))
    for (name, a), b in zip(model.named_parameters(), tuned.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert weights(setting.model) == before != weights(tmp_path / "run")


ENDS = [
    ({}, 5), ({"method": "feedback", "lr": "auto"}, 5), ({"lr": 1e-2}, None), ({"eval_steps": 3}, None), ({"average": "last:5"}, None),
    ({"dev_examples": 0}, None), ({"method": "feedback", "objective": "f1"}, None), ({"method": "mezo"}, None), ({"task": "squad"}, None),
]  # fmt: skip


@pytest.mark.parametrize(("given", "patience"), ENDS, ids=str)
def test_what_says_nothing_of_rates_may_end_early(given: dict[str, Any], patience: int | None) -> None:
    task = get_task(given.get("task", "sst2"))
    assert usual_patience(describe("train", {**PLAIN, **given}), task) == patience


def test_a_walk_that_left_nothing_to_gain_ends_the_run(tmp_path: Path) -> None:
    setting = Setting(save_tiny_model(tmp_path / "model", "llama"), write_task(tmp_path / "task"))
    done(*setting.train(tmp_path / "run", method=None, lr=None, eps=None, steps=100))
    metrics = read(tmp_path / "run")
    assert metrics["stopped"] == "patience"
    lines = [json.loads(line) for line in (tmp_path / "run" / "dev.jsonl").read_text().splitlines()]
    best = min(lines, key=lambda line: line["dev"]["loss"])
    assert sum(line["step"] > best["step"] for line in lines) == 5
    assert metrics["steps"] == lines[-1]["step"] < 100
    assert metrics["best_step"] == best["step"]
    assert "(more --steps and a larger --patience would extend it)" in cli(*setting.resume(tmp_path / "run")).err
    adapter = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert log.steps > best["step"] == log.rollbacks[-1].to  # so what replay rebuilds are the weights that were kept
    done("replay", tmp_path / "run", "--model", setting.model, "--output-dir", tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == adapter

    shutil.copytree(tmp_path / "run", tmp_path / "killed")  # when it had ended, and was measured
    (tmp_path / "killed" / "metrics.json").unlink()
    done(*setting.resume(tmp_path / "killed"))
    assert read(tmp_path / "killed")["steps"] == log.steps
    assert (tmp_path / "killed" / "adapter_model.safetensors").read_bytes() == adapter

    done(*setting.resume(tmp_path / "run", steps=120, patience=1000))
    assert read(tmp_path / "run")["steps"] == 120
