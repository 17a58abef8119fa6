"""Steps that wait to be folded into the weights: against weights that were folded, and through log, kill, replay and export."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.errors import InputError, LogError
from forwardtune.method.estimators import Query
from forwardtune.noise import GAUSSIAN, Fold, LowRank, Noise, Update
from forwardtune.parameters import TunedParameters
from forwardtune.points import Copy, SidePath, side_weight
from forwardtune.search.auto_lr import AutoLR
from forwardtune.trajectory import ReturnPoint, export_trajectory, read_log
from support.logs import log_lines, reseal
from support.side_path import COUNT, EPS, LENGTH, losses_of, trainer_of
from support.trainers import Kill, KilledError

STEPS = 11
FOLDS: dict[str, Any] = {"assignment": "example", "refresh": 4, "fold": "refresh"}


class Net(nn.Module):
    """A table whose rows are read late, a normalisation, and a layer that not every step goes through."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.table, self.wide = nn.Embedding(40, 12, dtype=dtype), nn.Linear(12, 24, dtype=dtype)
        self.norm, self.seldom = nn.LayerNorm(24, dtype=dtype), nn.Linear(24, 24, dtype=dtype)
        self.out = nn.Linear(24, 40, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.wide(self.table(ids)))
        return self.out(torch.tanh(x if ids.sum() % 3 == 1 else self.seldom(x)))

    def losses(self, step: int) -> Tensor:
        rows = 2 if step == 6 else 4  # a short minibatch among them
        ids = torch.randint(0, 12 + step, (rows, 7), generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(self(ids)[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def begin(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> tuple[Net, MeZO]:
    net = Net(dtype)
    return net, MeZO(net, **{"lr": 3e-2, "eps": EPS, "seed": 3, **FOLDS, **settings})


def run(net: Net, optimizer: MeZO, steps: int = STEPS, every: int | None = 3) -> None:
    """Go on to so many steps, with an evaluation after every few."""
    while optimizer.next_step < steps:
        step = optimizer.next_step
        optimizer.step(lambda step=step: net.losses(step))
        if every and optimizer.next_step % every == 0:
            with torch.no_grad():
                net.losses(25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_a_fold_is_the_sum_of_the_steps_added_once(dtype: torch.dtype, rank: int) -> None:
    noise, shape = Noise(7, GAUSSIAN, LowRank(rank, 8)), (19, 23)
    unread = torch.arange(19) < 5
    steps = [
        Update(8, (0.5, 0.0, -0.25), unread={4: unread}),
        Update(9, (0.125, 0.0)),
        Update(11, (0.0, 0.0, 0.7), unused=frozenset({3})),
    ]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = weight.float().clone()
    for k in (0, 2):  # the direction without a size has no term
        p, v = torch.zeros(19, rank), None
        for update in steps:
            size = update.sizes[k] if k < len(update.sizes) else 0.0
            u, v = (
                f[0]
                for f in noise.factors(shape, tensor=4, step=update.step, probes=[k], scale=size, device=weight.device)
            )
            p += u.masked_fill(unread[:, None], 0.0) if update.unread else u
        assert v is not None
        for column in range(rank):
            expected += p[:, column, None] * v[:, column]
    whole, pieces = weight.clone(), weight.clone()
    noise.update(whole, [Fold.of(steps)], tensor=4)
    for piece, start in ((pieces.view(-1)[:100], 0), (pieces.view(-1)[100:], 100)):
        noise.update(piece, [Fold.of(steps)], tensor=4, start=start, shape=shape)
    assert torch.equal(whole, pieces)
    if dtype == torch.float32:
        assert torch.equal(whole, expected)
    else:
        rounded = weight.clone()
        noise.store(rounded.view(-1), expected.view(-1), tensor=4, step=11)
        assert torch.equal(whole, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_after_every_step_is_sweeping_at_every_step(dtype: torch.dtype) -> None:
    (net, optimizer), (other, plain) = begin(dtype), begin(dtype, fold="step")
    for step in range(STEPS):
        loss = optimizer.step(lambda step=step: net.losses(step))
        optimizer.fold()
        assert loss == plain.step(lambda step=step: other.losses(step))
    support.assert_same_bits(net, support.snapshot(other))


@pytest.mark.parametrize("perturbation", ["side_path", "both_signs"])
def test_matrices_stay_until_v_is_drawn_anew(perturbation: str) -> None:
    net, optimizer = begin(perturbation=perturbation)
    changed = []
    for step in range(8):
        looked_at = (net.wide.weight, net.norm.weight)
        before = [weight.clone() for weight in looked_at]
        optimizer.step(lambda step=step: net.losses(step))
        changed.append([not torch.equal(weight, old) for weight, old in zip(looked_at, before, strict=True)])
    assert [matrix for matrix, _ in changed] == [False, False, False, True] * 2
    assert all(vector for _, vector in changed)


@pytest.mark.parametrize("at_once", [32, 0], ids=["at_once", "batched"])
@pytest.mark.filterwarnings("ignore:.* have no side path")
@pytest.mark.parametrize("family", support.FAMILIES)
def test_what_waits_is_in_the_losses(family: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses beside weights that lag behind are those of weights that do not, at theta and along directions."""
    if not at_once and family not in ("llama", "gpt2"):
        pytest.skip("the other way to multiply is that of two kinds of projections, whatever the model")
    monkeypatch.setattr(side_weight, "_AT_ONCE", at_once)
    double = family not in ("mixtral", "qwen3_moe")  # torch's product for experts knows no float64
    model = support.tiny_model(family, torch.float64 if double else torch.float32)
    ids = support.token_batch(COUNT, LENGTH)
    optimizer = MeZO(model, **{"lr": 0.03, "eps": EPS, "seed": 3, "rank": 1, **FOLDS, "refresh": 100})
    for _ in range(2):
        optimizer.step(lambda: losses_of(model, ids))
    side = optimizer.perturbation
    assert isinstance(side, SidePath)
    queries = [Query(0, scale, 1) for scale in (EPS, -EPS, 0.0)]
    with torch.no_grad(), optimizer.aside():
        found = side.losses(2, queries, lambda: losses_of(model, ids))
        behind = losses_of(model, ids).tolist()
    optimizer.fold()
    tuned = [tensor for tensor in optimizer.tuned if tensor.id not in side.left_out]
    weights = Copy(TunedParameters(tuned, model), optimizer.noise)
    with torch.no_grad():
        for losses, query in zip(found, queries, strict=True):
            expected = [
                weights.losses(2, [Query(b, query.scale)], lambda b=b: losses_of(model, ids)[b])[0][0]
                for b in range(COUNT)
            ]
            assert losses == pytest.approx(expected, rel=1e-6 if double else 1e-5)
    assert max(abs(a - b) for a, b in zip(found[2], behind, strict=True)) > 1e-4, "what moves nothing proves nothing"


def test_a_shared_direction_waits_too() -> None:
    net, optimizer = begin(torch.float64, assignment="shared", rank=1, perturbation="side_path")
    for step in range(3):
        optimizer.step(lambda step=step: net.losses(step).mean())
    assert optimizer.perturbation is not None
    with torch.no_grad(), optimizer.aside():
        (clean,) = optimizer.perturbation.losses(3, [Query(0, EPS)], lambda: net.losses(20).mean())
    optimizer.fold()
    with torch.no_grad():
        (expected,) = Copy(optimizer.tuned, optimizer.noise).losses(3, [Query(0, EPS)], lambda: net.losses(20).mean())
    assert clean == pytest.approx(expected, rel=1e-6)


def test_a_use_without_a_side_path_meets_whole_weights() -> None:
    """A matrix that turns out to be used otherwise is folded for that use, and from then on the weights are."""
    net, optimizer = begin(torch.float64)
    for step in range(2):
        optimizer.step(lambda step=step: net.losses(step))
    stored = net.out.weight.clone()

    def otherwise() -> Tensor:
        return net.losses(2) + net.out.weight.square().sum()

    with pytest.warns(UserWarning, match="no side path"):
        optimizer.step(otherwise)
    assert optimizer.pending is not None
    assert optimizer.pending.at == [2]
    assert not torch.equal(stored, net.out.weight)
    (whole, other) = begin(torch.float64)
    for step in range(2):
        other.step(lambda step=step: whole.losses(step))
    other.fold()
    assert torch.equal(whole.out.weight, net.out.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"perturbation": "both_signs", "rank": 2, "probes": 2}], ids=["one", "two"])
def test_runs_are_replayed_and_exported(settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    net, optimizer = begin(dtype, **settings)
    path, states = tmp_path / "steps.jsonl", []
    with StepLog(path, optimizer):
        for step in range(STEPS):
            run(net, optimizer, step + 1, every=5)
            states.append(len(optimizer.pending.steps) if optimizer.pending else None)
    log = read_log(path)
    assert (log.header["fold"], log.header["format"], log.folds) == ("refresh", 5, [5, 10, 11])
    assert states == [1, 2, 3, 0, 0, 1, 2, 0, 1, 0, 1]
    again = Net(dtype)
    assert replay(log, again) == STEPS
    support.assert_same_bits(again, support.snapshot(net))
    export_trajectory(log, tmp_path / "t.safetensors")
    again = Net(dtype)
    replay(tmp_path / "t.safetensors", again)
    support.assert_same_bits(again, support.snapshot(net))
    for steps in (3, 5, 7):  # at step 3 nothing was folded: replay does it
        part, other = Net(dtype), begin(dtype, **settings)
        replay(path, part, steps=steps)
        run(*other, steps, every=5)
        support.assert_same_bits(part, support.snapshot(other[0]))
    replay(path, Net(dtype), average="last:3")


@pytest.mark.parametrize("after", range(1, STEPS))
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_run_that_was_killed_ends_as_one_that_was_not(after: int, evaluated: bool, tmp_path: Path) -> None:
    """Killed after any step, before the evaluation that folds or after it."""
    net, optimizer = begin()
    with StepLog(tmp_path / "whole.jsonl", optimizer):
        run(net, optimizer)
    killed, optimizer = begin()
    log = StepLog(tmp_path / "steps.jsonl", optimizer)
    run(killed, optimizer, after - 1)
    run(killed, optimizer, after, every=3 if evaluated else None)
    log.close()
    resumed, optimizer = begin()
    with StepLog.resume(tmp_path / "steps.jsonl", optimizer):
        assert 0 <= after - optimizer.next_step < 4
        run(resumed, optimizer)
    support.assert_same_bits(resumed, support.snapshot(net))
    assert log_lines(tmp_path / "steps.jsonl") == log_lines(tmp_path / "whole.jsonl")


def test_whoever_reads_the_weights_folds_them() -> None:
    def waits(optimizer: MeZO) -> int:
        assert optimizer.pending is not None
        return len(optimizer.pending.steps)

    def of(net: Net, optimizer: MeZO) -> dict[str, Any]:
        return {
            "call": lambda: net.losses(0),
            "part": lambda: net.wide(torch.zeros(1, 12, dtype=torch.bfloat16)),
            "state": net.state_dict,
            "optimizer": optimizer.state_dict,
            "copy": lambda: copy.deepcopy(optimizer),
            "fold": optimizer.fold,
            "another optimizer": lambda: MeZO(net, lr=1e-9).estimate(lambda: net.losses(0).mean()),
        }

    whole, other = begin()
    run(whole, other, 2, every=None)
    other.fold()
    for name in of(whole, other):
        net, optimizer = begin()
        run(net, optimizer, 2, every=None)
        assert waits(optimizer) == 2
        of(net, optimizer)[name]()
        assert waits(optimizer) == 0, name
        support.assert_same_bits(net, support.snapshot(whole))
        assert not net._state_dict_pre_hooks, "nobody watches when nothing waits"
    net, optimizer = begin()
    run(net, optimizer, 2, every=None)
    other = pickle.loads(pickle.dumps(net))  # a copy of the model folds nothing
    other.losses(0)
    assert waits(optimizer) == 2


def test_a_state_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    net, optimizer = begin()
    run(net, optimizer, 6)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    other, again = begin()
    other.load_state_dict(weights)
    again.load_state_dict(state)
    for model, one in ((net, optimizer), (other, again)):
        run(model, one)
        one.fold()
    support.assert_same_bits(other, support.snapshot(net))


@pytest.mark.parametrize("to", [2, 4, 5])
def test_a_run_that_went_back_is_replayed(to: int, tmp_path: Path) -> None:
    net, optimizer = begin()
    path = tmp_path / "steps.jsonl"
    with StepLog(path, optimizer) as log:
        point = ReturnPoint(tmp_path / "return.bin", optimizer, log.base)
        run(net, optimizer, 7, every=None)
        point.go_back(to)
        log.rolled_back(to)
        went_back = support.snapshot(net)
        run(net, optimizer, every=None)
    again, part = Net(), Net()
    replay(path, again)
    support.assert_same_bits(again, support.snapshot(net))
    replay(path, part, steps=to)
    support.assert_same_bits(part, went_back)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kill", [None, 30, 41])
def test_a_run_that_finds_its_rate_is_the_same_after_a_kill(kill: int | None, tmp_path: Path) -> None:
    def held_out_of(net: Net) -> Any:
        return lambda batches: sum(float(net.losses(20 + k).mean()) for k in range(batches)) / batches

    def go(auto: AutoLR, net: Net, until: int) -> None:
        while auto.optimizer.next_step < until:
            auto.step(lambda step=auto.optimizer.next_step: net.losses(step % 28))

    path, steps = tmp_path / "steps.jsonl", 60
    net, optimizer = begin()
    auto = AutoLR(optimizer, path, steps=steps, held_out=held_out_of(net), find_eps=False)
    if kill is not None:
        go(auto, net, kill)
        auto.close()
        net, optimizer = begin()
        auto = AutoLR.resume(optimizer, path, steps=steps, held_out=held_out_of(net))
    with auto:
        go(auto, net, steps)
    again = Net()
    replay(path, again)
    support.assert_same_bits(again, support.snapshot(net))


@pytest.mark.parametrize("after", [3, 5, 6])
def test_trainer_goes_on_as_if_nothing_had_happened(after: int, tmp_path: Path) -> None:
    def make(name: str, *callbacks: Any) -> Any:
        model = support.tiny_model("llama", torch.bfloat16)
        rows = [{"input_ids": row, "labels": row} for row in support.token_batch(4, 6).tolist()]
        settings = {"max_steps": 7, "learning_rate": 1e-2, "eval_strategy": "steps", "eval_steps": 3}
        settings |= {"save_strategy": "steps", "save_steps": 6, "refresh": 5, "fold": "refresh"}
        trainer = trainer_of(tmp_path / name, model, given={"eval_dataset": rows}, **settings)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    whole = make("whole")
    whole.train()
    assert read_log(whole.step_log).folds == [3, 6, 7]
    with pytest.raises(KilledError):
        make("killed", Kill(after)).train()
    resumed = make("killed")
    resumed.train(resume_from_checkpoint=True)
    assert read_log(resumed.step_log).end == read_log(whole.step_log).end
    assert read_log(resumed.step_log).folds == [3, 6, 7]


def test_a_fold_that_is_out_of_place_is_refused(tmp_path: Path) -> None:
    net, optimizer = begin()
    path = tmp_path / "steps.jsonl"
    with StepLog(path, optimizer):
        run(net, optimizer, 5)
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"fold":3' in line)
    reseal(path, lambda contents: contents[place].update(fold=2))
    with pytest.raises(LogError, match="it folds what waits after 2 steps, not after 3"):
        read_log(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh": 1},
        {"rank": 0, "refresh": 1},
        {"rule": "momentum"},
        {"assignment": "shared", "rank": 1},
        {"weight_decay": 0.1},
        {"active_layers": 1},
    ],
)
def test_what_cannot_wait_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="fold='refresh' lets steps wait"):
        MeZO(support.tiny_model("llama"), **{**FOLDS, **settings})
    with pytest.raises(InputError, match="unknown fold 'never'"):
        begin(fold="never")
