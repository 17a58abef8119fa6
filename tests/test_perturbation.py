"""Evaluation at a perturbed point: exact in every model, and the weights are as they were, whatever happens."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import support
from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.noise import Noise
from forwardtune.parameters import TunedParameters
from forwardtune.points import PERTURBATIONS, Copy, Perturbation, Scratch, head

NOISE = Noise(seed=17)
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
            perturbation.shift(STEP, PROBE, scale)
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
NEEDS_COPY = {
    "returns_its_weight": lambda: Net(ReturnsItsWeight()),
    "keeps_a_list": lambda: Net(KeepsAList()),
    "scripted": lambda: Net(ReadsInScript()),
}
MODULES = EXACT_IN_SCRATCH | NEEDS_COPY


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


@pytest.mark.parametrize("name", NEEDS_COPY)
def test_the_self_check_falls_back_to_an_exact_copy_where_a_weight_is_read_elsewhere(name):
    net = build(name)
    expected = by_hand(net, lambda net: net())
    optimizer = MeZO(net)
    with Untouched(net), pytest.warns(UserWarning, match=FALLBACK):
        optimizer.estimate(loss_of(net))
    assert type(optimizer.perturbation) is Copy
    with Untouched(net):
        assert_equal(evaluate(Copy(tune(net), NOISE), net), expected)


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
    """The first two calls are the self-check, the second of them on poisoned weights: what it raises is the closure's own."""
    torch.manual_seed(0)
    net = Net(Nested(Nested(Interrupts(exception, call))))
    optimizer = MeZO(net, perturbation=perturbation)

    def estimate() -> None:
        """At least four calls, and no update: the weights must not move at all."""
        optimizer.estimate(loss_of(net))
        optimizer.estimate(loss_of(net))

    with Untouched(net):
        with pytest.raises(exception, match="in the middle"):
            estimate()
        clean = net()
    with Untouched(net):
        estimate()
        assert torch.equal(net(), clean)


@without_trace
def test_the_model_is_intact_after_an_exception_in_the_closure(kind):
    net = build("embedding")
    with Untouched(net):
        with pytest.raises(ZeroDivisionError):
            evaluate(kind(tune(net), NOISE), lambda: net() / (1 // 0))
        assert torch.equal(net(), build("embedding")())


def test_a_model_is_perturbed_only_inside_the_block():
    net = build("shared_bias")
    clean = net()
    scratch = Scratch(tune(net), NOISE)
    with scratch:
        assert torch.equal(net(), clean)
        scratch.shift(STEP, PROBE, EPS)
        assert not torch.equal(net(), clean)
    assert torch.equal(net(), clean)


@pytest.mark.parametrize("kind", PERTURBATIONS.values(), ids=PERTURBATIONS)
def test_every_shift_starts_from_the_unperturbed_weights(kind):
    net = build("tied_weights")
    expected = by_hand(net, lambda net: net())[0]
    with torch.no_grad(), kind(tune(net), NOISE) as perturbation:
        for step, probe, scale in ((STEP, 0, EPS), (STEP - 1, PROBE, 2 * EPS), (STEP, PROBE, -EPS), (STEP, PROBE, EPS)):
            perturbation.shift(step, probe, scale)
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
            self.x = torch.randn(2, 4, 64).to(dtype)

    def forward(self, positions: int) -> Tensor:
        return self.head(self.x[:, :positions])


@every_dtype
@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("exact", [True, False], ids=["slices are exact", "slices round otherwise"])
def test_a_vocabulary_head_in_slices_gives_the_bits_of_the_whole(dtype, positions, exact, monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    if not exact:
        monkeypatch.setattr(head.Slices, "may_slice", lambda *_: False)
    net = Head(dtype)
    before = support.snapshot(net)
    scratch = Scratch(tune(net), NOISE)
    got = evaluate(scratch, lambda: net(positions))
    for ours, expected in zip(got, by_hand(net, lambda moved: moved(positions)), strict=True):
        assert support.same_bits(ours, expected)
    support.assert_same_bits(net, before)
    whole = net.head.weight.numel() * net.head.weight.element_size()
    # So few rows may go through a kernel whose rounding depends on the width: then the head is computed whole.
    sliced = exact and (positions == 4 or all(scratch.slices.is_exact.values()))
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


def test_a_head_whose_slices_differ_in_a_bit_is_computed_whole(monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    in_slices = head.project_in_slices
    monkeypatch.setattr(head, "project_in_slices", lambda *args: torch.nextafter(in_slices(*args), INFINITY))
    net = Head(torch.float32)
    got = evaluate(Scratch(tune(net), NOISE), lambda: net(1))
    for ours, expected in zip(got, by_hand(net, lambda moved: moved(1)), strict=True):
        assert support.same_bits(ours, expected)


def test_a_trial_on_one_layout_says_nothing_of_another(monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    net = Head(torch.float32)
    strided, contiguous = net.x[:, :1], net.x[:, :1].contiguous()
    scratch = Scratch(tune(net), NOISE)
    for x in (contiguous, strided):
        got = evaluate(scratch, lambda x=x: net.head(x))
        for ours, expected in zip(got, by_hand(net, lambda moved, x=x: moved.head(x)), strict=True):
            assert support.same_bits(ours, expected)
    assert len(scratch.slices.is_exact) == 2  # torch chooses kernels by layout too, so each was tried


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_one_trial_serves_all_contiguous_inputs_with_as_many_rows(dtype, bias, monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    net = Head(dtype)
    if not bias:
        net.head.bias = None
    scratch = Scratch(tune(net), NOISE)
    for shape in ((1, 8, 64), (8, 1, 64), (2, 4, 64), (4, 2, 64), (1, 6, 64), (3, 2, 64)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        got = evaluate(scratch, lambda x=x: net.head(x))
        for ours, expected in zip(got, by_hand(net, lambda moved, x=x: moved.head(x)), strict=True):
            assert support.same_bits(ours, expected)
    assert len(scratch.slices.is_exact) == 2  # 8 rows and 6


def test_trials_of_strided_inputs_come_to_an_end(monkeypatch):
    """A batch's last positions are as far apart as its texts are long: any number of layouts."""
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    monkeypatch.setattr(head, "_STRIDED_TRIALS", 3)
    net = Head(torch.float32)
    scratch = Scratch(tune(net), NOISE)
    for length in range(2, 10):
        x = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(length))[:, -1:]
        got = evaluate(scratch, lambda x=x: net.head(x))
        for ours, expected in zip(got, by_hand(net, lambda moved, x=x: moved.head(x)), strict=True):
            assert support.same_bits(ours, expected)
    assert len(scratch.slices.is_exact) == 3


def test_many_positions_take_the_head_whole(monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY", 1000)
    net = Head(torch.float32)
    net.x = net.x.repeat(1, 3, 1)
    scratch = Scratch(tune(net), NOISE)
    evaluate(scratch, lambda: net(12))
    assert arena_bytes(scratch) >= net.head.weight.numel() * 4


def test_scratch_memory_of_nested_modules_adds_up_and_no_more():
    net = Net(Nested(Nested(nn.Linear(6, 6))))
    scratch = Scratch(tune(net), NOISE)
    evaluate(scratch, net)
    assert 0 < arena_bytes(scratch) <= sum(map(own_bytes, net.middle.modules()))


def test_a_module_that_failed_gives_its_scratch_memory_back_at_once():
    net = build("caught_exception")
    scratch = Scratch(tune(net), NOISE)
    evaluate(scratch, net)
    assert 0 < arena_bytes(scratch) <= own_bytes(net.middle) + own_bytes(net.middle.works)


def test_an_embedding_that_is_also_a_matrix_is_computed_whole_once():
    net = build("embedding_and_matrix")
    scratch = Scratch(tune(net), NOISE)
    evaluate(scratch, net)
    assert 0 < arena_bytes(scratch) <= own_bytes(net.middle)


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
                    perturbation.shift(step, 0, scale)
                    net()


# --- parameters ------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Linear(3, 2), nn.Linear(2, 3, bias=False)


def names(tuned: TunedParameters) -> dict[str, int]:
    return {tensor.name: tensor.id for tensor in tuned}


def test_ids_are_places_among_the_sorted_names_whatever_the_order():
    pair = Pair()
    expected = {"first.weight": 0, "second.bias": 1, "second.weight": 2}
    parameters = list(pair.parameters())
    for groups in (
        [parameters],
        [parameters[::-1]],
        [parameters[:1], parameters[1:]],
        [parameters[2:], parameters[:1], parameters[1:2]],
    ):
        tuned = TunedParameters.from_groups([{"params": group} for group in groups], pair)
        assert names(tuned) == expected
        for tensor in tuned:
            assert tensor.parameter is pair.get_parameter(tensor.name)
            assert any(tensor.parameter is parameter for parameter in groups[tensor.group])
    assert tuned.numel == 14
    assert tuned[0].name == "first.weight"
    assert len(tuned) == 3
    named = [{"params": [p], "param_names": [name]} for name, p in reversed(list(pair.named_parameters()))]
    assert names(TunedParameters.from_groups(named)) == expected


def test_tied_tensors_count_once_under_the_first_of_their_names():
    tied = TiedWeights()
    assert names(tune(tied)) == {"a.bias": 0, "a.weight": 1, "b.bias": 2}
    tied.a_shorter_path = tied.b
    assert names(tune(tied)) == {"a.bias": 0, "a.weight": 1, "a_shorter_path.bias": 2}


def test_unnamed_parameters_are_named_by_their_position():
    tensors = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    tuned = TunedParameters.from_groups([{"params": tensors[:1]}, {"params": tensors[1:]}])
    assert names(tuned) == {f"parameter.{i:06d}": i for i in range(3)}
    assert [tensor.group for tensor in tuned] == [0, 1, 1]


def test_two_parameters_of_one_name_are_refused():
    """Two modules without a common one: their names would collide, and one of the two would not be tuned."""
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "param_names": ["weight"]} for _ in range(2)]
    with pytest.raises(ValueError, match="weight"):
        TunedParameters.from_groups(groups)


def test_tensors_are_described_for_the_step_log():
    pair = Pair().half()
    assert tune(pair).describe()[1:] == [
        {"name": "second.bias", "shape": [2], "dtype": "float16", "group": 0},
        {"name": "second.weight", "shape": [2, 3], "dtype": "float16", "group": 0},
    ]


@pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
def test_the_digest_changes_with_any_single_bit(dtype):
    net = build("linear", dtype)
    with torch.no_grad():
        net.last.bias[0] = 0.0
    tuned = tune(net, [net.last.weight, net.last.bias])
    seen = {tuned.digest()}
    flips = 0
    for tensor in tuned:
        raw = tensor.parameter.detach().view(-1).view(torch.uint8)
        for byte in range(len(raw)):
            for bit in range(8):
                raw[byte] ^= 1 << bit
                seen.add(tuned.digest())
                raw[byte] ^= 1 << bit
                flips += 1
    assert flips == 8 * 14 * dtype.itemsize
    assert len(seen) == 1 + flips
    assert tuned.digest() in seen


def test_the_digest_depends_on_names_shapes_and_dtypes_and_not_on_layout():
    def digest(name: str, value: Tensor) -> str:
        return TunedParameters.from_groups([{"params": [nn.Parameter(value)], "param_names": [name]}]).digest()

    value = torch.arange(6.0).view(2, 3)
    reference = digest("w", value)
    assert digest("w", value.t().contiguous().t()) == reference
    assert digest("w", torch.stack([value, value], dim=-1)[..., 0]) == reference
    others = [
        digest("v", value),
        digest("w", value.view(3, 2)),
        digest("w", value.view(6)),
        digest("w", torch.zeros(2, 3).half()),
        digest("w", torch.zeros(2, 3).bfloat16()),
        digest("w", torch.tensor(0.0)),
        digest("w", torch.empty(0)),
    ]
    assert len({reference, *others}) == 1 + len(others)


@pytest.mark.parametrize(
    ("groups", "module", "message"),
    [
        ([], None, "nothing to tune"),
        ([{"params": []}], nn.Linear(2, 2), "nothing to tune"),
        (
            [{"params": [nn.Parameter(torch.zeros(2, dtype=torch.int8), False)]}],
            None,
            "int8, which cannot be perturbed",
        ),
        ([{"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}], None, "complex64"),
        ([{"params": [nn.Parameter(torch.empty(2, device="meta"))]}], None, "no storage \\(meta device\\)"),
        ([{"params": [nn.Parameter(torch.zeros(2, 5))]}], nn.Linear(2, 2), "group 0 \\(shape \\(2, 5\\)\\) is not in"),
    ],
    ids=["no group", "empty group", "int8", "complex", "meta", "not in the module"],
)
def test_what_cannot_be_tuned_is_refused_with_the_reason(groups, module, message):
    with pytest.raises(ValueError, match=message):
        TunedParameters.from_groups(groups, module)


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="nothing to tune"):
        MeZO(nn.Linear(2, 2).requires_grad_(False))


class Quantised(Tensor):
    """Integers and a scale that pass for a float tensor, as torchao's do."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: float) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor, scale: float) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        plain = [arg.values * arg.scale if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **(kwargs or {}))


def distributed() -> Tensor:
    """A DTensor over the one process that there is."""
    from torch.distributed import device_mesh, tensor

    return tensor.distribute_tensor(torch.ones(2, 3), device_mesh.init_device_mesh("cpu", (1,)), [tensor.Replicate()])


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Quantised(torch.ones(2, 3, dtype=torch.int8), 0.5), "Quantised"),
        (distributed, "DTensor"),
        (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=["quantised", "distributed", "sparse"],
)
@pytest.mark.parametrize("by_module", [True, False])
def test_tensors_that_do_not_hold_their_values_are_refused_with_the_remedy(make, kind, by_module, one_process):
    net = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    net.layer.weight = nn.Parameter(make())
    with pytest.raises(InputError, match=f"layer.weight is a .*{kind}.*requires_grad=False.*adapter"):
        MeZO(net if by_module else net.named_parameters())
    net.layer.weight.requires_grad_(False)
    MeZO(net, lr=1e-3, perturbation="copy").step(lambda: net.layer.bias.sum())  # the rest can be tuned beside it


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_subclass_with_an_ordinary_memory_is_tuned():
    class Named(Tensor):
        """What a library may hang names on."""

    net = nn.Linear(3, 2)
    net.weight = nn.Parameter(torch.ones(2, 3).as_subclass(Named))
    MeZO(net, lr=1e-3).step(lambda: net(torch.ones(3)).sum())
    assert not torch.equal(net.weight, torch.ones(2, 3))
