"""Inputs and settings on which an evaluation at a perturbed point would be silently wrong."""

from __future__ import annotations

import copy
import itertools
import json
import operator
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forwardtune import MeZO, StepLog, replay
from forwardtune.method.rules import Adam, Momentum
from forwardtune.points import ReadElsewhereError, Scratch
from forwardtune.trajectory import read_log
from forwardtune.trajectory.export import export_trajectory
from support import (
    SIZES,
    assert_same_bits,
    closure_for,
    same_bits,
    snapshot,
    tiny_model,
    token_batch,
    tokenizer,
    trusted,
)

PERTURBATIONS = ["auto", "scratch", "copy"]


def coefficient(optimizer: MeZO, closure: Callable[[], Any]) -> float:
    optimizer.step(closure)
    (c,) = optimizer.last.coefficients
    return c


# --- caches that know a weight by its parameter ------------------------------------------------------------------------


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_autocast_around_a_step_sees_the_perturbed_weights(family, perturbation):
    """It casts a weight once and keeps the cast while it lasts."""
    model, ids = tiny_model(family), token_batch()
    loss = closure_for(model, ids)

    def inside() -> Tensor:
        with autocast():
            return loss()

    # A fresh model each time, as the step moves it.
    expected = coefficient(MeZO(model, eps=1e-2, perturbation=perturbation), inside)
    model = tiny_model(family)
    loss = closure_for(model, ids)
    with autocast():
        loss()  # casts are in the cache already
        assert coefficient(MeZO(model, eps=1e-2, perturbation=perturbation), loss) == expected != 0
        # And afterwards nothing of a perturbed weight is left there.
        with torch.no_grad():
            after = loss()
    with autocast(), torch.no_grad():
        assert torch.equal(loss(), after)


def test_cached_parametrisations_are_refused():
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with torch.nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match="leave it out around step"):
        MeZO(net).step(lambda: net(torch.ones(1, 3)).sum())
    MeZO(net).step(lambda: net(torch.ones(1, 3)).sum())


# --- weights that are read elsewhere -------------------------------------------------------------------------------------


class ReadsWhenLong(nn.Module):
    """On long inputs it reads the weights of a part of it directly: as its attributes, or from a list made before."""

    def __init__(self, from_list: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.inner, self.out = nn.Linear(8, 8), nn.Linear(8, 1)
        self.kept, self.from_list = list(self.inner.parameters()), from_list

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 4:
            inner = self.inner(x)
        else:
            inner = F.linear(x, *(self.kept if self.from_list else (self.inner.weight, self.inner.bias)))
        return self.out(inner).square().mean()


SHORT, LONG = torch.ones(2, 8), torch.linspace(-1, 1, 48).view(6, 8)


def exact_coefficient(make: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor]) -> float:
    net = make()
    optimizer = trusted(MeZO(net, eps=1e-3, seed=1, perturbation="copy"))
    optimizer.next_step = 1
    return coefficient(optimizer, lambda: run(net))


@pytest.mark.parametrize("from_list", [False, True])
def test_a_shape_that_reads_a_weight_directly_is_exact_whenever_it_comes(from_list):
    """The first minibatch does not show it."""
    net = ReadsWhenLong(from_list)
    optimizer = MeZO(net, lr=1e-30, eps=1e-3, seed=1)
    optimizer.step(lambda: net(SHORT))
    assert optimizer.perturbation.name == "scratch"
    before = snapshot(net)
    with pytest.warns(UserWarning, match="cannot see") if from_list else warnings.catch_warnings():
        c = coefficient(optimizer, lambda: net(LONG))
    assert c == exact_coefficient(lambda: ReadsWhenLong(from_list), lambda net: net(LONG))
    assert optimizer.perturbation.name == "scratch"
    assert {optimizer.tuned[i].name for i in optimizer.evaluator.copied} == {"inner.weight", "inner.bias"}
    assert_same_bits(net, before)


@pytest.mark.parametrize("late", [False, True])
def test_explicit_scratch_is_refused_where_it_would_be_wrong(late, monkeypatch):
    monkeypatch.setattr(Scratch, "_leaks", lambda *_: frozenset())  # nor can it be found out which weight it is
    net = ReadsWhenLong(from_list=True)
    before = snapshot(net)
    optimizer = MeZO(net, lr=1e-30, eps=1e-3, perturbation="scratch")
    if late:
        optimizer.step(lambda: net(SHORT))
    with pytest.raises(ReadElsewhereError, match="use perturbation='auto' or 'copy'"):
        optimizer.step(lambda: net(LONG))
    assert_same_bits(net, before)


def test_a_hidden_nan_is_found_in_the_outputs_of_modules():
    """An accuracy is finite, whatever the model says."""
    net = ReadsWhenLong(from_list=True)
    optimizer = MeZO(net)
    with pytest.warns(UserWarning, match=r"shows first in the output of out\): inner. So every step"):
        optimizer.step(lambda: float(net(LONG) > 1e9))
    assert {optimizer.tuned[i].name for i in optimizer.evaluator.copied} == {"inner.weight", "inner.bias"}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_mamba_is_exact_with_any_perturbation(perturbation):
    """It hands the weight of its convolution to a kernel; no second set of weights is needed for that."""
    model, ids = tiny_model("mamba"), token_batch()
    optimizer = MeZO(model, eps=1e-2, perturbation=perturbation)
    c = coefficient(optimizer, closure_for(model, ids))
    other = tiny_model("mamba")
    assert c == coefficient(MeZO(other, eps=1e-2, perturbation="copy"), closure_for(other, ids)) != 0
    assert optimizer.perturbation.name == ("copy" if perturbation == "copy" else "scratch")
    if perturbation != "copy":
        assert {optimizer.tuned[i].name.split(".")[-2] for i in optimizer.perturbation._whole} == {"conv1d", "dt_proj"}


class Rescales(ReadsWhenLong):
    """Writes to the weights of a part of it in its first evaluation, as RWKV does."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        super().__init__(from_list=False)
        self.write, self.done = write, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.done:
            with torch.no_grad():
                self.write(self.inner)
            self.done = True
        return super().forward(x)


WRITES: dict[str, Callable[[Any], object]] = {
    "div_": lambda inner: inner.weight.div_(2),
    "*=": lambda inner: setattr(inner, "weight", operator.imul(inner.weight, 2)),
    "[0] =": lambda inner: operator.setitem(inner.weight, 0, 0),
    ".data =": lambda inner: setattr(inner.weight, "data", inner.weight.detach() * 2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_model_that_writes_to_its_weights_is_not_evaluated_without(write):
    """What it writes would be lost with the perturbed copy, and it would not write again."""
    net = Rescales(write)
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="run it once in evaluation mode before tuning it"):
        MeZO(net).step(lambda: net(SHORT))
    assert_same_bits(net, before)
    net.done = False
    with torch.no_grad():
        net(SHORT)
    MeZO(net).step(lambda: net(SHORT))


def test_a_compiled_model_is_evaluated_at_perturbed_weights():
    model, ids = tiny_model("llama"), token_batch()
    compiled = torch.compile(model, backend="eager")
    eager = tiny_model("llama")
    expected = coefficient(MeZO(eager, eps=1e-2), closure_for(eager, ids))
    assert coefficient(MeZO(model, eps=1e-2), lambda: compiled(input_ids=ids).logits.float().pow(2).mean()) == expected


# --- what an evaluation raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("error", [KeyError, RuntimeError, ValueError, AssertionError, torch.OutOfMemoryError])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_what_the_closure_raises_is_raised(call, error, perturbation):
    net, calls = Row(nn.Identity()), itertools.count(1)
    before = snapshot(net)

    def closure() -> Tensor:
        if next(calls) == call:
            raise error("the closure's own")
        return net()

    optimizer = MeZO(net, perturbation=perturbation)
    with pytest.raises(error, match="the closure's own"):
        optimizer.step(closure)
    assert_same_bits(net, before)
    optimizer.step(closure)
    assert optimizer.perturbation.name == ("copy" if perturbation == "copy" else "scratch")


def test_an_error_that_poisoned_weights_cause_is_a_diagnosis():
    net = ReadsWhenLong(from_list=True)

    def closure() -> Tensor:
        loss = net(LONG)
        if loss.isnan():
            raise FloatingPointError("not a number")
        return loss

    with pytest.warns(UserWarning, match="cannot see"):
        MeZO(net).step(closure)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_microbatch_takes_the_whole_step_with_it(error):
    model, ids = tiny_model(), token_batch()
    optimizer, loss = MeZO(model, lr=1e-30), closure_for(model, ids)
    optimizer.step(loss)
    expected = optimizer.last.loss

    def failing() -> float:
        raise error

    optimizer.estimate(loss)
    with pytest.raises(error):
        optimizer.estimate(failing)
    assert not optimizer.gathering
    optimizer.step(loss)
    assert optimizer.last.loss == pytest.approx(expected, rel=1e-3)


def test_zero_grad_drops_what_was_gathered():
    model, ids = tiny_model(), token_batch()
    optimizer, loss = MeZO(model, lr=1e-30), closure_for(model, ids)
    optimizer.estimate(loss)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no loss to step on"):
        optimizer.step()
    assert optimizer.step(loss) == pytest.approx(float(loss().detach()), rel=1e-2)


# --- training mode --------------------------------------------------------------------------------------------------------


class Row(nn.Module):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.first, self.modules_after, self.last = nn.Linear(4, 4), nn.Sequential(*modules), nn.Linear(4, 1)

    def forward(self) -> Tensor:
        return self.last(self.modules_after(self.first(torch.linspace(-1, 1, 24).view(6, 4)))).square().mean()


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Dropout(0.5), "training mode with dropout"),
        (lambda: nn.BatchNorm1d(4), "training mode with batch normalisation"),
    ],
)
def test_training_mode_is_told(module, message, perturbation):
    net = Row(module())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MeZO(net, perturbation=perturbation).step(net)
    assert any(message in str(warning.message) and "model.eval()" in str(warning.message) for warning in caught)
    net.eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    MeZO(net, perturbation=perturbation).step(net)
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


@pytest.mark.parametrize("chosen", ["scratch", "copy", None])
def test_a_loss_that_changes_from_call_to_call_is_told(chosen):
    """Without a module, too."""
    net = Row(nn.Identity())
    generator = torch.Generator().manual_seed(0)
    optimizer = MeZO(net, perturbation="auto" if chosen == "scratch" else chosen) if chosen else MeZO(net.parameters())
    with pytest.warns(UserWarning, match="closure is not deterministic"):
        optimizer.step(lambda: net() + torch.rand((), generator=generator))
    assert optimizer.perturbation.name == (chosen or "copy")


# --- what takes no part -----------------------------------------------------------------------------------------------------


def vision_language() -> Any:
    """A vision-language model with a tower that a run on text never enters."""
    import transformers

    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 28, "patch_size": 14,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.Gemma3ForConditionalGeneration(config).eval()


IDLE = "took no part in the first step"


@pytest.mark.parametrize("rule", ["sgd", "adam", Momentum(state="exact"), Adam(state="exact")], ids=str)
def test_a_part_that_never_ran_stays(rule, tmp_path):
    """And is named; and the log, resumed and exported, says so."""
    model, ids = vision_language(), token_batch()
    before = snapshot(model)
    closure = closure_for(model, ids)
    optimizer = MeZO(model, lr=1e-3, weight_decay=0.1, rule=rule)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        with pytest.warns(UserWarning, match=rf"tuned tensors {IDLE}.*multi_modal_projector.*vision_tower"):
            optimizer.step(closure)
        for _ in range(3):
            optimizer.step(closure)
    moved = {name: not same_bits(now, before[name]) for name, now in model.state_dict().items()}
    vision = {name for name in moved if "vision" in name or "projector" in name}
    assert len(vision) > 30
    assert not any(moved[name] for name in vision)
    assert all(moved[name] for name, _ in model.named_parameters() if name not in vision)
    export_trajectory(read_log(tmp_path / "steps.jsonl"), tmp_path / "run.safetensors")
    for source in ("steps.jsonl", "run.safetensors"):
        again = vision_language()
        assert replay(tmp_path / source, again) == 4
        assert_same_bits(again, snapshot(model))


class Routed(nn.Module):
    """Which of its experts runs depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.experts, self.last = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 1)

    def forward(self, which: tuple[int, ...]) -> Tensor:
        x = torch.linspace(-1, 1, 8).view(2, 4)
        for number in which:
            x = self.experts[number](x).tanh()
        return self.last(x).square().mean()


ROUTES = [(0,), (1,), (0, 1), (1,), (2,), (0,), (0, 2)]


@pytest.mark.filterwarnings(f"ignore:.*{IDLE}")
@pytest.mark.parametrize(
    "rule", ["sgd", "sign", Momentum(state="exact"), Adam(state="exact"), Adam(state="window")], ids=str
)
def test_a_step_moves_the_experts_that_ran(rule, tmp_path):
    """As torch's optimizers leave parameters without a gradient, and their state, alone."""
    net = Routed()
    optimizer = MeZO(net, lr=1e-2, weight_decay=0.1, rule=rule)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for route in ROUTES:
            before = snapshot(net)
            optimizer.step(lambda route=route: net(route))
            for number, expert in enumerate(net.experts):
                stayed = same_bits(expert.weight, before[f"experts.{number}.weight"])
                assert stayed == (number not in route)
    assert read_log(tmp_path / "steps.jsonl").records[0].unused == (2, 3, 4, 5)
    line = json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[1])
    assert line["unused"] == "2-5"
    again = Routed()
    replay(tmp_path / "steps.jsonl", again)
    assert_same_bits(again, snapshot(net))
    for steps in range(len(ROUTES)):  # resumed at any step, by state or by replay, it goes on to the same weights
        part, state = Routed(), Routed()
        replay(tmp_path / "steps.jsonl", part, steps=steps)
        other, restored = (MeZO(state, lr=1e-2, weight_decay=0.1, rule=rule) for _ in range(2))
        for route in ROUTES[:steps]:
            other.step(lambda route=route, state=state: state(route))
        assert_same_bits(state, snapshot(part))
        restored.load_state_dict(copy.deepcopy(other.state_dict()))
        for route in ROUTES[steps:]:
            restored.step(lambda route=route, state=state: state(route))
        assert_same_bits(state, snapshot(net))


@pytest.mark.filterwarnings(f"ignore:.*{IDLE}")
@pytest.mark.parametrize("rule", [Momentum, Adam])
def test_exact_and_window_agree_on_routed_steps(rule):
    nets = [Routed(), Routed()]
    for net, settings in zip(nets, ({"state": "exact"}, {"state": "window", "window": 50}), strict=True):
        optimizer = MeZO(net, lr=1e-2, rule=rule(**settings))
        for route in ROUTES * 2:
            optimizer.step(lambda route=route, net=net: net(route))
    assert_same_bits(nets[0], snapshot(nets[1]))


@pytest.mark.filterwarnings(f"ignore:.*{IDLE}")
def test_a_log_with_ids_that_are_none_is_refused(tmp_path):
    from forwardtune.trajectory.format import numbers, ranges

    for text in ("7-5", "5,3", "0-6", "1,1", "x", "1-2-3", "-1", "00", "1-1"):
        with pytest.raises(ValueError, match=r"no ids|invalid literal"):
            numbers(text, 6)
    for ids in ((), (0,), (0, 1, 2), (0, 2, 3, 5)):
        assert numbers(ranges(ids), 6) == ids


def test_microbatches_add_up_what_they_went_through():
    net = Routed()
    optimizer = MeZO(net, lr=1e-2)
    optimizer.estimate(lambda: net((0,)))
    optimizer.estimate(lambda: net((1,)))
    with pytest.warns(UserWarning, match=rf"2 of 8 tuned tensors {IDLE} \(experts\.2\)"):
        optimizer.step()
    assert optimizer.last.unused == (4, 5)


# --- nothing to learn from ---------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_told_at_once():
    from forwardtune.models import tune

    model = tune(tiny_model(), tokenizer(), "lora")
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"1 steps, every coefficient is 0, and no evaluation read one of them"):
        MeZO(model).step(closure_for(model, token_batch()))


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_weights_that_never_change_the_loss_are_told_once(perturbation):
    net = Row(nn.Identity())
    optimizer = MeZO(net, perturbation=perturbation)

    def closure() -> float:
        net()
        return 1.0

    for _ in range(9):
        optimizer.step(closure)
    with pytest.warns(UserWarning, match=r"10 steps, every coefficient is 0\)"):
        optimizer.step(closure)
    for _ in range(20):
        optimizer.step(closure)


def test_an_objective_that_is_flat_at_times_is_fine():
    net = Row(nn.Identity())
    optimizer = MeZO(net, lr=1e-30)
    for number in range(30):
        optimizer.step(net if number == 3 else lambda: net() * 0)


# --- copies and arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_copied_optimizer_goes_on_by_itself(perturbation, how, rule, tmp_path):
    """With the model, as both are copied together; the copy writes to no log."""
    model, ids = tiny_model(), token_batch()
    optimizer = MeZO(model, lr=1e-3, perturbation=perturbation, rule=rule)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        optimizer.step(closure_for(model, ids))
        other, copied = how((model, optimizer))
        assert copied.module is other
        copied.step(closure_for(other, ids))
        assert optimizer.next_step == 1
        optimizer.step(closure_for(model, ids))
        assert_same_bits(other, snapshot(model))


def test_a_copy_that_runs_the_wrong_model_is_told():
    """Copied alone, an optimizer has a model of its own, which the closure knows nothing of."""
    net = Row(nn.Identity())
    optimizer = MeZO(net)
    optimizer.step(net)
    other = copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="no evaluation read one of them"):
        other.step(net)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_words_for_numbers_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a number, got 'auto'; MeZOTrainer finds one"):
        MeZO(tiny_model(), **{name: "auto"})


@pytest.mark.filterwarnings("default")
def test_warnings_stand_at_the_users_own_line(tmp_path):
    """Not inside torch or transformers, where they would be taken for theirs, and be silenced with them."""
    from forwardtune import MeZOTrainer
    from support.trainers import quiet_config

    net = Row(nn.Dropout(0.5))
    with warnings.catch_warnings(record=True) as direct:
        warnings.simplefilter("always")
        MeZO(net).step(net)
    # With another column than text's the tower may be entered, and is not frozen before the run.
    rows = [{"input_ids": row, "labels": row, "number": 0} for row in token_batch(4, 11).tolist()]
    config = quiet_config(tmp_path, learning_rate=1e-5, eps=1e-3, max_steps=1)
    trainer = MeZOTrainer(model=vision_language(), args=config, train_dataset=rows)
    with warnings.catch_warnings(record=True) as through_trainer:
        warnings.simplefilter("always")
        trainer.train()
    ours = [w for w in (*direct, *through_trainer) if IDLE in str(w.message) or "training mode" in str(w.message)]
    assert len(ours) == 2
    assert {w.filename for w in ours} == {__file__}
