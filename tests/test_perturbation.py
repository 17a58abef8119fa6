"""Evaluation at a perturbed point: exact in every model, and the weights are as they were, whatever happens."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.method.estimators import Query
from forwardtune.noise import Noise
from forwardtune.parameters import TunedParameters
from forwardtune.points import PERTURBATIONS, Copy, Perturbation, Scratch, head, leaks
from forwardtune.points import scratch as scratch_module

NOISE = Noise(seed=17)
EXACT = {kind.name: kind for kind in (Scratch, Copy)}  # bit for bit: the side path is so up to rounding
STEP, PROBE, EPS = 3, 1, 1e-2
SIGNS = (+EPS, -EPS)
INFINITY = torch.tensor(torch.inf)
FALLBACK = "reads a tuned weight on a way that perturbation='scratch' cannot see"

every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
without_trace = pytest.mark.parametrize("kind", [Scratch, Copy], ids=lambda kind: kind.name)


def tune(module: nn.Module, parameters: Iterable[nn.Parameter] | None = None) -> TunedParameters:
    """These parameters of the module, or all that require grad."""
    if parameters is None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return TunedParameters.from_groups([{"params": list(parameters)}], module)


def evaluate(perturbation: Perturbation, forward: Callable[[], Tensor]) -> list[Tensor]:
    """The outputs at both signs."""
    outputs = []
    with torch.no_grad(), perturbation:
        for scale in SIGNS:
            perturbation.shift(STEP, Query(PROBE, scale))
            outputs.append(forward().clone())
    return outputs


def by_hand(module: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The outputs at both signs of copies of the module whose tuned weights were moved one by one."""
    outputs = []
    for scale in SIGNS:
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for tensor in tune(moved):
                z = NOISE.z(tensor.parameter, tensor=tensor.id, step=STEP, probe=PROBE)
                table = torch.tensor(scale, dtype=torch.float64) * z.double()  # rounded once, as the noise is scaled
                at_least_float32 = torch.promote_types(tensor.parameter.dtype, torch.float32)
                tensor.parameter.copy_(tensor.parameter.to(at_least_float32) + table.float())
            outputs.append(run(moved))
    return outputs


def assert_exact(perturbation: Perturbation, net: nn.Module, run: Callable[[nn.Module], Tensor]) -> None:
    """What the module computes there has the bits of a copy that was moved by hand, and the module keeps its own."""
    before = support.snapshot(net)
    for ours, expected in zip(evaluate(perturbation, lambda: run(net)), by_hand(net, run), strict=True):
        assert support.same_bits(ours, expected)
    support.assert_same_bits(net, before)


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.isfinite().all()
        assert support.same_bits(a, b)
    assert not torch.equal(*expected), "the point does not depend on the perturbation: nothing was tested"


def parts(module: nn.Module) -> list[tuple[Any, ...]]:
    """What a perturbation may touch for a while: the identity of parameters, their storage, and hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    return [
        (
            name,
            {key: (id(p), p.data_ptr(), type(p)) for key, p in m._parameters.items() if p is not None},
            *(len(getattr(m, hook)) for hook in hooks),
        )
        for name, m in module.named_modules()
    ]


class Untouched:
    """Checks at the end of the block that the module is bit for bit, object for object, what it was."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.bits, self.parts = module, support.snapshot(module), parts(module)

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *rest: object) -> None:
        if kind is None:
            support.assert_same_bits(self.module, self.bits)
            assert parts(self.module) == self.parts


# --- every architecture ----------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("family", support.FAMILIES)
def test_all_perturbations_evaluate_every_family_at_the_same_point(family, dtype, random_state_untouched):
    """The self-check's choice and copy give the logits of weights moved by hand; weights and buffers stay intact."""
    model, input_ids = support.tiny_model(family, dtype), support.token_batch(rows=2, length=7)
    extra = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}

    def run(model: nn.Module) -> Tensor:
        return model(input_ids=input_ids, **extra).logits

    forward = functools.partial(run, model)
    optimizer = MeZO(model)
    with Untouched(model):
        optimizer.estimate(support.closure_for(model, input_ids))
        assert type(optimizer.perturbation) is Scratch
        chosen = evaluate(Scratch(tune(model), NOISE), forward)
        copied = evaluate(Copy(tune(model), NOISE), forward)

    expected = by_hand(model, run)
    assert_equal(chosen, expected)
    assert_equal(copied, expected)


# --- every way to read a weight --------------------------------------------------------------------------------------


class Net(nn.Module):
    """A module under test between two ordinary ones, with numbers or with ids as its input."""

    def __init__(self, middle: nn.Module, ids: bool = False) -> None:
        super().__init__()
        self.first = nn.Identity() if ids else nn.Linear(6, 6)
        self.middle = middle
        self.last = nn.Linear(6, 2)
        self.input = torch.tensor([[1, 4, 4], [0, 1, 8]]) if ids else torch.linspace(-1, 1, 18).view(3, 6)

    def forward(self) -> Tensor:
        out = self.middle(self.first(self.input))
        return self.last(out[0] if isinstance(out, tuple) else out)


class ReadsChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.child.weight)


class ReadsTable(nn.Module):
    """Looks up rows of a table, and projects on it, from outside the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, ids: Tensor) -> Tensor:
        assert isinstance(self.table.weight, nn.Parameter)
        rows = F.embedding(ids, self.table.weight)
        return F.linear(rows, self.table.weight) @ self.table(torch.arange(9))


class KeepsAList(ReadsChild):
    """What it reads are the parameters themselves, taken when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = list(self.child.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.kept)


@torch.jit.script
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(x, weight.t())


class ReadsInScript(ReadsChild):
    """Compiled code reads the storage, whatever the Python object says."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.child.weight)


def _old_weight_norm(module: nn.Module) -> nn.Module:
    """A hook of the module makes its weight of two others before it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.utils.weight_norm(module)
    module.weight = module.weight.detach()
    return module


class ReadsByAddress(ReadsChild):
    """NumPy takes the memory that the parameter points to; torch knows nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.child.weight]

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            weight = torch.from_numpy(self.kept[0].data.numpy().copy())
        return F.linear(x, weight)


class CallsForward(ReadsChild):
    def forward(self, x: Tensor) -> Tensor:
        return self.child.forward(x)


class SelfAttention(nn.Module):
    """torch's attention reads the weight of its output projection itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ReturnsItsWeight(nn.Module):
    """The scratch memory of a weight that is handed out is used again by the next module."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6))

        def forward(self, length: int) -> Tensor:
            return self.weight[:length]

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.mix = self.Positions(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        positions = self.positions(len(x))
        return self.mix(x) + positions


class RecursesAndReads(nn.Module):
    """Calls itself, and reads its weight before, or before and after."""

    def __init__(self, afterwards: bool) -> None:
        super().__init__()
        self.weight, self.afterwards = nn.Parameter(torch.randn(6, 6) / 3), afterwards

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        x = F.linear(x, self.weight).tanh()
        if depth:
            x = self(x, depth - 1)
        return F.linear(x, self.weight) if self.afterwards else x


class CalledTwice(ReadsChild):
    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) + self.child(self.child(x).tanh())


class SharedBias(nn.Module):
    """One bias, owned by two nested modules and read by both."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(6, 6)
        self.bias = self.child.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.bias * self.child(x) + self.bias


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class CatchesAnException(nn.Module):
    """A nested module fails, and the enclosing one goes on without it."""

    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"no result, {super().forward(x).sum()}")

    def __init__(self) -> None:
        super().__init__()
        self.fails, self.works = self.Fails(6, 6), nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.fails(x)
        except RuntimeError:
            return self.works(x) * self.weight


class ScaledEmbedding(nn.Embedding):
    """As in Gemma, and asks its weight about itself."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight.shape == (9, 6)
        assert self.weight.is_floating_point()
        return super().forward(input) * torch.tensor(6**0.5, dtype=self.weight.dtype, device=self.weight.device)


class OffsetEmbedding(nn.Embedding):
    """As in OPT."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input // 2 + 1)


class EmbeddingAndMatrix(nn.Embedding):
    """Its weight is a look-up table and a matrix in one forward."""

    def forward(self, input: Tensor) -> Tensor:
        scores = F.linear(super().forward(input), self.weight)
        return torch.cat([scores @ self.weight, self.weight.mean(0).expand(*input.shape, 6)]).add(self.weight[2])


EXACT_IN_SCRATCH = {
    "linear": lambda: Net(nn.Linear(6, 6)),
    "called_twice": lambda: Net(CalledTwice()),
    "shared_bias": lambda: Net(SharedBias()),
    "tied_weights": lambda: Net(TiedWeights()),
    "recursion": lambda: Net(RecursesAndReads(afterwards=False)),
    "caught_exception": lambda: Net(CatchesAnException()),
    "weight_norm": lambda: Net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
    "lstm": lambda: Net(nn.LSTM(6, 6)),  # notices that its weights are other tensors
    "embedding": lambda: Net(nn.Embedding(9, 6), ids=True),
    "embedding_padding_idx": lambda: Net(nn.Embedding(9, 6, padding_idx=4), ids=True),
    "embedding_max_norm": lambda: Net(nn.Embedding(9, 6, max_norm=0.5), ids=True),
    "embedding_scaled": lambda: Net(ScaledEmbedding(9, 6), ids=True),
    "embedding_offset": lambda: Net(OffsetEmbedding(9, 6), ids=True),
    "embedding_and_matrix": lambda: Net(EmbeddingAndMatrix(9, 6), ids=True),
    "embedding_bag": lambda: Net(nn.EmbeddingBag(9, 6), ids=True),
    "reads_child": lambda: Net(ReadsChild()),
    "calls_forward": lambda: Net(CallsForward()),
    "attention": lambda: Net(SelfAttention()),
    "attention_in_evaluation": lambda: Net(
        SelfAttention()
    ).eval(),  # a fused kernel, where every weight is a plain tensor
    "old_weight_norm": lambda: Net(_old_weight_norm(nn.Linear(6, 6))),
    "recursion_and_after": lambda: Net(RecursesAndReads(afterwards=True)),
    "reads_table_of_child": lambda: Net(ReadsTable(), ids=True),
}
# What has to be copied as a whole, as operations show who reads it.
COPIED_ALONE = {
    # The module that runs next has the memory that was handed out.
    "returns_its_weight": (
        lambda: Net(ReturnsItsWeight()),
        {"middle.positions.weight", "middle.mix.weight", "middle.mix.bias"},
    ),
    "keeps_a_list": (lambda: Net(KeepsAList()), {"middle.child.weight", "middle.child.bias"}),
    "scripted": (lambda: Net(ReadsInScript()), {"middle.child.weight"}),
    "by_address": (lambda: Net(ReadsByAddress()), {"middle.child.weight"}),
}
MODULES = EXACT_IN_SCRATCH | {name: make for name, (make, _) in COPIED_ALONE.items()}


def build(name: str, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MODULES[name]()
    net.input = net.input.to(dtype) if net.input.is_floating_point() else net.input
    return net.to(dtype)


def loss_of(net: Net) -> Callable[[], Tensor]:
    return lambda: net().float().pow(2).mean()


@every_dtype
@pytest.mark.parametrize("name", EXACT_IN_SCRATCH)
def test_scratch_is_chosen_and_exact_where_each_weight_is_read_by_its_owner(name, dtype):
    net = build(name, dtype)
    expected, clean = by_hand(net, lambda net: net()), build(name, dtype)()
    optimizer = MeZO(net)
    with Untouched(net):
        optimizer.estimate(loss_of(net))
        assert_equal(evaluate(Scratch(tune(net), NOISE), net), expected)
    assert type(optimizer.perturbation) is Scratch
    assert torch.equal(net(), clean)


@pytest.mark.parametrize("name", COPIED_ALONE)
def test_what_is_read_unseen_is_named_and_copied_alone(name):
    net, wanted = build(name), COPIED_ALONE[name][1]
    expected = by_hand(net, lambda net: net())
    optimizer = MeZO(net)
    with Untouched(net), pytest.warns(UserWarning, match=FALLBACK) as told:
        optimizer.estimate(loss_of(net))
    assert len(told) == 1
    assert isinstance(optimizer.perturbation, Scratch)
    assert {optimizer.tuned[i].name for i in optimizer.evaluator.copied} == wanted
    with Untouched(net):
        again = Scratch(tune(net), NOISE)
        again.copy_whole(optimizer.evaluator.copied)
        assert_equal(evaluate(again, net), expected)


@pytest.fixture
def none_found(monkeypatch):
    """No operation shows what is read, and no trials are made."""
    monkeypatch.setattr(Scratch, "_leaks", lambda *_: frozenset())


@pytest.mark.parametrize("name", COPIED_ALONE)
def test_where_the_weight_is_not_found_everything_is_copied(name, none_found):
    net = build(name)
    expected = by_hand(net, lambda net: net())
    optimizer = MeZO(net)
    with Untouched(net), pytest.warns(UserWarning, match=FALLBACK):
        optimizer.estimate(loss_of(net))
    assert type(optimizer.perturbation) is Copy
    with Untouched(net):
        assert_equal(evaluate(Copy(tune(net), NOISE), net), expected)


@pytest.mark.parametrize("wanted", [(), (3,), (0, 7, 8), range(9)], ids=str)
def test_trials_find_what_no_operation_shows(wanted, monkeypatch):
    asked = []

    def is_bad(numbers):
        asked.append(numbers)
        return bool(set(numbers) & set(wanted))

    assert leaks.among(range(9), is_bad) == frozenset(wanted)
    monkeypatch.setattr(leaks, "TRIALS", 3)
    asked.clear()
    assert not leaks.among(range(9), is_bad)
    assert len(asked) <= 3


def test_a_weight_in_memory_that_no_operation_shows_is_found_by_trials(monkeypatch):
    class Blind(leaks.Leaks):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(scratch_module, "Leaks", Blind)
    for name in ("keeps_a_list", "scripted", "by_address"):
        optimizer = MeZO(build(name))
        with pytest.warns(UserWarning, match=FALLBACK):
            optimizer.estimate(loss_of(optimizer.module))
        assert {optimizer.tuned[i].name for i in optimizer.evaluator.copied} == COPIED_ALONE[name][1]


@pytest.mark.parametrize("ids", [-1, 9])
@without_trace
def test_an_id_outside_the_embedding_is_an_index_error(kind, ids):
    net = build("embedding")
    net.input = torch.tensor([[0, ids]])
    with Untouched(net), pytest.raises(IndexError):
        evaluate(kind(tune(net), NOISE), net)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 1, 2)], ids=str)
@without_trace
def test_ids_of_any_shape_are_looked_up(kind, shape):
    net = build("embedding")
    net.input = torch.full(shape, 3)
    expected = by_hand(net, lambda net: net())
    with Untouched(net):
        for actual, output in zip(evaluate(kind(tune(net), NOISE), net), expected, strict=True):
            assert actual.shape == (*shape, 2)
            assert torch.equal(actual, output)


@without_trace
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["linear", "embedding", "embedding_and_matrix"])
def test_a_closure_may_run_in_inference_mode(name, dtype, kind):
    net = build(name, dtype)
    expected = by_hand(net, lambda net: net())
    perturbation = kind(tune(net), NOISE)
    with Untouched(net):
        assert_equal(evaluate(perturbation, torch.inference_mode()(net)), expected)
        assert_equal(evaluate(perturbation, net), expected)  # and the same buffers serve outside it


@without_trace
def test_frozen_weights_are_never_perturbed(kind):
    """Neither those without requires_grad nor those that were not passed."""
    net = build("embedding_scaled")
    net.last.bias.requires_grad_(False)
    expected = by_hand(net, lambda net: net())
    with Untouched(net):
        assert_equal(evaluate(kind(tune(net), NOISE), net), expected)
        alone = tune(net, [net.last.weight])
        net.requires_grad_(False)
        net.last.weight.requires_grad_(True)
        assert_equal(evaluate(kind(alone, NOISE), net), by_hand(net, lambda net: net()))
        net.requires_grad_(True)


def test_scratch_without_a_module_is_refused():
    tuned = TunedParameters.from_groups([{"params": list(nn.Linear(2, 2).parameters())}])
    with pytest.raises(ValueError, match="needs the module"):
        Scratch(tuned, NOISE)


# --- whatever happens ------------------------------------------------------------------------------------------------


class Interrupts(nn.Linear):
    """Raises at its n-th call, having computed on the perturbed weight."""

    def __init__(self, exception: type[BaseException], call: int) -> None:
        super().__init__(6, 6)
        self.exception, self.countdown = exception, call

    def forward(self, x: Tensor) -> Tensor:
        self.countdown -= 1
        if self.countdown == 0:
            raise self.exception(f"in the middle of {super().forward(x).sum()}")
        return super().forward(x)


class Nested(nn.Module):
    """Every level owns a weight, so that all of them are lent at the moment of the exception."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(6)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.weight) + self.weight


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("perturbation", ["auto", "scratch", "copy"])
@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_the_model_is_intact_after_an_exception_inside_a_nested_module(exception, perturbation, call):
    """The first two calls are the self-check, the second of them on poisoned weights: what it raises is the closure's own.

    And the optimizer goes on as if nothing had been.
    """

    def make(call: int) -> tuple[Net, MeZO]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net(Nested(Nested(Interrupts(exception, call))))
        return net, MeZO(net, lr=1e-2, perturbation=perturbation)

    (net, optimizer), (whole, other) = make(call), make(0)
    with Untouched(net), pytest.raises(exception, match="in the middle"):
        optimizer.step(loss_of(net))
    assert optimizer.next_step == 0
    with Untouched(net):
        optimizer.estimate(loss_of(net))
    support.train(optimizer, None, loss_of(net))
    support.train(other, *[loss_of(whole)] * 2)
    support.assert_same_bits(net, support.snapshot(whole))


def test_a_model_is_perturbed_only_inside_the_block():
    net = build("shared_bias")
    clean = net()
    scratch = Scratch(tune(net), NOISE)
    with scratch:
        assert torch.equal(net(), clean)
        scratch.shift(STEP, Query(PROBE, EPS))
        assert not torch.equal(net(), clean)
    assert torch.equal(net(), clean)


@pytest.mark.parametrize("kind", EXACT.values(), ids=EXACT)
def test_every_shift_starts_from_the_unperturbed_weights(kind):
    net = build("tied_weights")
    expected = by_hand(net, lambda net: net())[0]
    with torch.no_grad(), kind(tune(net), NOISE) as perturbation:
        for step, probe, scale in ((STEP, 0, EPS), (STEP - 1, PROBE, 2 * EPS), (STEP, PROBE, -EPS), (STEP, PROBE, EPS)):
            perturbation.shift(step, Query(probe, scale))
            output = net()
    assert torch.equal(output, expected)


# --- memory and rounding ---------------------------------------------------------------------------------------------


def arena_bytes(scratch: Scratch) -> int:
    return scratch._arena.nbytes


def own_bytes(module: nn.Module) -> int:
    """What a module's own weights take, each in multiples of the 64 bytes of a cache line."""
    return sum(-(-p.numel() * p.element_size() // 64) * 64 for p in module.parameters(recurse=False))


@pytest.mark.parametrize("family", ["llama", "llama_untied", "qwen3_moe", "gpt2"])
def test_scratch_memory_is_that_of_the_largest_module(family):
    model, input_ids = support.tiny_model(family), support.token_batch()
    scratch = Scratch(tune(model), NOISE)
    evaluate(scratch, lambda: model(input_ids).logits)
    assert 0 < arena_bytes(scratch) <= max(map(own_bytes, model.modules()))


class Head(nn.Module):
    """A wide projection with a bias, as a vocabulary head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(64, 1001, dtype=dtype)
            self.x = torch.randn(2, 12, 64).to(dtype)

    def forward(self, positions: int) -> Tensor:
        return self.head(self.x[:, :positions])


@pytest.fixture
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)


@every_dtype
@pytest.mark.parametrize("positions", [1, 4, 12])
@pytest.mark.parametrize("exact", [True, False], ids=["slices are exact", "slices round otherwise"])
def test_a_vocabulary_head_in_slices_gives_the_bits_of_the_whole(
    dtype, positions, exact, monkeypatch, small_vocabulary
):
    if not exact:
        monkeypatch.setattr(head.Slices, "may_slice", lambda *_: False)
    net = Head(dtype)
    scratch = Scratch(tune(net), NOISE)
    assert_exact(scratch, net, lambda net: net(positions))
    whole = net.head.weight.numel() * net.head.weight.element_size()
    # So few rows may go through a kernel whose rounding depends on the width: then the head is computed whole.
    sliced = exact and (positions == 4 or (positions == 1 and all(scratch.slices.is_exact.values())))
    assert (arena_bytes(scratch) < whole / 4) == sliced


@pytest.mark.parametrize(
    ("height", "expected"),
    [(50272, {1571}), (49152, {2048}), (50000, {2500}), (50261, {2793, 2780})],
    ids=["OPT's", "a power of two", "twenty slices", "a prime number"],
)
def test_slices_of_a_head_are_of_one_height_where_it_can_be_cut_so(height, expected):
    """And none of them takes more memory than the largest other module does."""
    net = nn.ModuleDict({"layer": nn.Linear(64, 2792), "head": nn.Linear(64, height, bias=False)})
    scratch = Scratch(tune(net), NOISE)
    rows = scratch.slices.rows(net["head"].weight)
    heights = {min(rows, height - lo) for lo in range(0, height, rows)}
    assert heights == expected
    assert rows * 64 <= 64 * 2792 + 2792


def test_a_head_whose_slices_differ_in_a_bit_is_computed_whole(monkeypatch, small_vocabulary):
    in_slices = head.project_in_slices
    monkeypatch.setattr(head, "project_in_slices", lambda *args: torch.nextafter(in_slices(*args), INFINITY))
    net = Head(torch.float32)
    assert_exact(Scratch(tune(net), NOISE), net, lambda net: net(1))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


LAYOUTS: dict[str, tuple[list[Tensor], int]] = {  # inputs of a head, and how many trials of slices they take
    # torch chooses kernels by layout too, so each is tried.
    "contiguous and strided": ([drawn(2, 4, 64)[:, :1].contiguous(), drawn(2, 4, 64)[:, :1]], 2),
    # One trial serves all with as many rows: 8 rows and 6.
    "rows": ([drawn(*shape, 64) for shape in ((1, 8), (8, 1), (2, 4), (4, 2), (1, 6), (3, 2))], 2),
    # A batch's last positions are as far apart as its texts are long: any number of layouts.
    "strided": ([drawn(2, length, 64)[:, -1:] for length in range(2, 10)], 3),
}


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("inputs", "trials"), LAYOUTS.values(), ids=LAYOUTS)
def test_slices_are_tried_once_for_a_layout_and_trials_come_to_an_end(
    inputs, trials, bias, dtype, monkeypatch, small_vocabulary
):
    monkeypatch.setattr(head, "_STRIDED_TRIALS", 3)
    net = Head(dtype)
    if not bias:
        net.head.bias = None
    scratch = Scratch(tune(net), NOISE)
    for x in inputs:
        x = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
        assert_exact(scratch, net, lambda net, x=x: net.head(x))
    assert len(scratch.slices.is_exact) == trials


@pytest.mark.parametrize(
    ("make", "modules"),
    [
        (lambda: Net(Nested(Nested(nn.Linear(6, 6)))), lambda net: net.middle.modules()),  # of nested ones it adds up
        (lambda: build("caught_exception"), lambda net: [net.middle, net.middle.works]),  # a failed one gives it back
        (lambda: build("embedding_and_matrix"), lambda net: [net.middle]),  # computed whole, once
    ],
    ids=["nested", "failed", "embedding and matrix"],
)
def test_scratch_memory_is_that_of_the_modules_at_work(make, modules):
    net = make()
    scratch = Scratch(tune(net), NOISE)
    evaluate(scratch, net)
    assert 0 < arena_bytes(scratch) <= sum(map(own_bytes, modules(net)))


def test_an_embedding_takes_no_scratch_memory_for_rows_that_nobody_looks_up():
    embedding = nn.Embedding(1000, 6)
    scratch = Scratch(tune(embedding), NOISE)
    evaluate(scratch, lambda: embedding(torch.tensor([3, 5])))
    assert arena_bytes(scratch) == 0


@every_dtype
@pytest.mark.parametrize("kind", PERTURBATIONS.values(), ids=PERTURBATIONS)
def test_empty_steps_leave_the_weights_bit_for_bit(kind, dtype):
    net = build("linear", dtype)
    perturbation = kind(tune(net), NOISE)
    with Untouched(net), torch.no_grad():
        for step in range(20):
            with perturbation:
                for scale in (1e-3, -1e-3):
                    perturbation.shift(step, Query(0, scale))
                    net()


def losses_of_rows(model: Any, rows: Tensor) -> Tensor:
    return model(input_ids=rows).logits[:, -1].logsumexp(-1)


@pytest.mark.parametrize("settings", [{}, {"assignment": "example"}], ids=str)
def test_scratch_memory_goes_with_whoever_has_it(settings):
    """Not when Python looks for cycles, which may take minutes: it is as large as the vocabulary head."""

    def scratches() -> list[Any]:
        return [each for each in gc.get_objects() if type(each) is Scratch]

    model, batch = support.tiny_model("llama"), support.token_batch(4, 8)
    optimizer = MeZO(model, lr=1e-4, **settings)
    gc.collect()
    before = len(scratches())
    gc.disable()
    try:
        for _ in range(2):
            optimizer.step(lambda: losses_of_rows(model, batch) if settings else losses_of_rows(model, batch).mean())
        assert len(scratches()) - before == (
            0 if settings else 1
        )  # a side path is compared with it and needs it no more
        optimizer.evaluator = optimizer.evaluator.forgotten()
        assert len(scratches()) == before
    finally:
        gc.enable()


def test_a_step_leaves_few_objects_to_python():
    """Hooks and stand-ins that were made anew had it go through the heap of the whole process every ten steps."""
    model, batch = support.tiny_model("llama"), support.token_batch(4, 8)
    optimizer = MeZO(model, lr=1e-4)
    made: list[int] = []

    def loss() -> Tensor:
        found = losses_of_rows(model, batch).mean()
        made.append(gc.get_count()[0])
        return found

    optimizer.step(loss)
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        optimizer.step(loss)
    finally:
        gc.enable()
    tensors = len(list(model.parameters()))
    assert max(made[-2:]) - before < 25 * tensors
