"""Quantised models: tuned beside their integers, replayed bit for bit, merged; and what is said where they cannot run."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import support
from forwardtune import MeZO, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError, LogError
from forwardtune.models import forward, is_quantised, load_model, merge_adapter, save_model, tune, weights_of
from forwardtune.models.quantised import quantisation
from forwardtune.trajectory import read_log
from support.command import Setting, cli, done, message_of, read, write_task
from support.quantised import (
    AT_LOAD,
    STORED,
    dense_model,
    save_dense,
    save_fp8,
    save_mxfp4,
    save_quantised,
    write_config,
)
from support.trainers import Kill, KilledError, quiet_config

# Their packages say of themselves what is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::bitsandbytes"),
    pytest.mark.filterwarnings("ignore:::torchao"),
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:::gptqmodel"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up .*gptqmodel_:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:::compressed_tensors"),
]

Load = Callable[[str], tuple[Any, Any]]
KINDS = (*AT_LOAD, *STORED)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def stored(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a quantised checkpoint, made when first asked for."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = save_quantised(tmp_path_factory.mktemp(kind), dense, kind)
        return folders[kind]

    return of


@pytest.fixture(scope="module")
def load(dense: Path, stored: Callable[[str], Path]) -> Load:
    """A quantised model, quantised as it is loaded or before."""

    def of(kind: str) -> tuple[Any, Any]:
        if kind in AT_LOAD:
            pytest.importorskip(AT_LOAD[kind], reason=f"needs {AT_LOAD[kind]}")
            return load_model(str(dense), quantize=kind)
        return load_model(str(stored(kind)))

    return of


@pytest.fixture(scope="module")
def setting(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(dense, write_task(tmp_path_factory.mktemp("task")))


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, input_ids=support.token_batch(), **inputs).logits.float()


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def tuned(load: Load, kind: str, mode: str, path: Path, steps: int = 3, **options: Any) -> tuple[Any, MeZO]:
    """Tune over a quantised model in a loop, with a log."""
    model = tune(*load(kind), mode)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, **options)
    batch = support.token_batch()

    def closure() -> torch.Tensor:
        scores = forward(model, input_ids=batch).logits.float()
        return scores.pow(2).mean((1, 2)) if options.get("assignment") == "example" else scores.pow(2).mean()

    with StepLog(path, optimizer):
        for _ in range(steps):
            optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_weights_beside_the_integers_are_tuned_and_replayed(load: Load, kind: str, tmp_path: Path) -> None:
    model, optimizer = tuned(load, kind, "lora", tmp_path / "steps.jsonl")
    log = read_log(tmp_path / "steps.jsonl")
    assert log.header["frozen"] == optimizer.tuned.frozen_digest()  # nothing else moved
    assert log.header["base"] != log.end["digest"]
    assert weights_of(load(kind)[0]) == weights_of(dense_model())
    again = tune(*load(kind), "lora")
    assert replay(log, again) == 3
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["prefix", "norm"])
def test_prefixes_and_norms_are_tuned_too(load: Load, kind: str, mode: str, tmp_path: Path) -> None:
    model, optimizer = tuned(load, kind, mode, tmp_path / "steps.jsonl", steps=2)
    log = read_log(tmp_path / "steps.jsonl")
    assert log.header["frozen"] == optimizer.tuned.frozen_digest()
    assert log.header["base"] != log.end["digest"]
    again = tune(*load(kind), mode)
    assert replay(log, again) == 2
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_every_example_has_a_direction_of_the_adapter(load: Load, kind: str, tmp_path: Path) -> None:
    _, optimizer = tuned(load, kind, "lora", tmp_path / "steps.jsonl", assignment="example")
    log = read_log(tmp_path / "steps.jsonl")
    assert all(record.examples == 3 and not record.left_out for record in log.records)
    again = tune(*load(kind), "lora")
    assert replay(log, again) == 3
    assert log.end["digest"] == optimizer.tuned.digest() != log.header["base"]


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_never_tuned(load: Load, kind: str) -> None:
    model, tokenizer = load(kind)
    with pytest.raises(InputError, match=r"quantised.*lora or prefix.*norm\|bias"):
        tune(model, tokenizer, "all")
    if kind not in ("gptq", "awq"):  # whose integers are no parameters
        with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj.weight\w* is quantised.*lora or prefix"):
            tune(model, tokenizer, r"layers\.0\.")


def trainer(model: Any, folder: Path, cls: Any = MeZOTrainer, **options: Any) -> Any:
    rows = [{"input_ids": row, "labels": row} for row in support.token_batch(8).tolist()]
    config = quiet_config(folder, **{"max_steps": 4, "learning_rate": 1e-2, "eps": 1e-2, **options})
    return cls(model=model, args=config, train_dataset=rows)


@pytest.mark.parametrize(
    ("kind", "mode"), [("int4", "lora"), ("int4", "norm"), ("nf4", "norm"), ("nf4", "lora"), ("compressed-w4", "lora")]
)
def test_trainer_takes_what_transformers_refuses_to_train(load: Load, kind: str, mode: str, tmp_path: Path) -> None:
    model = tune(*load(kind), mode)
    own = trainer(model, tmp_path / "own")
    own.train()
    assert read_log(own.step_log).end["digest"] != read_log(own.step_log).header["base"]
    assert "_hf_peft_config_loaded" not in vars(model)
    if (kind, mode) in (("int4", "lora"), ("int4", "norm"), ("nf4", "norm")):  # nothing of transformers was changed
        with pytest.raises(ValueError, match=r"cannot perform fine-tuning|do not support training"):
            trainer(model, tmp_path / "theirs", transformers.Trainer)


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_a_killed_run_goes_on_with_the_same_bits(load: Load, kind: str, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = trainer(tune(*load(kind), "lora"), tmp_path / "whole")
    whole.train()
    killed = trainer(tune(*load(kind), "lora"), tmp_path / "run", **saving)
    killed.add_callback(Kill(2))
    with pytest.raises(KilledError):
        killed.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    resumed = trainer(tune(*load(kind), "lora"), tmp_path / "run", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert read_log(resumed.step_log).end["digest"] == read_log(whole.step_log).end["digest"]
    other = trainer(tune(*load("int8"), "lora"), tmp_path / "run", max_steps=6)
    with pytest.raises(LogError, match="not stored in the same bits"):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", ["nf4", "bitsandbytes-nf4"])
def test_asking_for_the_state_changes_nothing(load: Load, kind: str) -> None:
    """bitsandbytes packs the weights of some processors anew, and back with other scales when a checkpoint is written."""
    model, _ = load(kind)
    model = tune(model, None, "lora")
    before = logits(model)
    digest = MeZO(model, lr=1e-3).tuned.frozen_digest()
    assert torch.equal(logits(model), before)
    assert MeZO(model, lr=1e-3).tuned.frozen_digest() == digest


@pytest.mark.parametrize("kind", ["compressed-w4", "compressed-w8a8", "compressed-fp8"])
def test_compressed_weights_stay_compressed(load: Load, stored: Callable[[str], Path], kind: str) -> None:
    model, _ = load(kind)
    layer = model.model.layers[0].self_attn.q_proj
    before = {name: (id(p), p.dtype) for name, p in layer.named_parameters()}
    assert torch.bfloat16 not in {dtype for name, (_, dtype) in before.items() if "scale" not in name}
    ours = logits(model)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 7, dtype=torch.bfloat16))  # an exception leaves nothing behind
    assert {name: (id(p), p.dtype) for name, p in layer.named_parameters()} == before
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stored(kind)).eval()
    assert torch.equal(ours, logits(theirs))
    assert theirs.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16  # which made itself dense


@pytest.mark.parametrize("kind", AT_LOAD)
def test_an_adapter_loads_with_peft_over_the_same_base(load: Load, dense: Path, kind: str, tmp_path: Path) -> None:
    import peft

    model, _ = tuned(load, kind, "lora", tmp_path / "steps.jsonl")
    save_model(model, support.tokenizer(), tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantisation(kind, torch.bfloat16, "cpu")
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as load_model has it
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(theirs), logits(model))
    ours, _ = load_model(str(tmp_path / "adapter"), quantize=kind)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_into_a_dense_model(load: Load, kind: str, tmp_path: Path) -> None:
    model, tokenizer = load(kind)
    model = tune(model, tokenizer, "lora")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_model(model, tokenizer, tmp_path / "adapter")
    with model.disable_adapter():
        untuned = logits(model)
    merged, _ = merge_adapter(tmp_path / "adapter", "float32", quantize=kind if kind in AT_LOAD else None)
    assert type(merged) is transformers.LlamaForCausalLM
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not is_quantised(merged)
    assert far(logits(model), untuned) > 0.2
    rounding = 0.06 if kind in ("compressed-w8a8", "compressed-fp8", "bitsandbytes-int8") else 0.02
    assert far(logits(merged), logits(model)) < rounding  # of activations, to 8 bits or to bfloat16
    save_model(merged, tokenizer, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert torch.equal(logits(load_model(str(tmp_path / "merged"))[0]), logits(merged))


def test_what_cannot_be_merged_is_refused(load: Load, tmp_path: Path) -> None:
    model, tokenizer = load("nf4")
    save_model(tune(model, tokenizer, "prefix"), tokenizer, tmp_path / "prefix")
    with pytest.raises(InputError, match=r"a prefix.*merge a LoRA adapter"):
        merge_adapter(tmp_path / "prefix", quantize="nf4")


def test_an_adapter_of_a_dense_model_is_merged_too(dense: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(dense), dtype="float32")
    model = tune(model, tokenizer, "lora")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
    save_model(model, tokenizer, tmp_path / "adapter")
    merged, _ = merge_adapter(tmp_path / "adapter", "float32")
    assert far(logits(merged), logits(model)) < 1e-2  # whose base is rounded to bfloat16, as it is stored
    assert merge_adapter(tmp_path / "adapter")[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match="holds no adapter"):
        merge_adapter(dense)


def test_a_log_belongs_to_one_quantisation(load: Load, tmp_path: Path) -> None:
    tuned(load, "nf4", "lora", tmp_path / "steps.jsonl")
    for other in ("int8", "int4"):
        with pytest.raises(LogError, match=r"not stored in the same bits.*quantised as it was then"):
            replay(tmp_path / "steps.jsonl", tune(*load(other), "lora"))


# --- on the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", AT_LOAD)
def test_the_commands_quantise_as_they_load(setting: Setting, kind: str, tmp_path: Path) -> None:
    pytest.importorskip(AT_LOAD[kind], reason=f"needs {AT_LOAD[kind]}")
    how: dict[str, Any] = {"quantize": kind, "tune": "lora"}
    ran = done(*setting.train(tmp_path / "run", **how))
    assert f"quantised ({kind})" in ran.err
    header = read(tmp_path / "run" / "steps.jsonl")[0]
    assert header["run"]["quantize"] == kind
    assert "frozen" in header
    done("replay", tmp_path / "run" / "steps.jsonl", "--model", setting.model, "--output-dir", tmp_path / "again")
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")
    evaluated = json.loads(done(*setting.eval(model=tmp_path / "run")).out)
    assert evaluated["settings"]["quantize"] == kind  # the run says it
    assert evaluated["test"]["loss"] == read(tmp_path / "run")["test"]["loss"]
    base = json.loads(done(*setting.eval(quantize=kind)).out)
    assert base["test"]["loss"] == read(tmp_path / "run")["before"]["loss"]
    plan = ["plan", "--alone", "--model", setting.model, "--task", setting.task, "--device", "cpu", "--batch-size", 4]
    assert "--quantize" in done(*plan, "--quantize", kind, "--tune", "lora").err


@pytest.mark.parametrize("kind", ["bitsandbytes-nf4", "torchao-int8", "compressed-w4", "gptq", "awq"])
def test_the_commands_know_a_quantised_checkpoint(
    setting: Setting, stored: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    here = Setting(stored(kind), setting.task)
    ran = done(*here.train(tmp_path / "run", tune="lora"))
    assert f"quantised ({kind.split('-')[0]}" in ran.err
    done("replay", tmp_path / "run" / "steps.jsonl", "--model", here.model, "--output-dir", tmp_path / "again")
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")
    assert "norm|bias" in message_of(*here.train(tmp_path / "all"))
    done(*here.train(tmp_path / "usual", method=None, feedback_steps=3, steps=2))  # by default an adapter
    assert read(tmp_path / "usual")["method"] == "feedback"
    for method, mode in (("mezo", "all"), ("forward", "late-mlp")):  # matrices that are integers
        refused = cli(*here.train(tmp_path / "refused", method=method))
        assert f"--tune {mode} would have to move them" in refused.err
        assert "loading" not in refused.err  # before anything costly runs
    assert "quantised already" in message_of(*here.train(tmp_path / "twice", quantize="int8", tune="lora"))
    assert not (tmp_path / "all").exists()
    # Norms are weights of the model itself, which is written as it is stored.
    done(*here.train(tmp_path / "norms", tune="norm"))
    done("replay", tmp_path / "norms" / "steps.jsonl", "--model", here.model, "--output-dir", tmp_path / "same")
    ours, again = (load_model(str(tmp_path / name))[0] for name in ("norms", "same"))
    assert is_quantised(ours)
    assert torch.equal(logits(ours), logits(again))


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_gguf_file_is_quantised_with_and_without_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("torchao", reason="needs torchao")
    support.write_gguf(tmp_path / "model.gguf")
    found = []
    for cache in ("off", str(tmp_path / "cache"), str(tmp_path / "cache")):
        monkeypatch.setenv("FORWARDTUNE_CACHE", cache)
        model, _ = load_model(str(tmp_path / "model.gguf"), quantize="int8")
        assert is_quantised(model)
        found.append(logits(model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])
    assert 0 < far(found[0], logits(load_model(str(tmp_path / "model.gguf"))[0])) < 0.05


# --- formats that do not run here -------------------------------------------------------------------------------------

# Format -> what a checkpoint says of itself, what the refusal names, the package that would change that.
ELSEWHERE: dict[str, tuple[dict[str, Any], str, str]] = {
    "fbgemm_fp8": ({}, "GPU", "fbgemm_gpu"),
    "auto-round": ({"bits": 4, "group_size": 32}, "auto-round", "auto_round"),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "hqq", "hqq"),
    "aqlm": ({}, "aqlm", "aqlm"),
    "vptq": ({}, "vptq", "vptq"),
    "quanto": ({"weights": "int8"}, "quanto", "optimum.quanto" if find_spec("optimum") else "optimum"),
    "eetq": ({}, "GPU|kernels", "eetq"),
    "spqr": ({}, "GPU|spqr", "spqr_quant"),
    "higgs": ({}, "GPU|flute", "flute"),
    "awq": ({"bits": 4, "group_size": 32}, "gptqmodel", "gptqmodel"),
    "gptq": ({"bits": 4, "group_size": 32}, "optimum|gptqmodel", "gptqmodel"),
    "tomorrow": ({}, "does not know", "tomorrow"),
}


@pytest.mark.parametrize("method", ELSEWHERE)
def test_a_format_that_cannot_run_here_is_refused(setting: Setting, method: str, tmp_path: Path) -> None:
    told, words, package = ELSEWHERE[method]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is here")
    write_config(tmp_path / "model", dense_model(), {"quant_method": method, **told})
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    support.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=rf"quantised \({method}.*({words}).*dense checkpoint, with quantize='nf4'"):
        load_model(str(tmp_path / "model"))
    message = message_of(*Setting(tmp_path / "model", setting.task).train(tmp_path / "run", tune="lora"))
    assert "with --quantize nf4" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this device computes with these formats")
@pytest.mark.parametrize(("kind", "save"), [("fp8", save_fp8), ("mxfp4", save_mxfp4)])
def test_what_is_made_dense_is_said(setting: Setting, kind: str, save: Callable[[Path], Path], tmp_path: Path) -> None:
    """transformers does it without a word where it is quiet, and the memory is that of the dense model."""
    here = Setting(save(tmp_path / kind), setting.task)
    ran = done(*here.train(tmp_path / "run", steps=2))  # all weights: they are ordinary ones
    assert f"quantised ({kind})" in ran.err
    assert "transformers made it dense" in ran.err
    assert "frozen" not in read(tmp_path / "run" / "steps.jsonl")[0]
    model, _ = load_model(str(here.model))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    if kind == "fp8":
        assert far(logits(model), logits(dense_model())) < 0.1


def test_what_quantize_cannot_do_is_refused(setting: Setting, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown quantisation 'nf5': choose nf4, int8, int4"):
        load_model(str(dense), quantize="nf5")
    monkeypatch.setattr("forwardtune.models.quantised.find_spec", lambda name: None)
    for kind, package in AT_LOAD.items():
        with pytest.raises(InputError, match=rf"{kind} is made by {package}.*pip install 'forwardtune\[quantized\]'"):
            load_model(str(dense), quantize=kind)
