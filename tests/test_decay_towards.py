"""``decay_towards="base"``: weight decay pulls what moved back to the weights that the run began with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError
from forwardtune.method import base as method_base
from forwardtune.method.rule import History, Rule
from forwardtune.method.rules import SGD, Adam, Momentum, Sign
from forwardtune.trajectory import export_trajectory, keep_base, read_log
from support import snapshot
from support.command import done, read, write_task
from support.partly_read import PartlyRead
from support.trainers import Kill, KilledError, quiet_config

STEPS = 8
IDLE = "ignore:.*took no part in the first step"
RULES: dict[str, Rule] = {
    "sgd": SGD("base"),
    "sign": Sign("base"),
    "momentum": Momentum(0.8, state="exact", decay_towards="base"),
    "momentum in a window": Momentum(0.8, window=3, decay_towards="base"),
    "adam": Adam(state="exact", decay_towards="base"),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


class Net(PartlyRead):
    """Its loss is the minibatch's."""

    def forward(self, step: int) -> Tensor:
        return super().forward(step).mean()


def optimizer_of(net: nn.Module, rule: Rule | str, **changes: Any) -> MeZO:
    return MeZO(net, **{"lr": 2e-3, "eps": 2.0**-6, "seed": 5, "weight_decay": 100.0, "rule": rule, **changes})


def run(folder: Path, rule: Rule | str, dtype: torch.dtype = torch.float32, steps: int = STEPS, **changes: Any) -> Net:
    net = Net(dtype)
    optimizer = optimizer_of(net, rule, **changes)
    keep_base(folder / "base.weights", optimizer)
    with StepLog(folder / "steps.jsonl", optimizer):
        for step in range(steps):
            optimizer.step(lambda step=step: net(step))  # type: ignore[misc]
    return net


def replayed(path: Path, dtype: torch.dtype = torch.float32, **how: Any) -> dict[str, Tensor]:
    net = Net(dtype)
    replay(path, net, **how)
    return snapshot(net)


@pytest.fixture(params=[1 << 18, 5], ids=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("forwardtune.method.moments._PIECE", {"cpu": request.param})
    return


@pytest.mark.parametrize("towards", ["base", "zero"])
@every_rule
def test_a_step_is_the_equation_in_float32(rule: Rule, towards: str, pieces: None) -> None:
    """What moved shrinks by the factor, each operation rounded once; then the rule adds what it adds without decay."""
    plain = type(rule)(**{**rule.settings(), "decay_towards": "zero"})
    decayed = rule if towards == "base" else plain
    base = torch.linspace(-1, 1, 12).view(3, 4)
    theta = base + torch.linspace(0.3, 0.7, 12).view(3, 4)
    factor = decayed.plan(2, [0.5], 0.1, 4.0).decay
    expected = nn.Parameter(base + (theta - base) * factor if towards == "base" else theta * factor)
    found = nn.Parameter(theta.clone())
    for rule_of, parameter, decay in ((plain, expected, 0.0), (decayed, found, 4.0)):
        optimizer = MeZO([parameter], rule=rule_of, seed=3)
        update = rule_of.plan(2, [0.5], 0.1, decay)
        history = History(base=(lambda lo, hi: base.view(-1)[lo:hi]) if towards == "base" else None)
        with torch.no_grad():
            optimizer.rule.move(optimizer.noise, optimizer.tuned[0], [update], history, keep=False)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings(IDLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
@every_rule
def test_replay_and_export_give_the_bits_of_the_run(tmp_path: Path, rule: Rule, dtype: torch.dtype, rank: int) -> None:
    """Replay needs no file: it begins at the base."""
    net = run(tmp_path, rule, dtype, rank=rank)
    (tmp_path / "base.weights").unlink()
    log = read_log(tmp_path / "steps.jsonl")
    assert log.header["rule_settings"]["decay_towards"] == "base"
    support.assert_same_bits(net, replayed(log.path, dtype))
    export_trajectory(log, tmp_path / "t.safetensors")
    support.assert_same_bits(net, replayed(tmp_path / "t.safetensors", dtype))


def test_weights_that_do_not_move_stay_where_they_began(tmp_path: Path) -> None:
    """Decay towards zero would take them away."""
    for towards, moved in (("base", False), ("zero", True)):
        folder = tmp_path / towards
        folder.mkdir()
        net = Net()
        optimizer = optimizer_of(net, SGD(towards), lr=1e-3, clip_coefficient=1e-30)
        keep_base(folder / "base.weights", optimizer)
        support.train(optimizer, *[partial(net, 0)] * 3)
        assert torch.equal(net.out.weight, Net().out.weight) is not moved


def test_it_stays_nearer_to_the_base(tmp_path: Path) -> None:
    def moved(**changes: Any) -> float:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        net = run(folder, SGD("base"), steps=30, **changes)
        return float((net.out.weight - Net().out.weight).detach().norm())

    assert moved() < moved(weight_decay=10.0) < moved(weight_decay=0.0)


@pytest.mark.filterwarnings(IDLE)
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
def test_its_average_is_the_mean_of_the_replays(tmp_path: Path, rule: str) -> None:
    run(tmp_path, RULES[rule], torch.float64)
    path, base = tmp_path / "steps.jsonl", snapshot(Net(torch.float64))
    weights = [replayed(path, torch.float64, steps=n) for n in range(5, STEPS + 1)]
    found = replayed(path, torch.float64, average="last:4")
    for name in found:
        mean = sum(own[name] for own in weights) / 4
        torch.testing.assert_close(found[name] - base[name], mean - base[name], rtol=2e-6, atol=2e-7)  # type: ignore[operator]


def test_logs_without_it_are_as_before(tmp_path: Path) -> None:
    run(tmp_path, Momentum(state="exact"))
    assert "decay_towards" not in read_log(tmp_path / "steps.jsonl").header["rule_settings"]
    assert SGD().settings() == Sign().settings() == {}


def test_the_base_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardtune.method.moments._PIECE", {"cpu": 4})
    sizes: list[int] = []
    real = method_base.BaseFile.of

    def noted(self: Any, tensor: Any) -> Any:
        read = real(self, tensor)
        return lambda lo, hi: sizes.append(hi - lo) or read(lo, hi)  # type: ignore[func-returns-value]

    monkeypatch.setattr(method_base.BaseFile, "of", noted)
    run(tmp_path, SGD("base"), steps=2)
    assert sizes
    assert max(sizes) == 4


# --- what is refused -------------------------------------------------------------------------------------------------


def test_without_a_base_at_hand_the_first_step_is_refused() -> None:
    net = Net()
    optimizer = optimizer_of(net, SGD("base"))
    with pytest.raises(
        InputError, match=r"call forwardtune.trajectory.keep_base\(path, optimizer\) before the first step"
    ):
        optimizer.step(lambda: net(0))
    support.assert_same_bits(net, snapshot(Net()))
    optimizer_of(net, SGD("base"), weight_decay=0.0).step(lambda: net(0))  # nothing decays


def test_unknown_targets_are_refused(tmp_path: Path) -> None:
    for rule in (SGD, Sign, Momentum, Adam):
        with pytest.raises(InputError, match="unknown decay_towards 'origin'"):
            rule(decay_towards="origin")
    with pytest.raises(InputError, match="unknown decay_towards 'origin'"):
        quiet_config(tmp_path, decay_towards="origin")


# --- in Trainer and on the command line ------------------------------------------------------------------------------

DATA = [{"input_ids": row, "labels": row} for row in support.token_batch(12, 6).tolist()]


def make(folder: Path, callbacks: list[Any] | None = None, **changes: Any) -> MeZOTrainer:
    own = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "eps": 1e-3,
        "weight_decay": 20.0,
        "decay_towards": "base",
        **changes,
    }
    args = quiet_config(folder, **own)
    return MeZOTrainer(
        model=support.tiny_model(), args=args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=callbacks
    )


@pytest.mark.parametrize("how", [{}, {"save_strategy": "steps", "save_steps": 2}, {"learning_rate": "auto", "max_steps": 40}],
                         ids=["replay", "checkpoint", "auto"])  # fmt: skip
def test_a_trainer_that_was_killed_ends_with_the_same_bits(tmp_path: Path, how: dict[str, Any]) -> None:
    whole = make(tmp_path / "whole", **how)
    whole.train()
    with pytest.raises(KilledError):
        make(tmp_path / "run", [Kill(12 if "max_steps" in how else 5)], **how).train()
    again = make(tmp_path / "run", **how)
    again.train(resume_from_checkpoint=True)
    support.assert_same_bits(again.model, snapshot(whole.model))
    model = support.tiny_model()
    replay(tmp_path / "run" / "steps.jsonl", model)
    support.assert_same_bits(model, snapshot(whole.model))
    assert not list(tmp_path.rglob("*.weights"))


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_on_the_command_line(tiny_folder: Path, tmp_path: Path, tune: str) -> None:
    task, folder, again = write_task(tmp_path), tmp_path / "run", tmp_path / "again"
    done(
        "train", "--model", tiny_folder, "--task", task, "--steps", 4, "--lr", 1e-2, "--eps", 1e-3, "--batch-size", 2, "--device", "cpu",
        "--no-before", "--tune", tune, "--weight-decay", 30, "--decay-towards", "base", "--output-dir", folder,
    )  # fmt: skip
    steps = read(folder).get("best_step", 4)
    done("replay", folder, "--model", tiny_folder, "--output-dir", again, "--steps", steps)
    name = "adapter_model.safetensors" if tune == "lora" else "model.safetensors"
    assert (folder / name).read_bytes() == (again / name).read_bytes()
    done(
        "plan", "--model", tiny_folder, "--task", task, "--device", "cpu", "--alone",
        "--weight-decay", 30, "--decay-towards", "base", "--tune", tune,
    )  # fmt: skip
