"""Weights that live in a file, or in the host's memory: the bits of a run that has them on the device, and nothing of it is left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from forwardtune import MeZO, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError
from forwardtune.method.rules import Adam, Momentum
from forwardtune.models import load_model
from forwardtune.noise import Noise
from forwardtune.optimizer import InterruptedUpdateError
from forwardtune.storage import InHostMemory, Offloaded, OnDisk, home_of, is_offloaded, storage_named
from forwardtune.storage.visits import Visits
from forwardtune.trajectory import read_log
from support.command import done, message_of, process, write_jsonl
from support.process import python
from support.trainers import quiet_config

pytestmark = pytest.mark.usefixtures("short_collections")
pytest.importorskip("transformers", reason="needs transformers")


class Beside(InHostMemory):
    """A host beside a device that is the host, too: what does not visit it is NaN, so that no GPU is needed to see what is missing."""

    def __init__(self) -> None:
        Offloaded.__init__(self, "cpu")
        self._visits = Visits(self)
        self._values: dict[int, torch.Tensor] = {}

    def place(self, module: nn.Module) -> None:
        super().place(module)
        for parameter in module.parameters():
            if id(parameter) not in self._values:
                self._values[id(parameter)] = parameter.data
                parameter.data = torch.full_like(parameter.data, torch.nan)

    def read(self, parameter: nn.Parameter) -> torch.Tensor:
        is_here = not parameter.data.isnan().all()  # a perturbed copy that takes its place
        return parameter.data if is_here else self._values[id(parameter)]


HOMES: dict[str, Callable[[Path], Offloaded]] = {"disk": OnDisk, "host": lambda folder: Beside()}


def tuned(model: Any, steps: int = 3, **settings: Any) -> tuple[str, list[float]]:
    """The digest after a few steps, and their losses."""
    optimizer = MeZO(model, lr=1e-3, **settings)
    each = settings.get("assignment") == "example"
    tokens = support.token_batch()

    def loss() -> torch.Tensor:
        extra = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
        squares = model(input_ids=tokens, **extra).logits.float().pow(2)
        return squares.mean(dim=(1, 2)) if each else squares.mean()

    losses = [optimizer.step(loss) for _ in range(steps)]
    return optimizer.tuned.digest(), losses


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


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "gguf", "adapter"])
def test_every_form_of_a_model_is_loaded_with_the_same_bits(tmp_path: Path, form: str, dtype: str) -> None:
    name = str(_written(tmp_path, form))
    resident, _ = load_model(name, dtype=dtype)
    model, _ = load_model(name, dtype=dtype, storage=OnDisk(tmp_path / "run"))
    assert all(isinstance(home_of(parameter), OnDisk) for parameter in model.parameters())
    expected = dict(resident.named_parameters(remove_duplicate=False))
    found = dict(model.named_parameters(remove_duplicate=False))
    assert found.keys() == expected.keys()
    for key, parameter in found.items():
        assert parameter.dtype == expected[key].dtype, key
        assert torch.equal(parameter, expected[key]), key
    assert len(set(map(id, found.values()))) == len(set(map(id, expected.values()))), "ties are lost"
    assert list((tmp_path / "run").iterdir()) == []


def _written(folder: Path, form: str) -> Path:
    if form == "gguf":
        support.write_gguf(folder / "model.gguf")
        return folder / "model.gguf"
    model = support.save_tiny_model(folder / "model")
    if form == "bin":
        from safetensors.torch import load_file

        weights = model / "model.safetensors"
        torch.save(load_file(weights), model / "pytorch_model.bin")
        weights.unlink()
    if form == "adapter":
        from forwardtune.models import save_model, tune

        base, tokenizer = load_model(str(model))
        save_model(tune(base, tokenizer, "lora"), tokenizer, folder / "adapter")
        return folder / "adapter"
    return model


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
@pytest.mark.parametrize("how", ["device_map", "cpu_offload", "disk_offload"])
def test_what_accelerate_has_offloaded_is_taken_over(tmp_path: Path, how: str, family: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = support.tiny_model(family)
    resident = tuned(support.tiny_model(family))
    if how == "device_map":
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(
            tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )
        model.eval()
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"meta device.*MeZO\(storage=OnDisk"):
        MeZO(model, lr=1e-3)
    assert tuned(model, storage=OnDisk(tmp_path / "run")) == resident
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_trainer_takes_over_what_accelerate_has_offloaded(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    data = [{"input_ids": tokens, "labels": tokens} for tokens in support.token_batch(8)]

    def run(folder: str, offload: str | None, *, dispatched: bool) -> str:
        model = support.tiny_model()
        if dispatched:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        config = quiet_config(tmp_path / folder, max_steps=3, learning_rate=1e-3, eps=1e-3, offload=offload)
        trainer = MeZOTrainer(model=model, args=config, train_dataset=data)
        trainer.train()
        return trainer.mezo.tuned.digest()

    resident = run("resident", None, dispatched=False)
    assert run("taken", "disk", dispatched=True) == resident
    with pytest.raises(InputError, match="meta device"):
        run("refused", None, dispatched=True)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_the_hosts_memory_is_refused_where_the_host_computes() -> None:
    with pytest.raises(InputError, match="use offload='disk'"):
        storage_named("cpu", ".", "cpu")


def test_a_host_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = support.save_tiny_model(tmp_path / "model")
    monkeypatch.setattr("forwardtune.storage.host.free", lambda: 1000)
    with pytest.raises(InputError, match=r"take 0.0 GiB, and 0.0 are free: use offload='disk'"):
        load_model(str(folder), storage=Beside())


def test_a_copy_of_all_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use perturbation='auto'"):
        MeZO(support.tiny_model(), perturbation="copy", storage=OnDisk(tmp_path))
    with pytest.raises(InputError, match="pass MeZO"):
        MeZO([nn.Parameter(torch.ones(3))], storage=OnDisk(tmp_path))


def test_weights_read_in_secret_are_refused_where_they_would_be_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forwardtune.points.scratch.Scratch._leaks", lambda *_: frozenset())
    layer = nn.Linear(4, 4)
    kept = list(layer.parameters())
    optimizer = MeZO(layer, lr=1e-3, storage=OnDisk(tmp_path))
    with pytest.raises(RuntimeError, match="leave offload out"):
        optimizer.step(lambda: (layer(torch.ones(4)) @ kept[0]).sum())


# --- what ends a run -------------------------------------------------------------------------------------------------


def test_an_interrupt_in_an_update_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = support.tiny_model()
    model, tokens = support.tiny_model(), support.token_batch()
    optimizer = MeZO(model, lr=1e-2, storage=OnDisk(tmp_path / "run"))
    loss = support.closure_for(model, tokens)
    real, calls = Noise.update_many, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    log = StepLog(tmp_path / "steps.jsonl", optimizer)
    for _ in range(3):
        optimizer.step(loss)
    after = optimizer.tuned.digest()
    monkeypatch.setattr(Noise, "update_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(loss)
    log.close()
    monkeypatch.setattr(Noise, "update_many", real)
    assert optimizer.tuned.digest() != after, "the interrupt came in mid-update"
    with pytest.raises(InterruptedUpdateError):
        optimizer.step(loss)
    again = MeZO(base, lr=1e-2, storage=OnDisk(tmp_path / "run"))
    assert replay(tmp_path / "steps.jsonl", base, steps=3) == 3
    assert again.tuned.digest() == after


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a task, and a run that had its weights in memory."""
    folder = tmp_path_factory.mktemp("offload")
    support.save_tiny_model(folder / "model")
    rows = [{"text": f"{i} {text}", "label": i % 2} for i, text in enumerate(support.TEXT * 8)]
    write_jsonl(folder / "train.jsonl", rows[:40])
    write_jsonl(folder / "test.jsonl", rows[40:])
    (folder / "task.yaml").write_text(
        "train: train.jsonl\ntest: test.jsonl\nprompt: '{text} It was'\nanswers: {0: terrible, 1: great}\n"
    )
    done("train", *asked(folder), "--output-dir", folder / "resident")
    return folder


def asked(folder: Path, *more: object, steps: int = 6, method: str = "mezo") -> list[object]:
    beside = [
        "--method",
        method,
        "--batch-size",
        4,
        "--lr",
        "1e-3",
        "--eps",
        "1e-3",
        "--steps",
        steps,
        "--device",
        "cpu",
    ]
    return ["--model", folder / "model", "--task", folder / "task.yaml", *beside, *more]


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_command_line_gives_the_same_model_and_leaves_the_same_files(place: Path, tmp_path: Path) -> None:
    ran = done("train", *asked(place), "--offload", "disk", "--output-dir", tmp_path / "run", "--save-steps", 3)
    assert "kept in a file without a name" in ran.err
    assert weights(tmp_path / "run") == weights(place / "resident")
    checkpoints = {"checkpoint-3", "checkpoint-6"}
    assert left_in(tmp_path / "run") == left_in(place / "resident") | checkpoints
    assert weights(tmp_path / "run" / "checkpoint-6") == weights(place / "resident")


def test_best_weights_are_found_again_in_a_file(place: Path, tmp_path: Path) -> None:
    measured = ["--eval-steps", 2, "--dev-examples", 8]
    for name, more in (("resident", []), ("offloaded", ["--offload", "disk"])):
        done("train", *asked(place), *measured, *more, "--output-dir", tmp_path / name)
    assert weights(tmp_path / "offloaded") == weights(tmp_path / "resident")


def test_a_lora_adapter_over_an_offloaded_base(place: Path, tmp_path: Path) -> None:
    for name, more in (("resident", []), ("offloaded", ["--offload", "disk"])):
        done("train", *asked(place), "--tune", "lora", *more, "--output-dir", tmp_path / name)
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("resident", "offloaded"))
    assert one == other


def test_a_killed_process_leaves_nothing_and_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    steps = 400
    whole = [*asked(place, "--offload", "disk", "--no-before", steps=steps, method="forward"), "--output-dir"]
    child = process("train", *whole, tmp_path / "killed")
    log = tmp_path / "killed" / "steps.jsonl"
    until = time.monotonic() + 600
    while not (log.exists() and log.read_bytes().count(b"\n") > 20):
        if child.poll() is not None or time.monotonic() > until:
            child.kill()
            pytest.fail(child.communicate()[1])
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    taken = read_log(log).steps
    assert 0 < taken < steps
    assert not [path for path in (tmp_path / "killed").rglob("*") if path.stat().st_size > 100_000]
    done("train", "--resume", "--output-dir", tmp_path / "killed", "--steps", taken + 5)
    done("train", *asked(place, "--no-before", steps=taken + 5, method="forward"), "--output-dir", tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_eval_and_replay_work_from_a_file(place: Path, tmp_path: Path) -> None:
    run, model = place / "resident", place / "model"
    done("replay", run, "--model", model, "--offload", "disk", "--output-dir", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(run)
    common = ["eval", "--model", run, "--task", place / "task.yaml", "--device", "cpu"]
    resident, offloaded = (json.loads(done(*common, *more).out) for more in ([], ["--offload", "disk"]))
    assert offloaded["test"] == resident["test"]


def test_the_command_line_names_the_option_that_works(place: Path, tmp_path: Path) -> None:
    task = asked(place, "--output-dir", tmp_path / "run")
    assert "give --offload disk" in message_of("train", *task, "--offload", "cpu")
    if not torch.cuda.is_available():
        task = [part for i, part in enumerate(task) if "--device" not in (part, task[i - 1])]
        assert "use --offload disk" in message_of("train", *task, "--offload", "cpu")
