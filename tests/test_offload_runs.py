"""Runs whose weights live in a file: what is loaded, refused, killed and resumed."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import support
from forwardtune import MeZO, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError
from forwardtune.models import load_model
from forwardtune.noise import Noise
from forwardtune.optimizer import InterruptedUpdateError
from forwardtune.storage import OnDisk, home_of, storage_named
from forwardtune.trajectory import read_log
from support.command import cli, done, message_of, write_jsonl
from support.offload import Beside, interrupting, tuned
from support.ranks import forked
from support.trainers import quiet_config

pytest.importorskip("transformers", reason="needs transformers")


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
    log = StepLog(tmp_path / "steps.jsonl", optimizer)
    for _ in range(3):
        optimizer.step(loss)
    after = optimizer.tuned.digest()
    with monkeypatch.context() as patch:
        patch.setattr(Noise, "update", interrupting(5))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(loss)
    log.close()
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
    child = forked(lambda: cli("train", *whole, tmp_path / "killed").code)
    log = tmp_path / "killed" / "steps.jsonl"
    until = time.monotonic() + 600
    while not (log.exists() and log.read_bytes().count(b"\n") > 20):
        if not child.is_alive() or time.monotonic() > until:
            child.kill()
            pytest.fail("it ended, or wrote no steps")
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
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
