"""The average of a run's weights is the same list of steps with other factors: the mean of its replays, bit for bit, from base weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.averages import Average, candidates
from forwardtune.errors import InputError
from forwardtune.method.averaged import summed
from forwardtune.method.rules import Momentum
from forwardtune.noise import Update, definition
from forwardtune.trajectory import LogError, export_trajectory, read_log
from forwardtune.trajectory.export import read_trajectory
from forwardtune.trajectory.log import add_note
from forwardtune.trajectory.replay import tuned_by_header
from forwardtune.trajectory.updates import standing, trajectory_of
from support import snapshot
from support.partly_read import PartlyRead

STEPS = 12
IDLE = "ignore:.*took no part in the first step"


METHODS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "probes": {"probes": 3},
    "low rank": {"rank": 2, "refresh": 3},
    "examples": {"assignment": "example", "lr": 1e-3},
    "momentum": {"rule": Momentum(0.8, state="exact")},
    "momentum in a window": {"rule": Momentum(0.8, state="window", window=3)},
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
AVERAGES = ["last:1", "last:4", "last:50%", "steps:0-5", "steps:7-", "ema:0.8"]


def run(path: Path, method: dict[str, Any], dtype: torch.dtype, *, back: bool = False) -> nn.Module:
    """A run that decays one of its groups, skips a step, and can go back."""
    net = PartlyRead(dtype)
    decayed = [{"params": [net.table.weight, net.sometimes.weight, net.out.weight], "weight_decay": 20.0}]
    plain = [{"params": [net.sometimes.bias, net.out.bias], "weight_decay": 0.0}]
    optimizer = MeZO([*decayed, *plain], module=net, **{"lr": 2e-3, "eps": 2.0**-6, "seed": 5, **method})
    shared = optimizer.estimator.assignment == "shared"
    with StepLog(path, optimizer) as log:
        for step in range(STEPS):
            scale = torch.nan if step == 5 else 1.0

            def loss(step: int = step, scale: float = scale) -> Tensor:
                losses: Tensor = net(step) * scale
                return losses.mean() if shared else losses

            optimizer.step(loss)
            if back and step == 8:
                again = PartlyRead(dtype)
                replay(log.path, again, steps=4)
                with torch.no_grad():
                    for own, other in zip(net.parameters(), again.parameters(), strict=True):
                        own.copy_(other)
                log.rolled_back(4)
    return net


def replayed(path: Path, dtype: torch.dtype, **how: Any) -> dict[str, Tensor]:
    net = PartlyRead(dtype)
    replay(path, net, **how)
    return snapshot(net)


def close(found: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    """To the digits of float32 factors, of what moved."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name] - base[name], value - base[name], rtol=2e-6, atol=2e-7)


@pytest.mark.filterwarnings(IDLE)
@every_method
@pytest.mark.parametrize("back", [False, True], ids=["straight", "with a way back"])
def test_an_average_is_the_mean_of_the_replays(tmp_path: Path, method: dict[str, Any], back: bool) -> None:
    """In float64, where nothing is rounded on the way: with weight decay, rows and tensors that were read late or not at all, a skipped
    step, and undone ones."""
    if back and not isinstance(method.get("rule", "sgd"), str):
        method = {**method, "rule": Momentum(0.8, state="window", window=1)}  # whose memory does not need to go back
    path, dtype = tmp_path / "steps.jsonl", torch.float64
    run(path, method, dtype, back=back)
    log = read_log(path)
    assert any(record.unused for record in log.records)
    assert any(record.unread for record in log.records)
    assert log.records[5].skipped
    stands = standing(log.rollbacks, STEPS)
    assert stands.count(False) == (5 if back else 0)
    # The weights with which the run went on after a step, of the steps that are in the weights at the end.
    weights = {n: replayed(path, dtype, steps=n) for n in range(STEPS + 1)}
    kept = [n for n in range(1, STEPS + 1) if stands[n - 1]]
    base = weights[0]
    if back:  # before the way back
        for n in range(5, 9):
            assert n not in kept

    def mean(numbers: list[int]) -> dict[str, Tensor]:
        return {name: sum(weights[n][name] for n in numbers) / len(numbers) for name in base}  # type: ignore[misc]

    for text, numbers in {
        "last:1": kept[-1:],
        "last:4": kept[-4:],
        "last:50%": kept[-round(len(kept) / 2) :],
        "steps:0-4": [n for n in range(5) if n == 0 or n in kept],
        "steps:3-10": [n for n in range(3, 11) if n in kept],
        "steps:7-": [n for n in kept if n >= 7],
    }.items():
        close(replayed(path, dtype, average=text), mean(numbers), base)
    slow = dict(weights[kept[0]])
    for n in kept[1:]:
        slow = {name: 0.8 * slow[name] + 0.2 * weights[n][name] for name in slow}
    close(replayed(path, dtype, average="ema:0.8"), slow, base)


@pytest.mark.filterwarnings(IDLE)
@every_method
def test_a_part_of_a_run_can_be_averaged(tmp_path: Path, method: dict[str, Any]) -> None:
    path, dtype = tmp_path / "steps.jsonl", torch.float64
    run(path, method, dtype)
    weights = [replayed(path, dtype, steps=n) for n in (6, 7, 8)]
    mean = {name: (weights[0][name] + weights[1][name] + weights[2][name]) / 3 for name in weights[0]}
    close(replayed(path, dtype, steps=8, average="last:3"), mean, replayed(path, dtype, steps=0))


# --- the bits --------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """All of it is read in every step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.arange(600).view(20, 30) / 601 - 0.3).to(dtype))

    def forward(self) -> Tensor:
        return self.weight.float().square().sum(1)


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "low rank"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
@every_dtype
def test_the_bits_are_those_of_one_float32_sum_rounded_once(
    tmp_path: Path, dtype: torch.dtype, decay: float, rank: int
) -> None:
    """The definition in docs/step-log.md, in plain torch, from the numbers in the log."""
    path, net = tmp_path / "steps.jsonl", Whole(dtype)
    optimizer = MeZO(net, lr=1e-3, eps=2.0**-6, probes=2, weight_decay=decay, seed=9, rank=rank)
    with StepLog(path, optimizer):
        for _ in range(STEPS):
            optimizer.step(lambda: net().mean())
    again = Whole(dtype)
    replay(path, again, average="last:4")

    noise, log = optimizer.noise, read_log(path)
    x = Whole(dtype).weight.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)
    factor = float(torch.tensor(1 - 1e-3 * decay, dtype=torch.float32))  # of a step, as the rule has it
    behind = [[factor ** (n - t) for n in range(STEPS - 3, STEPS + 1) if n >= t] for t in range(1, STEPS + 1)]
    counts = [sum(own) / 4 for own in behind]  # of what each step added
    base = [1.0] * (STEPS + 1)
    for t in reversed(range(STEPS)):
        base[t] = base[t + 1] - (1 - factor) * counts[t]
    for t, record in enumerate(log.records):
        if base[t] != base[t + 1]:
            x = x * torch.tensor(base[t] / base[t + 1], dtype=torch.float32)
        for probe, c in enumerate(record.coefficients):
            size = float(torch.tensor(-1e-3 * c / 2, dtype=torch.float32))
            share = float(torch.tensor(counts[t] / base[t + 1] * size, dtype=torch.float32))
            if rank:
                u, v = noise.factors(x.shape, tensor=0, step=t, probes=[probe], scale=share, device=x.device)
                for column in range(rank):
                    x = x + u[0, :, column, None].to(x.dtype) * v[0, None, :, column].to(x.dtype)
            else:
                z = definition.directions(noise.direction, 9, 0, t, probe, 0, x.numel(), scale=share)
                x = x + z.view(x.shape)
    expected = Whole(dtype).weight.detach().clone()
    definition.store(expected.view(-1), x.reshape(-1), 9, 0, STEPS)
    assert torch.equal(again.weight.detach(), expected)
    assert not torch.equal(expected, net.weight.detach())


@pytest.mark.parametrize("plain", [True, False], ids=["plain torch", "compiled"])
def test_kernels_and_pieces_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: bool) -> None:
    path = tmp_path / "steps.jsonl"
    run(path, {"rank": 1}, torch.bfloat16)
    expected = replayed(path, torch.bfloat16, average="ema:0.7")
    if plain:
        monkeypatch.setattr("forwardtune.noise.backends.backend", lambda weight: definition)
        monkeypatch.setattr("forwardtune.noise.backends.for_directions", lambda device: definition)
    else:
        monkeypatch.setattr("forwardtune.method.moments._PIECE", {"cpu": 5})
        monkeypatch.setattr("forwardtune.method.averaged._STEPS_PER_SWEEP", 2)
    found = replayed(path, torch.bfloat16, average="ema:0.7")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_in_half_precision_it_is_what_the_run_stands_for(tmp_path: Path) -> None:
    """Rounded once, where the run rounds at every step: nearer to the run in float32 than the run itself."""
    path = tmp_path / "steps.jsonl"
    net = Whole(torch.bfloat16)
    optimizer = MeZO(net, lr=2e-4, eps=2.0**-6, seed=1)
    with StepLog(path, optimizer):
        for _ in range(200):
            optimizer.step(lambda: net().mean())
    exact, once = Whole(torch.bfloat16).weight.detach().float(), Whole(torch.bfloat16)
    definition.update(exact.view(-1), trajectory_of(read_log(path)).updates[0], optimizer.noise.direction, 1, 0)
    replay(path, once, average="last:1")
    far = (net.weight.detach().float() - exact).square().mean()
    near = (once.weight.detach().float() - exact).square().mean()
    assert near < far / 4


def test_sgd_moves_nothing_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory of the size of a weight: a float32 copy of a piece at a time."""
    path = tmp_path / "steps.jsonl"
    run(path, {}, torch.bfloat16)
    monkeypatch.setattr("forwardtune.method.moments._PIECE", {"cpu": 4})
    sizes: list[int] = []
    real = definition.store

    def noted(weight: Tensor, x: Tensor, *rest: Any) -> Any:
        sizes.append(x.numel())
        return real(weight, x, *rest)

    monkeypatch.setattr("forwardtune.noise.backends.backend", lambda weight: definition)
    monkeypatch.setattr(definition, "store", noted)
    replayed(path, torch.bfloat16, average="last:2")
    assert max(sizes) == 4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "last", "last:0", "last:0%", "last:101%", "steps:5-2", "ema:1", "ema:0", "mean:3"]
)
def test_what_is_no_average(text: str) -> None:
    with pytest.raises(InputError, match="is no average of weights: write last:200"):
        Average(text)


@pytest.mark.parametrize(("text", "needed"), [("last:13", 13), ("steps:3-13", 13), ("steps:13-", 12)])
def test_more_steps_than_there_are(tmp_path: Path, text: str, needed: int) -> None:
    run(tmp_path / "steps.jsonl", {}, torch.float32)
    net = PartlyRead(torch.float32)
    before = snapshot(net)
    with pytest.raises(InputError, match=f"needs {needed} steps, and the run kept 12 of 12: average others"):
        replay(tmp_path / "steps.jsonl", net, average=text)
    support.assert_same_bits(net, before)


@pytest.mark.parametrize("rule", ["adam", "sign"])
def test_rules_that_add_no_directions_are_refused_with_the_remedy(tmp_path: Path, rule: str) -> None:
    run(tmp_path / "steps.jsonl", {"rule": rule}, torch.float32)
    net = PartlyRead(torch.float32)
    before = snapshot(net)
    with pytest.raises(InputError, match=f"the rule '{rule}' does not add up directions.* rule sgd or momentum"):
        replay(tmp_path / "steps.jsonl", net, average="last:2")
    support.assert_same_bits(net, before)


def test_a_step_that_decays_all_weights_away_is_refused() -> None:
    from forwardtune.method.rules import SGD

    with pytest.raises(InputError, match="weight decay"):
        summed(SGD(), [Update(0, (1.0,), 0.0)], [0.0, 1.0])


# --- the log and its export ------------------------------------------------------------------------------------------


def noted(path: Path, text: str, dtype: torch.dtype = torch.float32) -> str:
    """Note an average in a log, as a run that left it does."""
    net = PartlyRead(dtype)
    replay(path, net, average=text)
    digest = tuned_by_header(read_log(path), net).digest()
    add_note(path, {"average": {"of": text, "digest": digest}})
    return digest


@pytest.mark.filterwarnings(IDLE)
@every_method
def test_an_export_is_replayed_to_its_average(tmp_path: Path, method: dict[str, Any]) -> None:
    path, out = tmp_path / "steps.jsonl", tmp_path / "t.safetensors"
    run(path, method, torch.bfloat16, back=method == {})
    expected = replayed(path, torch.bfloat16, average="last:4")
    export_trajectory(read_log(path), out, "last:4")
    found = replayed(out, torch.bfloat16)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # It holds the run all the same.
    for how in ({"average": "none"}, {"average": "ema:0.5"}, {"steps": 7, "average": "last:2"}):
        theirs, ours = (
            replayed(out, torch.bfloat16, **how),
            replayed(path, torch.bfloat16, **{"average": "none", **how}),
        )
        assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_an_average_in_a_note_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = tmp_path / "steps.jsonl", tmp_path / "t.safetensors"
    run(path, {}, torch.float32)
    digest = noted(path, "last:3")
    log = read_log(path)
    assert log.end is not None
    export_trajectory(log, out, "last:3")
    assert read_trajectory(out).averages == trajectory_of(log).averages == {"last:3": digest}
    monkeypatch.setattr(Average, "shares", _shifted(Average.shares))
    for source in (path, out):
        with pytest.raises(LogError, match="differ from those that the run ended with"):
            replayed(source, torch.float32, average="last:3")


def _shifted(shares: Callable[..., list[float]]) -> Callable[..., list[float]]:
    def other(self: Average, stands: list[bool]) -> list[float]:
        found = shares(self, stands)
        return [*found[1:], found[0]]

    return other


def test_a_run_that_went_on_has_other_averages(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    run(path, {}, torch.float32)
    noted(path, "last:3")
    net = PartlyRead(torch.float32)
    groups = read_log(path).header["groups"]
    decayed = [{"params": [net.table.weight, net.sometimes.weight, net.out.weight], **groups[0]}]
    optimizer = MeZO(
        [*decayed, {"params": [net.sometimes.bias, net.out.bias], **groups[1]}],
        module=net,
        lr=2e-3,
        eps=2.0**-6,
        seed=5,
    )
    with StepLog.resume(path, optimizer):
        optimizer.step(lambda: net(3).mean())
    assert trajectory_of(read_log(path)).averages == {}
    replay(path, PartlyRead(torch.float32), average="last:3")


def test_candidates_of_a_run() -> None:
    assert candidates(100) == ["last:25", "last:50", "last:100"]
    assert candidates(1) == []
    assert candidates(2) == ["last:2"]
