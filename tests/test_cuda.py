"""What only a real CUDA device can show: whole MeZO steps on it, by hand, by Trainer and from the command line, replay on both
devices, tensors past 2**31 elements, no waiting.

Across devices the bits of the noise and of updates are promised; losses, and so coefficients, are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from forwardtune import MeZO, StepLog, noise, replay
from forwardtune.method.rule import _total
from forwardtune.method.rules import RULES, SGD, Adam, Momentum
from forwardtune.noise import DIRECTIONS, GAUSSIAN, Noise, Update, definition
from forwardtune.storage import InHostMemory, OnDisk
from forwardtune.trajectory import read_log
from support import DTYPES, HALF, assert_same_bits, closure_for, same_bits, snapshot, tiny_model, token_batch
from support.offload import tuned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda", 0)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fails where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def optimizer_of(model: Any, **settings: Any) -> MeZO:
    decay = 0.0 if settings.get("fold") else 0.1  # what waits is a sum: nothing decays
    return MeZO(model, lr=1e-3, eps=1e-2, seed=2**40, weight_decay=decay, **settings)


# What a rule cannot do without.
OF_RULE: dict[str, dict[str, Any]] = {"muon": {"rank": 4, "refresh": 10}}


@every_dtype
def test_the_compiled_kernels_serve(dtype):
    assert isinstance(noise.backends.fast(CUDA, dtype), ModuleType), noise.backends.fast(CUDA, dtype)


@every_dtype
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_update_of_a_model_has_the_bits_that_it_has_on_the_cpu(dtype, direction):
    models = tiny_model("llama", dtype), tiny_model("llama", dtype).to(CUDA)
    moved = []
    for model in models:
        z = Noise(7, DIRECTIONS[direction])
        moved.append(
            [
                z.update(parameter, [Update(step, (1e-4, -3e-3), decay=0.999) for step in range(9)], tensor=i)
                for i, parameter in enumerate(model.parameters())
            ]
        )
    assert moved[0] == moved[1]
    assert_same_bits(models[1].cpu(), snapshot(models[0]))


@every_dtype
def test_scratch_and_copy_see_the_same_losses_and_leave_the_weights_alone(dtype):
    batch = token_batch().to(CUDA)
    losses = []
    for perturbation in ("scratch", "copy"):
        model = tiny_model("llama", dtype).to(CUDA)
        before = snapshot(model)
        optimizer = optimizer_of(model, perturbation=perturbation, probes=2)
        optimizer.estimate(closure_for(model, batch))
        assert_same_bits(model, before)
        optimizer.apply()
        assert optimizer.last is not None
        losses.append(optimizer.last.losses)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4


@every_dtype
@pytest.mark.parametrize("rule", RULES)
def test_a_run_replays_with_the_same_bits_on_both_devices(dtype, rule, tmp_path):
    path = tmp_path / "steps.jsonl"
    model = tiny_model("llama", dtype).to(CUDA)
    optimizer = optimizer_of(model, rule=rule, **OF_RULE.get(rule, {}))
    with StepLog(path, optimizer):
        for step in range(6):
            optimizer.step(closure_for(model, token_batch(seed=step).to(CUDA)))
    assert any(any(record.coefficients) for record in read_log(path).records)
    for device in (CUDA, torch.device("cpu")):
        base = tiny_model("llama", dtype).to(device)
        assert replay(path, base) == 6  # and the digest at the log's end agrees
        assert_same_bits(base.to(CUDA), snapshot(model))


def losses_of_rows(model: Any, batch: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: model(input_ids=batch).logits.float().pow(2).mean(dim=(1, 2))


STRUCTURES: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 2, "refresh": 3},
    "example": {"assignment": "example"},
    "example_full": {"assignment": "example", "rank": 0},
    "example_many": {"assignment": "example", "rank": 4, "direction": "rademacher", "probes": 2},
    "group": {"assignment": "example", "perturbation": "both_signs", "group_size": 2},
    "probes_in_a_pass": {"assignment": "example", "perturbation": "both_signs", "probes": 4, "probes_per_pass": 2},
}


@every_dtype
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_directions_of_low_rank_and_of_examples_replay_with_the_same_bits_on_both_devices(
    dtype, family, structure, tmp_path
):
    settings, losses = STRUCTURES[structure], {}
    for name, device in (("cpu", torch.device("cpu")), ("cuda", CUDA)):
        model = tiny_model(family, dtype).to(device)
        optimizer = optimizer_of(model, **settings)
        of = losses_of_rows if "assignment" in settings else closure_for
        with StepLog(tmp_path / f"{name}.jsonl", optimizer):
            for step in range(5):
                optimizer.step(of(model, token_batch(4, seed=step).to(device)))
                if step == 0:
                    assert optimizer.last is not None
                    losses[name] = torch.tensor(optimizer.last.losses)
    torch.testing.assert_close(losses["cuda"], losses["cpu"], rtol=1e-4 if dtype == torch.float32 else 5e-2, atol=0)
    for device in (CUDA, torch.device("cpu")):
        base = tiny_model(family, dtype).to(device)
        assert replay(tmp_path / "cuda.jsonl", base) == 5
        assert_same_bits(base.to(CUDA), snapshot(model))


@every_dtype
def test_a_run_of_the_trainer_replays_on_the_cpu(dtype, tmp_path):
    """Trainer moves model and batches to the device by itself."""
    pytest.importorskip("accelerate", reason="needs accelerate")
    from forwardtune import MeZOTrainer
    from support.trainers import quiet_config

    data = [{"input_ids": row, "labels": row} for row in token_batch(12, 6).tolist()]
    config = quiet_config(tmp_path, max_steps=4, learning_rate=1e-3, eps=1e-2, use_cpu=False)
    trainer = MeZOTrainer(model=tiny_model("llama", dtype), args=config, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.model.device == CUDA
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    base = tiny_model("llama", dtype)
    assert replay(tmp_path / "steps.jsonl", base) == 4
    assert_same_bits(trainer.model.cpu(), snapshot(base))


@pytest.mark.parametrize(
    "options",
    [
        *("--lr 1e-3", "--lr 1e-3 --objective accuracy --rule adam", "--lr auto", "--lr 1e-3 --tune lora"),
        *(
            "--lr 1e-3 --assignment example",
            "--lr 1e-3 --assignment example --tune lora",
            "--lr auto --rank 2 --refresh 3",
        ),
    ],
    ids=lambda options: options.replace(" ", ""),
)
def test_a_run_of_the_command_line_replays_on_the_cpu(options, tiny_folder, tmp_path):
    for package in ("tqdm", "safetensors", *(["peft"] if "lora" in options else [])):
        pytest.importorskip(package, reason=f"needs {package}")
    from safetensors.torch import load_file

    from support.command import done, write_task

    run, again = tmp_path / "run", tmp_path / "again"
    model, task = ["--model", tiny_folder], write_task(tmp_path / "task")
    train = ["train", *model, "--task", task, "--device", "cuda", "--dtype", "bfloat16", "--steps", 12]
    done(*train, "--batch-size", 4, *options.split(), "--output-dir", run)
    done("replay", run / "steps.jsonl", *model, "--output-dir", again)
    (tuned,) = (path.name for path in run.glob("*model.safetensors"))
    ours, theirs = load_file(run / tuned), load_file(again / tuned)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)


@every_dtype
def test_no_sweep_waits_for_the_device(dtype):
    """New scales and steps included, whose tables have to reach the device."""
    gpu = noise.backends.fast(CUDA, dtype)
    assert isinstance(gpu, ModuleType), gpu
    weight, rows = torch.ones(64, 48, dtype=dtype, device=CUDA), torch.tensor([3, 60], device=CUDA)
    out = torch.empty_like(weight)
    for step in range(3):
        # The first round may compile a kernel, which may wait.
        with no_waiting() if step else torch.no_grad():
            address = {"tensor": 1, "step": step, "probe": 0, "scale": 1e-3 / (step + 1)}
            Noise(7).perturb(out, weight, **address)
            Noise(7).perturb_rows(weight, rows, **address)
            Noise(7).z(weight, tensor=1, step=step, probe=0)
            unchanged = gpu.update(weight.view(-1), [Update(step, (1e-3 / (step + 1),), 0.99)], GAUSSIAN, 7, 1)
    assert 0 <= int(unchanged) <= weight.numel()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "muon"])  # which multiplies on the host
@every_dtype
def test_moving_all_tensors_waits_for_the_device_once_at_the_end(dtype, rule):
    model = tiny_model("llama", dtype).to(CUDA)
    optimizer = MeZO(model, lr=1e-3, rule=rule)
    for step in range(3):
        updates = [optimizer.rule.plan(step, [1.0 / (step + 1)], 1e-3, 0.1)]
        # The first round may compile a kernel, which may wait.
        with no_waiting() if step else torch.no_grad(), torch.no_grad():
            counts = [
                optimizer.rule.move(optimizer.noise, tensor, updates, optimizer.history, keep=True)
                for tensor in optimizer.tuned
            ]
        assert all(isinstance(count, torch.Tensor) for count in counts)
        assert 0 <= _total(counts) <= optimizer.tuned.numel


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_tensors_past_two_to_the_31_elements(dtype):
    width, height = 4096, 2**19 + 3
    count = width * height
    if torch.cuda.mem_get_info(CUDA)[0] < 5 * count:  # the weights, as much again, and room to spare
        pytest.skip("needs 11 GB of free device memory")
    table = torch.full((height, width), 0.02, dtype=dtype, device=CUDA)
    out = torch.full_like(table, math.nan)
    address = {"tensor": 3, "step": 4, "probe": 0, "scale": 1e-3}
    Noise(7).perturb(out, table, **address)
    assert not out.view(-1)[:: 2**12 + 1].isnan().any()
    rows = torch.tensor([0, 2**19 - 1, 2**19, height - 1], device=CUDA)
    assert same_bits(Noise(7).perturb_rows(table, rows, **address), out[rows])
    del out
    unchanged = Noise(7).update(table, [Update(4, (1e-3,))], tensor=3)
    assert 0 < unchanged < count
    for lo in (0, 2**31 - 1000, count - 1001):
        expected = torch.full((1001,), 0.02, dtype=dtype)
        definition.update(expected, [Update(4, (1e-3,))], GAUSSIAN, 7, 3, lo)
        assert same_bits(table.view(-1)[lo : lo + 1001].cpu(), expected)


def test_a_nan_weight_stays_nan():
    """The NaN that a GPU computes has all bits set, so that a carry of the rounding could make a zero of it."""
    for dtype in HALF:
        weight = torch.full((4096,), math.nan, dtype=dtype, device=CUDA)
        Noise(7).update(weight, [Update(step, (1e-3,)) for step in range(3)], tensor=0)
        assert weight.isnan().all()


def run_of_rows(model: Any, path: Path, steps: int = 6, **settings: Any) -> list[float]:
    """Steps on directions of examples, logged; their losses."""
    optimizer = optimizer_of(model, assignment="example", **settings)
    with StepLog(path, optimizer):
        return [optimizer.step(losses_of_rows(model, token_batch(4, seed=step).to(CUDA))) for step in range(steps)]


@every_dtype
@pytest.mark.parametrize("settings", [{}, {"refresh": 3, "fold": "refresh"}], ids=["swept", "folded"])
@pytest.mark.parametrize("perturbation", ["side_path", "both_signs"])
def test_both_signs_and_waiting_steps_replay_with_the_same_bits_on_both_devices(
    dtype, settings, perturbation, tmp_path
):
    model = tiny_model("llama", dtype).to(CUDA)
    run_of_rows(model, tmp_path / "steps.jsonl", perturbation=perturbation, **settings)
    for device in (CUDA, torch.device("cpu")):
        base = tiny_model("llama", dtype).to(device)
        assert replay(tmp_path / "steps.jsonl", base) == 6
        assert_same_bits(base.to(CUDA), snapshot(model))


@pytest.mark.parametrize("settings", [{}, {"rank": 12}, {"refresh": 3, "fold": "refresh"}], ids=str)
@pytest.mark.parametrize("perturbation", ["side_path", "both_signs"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_an_evaluation_on_directions_of_examples_waits_for_its_losses_alone(
    family, perturbation, settings, monkeypatch
):
    """The logits of one position a row, as of a task, so that where they stand has to be known on both sides."""
    from forwardtune.objectives import logits_at
    from forwardtune.points import both_signs, side_path

    model, length = tiny_model(family, torch.bfloat16).to(CUDA), 8
    optimizer = optimizer_of(model, assignment="example", perturbation=perturbation, **settings)
    positions = torch.arange(4, device=CUDA) * length + length - 1
    waits: list[int] = []

    def read(value: Any) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        try:
            waits.append(1)
            return right(value)
        finally:
            torch.cuda.set_sync_debug_mode("error" if step else "default")

    right = side_path.read
    for module in (side_path, both_signs):
        monkeypatch.setattr(module, "read", read)
    # Waits of the model's own, in every forward pass.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *args, **kwargs: False)
    for step in (0, 1, 2, 3):  # the first checks, and may compile a kernel
        step = max(0, step - 1)
        batch = {"input_ids": token_batch(4, length, seed=step).to(CUDA), "positions": positions}
        waits.clear()
        with no_waiting() if step else torch.no_grad():
            optimizer.estimate(lambda batch=batch: logits_at(model, batch).logsumexp(-1))
        optimizer.apply()
        if step:
            assert len(waits) == 2


@pytest.mark.parametrize("settings", [{"rank": 2}, {"assignment": "example"}], ids=str)
@every_dtype
def test_an_update_of_low_rank_waits_for_its_count_alone(dtype, settings):
    model = tiny_model("llama", dtype).to(CUDA)
    optimizer = optimizer_of(model, **settings)
    for step in range(3):
        updates = [optimizer.rule.plan(step, [1.0 / (step + 1), 0.5], 1e-3, 0.1)]
        with no_waiting() if step else torch.no_grad(), torch.no_grad():
            count = optimizer.rule.move_together(optimizer.noise, optimizer.tuned, updates)
        assert 0 <= int(count) <= optimizer.tuned.numel


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("family", ["llama", "llama_untied", "opt", "qwen3_moe", "t5", "mamba"])
def test_weights_that_visit_the_device_take_the_steps_of_weights_that_live_there(family, home, tmp_path):
    resident = tuned(tiny_model(family, torch.bfloat16).to(CUDA), device="cuda")
    storage = InHostMemory(CUDA) if home == "host" else OnDisk(tmp_path, CUDA)
    assert tuned(tiny_model(family, torch.bfloat16), device="cuda", storage=storage) == resident


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "sign"},
        {"rule": Momentum(state="exact")},
        {"rule": Momentum(window=2)},
        {"rule": Adam(state="exact")},
        {"rule": Adam(window=2)},
        {"rule": "muon", "rank": 2, "refresh": 10},
        {"estimator": "one_sided", "probes": 2, "rank": 2},
        {"sparsity": 0.5},
        {"assignment": "example"},
        {"assignment": "example", "perturbation": "both_signs"},
    ],
    ids=str,
)
@pytest.mark.parametrize("home", ["host", "disk"])
def test_so_they_do_with_every_method(settings, home, tmp_path, monkeypatch):
    # Pieces so small that even these weights come in several.
    monkeypatch.setattr("forwardtune.storage.ferry._PIECE", 1536)
    monkeypatch.setattr("forwardtune.storage.offloaded._SMALL", 0)
    settings = {"weight_decay": 0.1, **settings}
    resident = tuned(tiny_model("llama", torch.bfloat16).to(CUDA), device="cuda", **settings)
    storage = InHostMemory(CUDA) if home == "host" else OnDisk(tmp_path, CUDA)
    assert tuned(tiny_model("llama", torch.bfloat16), device="cuda", **settings, storage=storage) == resident


def large_layers(device: torch.device) -> torch.nn.Sequential:
    """Matrices of 72 MiB, each two pieces and a part of one; and their biases."""
    layers = [torch.nn.Linear(6144, 6144, dtype=torch.bfloat16, device="meta") for _ in range(3)]
    model = torch.nn.Sequential(*layers).to_empty(device=device)
    generator = torch.Generator(CUDA).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape, device=CUDA).uniform_(-0.02, 0.02, generator=generator))
    return model


@pytest.mark.parametrize("rule", ["sgd", Momentum(state="exact"), Momentum(window=3)], ids=str)
def test_no_copy_overtakes_what_it_has_to_wait_for(rule):
    """Steps of weights that take milliseconds to come and to go, while the host runs ahead."""
    x = torch.linspace(-1, 1, 8 * 6144, device=CUDA).view(8, 6144).bfloat16()
    found = []
    for storage in (None, InHostMemory(CUDA)):
        model = large_layers(CUDA if storage is None else torch.device("cpu"))
        optimizer = MeZO(model, lr=1e-3, rule=rule, storage=storage)
        losses = [optimizer.step(lambda model=model: model(x).float().square().mean()) for _ in range(4)]
        found.append((losses, optimizer.tuned.digest()))
    assert found[0] == found[1]


def test_pinned_weights_take_no_more_memory_of_the_host_than_they_need():
    """72 MiB each, which torch would make 128 of."""
    model = large_layers(torch.device("cpu"))
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    InHostMemory(CUDA).place(model)
    settings = getattr(torch._C, "_accelerator_getAllocatorSettings", str)()
    if "pinned_max_cached_size_mb" not in settings:
        pytest.skip("this torch always rounds pinned memory up to a power of two")
    taken = torch.cuda.host_memory_stats()["allocated_bytes.current"] - before
    assert all(parameter.is_pinned() for parameter in model.parameters())
    assert taken < 1.01 * sum(parameter.nbytes for parameter in model.parameters())


def test_updates_of_offloaded_weights_run_ahead_of_the_copies_in_three_pieces_of_memory():
    resident = MeZO(large_layers(CUDA), lr=1e-3)
    offloaded = MeZO(large_layers(torch.device("cpu")), lr=1e-3, storage=InHostMemory(CUDA))
    for step in range(6):
        updates = [SGD().plan(step, [1.0 / (step + 1)], 1e-3, 0.1)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        # The first round makes room on the device, which waits.
        with no_waiting() if step else torch.no_grad(), torch.no_grad():
            counts = [
                offloaded.rule.move(offloaded.noise, tensor, updates, offloaded.history, keep=True)
                for tensor in offloaded.tuned
            ]
        taken = torch.cuda.max_memory_allocated() - before
        assert taken < (3 * 2**25 + 2**22 if step == 0 else 2**22), "pieces wait for the memory of earlier ones"
        with torch.no_grad():
            there = [
                resident.rule.move(resident.noise, tensor, updates, resident.history, keep=True)
                for tensor in resident.tuned
            ]
        assert _total(counts) == _total(there)
    offloaded.tuned[0].home.wait()
    assert offloaded.tuned.digest() == resident.tuned.digest()


@pytest.mark.parametrize(
    "options", ["--offload cpu", "--offload disk", "--offload cpu --tune lora", "--method forward"]
)
def test_offloaded_and_default_runs_of_the_command_line_replay_on_the_cpu(options, tiny_folder, tmp_path):
    test_a_run_of_the_command_line_replays_on_the_cpu(f"--lr 1e-3 {options}", tiny_folder, tmp_path)


def test_a_plan_is_measured_on_the_device(tiny_folder, tmp_path):
    from support.command import done, write_task

    task = write_task(tmp_path / "task")
    text = done(
        "plan", "--model", tiny_folder, "--task", task, "--device", "cuda", "--dtype", "bfloat16", "--batch-size", 4
    ).out
    assert "measured" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapter_starts_from_the_errors_on_the_device(dtype):
    from forwardtune.models import start_from_feedback, tune
    from forwardtune.objectives import logits_at

    model = tune(
        tiny_model("llama", dtype).to(CUDA), None, "lora", lora_targets=["late-down", "late-attention"], freeze_a=True
    )
    tokens = token_batch(32, 8, seed=1).to(CUDA)
    batches = [{"input_ids": some, "positions": torch.arange(4, device=CUDA) * 8 + 7} for some in tokens.chunk(8)]

    def losses(model, batch):
        wanted = batch["input_ids"][:, 0] % 2
        return torch.nn.functional.cross_entropy(logits_at(model, batch)[:, [3, 5]].float(), wanted, reduction="none")

    def mean() -> float:
        with torch.no_grad():
            return float(torch.cat([losses(model, batch) for batch in batches]).mean())

    before = mean()
    start_from_feedback(model, batches * 4, losses, steps=24, rate=0.2, watched=mean)
    assert mean() < before
    assert {p.device for name, p in model.named_parameters() if ".lora_" in name} == {CUDA}
