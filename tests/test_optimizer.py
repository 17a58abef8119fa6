"""MeZO: the mathematics by exact enumeration and transcription, then the promises of an optimizer."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from forwardtune import MeZO, NonFiniteLossError
from forwardtune.method.rules import Adam, Momentum
from forwardtune.noise import Noise, Update, definition, get_direction
from forwardtune.optimizer import InterruptedUpdateError
from support import (
    assert_same_bits,
    same_bits,
    scripted,
    snapshot,
    trusted,
)  # fmt: skip

DIRECTIONS = ("gaussian", "rademacher")
EXACT = ("scratch", "copy")  # they leave the weights bit for bit as they were


class Quadratic(nn.Module):
    """L(theta) = 1/2 |theta - target|^2, with a target of unit size."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: int = 16) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.register_buffer("target", torch.randn(size, generator=torch.Generator().manual_seed(3)))

    def forward(self) -> Tensor:
        return 0.5 * (self.theta.float() - self.target).square().sum()


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def loss_of(net: nn.Module) -> Callable[[], Tensor]:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()).dtype)
    return lambda: (net(inputs) - 1).square().mean()


def two_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Weights with a learning rate and a decay of their own, biases with the defaults."""
    named = dict(net.named_parameters())
    return [
        {"params": [p for name, p in named.items() if name.endswith("weight")], "lr": 3e-2, "weight_decay": 0.125},
        {"params": [p for name, p in named.items() if name.endswith("bias")]},
    ]


def run(optimizer: MeZO, closure: Callable[[], Any], steps: int) -> MeZO:
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


# --- the mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_on_a_quadratic_each_coefficient_is_the_gradient_along_its_direction(direction):
    """c_k = g . z_k, as the even terms of the two sides cancel."""
    size, probes, eps = 12, 8, 2.0**-8
    data = torch.Generator().manual_seed(0)
    root = torch.randn(size, size, generator=data, dtype=torch.float64)
    matrix, linear = root @ root.T, torch.randn(size, generator=data, dtype=torch.float64)
    theta = torch.randn(size, generator=data, dtype=torch.float64).requires_grad_()
    gradient = (matrix @ theta + linear).detach()

    optimizer = MeZO([theta], lr=1e-9, eps=eps, probes=probes, direction=direction, seed=7)
    optimizer.step(lambda: theta @ matrix @ theta / 2 + linear @ theta)

    # Each loss is a sum of about size^2 products, each rounded to 2^-53; their difference is divided by 2 eps.
    rounding = size**2 * 2.0**-53 * max(map(abs, optimizer.last.losses)) / eps
    for probe, coefficient in enumerate(optimizer.last.coefficients):
        z = definition.directions(get_direction(direction), 7, 0, 0, probe, 0, size).double()
        assert abs(coefficient - float(gradient @ z)) < rounding


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("probes", [1, 3])
def test_twenty_steps_follow_the_published_algorithm(probes, direction):
    """Against a naive float64 transcription of the paper's algorithms 1 (n = 1) and 2 (n-SPSA)."""
    steps, lr, eps, seed = 20, 1e-2, 1e-3, 2**63 + 5
    net, naive = network(torch.float64), network(torch.float64)
    start = snapshot(net)
    optimizer = MeZO(
        two_groups(net), module=net, lr=lr, eps=eps, probes=probes, direction=direction, weight_decay=0.25, seed=seed
    )
    run(optimizer, loss_of(net), steps)

    loss = loss_of(naive)
    named = sorted(naive.named_parameters())

    def perturb(step: int, probe: int, scale: float) -> None:
        for tensor, (_, theta) in enumerate(named):
            theta.data += scale * z(step, probe, tensor, theta)

    def z(step: int, probe: int, tensor: int, theta: Tensor) -> Tensor:
        flat = definition.directions(get_direction(direction), seed, tensor, step, probe, 0, theta.numel())
        return flat.double().view_as(theta)

    for step in range(steps):
        projected = []
        for probe in range(probes):
            perturb(step, probe, eps)
            plus = loss().item()
            perturb(step, probe, -2 * eps)
            minus = loss().item()
            perturb(step, probe, eps)
            projected.append((plus - minus) / (2 * eps))
        for tensor, (name, theta) in enumerate(named):
            rate, decay = (3e-2, 0.125) if name.endswith("weight") else (lr, 0.25)
            gradient = sum(c * z(step, probe, tensor, theta) for probe, c in enumerate(projected)) / probes
            theta.data -= rate * (gradient + decay * theta.data)

    # MeZO rounds a multiple of z, and the factor of the decay, to float32: 2^-24 each, in every step, of numbers that
    # are no larger than the weights. Any other algorithm is off by the movement itself, which is 10,000 times as much.
    scale = max(float(tensor.abs().max()) for tensor in start.values())
    for name, theta in named:
        torch.testing.assert_close(net.get_parameter(name), theta, rtol=0, atol=steps * 2 * 2.0**-24 * scale)
        assert (net.get_parameter(name) - start[name]).abs().max().item() > 1e-2


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [Momentum(state="exact"), Momentum(state="window", window=3), Adam(state="exact"), Adam(state="window", window=3)],
    ids=str,
)
def test_a_saved_state_holds_all_that_a_rule_remembers(rule):
    """Counts, recent steps and what they left alone, moments; loaded, it is the same again, and shares no memory."""
    net = network()
    optimizer = MeZO(net, lr=1e-2, rule=rule, probes=2)
    run(optimizer, loss_of(net), 4)
    optimizer.history.missed, optimizer.history.recent = (
        {1: 2},
        [
            Update(update.step, update.sizes, unused=frozenset({3, 1} if update.step == 3 else ()))
            for update in optimizer.history.recent
        ],
    )
    saved = optimizer.state_dict()["mezo"]["rule"]
    recent = [(update.step, update.sizes, sorted(update.unused)) for update in optimizer.history.recent]
    assert (saved["name"], saved["settings"], saved["taken"]) == (rule.name, rule.settings(), 4)
    assert (saved["missed"], saved["recent"]) == ({1: 2}, recent)
    assert len(recent) == (3 if rule.state == "window" else 0)

    other = MeZO(network(), lr=1e-2, rule=rule, probes=2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ours, theirs = optimizer.history, other.history
    assert (theirs.taken, theirs.missed) == (4, {1: 2})
    assert [(u.step, u.sizes, u.unused) for u in theirs.recent] == [(u.step, u.sizes, u.unused) for u in ours.recent]
    assert (
        theirs.moments.keys()
        == ours.moments.keys()
        == (set(dict(net.named_parameters())) if rule.state == "exact" else set())
    )
    state = other.state_dict()
    third = MeZO(network(), lr=1e-2, rule=rule, probes=2)
    third.load_state_dict(state)
    for name, moments in ours.moments.items():
        assert len(theirs.moments[name]) == len(moments) == rule.averages
        for mine, loaded, shared in zip(moments, theirs.moments[name], third.history.moments[name], strict=True):
            assert same_bits(mine, loaded)
            assert shared.data_ptr() != loaded.data_ptr()


@pytest.mark.parametrize("change", ["names", "sizes"])
def test_a_state_of_other_tensors_is_refused(change):
    rule = Momentum(state="exact")
    net = network()
    optimizer = MeZO(net, lr=1e-2, rule=rule)
    run(optimizer, loss_of(net), 1)
    saved = copy.deepcopy(optimizer.state_dict())
    moments = saved["mezo"]["rule"]["moments"]
    name = next(iter(moments))
    if change == "names":
        moments["elsewhere"] = moments.pop(name)
    else:
        moments[name] = [moment[:-1] for moment in moments[name]]
    with pytest.raises(ValueError, match="for other tuned tensors: tune the same ones"):
        MeZO(network(), lr=1e-2, rule=rule).load_state_dict(saved)


# --- how it is called ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        lambda net: net,
        lambda net: list(net.parameters()),
        lambda net: net.parameters(),
        lambda net: net.named_parameters(),
        two_groups,
    ],
    ids=["module", "list", "generator", "named", "groups"],
)
def test_any_form_of_parameters_can_be_tuned(params):
    net, calls = network(), itertools.count()
    loss = loss_of(net)
    before = loss().item()
    optimizer = run(MeZO(params(net), lr=3e-2), lambda: (next(calls), loss())[1], 60)
    assert loss().item() < 0.5 * before
    assert next(calls) == 2 * 60 + 2  # the self-check costs two evaluations, in the first step only
    assert (optimizer.perturbation.name == "scratch") == (optimizer.module is not None)


def test_bare_tensors_can_be_tuned():
    theta = torch.zeros(16, requires_grad=True)
    data = theta.data_ptr()
    run(MeZO([theta], lr=1 / 18), lambda: (theta - 1).square().sum() / 2, 100)
    assert (theta - 1).abs().max().item() < 0.1
    assert theta.data_ptr() == data


@pytest.mark.parametrize(
    "make",
    [
        lambda net: MeZO(net.named_parameters(), lr=1e-2),
        lambda net: MeZO(list(net.parameters()), lr=1e-2, module=net),
        lambda net: MeZO([{"params": [p]} for p in reversed(list(net.parameters()))], lr=1e-2, module=net),
    ],
    ids=["named", "module given", "other order"],
)
def test_directions_depend_on_names_alone(make):
    net, same = network(), network()
    run(MeZO(net, lr=1e-2), loss_of(net), 3)
    run(make(same), loss_of(same), 3)
    assert_same_bits(same, snapshot(net))


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float64, lambda x: torch.tensor([[x]]), np.asarray])
def test_the_closure_may_return_any_number(kind):
    model, other = Quadratic(), Quadratic()
    run(MeZO(model, lr=1e-2), lambda: model().item(), 3)
    run(MeZO(other, lr=1e-2), lambda: kind(other().item()), 3)
    # torch.tensor rounds to float32, which these losses already are.
    assert_same_bits(other, snapshot(model))


@pytest.mark.parametrize("plus_minus", [(3, 1), (True, False), (np.int64(3), np.float32(1.0)), (3.0, torch.tensor(1))])
def test_the_closure_may_return_whole_numbers(plus_minus):
    """An accuracy, a count, a success: ``c = (plus - minus) / (2 eps)``."""
    plus, minus = map(float, plus_minus)
    optimizer = trusted(MeZO(network(), eps=0.5, perturbation="copy"))
    assert optimizer.step(scripted(*plus_minus)) == (plus + minus) / 2
    assert (optimizer.last.losses, optimizer.last.coefficients) == ((plus, minus), (plus - minus,))


WRONG = [None, "low", "0.5", torch.ones(2), np.ones(2), [1.0], 1 + 2j]


@pytest.mark.parametrize("perturbation", ["auto", *EXACT])
@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_the_closure_must_return_a_number(wrong, perturbation):
    net = network()
    before = snapshot(net)
    with pytest.raises(TypeError, match="the closure returned"):
        MeZO(net, perturbation=perturbation).step(lambda: wrong)
    assert_same_bits(net, before)


def test_microbatches_add_up_to_the_batch():
    """``estimate()`` for each part, then ``step()``, is the step of the whole, bit for bit."""
    batch = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))

    def loss(model: Quadratic, rows: Tensor) -> Tensor:
        # Squares are float32 and their sum is float64, so that it is exact in any order.
        return (model.theta - rows).square().double().sum()

    whole, parts = Quadratic(), Quadratic()
    one, many = (MeZO(model, lr=1e-3, probes=2, perturbation="copy") for model in (whole, parts))
    for _ in range(3):
        one.step(lambda: loss(whole, batch))
        for rows in batch.split([1, 2, 3]):
            many.estimate(lambda rows=rows: loss(parts, rows))
        assert many.step() == one.last.loss
        assert many.last.losses == one.last.losses
    assert_same_bits(parts, snapshot(whole))


def test_a_step_needs_a_loss():
    with pytest.raises(RuntimeError, match=r"estimate\(closure\) before step\(\)"):
        MeZO(network()).step()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (lambda optimizer: LambdaLR(optimizer, lambda step: step / 4), [0.0, 0.25e-2, 0.5e-2, 0.75e-2]),
        (
            lambda optimizer: CosineAnnealingLR(optimizer, T_max=4),
            [1e-2 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)],
        ),
    ],
    ids=["LambdaLR", "CosineAnnealingLR"],
)
def test_torch_schedulers_set_the_learning_rate(scheduler, expected):
    """Warnings are errors in this suite, so a scheduler that distrusts the optimizer would fail here."""
    net = network()
    optimizer, loss = MeZO(net, lr=1e-2), loss_of(net)
    schedule = scheduler(optimizer)
    seen = []
    for _ in range(4):
        optimizer.step(loss)
        schedule.step()
        seen += optimizer.last.lr
    assert seen == pytest.approx(expected, rel=1e-12)


def test_the_record_names_every_group_and_counts_unchanged_weights():
    net = network()
    optimizer = MeZO(two_groups(net), module=net, lr=1e-2, weight_decay=0.25, probes=2)
    loss = optimizer.step(loss_of(net))
    record = optimizer.last
    assert (record.step, record.lr, record.weight_decay) == (0, (3e-2, 1e-2), (0.125, 0.25))
    assert (len(record.coefficients), len(record.losses)) == (2, 4)
    assert record.loss == loss == pytest.approx(math.fsum(record.losses) / 4, rel=1e-15)
    assert not record.skipped

    before = snapshot(net)
    run(optimizer, scripted(1.0), 1)  # no slope: the decay moves weights that are not 0, nothing else
    after = net.state_dict()
    assert optimizer.last.unchanged == sum(int((after[name] == before[name]).sum()) for name in before)


def test_a_coefficient_is_clipped_to_the_limit():
    optimizer = trusted(MeZO(network(), eps=0.5, probes=3, perturbation="copy", clip_coefficient=5.0))
    optimizer.step(scripted(9.0, 1.0, 0.0, 6.0, 2.0, 0.0))
    assert optimizer.last.coefficients == (5.0, -5.0, 2.0)


# --- what must not happen --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        *({"lr": value} for value in (0, -1e-6, math.nan, math.inf)),
        *({"weight_decay": value} for value in (-0.1, math.nan, math.inf)),
        *({"eps": value} for value in (0, -1e-3, math.nan, math.inf, "small")),
        *({"probes": value} for value in (0, -1, 1.5)),
        *({"clip_coefficient": value} for value in (0.0, -1.0, math.nan)),
        *({"seed": value} for value in (-1, 2**64, 1.5)),
        {"max_skipped": 0},
        {"perturbation": "magic"},
        {"direction": "north"},
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_by_name(bad):
    """Of a group, too."""
    (name,) = bad
    with pytest.raises(ValueError, match=name):
        MeZO(network(), **bad)
    if name in ("lr", "weight_decay") and bad != {"lr": 0}:
        with pytest.raises(ValueError, match=name):
            MeZO([{"params": list(network().parameters()), **bad}])


def test_two_parameters_of_one_name_are_refused():
    """Without the module, names may collide; one of the two would never be tuned."""
    with pytest.raises(ValueError, match=r"0\.weight"):
        MeZO([{"params": list(network().named_parameters())}, {"params": list(network().named_parameters())}])


def test_groups_can_be_added_before_the_first_step():
    net, same = network(), network()
    first, second = two_groups(same)
    optimizer = MeZO([first], lr=1e-2, module=same)
    optimizer.add_param_group(second)
    run(MeZO(two_groups(net), lr=1e-2, module=net), loss_of(net), 3)
    run(optimizer, loss_of(same), 3)
    assert_same_bits(same, snapshot(net))


@pytest.mark.parametrize("begin", [MeZO.step, MeZO.estimate], ids=["after a step", "after an estimate"])
def test_groups_cannot_be_added_later(begin):
    """Ids, and so directions, would change under the coefficients."""
    net = network()
    first, second = two_groups(net)
    optimizer = MeZO([first], lr=1e-2, module=net)
    begin(optimizer, loss_of(net))
    with pytest.raises(ValueError, match=r"after the first step|estimate"):
        optimizer.add_param_group(second)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    net, same = network(), network()
    optimizer = MeZO(same, lr=1e-2)
    with pytest.raises(ValueError, match="not in the module"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    run(MeZO(net, lr=1e-2), loss_of(net), 2)
    run(optimizer, loss_of(same), 2)
    assert optimizer.last.lr == (1e-2,)
    assert_same_bits(same, snapshot(net))


@pytest.mark.parametrize(("state", "message"), [({"seed": 1}, "seed 0.*has 1"), (None, "not the state of a MeZO")])
def test_a_foreign_state_is_refused(state, message):
    net = network()
    saved = torch.optim.SGD(net.parameters()).state_dict() if state is None else MeZO(net).state_dict()
    with pytest.raises(ValueError, match=message):
        MeZO(net, **(state or {})).load_state_dict(saved)


@pytest.mark.parametrize("perturbation", ["auto", *EXACT])
@pytest.mark.usefixtures("random_state_untouched")
def test_no_global_random_state_is_touched(perturbation):
    net = network()
    states = random.getstate(), np.random.get_state()
    run(MeZO(net, lr=1e-2, probes=2, perturbation=perturbation), loss_of(net), 3)
    assert random.getstate() == states[0]
    np.testing.assert_equal(np.random.get_state(), states[1])


@pytest.mark.parametrize(
    "losses",
    [*((bad, 1.0) for bad in (math.nan, math.inf, -math.inf)), (1.0, math.nan), (1.0, math.inf), (1.0, -math.inf),
     (1e308, -1e308), (1e300, 0.0)],
    ids=str,
)  # fmt: skip
def test_a_step_whose_loss_coefficient_or_size_is_not_finite_is_skipped(losses):
    """Not even weight decay moves the weights; the step is counted and recorded."""
    net = network()
    before = snapshot(net)
    optimizer = trusted(MeZO(net, lr=1e-2, weight_decay=0.5, perturbation="copy"))
    assert math.isfinite(optimizer.step(scripted(*losses))) == all(map(math.isfinite, losses))
    assert_same_bits(net, before)
    assert optimizer.last.skipped
    assert optimizer.last.coefficients == ()
    assert optimizer.last.unchanged == sum(p.numel() for p in net.parameters())
    assert optimizer.next_step == 1


def test_too_many_skipped_steps_in_a_row_raise():
    net = network()
    before = snapshot(net)
    optimizer = MeZO(net, lr=1e-30, max_skipped=3)
    run(optimizer, lambda: math.nan, 2)
    run(optimizer, loss_of(net), 1)  # a good step starts the count anew
    run(optimizer, lambda: math.nan, 2)
    with pytest.raises(NonFiniteLossError, match="3 steps in a row, the last of them step 5"):
        optimizer.step(lambda: math.nan)
    assert_same_bits(net, before)


def test_skipped_steps_are_counted_across_a_restored_state():
    net = network()
    first, second = MeZO(net, max_skipped=3), MeZO(net, max_skipped=3)
    run(first, lambda: math.nan, 2)
    second.load_state_dict(first.state_dict())
    with pytest.raises(NonFiniteLossError, match="3 steps in a row"):
        second.step(lambda: math.nan)


def test_the_self_check_waits_for_a_finite_loss():
    net = network()
    optimizer = MeZO(net)
    optimizer.step(lambda: math.nan)
    assert optimizer.perturbation is None
    optimizer.step(loss_of(net))
    assert optimizer.perturbation.name == "scratch"


def test_dropout_in_training_mode_is_told_once_and_is_fine_in_evaluation_mode():
    net = nn.Sequential(network(), nn.Dropout(0.5))
    optimizer, loss = MeZO(net), loss_of(net)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pytest.warns(UserWarning, match="not deterministic"), pytest.warns(UserWarning, match=r"model\.eval\(\)"):
            optimizer.step(loss)
        optimizer.step(loss)
    run(MeZO(net.eval()), loss, 2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(4))
def test_an_update_that_stopped_half_way_is_not_built_upon(at, error, monkeypatch):
    net = network()
    optimizer, loss = MeZO(net, lr=1e-2), loss_of(net)
    optimizer.step(loss)
    with monkeypatch.context() as patch:
        calls, update = itertools.count(), Noise.update

        def breaking(self: Noise, *args: Any, **kwargs: Any) -> int:
            if next(calls) == at:
                raise error
            return update(self, *args, **kwargs)

        patch.setattr(Noise, "update", breaking)
        with pytest.raises(error):
            optimizer.step(loss)
    between = snapshot(net)
    for _ in range(2):
        with pytest.raises(InterruptedUpdateError, match="replay the step log"):
            optimizer.step(loss)
    assert_same_bits(net, between)


# --- half precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_far_below_the_spacing_are_kept_on_average(dtype):
    """Each step moves every weight by 1/64 of the spacing along z: rounding to nearest would lose every one."""
    size, steps, start = 2**14, 16, 1.5
    spacing = torch.finfo(dtype).eps  # between 1 and 2
    move = spacing / 64
    assert torch.tensor(start + move).to(dtype) == start
    weight = torch.full((size,), start, dtype=dtype, requires_grad=True)
    # c = 1 / eps = 2, so the update is -2 lr z.
    optimizer = trusted(MeZO([weight], lr=move / 2, eps=0.5, direction="rademacher"))
    along = 0.0
    for step in range(steps):
        before = weight.detach().double()
        optimizer.step(scripted(1.0, -1.0))
        z = definition.directions(get_direction("rademacher"), 0, 0, step, 0, 0, size).double()
        along += float(-z @ (weight.detach().double() - before)) / (size * steps)
    # A weight jumps by the spacing with probability 1/64, so the relative deviation of the mean of 2^18 jumps is
    # sqrt(63 / 2^18) = 1.6%. Six of them: false alarm 2e-9, over all seeds.
    assert along == pytest.approx(move, rel=6 * math.sqrt(63 / (size * steps)))
    assert same_bits(weight.detach() * 0, torch.zeros(size, dtype=dtype))
