"""Other ways to tune, in one table: by shapes alone, and measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import support
from forwardtune.cli import ways
from forwardtune.cli.estimates import _Fused, _Live, estimate
from forwardtune.config import describe
from forwardtune.durations import bytes_of
from forwardtune.errors import InputError
from forwardtune.models import blank_model, tune
from forwardtune.models.feedback import _begun, _learned, _step, step_by_shapes
from forwardtune.objectives import logits_at
from support.command import Setting, done, flags, message_of, process, write_task
from support.process import python


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("ways")))


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TinyLlama-1.1B's ``config.json``, and nothing beside it."""
    folder = tmp_path_factory.mktemp("config")
    transformers.LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def in_process(*arguments: object) -> Any:
    """What a command prints as JSON in a process of its own, whose memory holds nothing of other tests."""
    running = process(*arguments)
    out, err = running.communicate()
    assert running.returncode == 0, err
    return json.loads(out)


def planned(**options: Any) -> tuple[dict[str, Any], str]:
    """The rows of a plan by their ways, and what people are told."""
    ran = done("plan", *flags({"device": "cpu", "json": True, **options}))
    rows = json.loads(ran.out)["ways"]
    found = {row["way"]: row for row in rows}
    assert len(found) == len(rows)  # no way is there twice
    return found, ran.err


@pytest.mark.parametrize(
    ("text", "amount"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), ("1.5 GiB", 3 * 2**29), ("512MiB", 2**29), ("2G", 2 * 10**9)],
)
def test_memory_as_people_write_it(text: str, amount: int) -> None:
    assert bytes_of(text) == amount


@pytest.mark.parametrize("text", ["", "80", "0GB", "-1GB", "much", "80 gb", "GB"])
def test_what_is_no_memory(text: str) -> None:
    with pytest.raises(InputError, match="no amount of memory: write it as 80GB"):
        bytes_of(text)


def test_memory_that_is_none_is_refused() -> None:
    assert "write it as 80GB" in message_of("plan", "--model", "x", "--task", "y", "--memory", "much")


def test_live_tensors_are_counted_and_weights_are_not() -> None:
    """At its most a chain holds what a layer reads and what it gives: 40 and 160 floats, while the input waits."""
    chain = nn.Sequential(nn.Linear(10, 40), nn.Linear(40, 10)).to("meta")
    x = torch.ones(4, 10, device="meta")
    with torch.no_grad(), _Live((*chain.parameters(), x)) as live:
        chain(x)
    assert live.peak == 4 * (40 + 10) * 4
    with torch.no_grad(), _Live((*chain.parameters(), x)) as live:
        kept = chain[0](x)
        chain[1](kept)
        chain[1](kept)  # the first is gone by now
    assert live.peak == 4 * (40 + 10) * 4


@pytest.mark.parametrize("targets", [["late-down"], ["late-down", "late-attention"]], ids=["down", "and attention"])
def test_a_walk_by_shapes_is_as_large_as_one_of_numbers(targets: list[str]) -> None:
    """Of live tensors, which a step of a real one counts."""

    def walked(device: str) -> int:
        config = transformers.LlamaConfig(
            vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2
        )  # fmt: skip
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
        model = tune(model, support.tokenizer(), "lora", lora_rank=4, lora_targets=targets, freeze_a=True)
        ids = torch.arange(8 * 100).view(8, 100) % 90
        batch = {"input_ids": ids.to(device), "positions": torch.arange(99, 800, 100), "labels": torch.zeros(8)}
        known = (*model.parameters(), *model.buffers())
        if device == "meta":
            with _Live(known) as live, _Fused():
                step_by_shapes(model, lambda: logits_at(model, batch))
            return live.peak

        def losses(model: Any, batch: Any) -> torch.Tensor:
            return logits_at(model, batch).logsumexp(-1)

        with torch.no_grad():
            way, fed = _learned(model, [batch], losses)
            walk = _begun(model, batch, losses, 1e-3, fed, way)
            _step(model, walk, batch, losses)  # Adam's moments are there now
            with _Live((*known, *walk.maps.values())) as live:
                _step(model, walk, batch, losses)
        return live.peak

    assert walked("meta") == pytest.approx(walked("cpu"), rel=0.2)


WEIGHTS = 1_100_048_384
LINEAR = 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632)


def test_memory_by_config_alone(config_alone: Path) -> None:
    """Differences between ways are those of their weights, by arithmetic."""
    common = {"model": config_alone, "no_weights": True, "batch_size": 4, "max_length": 64}
    rows, said = planned(**common, memory="16GB")
    assert "every example is taken to be 64 tokens long" in said
    assert not any(row["measured"] or row["seconds_per_step"] for row in rows.values())
    peak = {way: row["peak_memory_bytes"] for way, row in rows.items()}
    assert peak["all weights"] > 2 * WEIGHTS
    int8, nf4 = peak["LoRA"] - peak["LoRA over int8"], peak["LoRA"] - peak["LoRA over nf4"]
    lent = 2 * 2048 * 5632  # the layer that is made dense while it runs
    assert int8 + lent == pytest.approx(LINEAR, rel=0.01)
    assert nf4 + lent == pytest.approx(1.5 * LINEAR, rel=0.03)
    assert peak["all weights, offloaded to a file"] < peak["LoRA over nf4"]
    assert peak["all weights, a direction for every example"] > peak["all weights"]
    assert {way for way, row in rows.items() if row["fits"]} == set(rows)
    # What this process holds of other tests is in every peak, so the room is one between them, not one of so many GB.
    room = (peak["all weights, offloaded to a file"] + peak["LoRA"]) // 2
    small, _ = planned(**common, memory=f"{room / 10**9:.3f}GB")
    assert {way for way, row in small.items() if not row["fits"]} >= {"all weights", "LoRA"}
    assert small["all weights, offloaded to a file"]["fits"]
    assert "--task TASK" in small["LoRA"]["command"]
    assert "--quantize nf4" in small["LoRA over nf4"]["command"]


def test_moments_and_copies_count(config_alone: Path) -> None:
    inputs = {
        "input_ids": torch.zeros(2, 16, dtype=torch.int64, device="meta"),
        "positions": torch.zeros(2, dtype=torch.int64, device="meta"),
    }

    def bytes_with(**changes: Any) -> int:
        options = describe("plan", {"model": "x", "task": "y", "method": "mezo", **changes})
        return estimate(tune(blank_model(str(config_alone)), None, "all"), inputs, options).bytes

    plain = bytes_with()
    assert bytes_with(rule="adam", rule_state="exact") - plain == 8 * WEIGHTS
    assert bytes_with(rule="adam", rule_state="window") == plain
    assert bytes_with(perturbation="copy") - plain > 2 * WEIGHTS - 2 * 2048 * 5632 - 1
    assert bytes_with(dtype="float32") == plain  # of the model, which is given
    offloaded = bytes_with(offload="disk")
    assert bytes_with(offload="disk", rule="adam", rule_state="exact") - offloaded == 8 * WEIGHTS
    for beside in ({"offload": "cpu"}, {"offload": "disk", "device": "cuda"}):
        assert bytes_with(**beside, rule="adam", rule_state="exact") - offloaded == 3 * 2**25


def test_with_a_tokenizer_the_longest_examples_count(setting: Setting, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((setting.model / name).read_bytes())
    ran = done("plan", "--model", tmp_path, "--task", setting.task, "--no-weights", "--json", "--batch-size", 4)
    longest = json.loads(ran.out)["tokens"]
    assert 0 < longest < 4 * 100
    assert "every example is taken" not in ran.err
    assert "s a step" in ran.err


def test_the_way_that_is_asked_for_is_named_and_there_once(config_alone: Path) -> None:
    common = {"model": config_alone, "no_weights": True, "batch_size": 2, "max_length": 8}
    rows, _ = planned(**common, tune="lora", lora_rank=4)
    assert next(iter(rows)) == "LoRA"
    assert "--lora-rank 4" in rows["LoRA over nf4"]["command"]
    assert "--lora-rank" not in rows["all weights"]["command"]
    own, _ = planned(**common, tune="norm")
    assert list(own) == [ways.ASKED, *ways.WAYS]


def test_other_ways_are_measured_in_processes_of_their_own(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot run says why; the command of one that does is a command that runs."""
    changes: dict[str, dict[str, Any]] = {
        "all weights": {"tune": "all"},
        "LoRA": {"tune": "lora"},
        "LoRA of nothing": {"tune": "lora", "lora_targets": "nothing"},
    }
    monkeypatch.setattr(ways, "WAYS", changes)
    rows, said = planned(model=setting.model, task=setting.task, batch_size=4, lr=1e-3, time_budget="1h", tune="all")
    assert list(rows) == list(changes)
    for way in ("all weights", "LoRA"):
        row = rows[way]
        assert row["measured"], row
        assert row["fits"]
        assert row["seconds_per_step"] > 0
        assert row["steps"] > 1
    lost = rows["LoRA of nothing"]
    assert not lost["measured"]
    assert "no linear layer is called 'nothing'" in lost["why_not_measured"]
    assert "no linear layer is called 'nothing'" in said
    command = shlex.split(rows["LoRA"]["command"])
    assert command[:2] == ["forwardtune", "train"]
    done(*command[1:], "--steps", 1, "--output-dir", tmp_path / "run")


def test_what_does_not_fit_is_not_loaded(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "WAYS", {"all weights": {"tune": "all"}, "LoRA": {"tune": "lora"}})
    rows, said = planned(model=setting.model, task=setting.task, batch_size=4, memory="1MiB", tune="all")
    assert "all weights: does not fit, and is not loaded" in said
    for row in rows.values():
        assert row["fits"] is False
        assert not row["measured"]
        assert row["seconds_per_step"] > 0  # estimated
        assert row["why_not_measured"] == "it would not fit"


def test_blank_models_have_no_weights_and_all_shapes(tiny_folder: Path) -> None:
    blank, full = blank_model(str(tiny_folder)), support.tiny_model()
    assert all(p.is_meta for p in blank.parameters())
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in full.named_parameters()}
    assert not blank.training


def test_an_adapter_alone_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds an adapter.*: give the base model"):
        blank_model(str(tmp_path))


REAL = {"model": "smollm2-135m", "task": "reviews", "dtype": "bfloat16", "device": "cpu", "json": True}


OFF = {
    "LoRA that starts from the errors": 0.15,  # what a walk leaves in the heap differs between runs
    "all weights": 0.1,
    "LoRA over int8": 0.15,  # what the quantiser leaves in the heap differs between runs
}

# The table of these ways alone, in a process whose memory holds nothing of other tests.
THESE = """
import json, sys
from forwardtune.cli import main, ways

ways.WAYS = {way: ways.WAYS[way] for way in json.loads(sys.argv[1])}
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def by_shapes() -> dict[str, int]:
    """Peak memory of ways to tune the embedded model, by shapes alone."""
    table = python(THESE, json.dumps([*OFF]), "plan", *flags({"no_weights": True, **REAL}))
    return {row["way"]: row["peak_memory_bytes"] for row in json.loads(table)["ways"]}


@pytest.mark.real_model
@pytest.mark.parametrize(("way", "off"), OFF.items())
def test_estimates_come_true(by_shapes: dict[str, int], way: str, off: float) -> None:
    """Within a tenth of what three steps take."""
    real = in_process("plan", *flags({"alone": True, **REAL, **ways.WAYS[way]}))
    assert by_shapes[way] == pytest.approx(real["peak_memory_bytes"], rel=off)


def test_settings_of_directions_of_examples_are_planned(setting: Setting) -> None:
    """What belongs to them alone is no setting of the minibatch's directions."""
    options = {"model": setting.model, "task": setting.task, "assignment": "example", "normalize": "spread"}
    rows, _ = planned(**options, no_weights=True, memory="8GB")
    assert all(row["peak_memory_bytes"] > 0 for row in rows.values())
