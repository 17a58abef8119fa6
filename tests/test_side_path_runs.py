"""Runs with directions of examples: steps, log, replay, export, and inside Trainer."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.cli import main
from forwardtune.errors import InputError, LogError
from forwardtune.method.record import as_float32
from forwardtune.trajectory import export_trajectory, read_log
from support.logs import reseal
from support.side_path import COUNT, LENGTH, losses_of, side_path, trainer_of
from support.trainers import Kill, KilledError


def test_microbatches_are_the_minibatch() -> None:
    ids = support.token_batch(6, LENGTH)
    whole, parts = support.tiny_model("llama"), support.tiny_model("llama")
    first, second = side_path(whole)[0], side_path(parts)[0]
    first.step(lambda: losses_of(whole, ids))
    for piece in ids.split(2):
        second.estimate(lambda piece=piece: losses_of(parts, piece))
    second.step()
    assert second.last is not None
    assert first.last is not None
    assert second.last.examples == first.last.examples == 6
    assert second.last.losses == pytest.approx(first.last.losses, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 2, "refresh": 3},
        {"rule": "momentum", "probes": 2},
        {"clip_coefficient": 0.5},
        {"probes": 3, "normalize": "sigma"},
        {"normalize": "spread", "clip_coefficient": 1.5},
    ],
)
def test_runs_are_logged_replayed_resumed_and_exported(tmp_path: Any, settings: dict[str, Any]) -> None:
    def begin() -> tuple[Any, MeZO]:
        model = support.tiny_model("llama", torch.bfloat16)
        return model, side_path(model, **settings)[0]

    def step(model: Any, optimizer: MeZO, number: int) -> None:
        ids = support.token_batch(2 if number == 3 else COUNT, LENGTH, seed=number)  # a short minibatch among them
        optimizer.step(lambda: losses_of(model, ids))

    model, optimizer = begin()
    path = tmp_path / "steps.jsonl"
    log = StepLog(path, optimizer)
    for number in range(3):
        step(model, optimizer, number)
    log.close()
    model, optimizer = begin()
    with StepLog.resume(path, optimizer):
        for number in range(3, 6):
            step(model, optimizer, number)
    whole, other = begin()
    for number in range(6):
        step(whole, other, number)
    support.assert_same_bits(model, support.snapshot(whole))
    assert read_log(path).records[4].coefficients == optimizer_record(other, 4, tmp_path)
    again = support.tiny_model("llama", torch.bfloat16)
    assert replay(path, again) == 6
    support.assert_same_bits(again, support.snapshot(model))
    export_trajectory(read_log(path), tmp_path / "t.safetensors")
    again = support.tiny_model("llama", torch.bfloat16)
    replay(tmp_path / "t.safetensors", again)
    support.assert_same_bits(again, support.snapshot(model))


def optimizer_record(optimizer: MeZO, step: int, tmp_path: Any) -> tuple[float, ...]:
    """The coefficients of that step as a second run saw them."""
    model = support.tiny_model("llama", torch.bfloat16)
    again = side_path(
        model,
        rank=optimizer.noise.structure.rank,
        refresh=optimizer.noise.structure.refresh,
        rule=optimizer.rule,
        probes=optimizer.estimator.probes,
        estimator=optimizer.estimator.name,
        normalize=optimizer.estimator.normalize,
        clip_coefficient=optimizer.clip_coefficient,
    )[0]
    seen: list[tuple[float, ...]] = []
    again.recorders.append(lambda record: seen.append(record.coefficients))
    for number in range(step + 1):
        ids = support.token_batch(2 if number == 3 else COUNT, LENGTH, seed=number)
        again.step(lambda ids=ids: losses_of(model, ids))
    return seen[step]


@pytest.mark.parametrize(("estimator", "probes"), [("spsa", 1), ("one_sided", 2)])
def test_fzoo_over_examples_is_the_update_of_a_plain_reference(estimator: str, probes: int) -> None:
    """``theta - lr / (B n) sum_b,k d_bk / s z_bk``, s the root mean square of all differences d: no unit of the loss is left in it."""
    moved = []
    for unit in (1.0, 2.0**-7):
        model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
        before = support.snapshot(model)
        optimizer, _ = side_path(model, estimator=estimator, probes=probes, normalize="spread", lr=2.0**-6)
        optimizer.step(lambda model=model, ids=ids, unit=unit: unit * losses_of(model, ids))
        losses = torch.tensor(optimizer.last.losses, dtype=torch.float64).view(-1, COUNT)
        d = (losses[0] - losses[1])[:, None] / 2 if estimator == "spsa" else (losses[1:] - losses[0]).T
        c = (d / d.square().mean().sqrt()).flatten()
        assert optimizer.last.coefficients == pytest.approx(c.tolist(), rel=1e-12)
        for tensor in optimizer.tuned:
            address = {"tensor": tensor.id, "step": 0}
            zs = [optimizer.noise.z(tensor.parameter, probe=k, **address) for k in range(len(c))]
            expected = before[tensor.name] - 2.0**-6 * sum(a * z for a, z in zip(c.tolist(), zs, strict=True)) / len(c)
            if tensor.id not in optimizer.last.unused and tensor.id not in optimizer.last.unread:
                torch.testing.assert_close(tensor.parameter.detach(), expected, rtol=0, atol=1e-6)
        moved.append(optimizer.last.coefficients)
    assert moved[0] == pytest.approx(moved[1], rel=1e-3)  # float32 losses


def test_a_line_and_an_exported_step_are_short(tmp_path: Any) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(16, LENGTH)
    optimizer, _ = side_path(model)
    path = tmp_path / "steps.jsonl"
    with StepLog(path, optimizer):
        for _ in range(30):
            optimizer.step(lambda: losses_of(model, ids))
    lines = path.read_bytes().splitlines()
    assert max(map(len, lines[1:])) < 400
    size = export_trajectory(read_log(path), tmp_path / "t.safetensors")
    header = len(lines[0])
    assert size < 100 * 30 + header


def test_an_example_without_a_finite_loss_is_left_out() -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(4, LENGTH)
    optimizer, _ = side_path(model)

    def closure() -> Tensor:
        return losses_of(model, ids).index_fill(0, torch.tensor([2]), math.nan)

    optimizer.step(closure)
    assert optimizer.last is not None
    assert [math.isnan(c) for c in optimizer.last.coefficients] == [False, False, True, False]
    there = [loss for loss in optimizer.last.losses if not math.isnan(loss)]
    assert optimizer.last.loss == pytest.approx(sum(there) / 6)
    assert not optimizer.last.skipped


class Sometimes(nn.Module):
    """Uses a weight in a way that has no side path, in some minibatches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, odd: bool) -> Tensor:
        y = self.layer(x)
        return self.last(y + x @ self.layer.weight.inverse() if odd else y).pow(2).mean(1)


@pytest.mark.filterwarnings("ignore:.* have no side path")
def test_what_a_run_found_to_have_no_side_path_is_known_when_it_goes_on(tmp_path: Any) -> None:
    x, path = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)), tmp_path / "steps.jsonl"

    def steps(model: Sometimes, optimizer: MeZO, numbers: range) -> None:
        for number in numbers:
            optimizer.step(lambda number=number: model(x, odd=number == 1))

    whole, broken = Sometimes(), Sometimes()
    steps(whole, side_path(whole)[0], range(4))
    optimizer = side_path(broken)[0]
    log = StepLog(path, optimizer)
    steps(broken, optimizer, range(2))
    log.close()
    assert [record.left_out for record in read_log(path).records] == [(), (3,)]
    copied = copy.deepcopy(optimizer)
    assert copied.evaluator.left_out == {3}
    broken = Sometimes()
    optimizer = side_path(broken)[0]
    with StepLog.resume(path, optimizer):
        steps(broken, optimizer, range(2, 4))
    support.assert_same_bits(broken, support.snapshot(whole))
    assert [record.left_out for record in read_log(path).records] == [(), (3,), (), ()]


def test_a_step_that_does_not_fit_float32_is_logged_as_it_was(tmp_path: Any) -> None:
    """Not that examples which have a loss have a mean: the step was skipped, and its loss is the mean of all."""
    model, ids = support.tiny_model("llama"), support.token_batch(4, LENGTH)
    optimizer, _ = side_path(model, lr=1e38)
    seen = []
    optimizer.recorders.append(seen.append)

    def closure() -> Tensor:
        return (1e4 * losses_of(model, ids)).index_fill(0, torch.tensor([2]), math.nan)

    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(closure)
    (found,) = read_log(tmp_path / "steps.jsonl").records
    assert found.skipped
    assert seen[0].skipped
    assert math.isnan(found.loss)
    assert math.isnan(seen[0].loss)


def test_a_bound_of_infinity_is_none(tmp_path: Any) -> None:
    optimizer, _ = side_path(support.tiny_model("llama"), clip_coefficient=math.inf)
    StepLog(tmp_path / "steps.jsonl", optimizer).close()
    assert "clip_coefficient" not in read_log(tmp_path / "steps.jsonl").header


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        *((1, {"examples": n}, "line 2: a field") for n in (0, -1, 4, 10**30, True, 3.0, "3", None)),
        *((1, {"losses": text}, "line 2: a field") for text in ("", "AAAA", "????", "=", 3, None, [1.0])),
        (1, {"examples": 0, "losses": ""}, "line 2: a field"),
        (0, {"eps": "small"}, "a header that is not whole"),
        (0, {"assignment": "each"}, "a header that is not whole"),
        (0, {"rank": -1}, "a header that is not whole"),
        (0, {"refresh": 0}, "a header that is not whole"),
    ],
)
def test_lines_that_hold_something_else_are_refused(
    tmp_path: Any, line: int, change: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 6), torch.randn(3, 6)
    optimizer, _ = side_path(model)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: model(x).pow(2).mean(1))
    reseal(tmp_path / "steps.jsonl", lambda contents: contents[line].update(change))
    with pytest.raises(LogError, match=message):
        read_log(tmp_path / "steps.jsonl")


def test_losses_beyond_float32_keep_their_sign() -> None:
    assert as_float32((1e39, -1e39, 0.1)) == (math.inf, -math.inf, pytest.approx(0.1, rel=1e-7))


def test_the_log_says_what_the_directions_are(tmp_path: Any) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer, _ = side_path(model, rank=3, refresh=4, clip_coefficient=2.0)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: losses_of(model, ids))
    header, step = map(json.loads, (tmp_path / "steps.jsonl").read_text().splitlines()[:2])
    said = {key: header[key] for key in ("assignment", "rank", "refresh", "clip_coefficient")}
    assert said == {"assignment": "example", "rank": 3, "refresh": 4, "clip_coefficient": 2.0}
    assert "coefficients" not in step
    assert step["examples"] == COUNT


def test_labels_are_moved_where_the_model_moves_them(tmp_path: Path) -> None:
    """A class that transformers does not list among its causal models: a vision-language model, or code from a hub."""
    import transformers

    class Elsewhere(transformers.LlamaForCausalLM):
        pass

    losses = []
    for number, kind in enumerate((transformers.LlamaForCausalLM, Elsewhere)):
        model = support.tiny_model("llama")
        model.__class__ = kind
        trainer = trainer_of(tmp_path / str(number), model)
        trainer.train()
        losses.append(trainer.mezo.last.losses)
    assert losses[0] == losses[1]


def test_a_model_whose_own_loss_is_another_is_refused(tmp_path: Path) -> None:
    import transformers

    class Weighted(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
            outputs = super().forward(input_ids=input_ids, labels=labels)
            outputs.loss = 2 * outputs.loss
            return outputs

    model = support.tiny_model("llama")
    model.__class__ = Weighted
    with pytest.raises(InputError, match=r"own loss \(.*\) is not the mean cross-entropy of its labels"):
        trainer_of(tmp_path, model).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_own_losses_of_families_are_found_again(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = support.tiny_model(family, dtype)
    if family == "t5":
        model.config.decoder_start_token_id = 0
    trainer = trainer_of(tmp_path, model)
    with pytest.warns(UserWarning, match="have no side path") if family == "t5" else contextlib.nullcontext():
        trainer.train()
    assert trainer.mezo.last.examples == 4


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor gives one loss"),
        ({}, {"compute_loss_func": lambda outputs, labels, **_: outputs.loss}, "compute_loss_func gives one loss"),
    ],
)
def test_a_loss_of_the_batch_alone_is_refused(settings: Any, given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, support.tiny_model("llama"), given=given, **settings)


def test_trainer_reports_the_mean_over_microbatches(tmp_path: Path) -> None:
    found = []
    for number, (size, parts) in enumerate(((4, 1), (2, 2))):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = trainer_of(tmp_path / str(number), support.tiny_model("llama"), **sizes)
        found.append(trainer.train().training_loss)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_trainer_computes_in_bfloat16(tmp_path: Path) -> None:
    found = []
    for number, bf16 in enumerate((False, True)):
        trainer = trainer_of(tmp_path / str(number), support.tiny_model("llama"), bf16=bf16, eps=0.1, max_steps=1)
        trainer.train()
        found.append(trainer.mezo.last.coefficients)
    assert found[1] == pytest.approx(found[0], rel=0.1, abs=0.1)


def test_inspect_says_what_the_directions_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = support.tiny_model("llama"), support.token_batch(COUNT, LENGTH)
    optimizer, _ = side_path(model, rank=3, refresh=4)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(lambda: losses_of(model, ids))
    assert main(["inspect", str(tmp_path / "steps.jsonl"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["assignment"], facts["rank"], facts["refresh"]) == ("example", 3, 4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eps", ["auto", 1e-2])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_trainer_finds_and_checks_eps(family: str, eps: Any, tmp_path: Path) -> None:
    """In runs long enough for it. Held-out examples have one loss there."""
    settings = {"learning_rate": "auto" if eps == "auto" else 1e-4, "eps": eps, "max_steps": 1000}
    trainer = trainer_of(tmp_path, support.tiny_model(family), **settings)
    trainer.add_callback(Kill(1))
    with pytest.raises(KilledError):
        trainer.train()
    assert trainer.mezo.last.examples == 4
