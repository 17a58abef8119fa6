"""Rules: the same bits in every way to compute them, moments exact and from a window, and the memory that they take."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from forwardtune import MeZO, noise
from forwardtune.method.rule import History, float32, move_all
from forwardtune.method.rules import Adam, Momentum, Sign, nearest_root, sgd
from forwardtune.noise import ROUNDING_PROBE, Noise, Update, definition
from forwardtune.noise.philox import half_words
from forwardtune.parameters import TunedParameters
from support import HALF, assert_same_bits, same_bits, scripted, snapshot
from support.methods import (
    LOSSES,
    RULES,
    Quadratic,
    every_direction,
    every_dtype,
    every_rule,
    every_rule_with_moments,
    long_enough,
    scripted_run,
)


@every_dtype
@every_direction
@every_rule
def test_plain_torch_gives_the_same_bits_as_the_kernels(rule, direction, dtype, monkeypatch):
    fast, slow = long_enough(dtype), long_enough(dtype)
    first = scripted_run(fast, rule, direction=direction)
    with monkeypatch.context() as patch:
        patch.setattr(noise.backends, "fast", lambda device, dtype: "not here")
        patch.setattr(noise.backends, "_told", True)
        second = scripted_run(slow, rule, direction=direction)
    assert_same_bits(slow, snapshot(fast))
    assert first.last.unchanged == second.last.unchanged


@pytest.mark.parametrize(("sizes", "elsewhere"), [({"cpu": 512}, 1), ({}, 500)], ids=["on-cpu", "elsewhere"])
@every_rule
def test_pieces_of_a_tensor_add_up_to_the_whole(rule, sizes, elsewhere, monkeypatch):
    whole, parts = long_enough(torch.bfloat16), long_enough(torch.bfloat16)
    one = scripted_run(whole, rule)
    monkeypatch.setattr("forwardtune.method.moments._PIECE", sizes)
    monkeypatch.setattr("forwardtune.method.moments._PIECE_ELSEWHERE", elsewhere)
    many = scripted_run(parts, rule)
    assert_same_bits(parts, snapshot(whole))
    assert one.last.unchanged == many.last.unchanged


@every_dtype
@pytest.mark.parametrize("kind", [Momentum, Adam])
def test_a_window_over_the_whole_history_is_exact(kind, dtype):
    exact, window = long_enough(dtype), long_enough(dtype)
    scripted_run(exact, kind(state="exact"), steps=12)
    scripted_run(window, kind(window=12), steps=12)
    assert_same_bits(window, snapshot(exact))


def test_what_a_window_of_momentum_cuts_off_is_below_one_percent():
    """Of the largest m: the cut-off part is ``sum_{j >= W} mu^j g``, and ``mu^W`` is below 1%."""
    mu, steps, lr = 0.5, 30, 1e-2
    exact, window = long_enough(torch.float64), long_enough(torch.float64)
    scripted_run(exact, Momentum(mu, state="exact"), steps, weight_decay=0.0, lr=lr)
    optimizer = scripted_run(window, Momentum(mu, state="window"), steps, weight_decay=0.0, lr=lr)
    assert optimizer.rule.window == 7
    largest = 3.67 * 2.5 / (2 * 0.25) / (1 - mu)  # |z| times the largest difference of losses over 2 eps
    for a, b in zip(exact.parameters(), window.parameters(), strict=True):
        difference = (a - b).abs().max().item()
        assert 0 < difference <= steps * lr * 0.01 * largest


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (Momentum(0.9, state="exact"), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (Momentum(0.9, window=50), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9)),
        (Adam(0.9, 0.99, state="exact"), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.25)),
        (Adam(0.9, 0.99, window=50), lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.25)),
    ],
    ids=["momentum-exact", "momentum-window", "adam-exact", "adam-window"],
)
def test_moments_are_those_of_torch_optim(rule, reference):
    """Fed with the same estimate, in float64 (torch's SGD couples weight decay to the gradient: without it there)."""
    steps = 20
    ours, theirs = long_enough(torch.float64), long_enough(torch.float64)
    optimizer = scripted_run(ours, rule, 0, weight_decay=0.25 if isinstance(rule, Adam) else 0.0)
    other = reference(theirs.parameters())
    closure = scripted(*LOSSES)
    for step in range(steps):
        optimizer.step(closure)
        for tensor, parameter in zip(optimizer.tuned, (theirs.a.value, theirs.b.value), strict=True):
            zs = [optimizer.noise.z(parameter, tensor=tensor.id, step=step, probe=k) for k in range(2)]
            parameter.grad = sum(c * z.double() for c, z in zip(optimizer.last.coefficients, zs, strict=True)) / 2
        other.step()
    # Coefficients, factors and rates are rounded to float32, 2^-24 each: a handful of such errors in moves that add up
    # to less than 20 steps * lr * |m| <= 20 * 0.01 * 100.
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=8 * 2.0**-24 * 20)
    assert (ours.a.value - long_enough(torch.float64).a.value).abs().mean() > 0.1


def test_sign_moves_every_weight_by_the_learning_rate():
    model = long_enough(torch.float64)
    before = snapshot(model)
    optimizer = scripted_run(model, Sign(), 1, weight_decay=0.0, lr=2.0**-7, probes=1)
    for tensor in optimizer.tuned:
        z = optimizer.noise.z(tensor.parameter, tensor=tensor.id, step=0, probe=0)
        moved = tensor.parameter.detach() - before[tensor.name]
        # theta is below 8 and float64: the difference is exact to 2^-49.
        torch.testing.assert_close(moved, -(2.0**-7) * z.sign().double(), rtol=0, atol=2.0**-49)


def test_weight_decay_is_decoupled_in_every_rule():
    """Without slope, and before there are moments, it is all that moves the weights; and only where it is asked for."""
    for rule, decay in itertools.product(RULES.values(), (0.25, 0.0)):
        model = long_enough(torch.float32)
        before = snapshot(model)
        optimizer = MeZO(model, lr=0.5, weight_decay=decay, perturbation="copy", rule=rule)
        optimizer.step(lambda: 1.0)
        assert optimizer.last.flat
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name] * (1 - decay / 2))
    assert (sgd(0, [1.0], 0.1).decay, sgd(0, [1.0], 0.5, 0.5).decay) == (1.0, 0.75)


@every_rule
def test_a_flat_step_is_taken_and_a_skipped_one_is_not(rule):
    model = long_enough(torch.float32)
    optimizer = scripted_run(model, rule, 2, weight_decay=0.0)
    before = snapshot(model)
    optimizer.step(lambda: math.inf)
    assert_same_bits(model, before)
    assert optimizer.history.taken == (2 if rule.remembers else 0)
    optimizer.step(lambda: 1.0)
    moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert moved == rule.remembers  # momentum carries on
    assert optimizer.history.taken == (3 if rule.remembers else 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("start", [0, 512, 2**35 - 2**13])
@pytest.mark.parametrize("size", [0, 1, 7, 511, 1300])
def test_storing_rounds_as_the_definition_does(size, start, dtype, monkeypatch):
    """By all kernels that are here, Triton's in its interpreter."""
    where = {"seed": 2**63 + 9, "tensor": 5, "step": 7, "start": start}
    draw = torch.Generator().manual_seed(0)
    weight = (torch.randn(size, generator=draw) ** 9).to(dtype)
    x = weight.float() * (1 + torch.randn(size, generator=draw) / 256)
    x[::5] = weight[::5].float()
    stored = weight.clone()
    count = definition.store(stored, x, **where)
    random = half_words(where["seed"], 5, 7, ROUNDING_PROBE, start, size)
    assert same_bits(stored, definition.round_stochastically(x, random, dtype).to(dtype))
    assert count == int((stored == weight).sum()) >= size // 5
    kernels = [pytest.importorskip("forwardtune.noise.cpu")]
    try:
        from test_noise_gpu import load_interpreted
    except pytest.skip.Exception:
        pass
    else:
        kernels.append(load_interpreted())
    for kernel in kernels:
        here = weight.clone()
        assert int(kernel.store(here, x, **where)) == count
        assert same_bits(here, stored)


def test_the_update_and_the_store_round_alike():
    """sgd as one fused sweep, and spelled out: the same rounding bits."""
    fused, spelled = (torch.linspace(-3, 3, 1300).to(torch.bfloat16) for _ in range(2))
    source = Noise(4)
    update = noise.Update(3, (1e-3, -2e-3), 0.75)
    source.update(fused, [update], tensor=2)
    x = spelled.float()
    source.update(x, [update], tensor=2)
    source.store(spelled, x, tensor=2, step=3)
    assert same_bits(fused, spelled)


# --- what a rule keeps, and where ------------------------------------------------------------------------------------


def test_the_form_of_the_memory_follows_the_share_that_is_tuned():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 2, bias=False))
    whole = MeZO(model, rule="adam").rule
    assert (whole.state, whole.window) == ("window", 90)
    model[0].requires_grad_(False)  # 128 of 4,224 weights are left: 1 KiB of moments beside 16.5 KiB
    adapter = MeZO(model, rule="adam").rule
    assert (adapter.state, adapter.window) == ("exact", None)
    assert MeZO(list(model[1].parameters()), rule="adam").rule.state == "window"  # the model is not known
    assert MeZO(model, rule=Adam(window=5)).rule.settings()["window"] == 5
    assert MeZO(model, rule="momentum").rule.state == "exact"


@pytest.mark.parametrize(("mu", "window"), [(0.0, 1), (0.01, 2), (0.9, 44), (0.99, 459)])
def test_a_window_holds_99_percent(mu, window):
    model = Quadratic()
    rule = Momentum(mu, state="window").resolved(
        TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    )
    assert rule.window == window
    assert mu**window < 0.01
    assert window == 1 or mu ** (window - 1) >= 0.01


@pytest.mark.parametrize(("rule", "weights"), [("momentum", 1000), ("adam", 2000)])
@pytest.mark.parametrize(("count", "state"), [(100, "exact"), (101, "window")])
def test_moments_are_exact_up_to_a_tenth_of_the_models_memory(rule, weights, count, state):
    model = nn.ParameterList([torch.zeros(count), torch.zeros(weights - count)])
    model[1].requires_grad_(False)
    assert MeZO(model, rule=rule).rule.state == state
    model[1].data = model[1].data.double()  # memory counts, not the number of weights
    assert MeZO(model, rule=rule).rule.state == "exact"


@every_rule_with_moments
def test_moments_are_kept_where_they_are_wanted(rule):
    model = long_enough(torch.float32)
    tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    for keep in (False, True):
        history = History()
        move_all(rule, Noise(0), tuned, [[rule.plan(0, [1.0], 1e-2, 0.0)]], history, keep=keep)
        assert bool(history.moments) == (keep and rule.state == "exact")


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_did_not_change_is_counted_over_all_steps(rule, dtype):
    """Skipped ones too, in which nothing changes."""
    model, one_by_one, counts = long_enough(dtype), long_enough(dtype), []
    rule = rule.resolved(TunedParameters.from_groups([{"params": list(model.parameters())}], model))
    updates = [Update(0, ()), rule.plan(1, [2.0], 1e-4, 0.0), Update(2, ()), rule.plan(3, [1.0], 1e-4, 0.25)]
    tuned = TunedParameters.from_groups([{"params": list(one_by_one.parameters())}], one_by_one)
    history = History()
    for update in updates:
        before = snapshot(one_by_one)
        counted = move_all(rule, Noise(0), tuned, [[update]], history)
        same = sum(int((tensor == before[name]).sum()) for name, tensor in one_by_one.state_dict().items())
        assert counted == same
        counts.append(counted)
    assert counts[0] == counts[2] == tuned.numel
    assert 0 < counts[1] < tuned.numel or dtype == torch.float64
    tuned = TunedParameters.from_groups([{"params": list(model.parameters())}], model)
    assert move_all(rule, Noise(0), tuned, [updates], History()) == sum(counts)
    assert_same_bits(model, snapshot(one_by_one))


def test_the_root_of_adam_is_rounded_to_nearest():
    """torch's own is a last place off for some numbers on a CPU, and so differs from a GPU's."""
    v = torch.arange(0x3F800000, 0x40800000, 61, dtype=torch.int32).view(torch.float32)
    v = torch.cat([v, v * 1e-14, torch.tensor([0.0, 1e-45, 3e38, math.inf])])
    expected = torch.from_numpy(np.sqrt(v.numpy()))
    assert torch.equal(nearest_root(v), expected)
    m, step = torch.ones_like(v), Adam().plan(0, [1.0], 0.5, 0.0)
    direction = Adam(beta1=0.5, beta2=0.75).direction([m, v], step, 1)  # sqrt(1 - b2) is 1/2, exactly
    assert torch.equal(direction, m / (expected * 2.0 + float32(1e-8)))


def test_a_step_of_adam_must_fit_its_float32_moments():
    """``(4 sum |sizes|)^2`` is at most the largest float32, 2^128."""
    assert Adam().plan(0, [0.99 * 2.0**62], 1e-6, 0.0)
    assert Adam().plan(0, [0.99 * 2.0**62, -0.99 * 2.0**62], 1e-6, 0.0)
    for coefficients in ([1.01 * 2.0**62], [1.01 * 2.0**62, -1.01 * 2.0**62]):
        with pytest.raises(OverflowError):
            Adam().plan(0, coefficients, 1e-6, 0.0)
    assert Momentum().plan(0, [1.01 * 2.0**62], 1e-6, 0.0)


@every_rule
def test_the_memory_is_what_it_is_said_to_be(rule):
    model = long_enough(torch.bfloat16)
    optimizer = scripted_run(model, rule)
    moments = [moment for kept in optimizer.history.moments.values() for moment in kept]
    rule = optimizer.rule
    kept = rule.averages if rule.remembers and rule.state == "exact" else 0
    assert sum(moment.numel() for moment in moments) == kept * optimizer.tuned.numel
    assert {moment.dtype for moment in moments} <= {torch.float32}
    assert len(optimizer.history.recent) == (rule.window or 0 if rule.remembers else 0)
    assert not optimizer.state


@pytest.mark.usefixtures("random_state_untouched")
def test_steps_may_be_taken_in_inference_mode_and_out_of_it():
    plain, mixed = long_enough(torch.float32), long_enough(torch.float32)
    rule = Adam(state="exact")
    scripted_run(plain, rule, 4)
    optimizer = scripted_run(mixed, rule, 0)
    closure = scripted(*LOSSES)
    for step in range(4):
        with torch.inference_mode(step % 2 == 0):
            optimizer.step(closure)
    assert_same_bits(mixed, snapshot(plain))
