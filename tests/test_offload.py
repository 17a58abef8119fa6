"""Weights that live in a file, or in the host's memory: the bits of a run that has them on the device, and a file that leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from forwardtune.errors import InputError
from forwardtune.method.rules import Adam, Momentum
from forwardtune.models import load_model
from forwardtune.storage import Offloaded, OnDisk, home_of, is_offloaded
from support.offload import HOMES, Beside, tuned
from support.process import python

pytest.importorskip("transformers", reason="needs transformers")


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("family", ["llama", "llama_untied", "opt", "qwen3_moe", "t5", "mamba"])
def test_a_run_has_the_bits_of_a_resident_one(tmp_path: Path, family: str, home: str) -> None:
    resident = tuned(support.tiny_model(family, torch.bfloat16))
    model = support.tiny_model(family, torch.bfloat16)
    assert tuned(model, storage=HOMES[home](tmp_path)) == resident
    assert is_offloaded(model)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"rule": Momentum(0.9, state="window")},
        {"rule": Adam(state="exact")},
        {"estimator": "one_sided", "probes": 2, "rank": 2},
        {"assignment": "example"},
        {"assignment": "example", "perturbation": "both_signs"},
        {"perturbation": "side_path", "rank": 1},
    ],
    ids=str,
)
def test_so_does_every_method(tmp_path: Path, settings: dict[str, Any], home: str) -> None:
    resident = tuned(support.tiny_model(), **settings)
    assert tuned(support.tiny_model(), **settings, storage=HOMES[home](tmp_path)) == resident


@pytest.mark.parametrize("home", HOMES)
def test_frozen_weights_live_there_too(tmp_path: Path, home: str) -> None:
    def model() -> Any:
        made = support.tiny_model("opt")
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("layers.1" in name)
        return made

    offloaded = model()
    assert tuned(offloaded, storage=HOMES[home](tmp_path)) == tuned(model())
    assert all(isinstance(home_of(parameter), Offloaded) for parameter in offloaded.parameters())


@pytest.mark.parametrize("home", HOMES)
def test_the_model_answers_outside_a_step_as_before(tmp_path: Path, home: str) -> None:
    model, tokens = support.tiny_model(), support.token_batch()
    expected = model(tokens).logits
    HOMES[home](tmp_path).place(model)
    assert torch.equal(model(tokens).logits, expected)


def test_weights_come_for_a_module_and_go_with_it() -> None:
    model, present = support.tiny_model(), set()
    Beside().place(model)
    names = {id(module): name for name, module in model.named_modules()}

    def look(module: nn.Module, args: Any) -> None:
        there = (m for m in model.modules() for p in m._parameters.values() if p is not None and not p.isnan().all())
        present.add(frozenset(names[id(m)] for m in there))

    for module in model.modules():
        module.register_forward_pre_hook(look)
    model(support.token_batch())
    assert {"lm_head"} in present
    assert max(map(len, present)) == 1, "two modules at a time"
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_an_interrupt_in_a_forward_pass_leaves_no_stale_weights() -> None:
    model, tokens = support.tiny_model(), support.token_batch()
    expected = model(tokens).logits
    home = Beside()
    home.place(model)

    def interrupt(module: nn.Module, args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens)
    hook.remove()
    with torch.no_grad(), home.change(dict(model.named_parameters())["model.norm.weight"]) as weight:
        weight.mul_(2)
    assert torch.allclose(model(tokens).logits, 2 * expected, atol=1e-5)
    assert all(parameter.isnan().all() for parameter in model.parameters())


def test_pinned_memory_is_not_rounded_up_and_other_settings_of_it_stay() -> None:
    said = python(
        """
        import torch
        from forwardtune.storage.host import pin_no_more_than_asked

        pin_no_more_than_asked()
        pin_no_more_than_asked()
        print(torch._C._accelerator_getAllocatorSettings())
        """,
        PYTORCH_ALLOC_CONF="max_split_size_mb:100",
    )
    assert said.strip() == "max_split_size_mb:100,pinned_max_cached_size_mb:1"


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_gives_its_room_back(tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    model = support.tiny_model()
    OnDisk(tmp_path).place(model)
    assert list(tmp_path.iterdir()) == []
    assert open_files()
    del model
    assert not open_files()


def test_the_users_checkpoint_is_never_written(tmp_path: Path) -> None:
    folder = support.save_tiny_model(tmp_path / "model")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    model, _ = load_model(str(folder), storage=OnDisk(tmp_path / "run"))
    tuned(model)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_strides_are_kept(tmp_path: Path) -> None:
    layer = nn.Linear(4, 6)
    layer.weight.data = torch.randn(4, 6).T
    expected = layer.weight.detach().clone()
    OnDisk(tmp_path).place(layer)
    assert layer.weight.stride() == (1, 6)
    assert torch.equal(layer.weight, expected)


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = os.statvfs(tmp_path)
    free = usage.f_bavail * usage.f_frsize
    with pytest.raises(InputError, match=r"weights on disk take .* GiB in .*are free.*: make room"):
        OnDisk(tmp_path)._file(free + (1 << 30))
    # As if another process had taken the room in the meantime: the system itself says no.
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 1 << 60}))
    with pytest.raises(InputError, match=r"(No space left on device|File too large).*: make room"):
        OnDisk(tmp_path)._file(1 << 50)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow_ends_with_a_message(tmp_path: Path) -> None:
    said = python(
        """
        import resource, sys, torch
        from forwardtune import MeZO
        from forwardtune.storage import OnDisk

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            MeZO(torch.nn.Linear(64, 64), storage=OnDisk(sys.argv[1]))
        except ValueError as error:
            print(error)
        """,
        tmp_path,
    )
    assert "File too large" in said
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_no_weights(tmp_path: Path) -> None:
    """38 MiB of weights: loading in another dtype, a step and saving hold a fraction of them, but for pages of files."""
    growth = json.loads(
        python(
            """
            import json, sys, threading, torch
            from pathlib import Path
            from forwardtune import MeZO
            from forwardtune.models import load_model, save_model
            from forwardtune.storage import OnDisk

            def anonymous():
                lines = Path("/proc/self/status").read_text().splitlines()
                return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

            folder, run = Path(sys.argv[1]), sys.argv[2]
            tiny = torch.nn.Linear(64, 64).bfloat16()
            MeZO(tiny, lr=1e-3).step(lambda: tiny(torch.ones(2, 64).bfloat16()).float().sum())
            small = load_model(str(folder.parent / "small"))[0]
            del small
            before, peaks, over = anonymous(), {}, threading.Event()
            what = "load"
            def look():
                while not over.wait(0.002):
                    peaks[what] = max(peaks.get(what, 0), anonymous() - before)
            threading.Thread(target=look, daemon=True).start()
            model, tokenizer = load_model(str(folder), dtype="bfloat16", storage=OnDisk(run))
            tokens = torch.arange(5, 37)[None]
            what = "step"
            MeZO(model, lr=1e-3).step(lambda: model(tokens, labels=tokens).loss)
            what = "save"
            save_model(model, tokenizer, Path(run) / "saved")
            over.set()
            size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
            print(json.dumps({"size": size, **peaks}))
            """,
            *(_large_beside_small(tmp_path), tmp_path / "run"),
            MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", MALLOC_ARENA_MAX="1",
        ).splitlines()[-1]
    )  # fmt: skip
    size = growth.pop("size")
    assert size > 30
    assert max(growth.values()) < 0.35 * size, growth


def _large_beside_small(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    small, large = support.save_tiny_model(folder / "small"), support.save_tiny_model(folder / "large")
    config = LlamaConfig.from_pretrained(small)
    config.update({"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 8})
    with torch.random.fork_rng():
        LlamaForCausalLM(config).save_pretrained(large)
    return large
