"""What a run's folder says of itself, and where its model goes: the card, one folder of base and adapter, the hub."""

from __future__ import annotations

import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import support
from forwardtune.models import load_model
from forwardtune.trajectory import read_log
from support.command import REVIEWS, Setting, cli, done, read, refused, write_task


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def runs(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All weights, LoRA over a folder, LoRA over a GGUF file, a prefix; and one by Adam."""
    folder = tmp_path_factory.mktemp("runs")
    support.write_gguf(folder / "tiny.gguf")
    gguf = Setting(folder / "tiny.gguf", setting.task)
    done(*setting.train(folder / "all", lr=1e-2, log_completions=None))
    done(*setting.train(folder / "lora", lr=1.0, tune="lora"))
    done(*gguf.train(folder / "over-gguf", lr=1.0, tune="lora"))
    done(*setting.train(folder / "prefix", tune="prefix"))
    done(*setting.train(folder / "adam", method="adam", lr=1e-3))
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def card_of(run: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card."""
    _, head, text = (run / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("name", ["all", "lora", "over-gguf", "prefix", "adam"])
def test_card_says_what_the_run_was(setting: Setting, runs: dict[str, Path], name: str) -> None:
    data, text = card_of(runs[name])
    metrics = read(runs[name])
    assert data["library_name"] == ("peft" if name in ("lora", "over-gguf", "prefix") else "transformers")
    assert data["metrics"] == ["accuracy"]
    (index,) = data["model-index"]
    assert index["results"][0]["metrics"][0]["value"] == metrics["test"]["accuracy"]
    assert ("mezo" in data["tags"]) == (name != "adam")
    for key in ("accuracy", "loss", "macro_f1", "calibration_error"):
        row = f"| {key.replace('_', ' ')} | {metrics['before'][key]:.4f} | {metrics['test'][key]:.4f} |"
        assert row in text
    assert "11 train, 3 dev, 6 test" in text
    assert "--batch-size 4" in text
    if name != "adam":
        log = read_log(runs[name] / "steps.jsonl")
        for fact in ("MeZO", "rule: sgd", "eps: 0.001", log.end["digest"], "forwardtune replay steps.jsonl"):
            assert fact in text, fact
    else:
        assert "backpropagation" in text
        assert "replay" not in text


def test_card_holds_no_data_and_no_path(runs: dict[str, Path]) -> None:
    for run in runs.values():
        text = (run / "README.md").read_text(encoding="utf-8")
        assert not any(review in text for review, _ in REVIEWS)
        assert str(run.parent) not in text
        assert "/tmp" not in text


def test_rates_that_were_found_are_in_the_card(setting: Setting, tmp_path: Path) -> None:
    done(*setting.train(tmp_path / "run", lr="auto", eps="auto", steps=40))
    assert re.search(r"- learning rate: .*found by the run", card_of(tmp_path / "run")[1])


@pytest.mark.parametrize("name", ["all", "lora", "over-gguf", "prefix"])
def test_the_code_of_the_card_opens_the_folder(
    runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"## Use\n.*?```python\n(.*?)```", card_of(runs[name])[1], re.DOTALL)
    monkeypatch.chdir(runs[name])
    found: dict[str, Any] = {}
    exec(code, found)
    expected, _ = load_model(str(runs[name]))
    tokens = support.token_batch()
    with torch.no_grad():
        assert torch.equal(found["model"].eval()(tokens).logits, expected(tokens).logits)


# --- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "over-gguf"])
def test_merged_model_is_the_adapted_one(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    done("merge", "--model", runs[name], "--output-dir", tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged, (adapted, _) = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), load_model(str(runs[name]))
    base = adapted.get_base_model()
    tokens = support.token_batch()
    with torch.no_grad():
        found, expected = merged(tokens).logits, adapted(tokens).logits
        with adapted.disable_adapter():
            assert not torch.allclose(found, adapted(tokens).logits, atol=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert merged.dtype == base.dtype == torch.float32
    done("generate", "--model", tmp_path / "merged", "--prompt", "a film", "--max-new-tokens", 2)


def test_half_precision_is_rounded_once(runs: dict[str, Path], tmp_path: Path) -> None:
    """Also an adapter as large as its base: the weights are the float32 sum, rounded."""
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    adapter = load_file(run / "adapter_model.safetensors")
    save_file({name: 30 * tensor for name, tensor in adapter.items()}, run / "adapter_model.safetensors")
    done("merge", "--model", run, "--output-dir", tmp_path / "merged", "--dtype", "bfloat16")
    adapted, _ = load_model(str(run), dtype="bfloat16")
    expected = adapted.float().merge_and_unload().to(torch.bfloat16).state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


def test_what_cannot_be_merged(setting: Setting, runs: dict[str, Path], tmp_path: Path) -> None:
    for model, words in ((runs["all"], "holds no adapter"), (runs["prefix"], "a prefix.*cannot be merged")):
        with refused(tmp_path, words) as ran:
            ran(cli("merge", "--model", model, "--output-dir", tmp_path / "merged"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with refused(tmp_path, "not empty") as ran:
        ran(cli("merge", "--model", runs["lora"], "--output-dir", tmp_path / "full"))


# --- push -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub's two requests, answered here."""
    seen: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **how: Any) -> Any:
        seen.update(how, repo=repo_id)
        return types.SimpleNamespace(repo_id=repo_id)

    def create_commit(self: HfApi, repo_id: str, operations: Any, **how: Any) -> Any:
        seen["files"] = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
        return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", _endpoint="", repo_url=None)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return seen


PRIVATE = {"predictions.jsonl", "outcomes.json", "completions.jsonl", "history.jsonl", "dev.jsonl", "objective.jsonl"}


@pytest.mark.parametrize("name", ["all", "lora"])
def test_push_uploads_the_model_and_no_example(
    runs: dict[str, Path], hub: dict[str, Any], name: str, tmp_path: Path
) -> None:
    run = shutil.copytree(runs[name], tmp_path / "run")
    done("report", run)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "model.safetensors").write_bytes(b"x")
    (run / "completions.jsonl").write_text("{}\n")
    (run / "train.csv").write_text("text\nsecret\n")
    ran = done("push", run, "--repo", "me/tuned", "--private")
    assert (hub["repo"], hub["private"], hub["exist_ok"]) == ("me/tuned", True, True)
    uploaded = set(hub["files"])
    weights = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    assert {weights, "README.md", "steps.jsonl", "tokenizer.json", "metrics.json", "task.yaml"} <= uploaded
    assert ("initial.safetensors" in uploaded) == (name == "lora")
    assert not uploaded & (PRIVATE | {"train.csv"})
    assert not any("/" in path for path in uploaded)
    assert not any(review.encode() in content for content in hub["files"].values() for review, _ in REVIEWS[:4]
                   if content[:1] in b"{-#p")  # fmt: skip
    assert "https://hub/me/tuned/commit/1" in ran.err


def test_push_uploads_more_if_it_is_told_to(runs: dict[str, Path], hub: dict[str, Any], tmp_path: Path) -> None:
    run = shutil.copytree(runs["all"], tmp_path / "run")
    done("report", run, "--no-plots")
    (run / "completions.jsonl").write_text("{}\n")
    told = done("push", run, "--repo", "me/tuned", "--with-predictions", "--dry-run").err
    assert "predictions.jsonl" in told
    assert not hub
    done("push", run, "--repo", "me/tuned", "--with-predictions", "--with-samples")
    assert {"predictions.jsonl", "outcomes.json", "completions.jsonl", "report/report.html"} <= set(hub["files"])


def test_push_that_fails_says_what_to_do(runs: dict[str, Path], tmp_path: Path) -> None:
    """Tests run without network."""
    with refused(tmp_path, "me/tuned could not be written.*hf auth login.*network") as ran:
        ran(cli("push", runs["all"], "--repo", "me/tuned"))
    with refused(tmp_path, "no name of the hub|could not be written") as ran:
        ran(cli("push", runs["all"], "--repo", "a//b"))
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs["all"] / "steps.jsonl", begun)
    with refused(tmp_path, "no tuned model yet: finish the run") as ran:
        ran(cli("push", begun, "--repo", "me/tuned"))
