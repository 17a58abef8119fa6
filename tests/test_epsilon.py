"""The perturbation scale: signal and rounding of real models, and losses that are curved, flat or broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO
from forwardtune.points import ReadElsewhereError
from forwardtune.search.budget import SCALE_EVALUATIONS
from forwardtune.search.epsilon import choose_eps, measure, set_eps
from support import assert_same_bits, closure_for, snapshot, tiny_model, token_batch, trusted

ROOT = 10**0.5


class Counted:
    """A closure that counts its calls and keeps what it returned."""

    def __init__(self, closure: Callable[[], Any]) -> None:
        self._closure = closure
        self.calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        return self._closure()


def llama(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, MeZO, Counted]:
    model = tiny_model("llama", dtype)
    optimizer = MeZO(model, **{"perturbation": "scratch", **settings})
    return model, optimizer, Counted(closure_for(model, token_batch()))


class Weights(nn.Module):
    """A vector of weights and a loss of it."""

    def __init__(self, loss: Callable[[Tensor], Tensor], size: int = 64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, size))
        self._loss = loss

    def forward(self) -> Tensor:
        return self._loss(self.w)


def weights(loss: Callable[[Tensor], Tensor], **settings: Any) -> tuple[Weights, MeZO, Counted]:
    net = Weights(loss)
    return net, trusted(MeZO(net, perturbation="copy", **settings)), Counted(net)


def scales(measured: list[Any]) -> list[float]:
    """In powers of the square root of ten around 1, in the order of measurement."""
    return [round(math.log(scale.eps, ROOT)) for scale in measured]


@pytest.mark.parametrize("perturbation", ["auto", "scratch", "copy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_nothing_changes(dtype, perturbation, random_state_untouched):
    """Weights and loss to the bit, and the steps that follow."""
    model, optimizer, closure = llama(dtype, perturbation=perturbation)
    other, untouched, _ = llama(dtype, perturbation=perturbation)
    before = snapshot(model)
    loss = closure()
    measured = choose_eps(optimizer, closure, 1e-3)
    assert_same_bits(model, before)
    assert torch.equal(closure(), loss)
    assert (optimizer.estimator.eps, optimizer.next_step, optimizer.last) == (1e-3, 0, None)
    # As many evaluations as are reported; the first call's self-check comes on top.
    assert closure.calls == 2 + 2 + sum(scale.evaluations for scale in measured)
    for run, net in ((optimizer, model), (untouched, other)):
        for seed in range(2):
            run.step(closure_for(net, token_batch(seed=seed)))
    assert_same_bits(model, snapshot(other))


def test_a_run_with_a_direction_for_each_example_is_measured_along_one_for_all():
    """What is measured is a minibatch's loss, at the point of LOZO; the first step still compares one example's."""
    _, optimizer, closure = llama(rank=1)
    expected = measure(optimizer, closure, 1e-2).coefficients
    _, optimizer, closure = llama(perturbation="auto", assignment="example")
    assert measure(optimizer, closure, 1e-2).coefficients == pytest.approx(expected, rel=1e-2, abs=1e-4)

    mixing, x = nn.Linear(6, 6), torch.randn(4, 6)

    def losses() -> Tensor:
        y = mixing(x)
        return (y - 2 * y.mean(0)).pow(2).mean(1)

    optimizer = MeZO(mixing, assignment="example")
    measure(optimizer, lambda: losses().mean(), 1e-2)
    with pytest.raises(ReadElsewhereError, match="mixes its examples"):
        optimizer.step(losses)


def test_directions_are_not_those_of_steps():
    """A scale that suits the directions it was chosen on says nothing more of them."""
    _, optimizer, closure = llama()
    c = measure(optimizer, closure, 1e-3).coefficients
    assert len(set(c)) == 3
    optimizer.step(closure)
    assert optimizer.last.coefficients[0] not in c


def test_a_failing_closure_leaves_the_weights():
    model, optimizer, _ = llama()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        measure(optimizer, lambda: 1 / 0, 1e-3)
    assert_same_bits(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("eps", [0.0, -1e-3, math.inf, math.nan])
def test_a_scale_that_is_none_is_refused(eps):
    _, optimizer, closure = llama()
    with pytest.raises(ValueError, match="eps must be positive"):
        measure(optimizer, closure, eps)
    assert closure.calls == 0


def test_the_coefficients_are_derivatives_along_directions():
    """Of a linear loss: exactly, whatever the scale, with a signal of 2 eps c and no noise but rounding."""
    _, optimizer, closure = weights(lambda w: (w * torch.linspace(0, 1, 64)).double().sum())
    small, large = measure(optimizer, closure, 1e-2), measure(optimizer, closure, 1.0)
    assert small.coefficients == pytest.approx(large.coefficients, rel=1e-4)
    for scale in (small, large):
        norm = math.sqrt(sum(c * c for c in scale.coefficients) / 3)
        assert scale.signal == pytest.approx(2 * scale.eps * norm)
        assert scale.noise < 1e-5
        assert scale.is_clear
        assert scale.evaluations == SCALE_EVALUATIONS == 10
    assert measure(optimizer, closure, 1.0, directions=5).evaluations == 16
    assert closure.calls == 10 + 10 + 16


def test_the_noise_is_that_of_one_evaluation():
    """A loss with noise of a known size on top, which is drawn anew at every evaluation."""
    generator = torch.Generator().manual_seed(0)
    for deviation in (1e-3, 1e-1):
        noisy = lambda w, d=deviation: w.double().sum() + d * torch.randn((), generator=generator)  # noqa: E731
        _, optimizer, closure = weights(noisy)
        assert measure(optimizer, closure, 1e-2, directions=300).noise == pytest.approx(deviation, rel=0.15)


def test_float32_finds_a_clear_signal_at_once():
    _, optimizer, closure = llama()
    measured = choose_eps(optimizer, closure, 1e-3)
    assert [scale.eps for scale in measured] == pytest.approx([1e-3 / ROOT, 1e-3])
    assert all(scale.is_clear for scale in measured)
    assert measured[-1].signal > 100 * measured[-1].noise
    assert measured[-1].eps == 1e-3


def test_bfloat16_with_a_minute_scale_is_seen_as_rounding():
    _, optimizer, closure = llama(torch.bfloat16)
    assert not measure(optimizer, closure, 1e-6).is_clear
    measured = choose_eps(optimizer, closure, 1e-6, most=10)
    *hidden, chosen = measured
    assert hidden
    assert not any(scale.is_clear for scale in hidden)
    assert chosen.is_clear
    assert [scale.eps for scale in measured] == pytest.approx([1e-6 * ROOT**i for i in range(len(measured))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_curvature_is_not_taken_for_rounding(dtype):
    """Where the model is strongly curved and hardly steep, a larger scale would only hide the slope."""
    _, optimizer, closure = llama(dtype)
    *_, fine = choose_eps(optimizer, closure, 3e-3)
    coarse = measure(optimizer, closure, 3e-2)
    assert math.dist(coarse.coefficients, fine.coefficients) > 0.5 * math.hypot(*fine.coefficients)
    assert coarse.is_clear
    assert choose_eps(optimizer, closure, 3e-2)[-1].eps < 3e-2


def test_the_scale_that_is_chosen_in_bfloat16_gives_the_slope():
    """The coefficients of float32, of which rounding at the first scale shows nothing."""
    _, exact, closure = llama()
    _, optimizer, half = llama(torch.bfloat16)
    first, *_, chosen = choose_eps(optimizer, half, 1e-6, most=10)
    truth = measure(exact, closure, 1e-3).coefficients
    size = math.hypot(*truth)
    assert math.dist(first.coefficients, truth) > 10 * size
    assert math.dist(chosen.coefficients, truth) < size
    assert first.kept < 0.1
    assert chosen.kept > 0.9


@pytest.mark.parametrize(("noise", "hidden"), [(7e-3, False), (math.inf, True)])
def test_rounding_is_spoken_of_where_nothing_is_left_beside_it(noise, hidden):
    """Beside a signal it costs steps, and asks nothing of the user; where it is all, another dtype or batch helps."""
    generator = torch.Generator().manual_seed(0)
    noisy = lambda w: w.double().sum() + noise * torch.randn((), generator=generator)  # noqa: E731
    _, optimizer, closure = weights((lambda w: torch.tensor(0.25)) if hidden else noisy)
    said: list[str] = []
    measured = set_eps(optimizer, lambda batches: lambda: float(closure()), "bfloat16", said.append, most=1)["tried"][0]
    assert measured["signal"] <= 3 * math.sqrt(2) * measured["noise"]  # not clear
    assert ["hides" in line for line in said] == ([True, False] if hidden else [False])
    assert said[-1].startswith("eps 1.0e-03: the loss moves by")


def cosine(w):
    """Turns around every 0.03: the scale must be well below that."""
    return (100 * w).double().cos().sum()


def breaking(value, inside=None):
    """A loss that is no number where a weight is far out; rounding is not what is wrong there."""
    return lambda w: torch.tensor(value) if w.abs().max() >= 1.2 else w.double().sum() if inside is None else inside


@pytest.mark.parametrize(
    ("loss", "start", "most", "expected", "clear"),
    [
        (cosine, 1e-1, 6, [-2, -3, -4, -6, -5], [1, 1, 1, 1, 1]),  # the last but one agreed with the chosen one
        (cosine, 1e-3, None, [-7, -6], [1, 1]),  # hardly curved
        (breaking(math.nan), 1.0, 5, [0, -1, -2], [0, 0, 1]),
        (breaking(math.inf), 1.0, 5, [0, -1, -2], [0, 0, 1]),
        (breaking(math.nan), 1.0, 2, [0, -1], [0, 0]),
        (breaking(math.nan, torch.tensor(1.0)), 1e-2, 9, [-3, -2, -1, -4], [0, 0, 0, 0]),  # it does not grow into it
        # Flat, as accuracies may be: no scale moves it, so nothing speaks against the first.
        *((lambda w: torch.tensor(0.25), 1e-3, most, None, [0] * most) for most in (1, 2, 3, 5)),
    ],
)
def test_what_is_chosen(loss, start, most, expected, clear):
    _, optimizer, closure = weights(loss)
    measured = choose_eps(optimizer, closure, start, **({} if most is None else {"most": most}))
    assert [scale.is_clear for scale in measured] == [bool(one) for one in clear]
    assert closure.calls == sum(scale.evaluations for scale in measured) == 10 * len(measured)
    if expected is None:
        assert {(scale.signal, scale.noise) for scale in measured} == {(0.0, 0.0)}
        assert measured[-1].eps == start
    else:
        assert scales(measured) == expected


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_no_more_scales_are_measured_than_may_be(most):
    for loss in (lambda w: (1000 * w).double().cos().sum(), lambda w: w.double().sum(), lambda w: w.bfloat16().sum()):
        _, optimizer, closure = weights(loss)
        assert 1 <= len(choose_eps(optimizer, closure, 1e-2, most=most)) <= most
