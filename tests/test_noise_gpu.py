"""The Triton kernels give the bits of the definition: in Triton's interpreter everywhere, natively where a GPU is.

The interpreter computes with NumPy what a GPU would: it proves the arithmetic, the numbering and the masks, and neither
the compiler nor the speed. What the compiler makes of the kernels is read from their PTX, for which no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import support
from forwardtune import MeZO, noise
from forwardtune.noise import DIRECTIONS, GAUSSIAN, RADEMACHER, Direction, Fold, LowRank, Noise, Update, definition
from forwardtune.noise.definition import Strips, Terms
from support.interpreter import hurry
from support.process import python
from test_noise import (
    EVERYTHING,
    LAYOUTS,
    RANDOM123,
    SEED,
    all_values,
    assert_equal_bits,
    everything,
    hostile,
    run_of_updates,
)  # fmt: skip

pytest.importorskip("triton", reason="needs Triton, which comes with torch for CUDA")

# Around the 8 elements of a block and the tiles of 1,024 and 2,048.
SIZES = (0, 1, 7, 8, 9, 1023, 4097)
# The last one lies in the highest blocks that a 32-bit counter can number.
STARTS = (0, 1, 8, 2047, 2**35 - 2**13)
# Half-words themselves: every value of 16 bits is a float32.
HALF_WORDS = Direction("half-words", 16, torch.arange(2.0**16))

every_direction = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
half_dtype = pytest.mark.parametrize("dtype", support.HALF, ids=str)


class Kernels(NamedTuple):
    """The module of the kernels, and the device whose tensors it takes here."""

    module: Any
    device: torch.device


def load_interpreted() -> ModuleType:
    """Second copies of the modules, whose kernels run in the interpreter: Triton decides that where it sees ``jit``."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(
            f"forwardtune.noise.{name}_interpreted", f"{noise.__path__[0]}/{name}.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    hurry()
    module = load("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module.kernels = load("gpu_kernels")
    many = load("gpu_many")
    many.kernels = module.kernels
    for name in ("many_strips", "perturber", "update_factored_many", "update_many"):
        setattr(module, name, getattr(many, name))
    return module


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return load_interpreted()


@pytest.fixture(scope="module", params=["interpreted", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        from forwardtune.noise import gpu

        return Kernels(gpu, torch.device("cuda", 0))
    from triton.language import standard

    module: Any = load_interpreted()
    # A sum that the interpreter knows by its identity, and does in NumPy: a hundred times as fast.
    module.kernels.add = standard._sum_combine
    return Kernels(module, torch.device("cpu"))


@pytest.fixture
def through_noise(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Noise on this device, with these kernels."""
    if kernels.device.type == "cpu":
        fast = dict.fromkeys(kernels.module.DTYPES, kernels.module)
        monkeypatch.setattr(noise.backends, "fast", lambda device, dtype: fast.get(dtype, "no kernel"))
    return kernels.device


def nans_like(x: Tensor) -> Tensor:
    return torch.full_like(x, math.nan)


# --- the same bits ---------------------------------------------------------------------------------------------------


@RANDOM123
def test_half_words_are_the_known_answers_of_random123(kernels, counter, key, output):
    block, tensor, step, probe = (int(word, 16) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    where = (low + (high << 32), tensor, [step], [probe], [8 * block], [1.0], 8)
    z = kernels.module.strips(HALF_WORDS, *where, kernels.device)
    words = (int(word, 16) for word in output.split())
    assert z[0].tolist() == [half for word in words for half in (word % 2**16, word // 2**16)]


@every_direction
def test_strips_of_several_tensors_come_from_one_launch(kernels, direction):
    both = Terms([0, 2**31], [4, 2**32 - 2], [1e-3, -2.0])
    many = [
        Strips((3,), 0, 1031, Terms([5], range(3), [0.5])),
        Strips((2**32 - 1, 4), 2**35 - 2**13, 9, both),
        Strips((0, 9, 5), 13, 2500, both),
        Strips((1,), 3, 1, Terms([0], range(4), [1.0])),
        Strips((), 3, 1, both),
        Strips((8,), 3, 0, both),
        Strips((8,), 3, 7, Terms([], [], [])),
        Strips((8,), 3, 7, Terms([7], [2], [-0.0])),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        found = kernels.module.many_strips(direction, SEED, many, kernels.device, dtype)
        for part, each in zip(found, many, strict=True):
            terms = each.terms
            assert part.shape == (len(each.tensors), len(terms.probes), each.length)
            for strips, tensor in zip(part, each.tensors, strict=True):
                where = (tensor, terms.steps, terms.probes, [each.start], terms.scales, each.length)
                expected = definition.strips(direction, SEED, *where, torch.device("cpu"))
                assert_equal_bits(strips.cpu(), expected.to(dtype))
    assert kernels.module.many_strips(direction, SEED, [], kernels.device) == []


@every_dtype
@every_direction
def test_perturb_equals_the_definition(kernels, direction, dtype):
    for size in SIZES:
        source = hostile(dtype, size)
        for start, scale in zip(STARTS, (1e-3, -1e-3, 1.0, 1e-42, -0.0), strict=True):
            arguments = (direction, SEED, 7, 11, 1, scale, start)
            expected = nans_like(source)
            definition.perturb(expected, source, *arguments)
            here = source.to(kernels.device, copy=True)
            poisoned = nans_like(here)
            kernels.module.perturb(poisoned, here, *arguments)
            assert_equal_bits(poisoned.cpu(), expected)
            kernels.module.perturb(here, here, *arguments)
            assert_equal_bits(here.cpu(), expected)


def test_scales_that_compare_equal_and_directions_of_one_name_are_told_apart(kernels):
    """-0.0 + 0.0 is 0.0, and -0.0 + -0.0 is not; tables are remembered by their direction and scale."""
    cases = [(GAUSSIAN, scale, -0.0) for scale in (0.0, -0.0, 0.0)]
    cases += [(Direction("mine", 1, torch.tensor(values)), 1e-3, 0.0) for values in ([-1.0, 1.0], [-2.0, 2.0])]
    for direction, scale, value in cases:
        source = torch.full((9,), value)
        expected, here = nans_like(source), source.to(kernels.device, copy=True)
        definition.perturb(expected, source, direction, SEED, 7, 11, 1, scale)
        kernels.module.perturb(here, here, direction, SEED, 7, 11, 1, scale)
        assert_equal_bits(here.cpu(), expected)
        weight, updates, here = source.clone(), [Update(1, (0.5,))], source.to(kernels.device, copy=True)
        definition.update(weight, updates, direction, SEED, 7)
        kernels.module.update(here, updates, direction, SEED, 7)
        assert_equal_bits(here.cpu(), weight)


@pytest.mark.parametrize("width", [1, 7, 8, 1030])
@every_dtype
@every_direction
def test_rows_of_a_table_equal_the_definition(kernels, direction, dtype, width):
    table = hostile(dtype, 40 * width).view(40, width)
    whole = nans_like(table)
    definition.perturb(whole.view(-1), table.view(-1), direction, SEED, 2, 3, 1, 1e-2)
    for rows in (torch.tensor([39, 0, 7, 7]), torch.tensor([], dtype=torch.int64)):
        out = nans_like(table[rows]).to(kernels.device)
        kernels.module.perturb_rows(
            out, table.to(kernels.device), rows.to(kernels.device), direction, SEED, 2, 3, 1, 1e-2
        )
        assert_equal_bits(out.cpu(), whole[rows])


@every_dtype
@every_direction
def test_fused_updates_equal_the_definition_and_the_same_updates_one_by_one(kernels, direction, dtype):
    updates = run_of_updates()[:7]
    for size, start in ((0, 0), (1, 0), (7, 509), (9, 3), (1023, 2**35 - 2**13), (1025, 0)):
        where = (direction, SEED, 7, start)
        expected = hostile(dtype, size)
        fused, single = (expected.to(kernels.device, copy=True) for _ in range(2))
        unchanged = definition.update(expected, updates, *where)
        assert int(kernels.module.update(fused, updates, *where)) == unchanged
        assert_equal_bits(fused.cpu(), expected)
        if size in (9, 1025):
            assert sum(int(kernels.module.update(single, [update], *where)) for update in updates) == unchanged
            assert_equal_bits(single.cpu(), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # from NumPy
@pytest.mark.parametrize("sizes", [(1040,), (16, 48, 1024, 8208, 32)], ids=len)
@every_dtype
@every_direction
def test_tensors_that_share_a_launch_have_the_bits_that_each_has_alone(kernels, direction, dtype, sizes):
    sources = [hostile(dtype, size) for size in sizes]
    ids = [7, 2**32 - 1, 0, 3, 2**31][: len(sizes)]
    here, outs = [source.to(kernels.device, copy=True) for source in sources], []
    for source, tensor in zip(sources, ids, strict=True):
        outs.append(nans_like(source))
        definition.perturb(outs[-1], source, direction, SEED, tensor, 2**31 + 5, 1, 1e-3)
    found = [nans_like(each) for each in here]
    kernels.module.perturber(found, here, direction, SEED, ids)(2**31 + 5, 1, 1e-3)
    for a, b in zip(found, outs, strict=True):
        assert_equal_bits(a.cpu(), b)
    updates = run_of_updates()[:4]
    unchanged = sum(
        definition.update(w, updates, direction, SEED, tensor) for w, tensor in zip(sources, ids, strict=True)
    )
    assert int(kernels.module.update_many(here, updates, direction, SEED, ids)) == unchanged
    for a, b in zip(here, sources, strict=True):
        assert_equal_bits(a.cpu(), b)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # from NumPy
@pytest.mark.parametrize(
    "shapes",
    # Some that are swept as they lie; and some in tiles, of which the third has two across and more than a program takes down.
    [[(26, 40)], [(4, 4), (48, 1), (3, 2736), (1, 16), (64, 64)], [(5, 256), (2, 200), (35, 272), (4, 128)]],
    ids=len,
)
# The dtype decides how a sum is stored, the rank how it is made: neither needs all of the other.
@pytest.mark.parametrize(
    ("dtype", "rank"), [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 1), (torch.float32, 3)], ids=str
)
def test_matrices_that_share_a_launch_have_the_bits_that_each_has_alone(kernels, dtype, rank, shapes):
    updates = run_of_updates()[:4]
    terms = sum(len(item.terms) for item in updates)
    assert len({len(item.terms) for item in updates}) > 1
    ids = [7, 2**32 - 1, 0, 3, 2**31][: len(shapes)]
    sources = [hostile(dtype, m * n) for m, n in shapes]
    factors = [torch.randn(terms, m + n, rank) / 30 for m, n in shapes]
    us, vs = zip(*(f.split([m, n], dim=1) for f, (m, n) in zip(factors, shapes, strict=True)), strict=True)
    us, vs = ([f.contiguous() for f in each] for each in (us, vs))
    here = [source.to(kernels.device, copy=True) for source in sources]
    unchanged = sum(
        definition.update_factored(w, updates, u, v, SEED, tensor)
        for w, u, v, tensor in zip(sources, us, vs, ids, strict=True)
    )
    there = [[f.to(kernels.device) for f in each] for each in (us, vs)]
    assert int(kernels.module.update_factored_many(here, updates, *there, SEED, ids)) == unchanged
    for a, b in zip(here, sources, strict=True):
        assert_equal_bits(a.cpu(), b)


@every_dtype
def test_a_view_in_the_middle_of_a_tensor_is_a_shard(kernels, dtype):
    """Storage that begins at no multiple of 16 bytes, and elements beside it that must stay."""
    whole = hostile(dtype, 1500)
    expected = whole.clone()
    updates = run_of_updates()[:3]
    definition.perturb(expected[3:1400], whole[3:1400], RADEMACHER, SEED, 1, 2, 3, 1e-2, 3)
    definition.update(expected[3:1400], updates, GAUSSIAN, SEED, 1, 3)
    here = whole.to(kernels.device, copy=True)
    kernels.module.perturb(here[3:1400], here[3:1400], RADEMACHER, SEED, 1, 2, 3, 1e-2, 3)
    kernels.module.update(here[3:1400], updates, GAUSSIAN, SEED, 1, 3)
    assert_equal_bits(here.cpu(), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")  # from NumPy
@half_dtype
def test_every_stored_value_comes_out_as_in_the_definition(kernels, dtype):
    """Subnormals, both zeros, what overflows, infinities; a NaN stays a NaN, whatever its payload."""
    firsts = (0, 0x7B00, 0x7E80, 0x8000, 0xFB00, 0xFE80)  # around the ends of both dtypes
    stored = torch.cat([all_values(dtype)[first : first + 1280] for first in firsts])
    assert stored.isnan().any()
    assert stored.isinf().sum() >= 2
    # What overflows in a step must stay infinite in the next one of the same sweep.
    updates = [Update(0, (1e-3,), decay=2.0), Update(1, (1e-7, 3e-5), decay=0.5), Update(2, (), decay=2.0)]
    expected, updated = torch.zeros_like(stored), stored.clone()
    definition.perturb(expected, stored, GAUSSIAN, SEED, 0, 0, 0, 1e-3)
    unchanged = definition.update(updated, updates, GAUSSIAN, SEED, 0)

    here = stored.to(kernels.device, copy=True)
    out = torch.zeros_like(here)
    kernels.module.perturb(out, here, GAUSSIAN, SEED, 0, 0, 0, 1e-3)
    assert int(kernels.module.update(here, updates, GAUSSIAN, SEED, 0)) == unchanged
    for result, wanted in ((out.cpu(), expected), (here.cpu(), updated)):
        assert torch.equal(result.isnan(), stored.isnan())
        kept = ~stored.isnan()
        assert_equal_bits(result[kept], wanted[kept])


# --- through Noise ---------------------------------------------------------------------------------------------------


def test_the_bits_of_all_sweeps_are_those_of_version_1(through_noise):
    with through_noise:  # the default device
        assert everything() == EVERYTHING


@every_direction
def test_z_is_that_of_the_definition(through_noise, direction):
    address = {"tensor": 7, "step": 11, "probe": 1}
    z = Noise(SEED, direction).z(torch.empty(30, 50, device=through_noise), **address)
    assert z.dtype == torch.float32
    assert_equal_bits(z.cpu().view(-1), definition.directions(direction, SEED, **address, start=0, count=1500))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(through_noise, layout):
    address, updates = {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-3}, run_of_updates()[:3]
    strided = layout(hostile(torch.bfloat16, 1500).to(through_noise))
    contiguous = strided.clone(memory_format=torch.contiguous_format)
    expected, out = nans_like(contiguous), nans_like(contiguous)
    Noise(SEED).perturb(expected, contiguous, **address)
    Noise(SEED).perturb(out, strided, **address)
    assert_equal_bits(out, expected)
    unchanged = Noise(SEED).update(contiguous, updates, tensor=7)
    assert Noise(SEED).update(strided, updates, tensor=7) == unchanged
    assert isinstance(unchanged, Tensor)  # still on the device, unread
    assert_equal_bits(strided, contiguous)


def test_consecutive_modules_and_updates_share_launches(through_noise, monkeypatch):
    launches: list[str] = []
    gpu = noise.backends.fast(through_noise, torch.bfloat16)
    real = {name: getattr(gpu, name) for name in ("perturb", "perturber", "update", "update_many")}

    def perturber(*arguments):
        perturb = real["perturber"](*arguments)
        return lambda *point: [launches.append("perturbed together"), perturb(*point)][1]

    for name in ("perturb", "update", "update_many"):
        monkeypatch.setattr(gpu, name, lambda *args, name=name: [launches.append(name), real[name](*args)][1])
    monkeypatch.setattr(gpu, "perturber", perturber)

    def run(device: torch.device) -> tuple[Any, list[float]]:
        sizes = {"vocab_size": 64, "hidden_size": 16, "max_position_embeddings": 16}  # an interpreter takes its time
        model = support.tiny_model("gpt2", torch.bfloat16, **sizes).to(device)
        optimizer = support.trusted(
            MeZO(model, lr=1e-2, eps=1e-2, perturbation="scratch", weight_decay=0.1, move="all")
        )
        batch = support.token_batch().remainder(64).to(device)
        closure = support.closure_for(model, batch)
        losses = []
        for _ in range(2):
            launches.clear()
            losses.append(optimizer.step(closure))
        return model, losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise.backends, "fast", lambda device, dtype: noise.cpu)
        expected, losses = run(torch.device("cpu"))
    model, found = run(through_noise)
    if through_noise.type == "cpu":
        assert found == losses
        support.assert_same_bits(model, support.snapshot(expected))
    assert launches.count("update_many") == 1
    assert "update" not in launches
    assert 2 <= launches.count("perturbed together") <= 8
    assert launches.count("perturb") <= 2  # of the head, at each point


def test_matrices_of_low_rank_share_draws_and_launches(through_noise, monkeypatch):
    """Some are drawn and moved together, whatever their shapes; one whose elements are no multiple of 16, and one of another dtype, alone. Steps
    may be folds, leave tensors alone, and have some sizes of 0."""
    structure, launches = LowRank(2, refresh=4), []
    shapes = [(16, 40), (40, 16), (6, 8, 16), (16, 40), (9, 7), (8, 16), (16,)]
    dtypes = [torch.bfloat16] * 5 + [torch.float32, torch.bfloat16]
    ids = [3, 2**32 - 1, 0, 5, 7, 8, 9]
    steps = [Update(step, (1e-2, 0.0, -3e-2 / (step + 1)), decay=1.0) for step in range(4, 8)]
    plain = [*steps, Update(8, (0.5,), decay=0.75), Update(9, ())]
    low = [i for i, shape in enumerate(shapes) if len(shape) == 2]
    for updates, which in ((plain, range(7)), ([Fold.of(steps), Fold.of([Update(9, (1e-2, 1e-3))])], low)):
        here, expected = ([hostile(dtypes[i], math.prod(shapes[i])).view(shapes[i]) for i in which] for _ in range(2))
        tensors = [ids[i] for i in which]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise.backends, "fast", lambda device, dtype: noise.cpu)
            counts = [
                Noise(SEED, GAUSSIAN, structure).update(w, updates, tensor=t)
                for w, t in zip(expected, tensors, strict=True)
            ]
        module = noise.backends.fast(through_noise, torch.bfloat16)
        noise.backends.fast(through_noise, torch.float32)  # checked before launches are counted
        with pytest.MonkeyPatch.context() as patch:
            for name in ("many_strips", "update_factored", "update_factored_many"):
                right = getattr(module, name)
                patch.setattr(
                    module, name, lambda *a, name=name, right=right, **k: [launches.append(name), right(*a, **k)][1]
                )
            there = [w.to(through_noise) for w in here]
            count = Noise(SEED, GAUSSIAN, structure).update_many(there, updates, tensors=tensors)
        assert int(count) == sum(map(int, counts))
        for a, b in zip(there, expected, strict=True):
            assert_equal_bits(a.cpu(), b)
        assert launches.count("update_factored_many") == 1
        assert launches.count("update_factored") == 2
        assert launches.count("many_strips") >= 3
        launches.clear()


def test_tensors_that_share_a_launch_are_so_many_that_their_factors_stay_small(monkeypatch):
    from forwardtune.noise import factored

    monkeypatch.setattr(factored, "_OF_ONE", 100)
    monkeypatch.setattr(factored, "_OF_ALL", 250)
    updates = [Update(step, (1.0,) * (step % 3)) for step in range(12)]
    sizes = [10, 30, 10, 200, 30, 20, 10, 10]
    done: dict[int, list[int]] = {i: [] for i in range(len(sizes))}
    found = list(factored.sweeps(updates, sizes))
    for which, fused in found:
        terms = sum(len(item.terms) for item in fused)
        assert len(fused) == 1 or max(sizes[i] for i in which) * terms <= 100
        assert len(which) == 1 or sum(sizes[i] for i in which) * terms <= 250
        for i in which:
            done[i] += [item.step for item in fused]
    assert all(steps == list(range(12)) for steps in done.values())
    assert max(len(which) for which, _ in found) > 2
    assert list(factored.sweeps([], sizes)) == []


# --- when the host waits ---------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Notes every number that is read from a tensor: on a GPU each of them is a wait."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.events.append("read")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", ["sgd", "sign", "momentum", "adam"])
def test_a_step_reads_its_losses_after_its_last_evaluation_and_one_count(through_noise, rule, dtype):
    """However many tensors it moves."""
    unchanged = []
    for device in (torch.device("cpu"), through_noise):
        net = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
        for i, parameter in enumerate(net.parameters()):
            parameter.data = hostile(torch.float32, parameter.numel()).view_as(parameter).clamp(-9, 9) / (i + 1)
        net = net.to(device, dtype)
        events: list[str] = []
        losses = itertools.cycle([2.0, 1.0])
        value = torch.zeros((), device=device)

        def loss(events=events, losses=losses, value=value) -> Tensor:
            events.append("evaluation")
            return value.fill_(next(losses))  # the same tensor each time, as a captured graph returns it

        with pytest.MonkeyPatch.context() as patch:
            if device is not through_noise:
                patch.setattr(
                    noise.backends,
                    "fast",
                    lambda device, dtype, fast=noise.backends.fast: fast(torch.device("cpu"), dtype),
                )
            optimizer = support.trusted(MeZO(net, lr=1e-4, perturbation="copy", rule=rule))
            for _ in range(2):
                events.clear()
                with Reads(events):
                    optimizer.step(loss)
                assert optimizer.last is not None
                assert optimizer.last.losses == (2.0, 1.0)
                unchanged.append(optimizer.last.unchanged)
        if device is through_noise:
            assert events == ["evaluation"] * 2 + ["read"] * 3
    assert unchanged[:2] == unchanged[2:]
    assert all(type(count) is int for count in unchanged)


# --- how sweeps are cut ----------------------------------------------------------------------------------------------


def test_sweeps_keep_the_order_cut_no_step_and_fuse_what_fits():
    from forwardtune.noise import gpu_launch

    updates = [item for item in run_of_updates() if not item.is_empty]
    sweeps = gpu_launch.sweeps([*updates, Update(2000, (1.0,) * 9)])
    assert [item for sweep in sweeps for item in sweep] == [*updates, Update(2000, (1.0,) * 9)]
    terms = [sum(max(1, sum(size != 0 for size in item.sizes)) for item in sweep) for sweep in sweeps]
    assert max(terms[:-1]) <= gpu_launch.FUSED_TERMS
    assert len(sweeps) < len(updates) / 2
    assert len(sweeps[-1]) == 1
    assert gpu_launch.sweeps([]) == []


# --- when kernels cannot serve ---------------------------------------------------------------------------------------


@every_dtype
def test_the_check_before_first_use_passes(kernels, dtype):
    assert kernels.module.trouble(kernels.device, dtype) is None


def test_a_sum_that_the_interpreter_does_not_know_is_the_same(interpreted):
    assert interpreted.trouble(torch.device("cpu"), torch.float32) is None


def last_element_off(out: Tensor, result: Any) -> Any:
    out.view(-1)[-1:].add_(1)
    return result


@pytest.mark.parametrize(
    ("sweep", "spoil"),
    [
        *((sweep, last_element_off) for sweep in ("perturb", "perturb_rows", "perturb_factored", "update_factored")),
        *(
            (sweep, lambda out, result: result + 1) for sweep in ("update", "update_factored_many", "update_many")
        ),  # a wrong count
        ("perturber", lambda outs, perturb: lambda *point: last_element_off(outs[1], perturb(*point))),
    ],
)
def test_the_check_sees_other_bits_in_any_sweep(kernels, sweep, spoil, monkeypatch):
    right = getattr(kernels.module, sweep)
    monkeypatch.setattr(kernels.module, sweep, lambda out, *arguments: spoil(out, right(out, *arguments)))
    assert "other bits" in kernels.module.trouble(kernels.device, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_check_does_not_mind_the_default_device():
    """What the definition counts lay on it then, and torch compared it with the CPU's in vain."""
    from forwardtune.noise import gpu

    with torch.device("cuda"):
        assert gpu.trouble(torch.device("cuda", 0), torch.float32) is None


def test_the_check_lets_a_lack_of_memory_through(kernels, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(kernels.module, "perturb", full)
    with pytest.raises(torch.OutOfMemoryError):
        kernels.module.trouble(kernels.device, torch.float32)


def test_kernels_that_cannot_run_are_replaced_by_the_definition_with_one_warning(monkeypatch):
    """Compiled kernels take no CPU tensors, whether there is a GPU or not: Triton fails for real."""
    monkeypatch.setattr(noise.backends, "fast", noise.backends._on_cuda)
    monkeypatch.setattr(noise.backends, "_told", False)
    source = hostile(torch.bfloat16, 100)
    expected, out = nans_like(source), nans_like(source)
    definition.perturb(expected, source, GAUSSIAN, SEED, 7, 11, 1, 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            Noise(SEED).perturb(out, source, tensor=7, step=11, probe=1, scale=1e-3)
            Noise(SEED).update(source.clone(), [Update(0, (1e-3,))], tensor=7)
    assert_equal_bits(out, expected)
    (warning,) = caught
    assert re.search(r"plain torch here: the same bits, but slowly \(\w+: .+\)", str(warning.message))


def test_float64_and_dtypes_without_a_kernel_take_the_definition():
    for dtype in (torch.float64, torch.float8_e4m3fn):
        assert noise.backends._on_cuda(torch.device("cpu"), dtype) == f"there is no kernel for {dtype}"


IMPORTS = """
import sys
import torch, forwardtune
from forwardtune import noise
noise.Noise(0).perturb(torch.zeros(9), torch.zeros(9), tensor=0, step=0, probe=0, scale=1.0)
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "triton was imported"
sys.modules["triton"] = None  # to import it raises ModuleNotFoundError
print(noise.backends._on_cuda(torch.device("cpu"), torch.float32))
"""


def test_triton_is_imported_for_cuda_tensors_alone_and_may_be_missing():
    assert python(IMPORTS).strip() == "install triton"


# --- what the compiler makes of them ---------------------------------------------------------------------------------

STORED = {torch.float32: "*fp32", torch.bfloat16: "*i16", torch.float16: "*fp16"}


def compiled(name: str, dtype: torch.dtype, capability: int) -> dict[str, str]:
    """A kernel compiled for a GPU that need not be there, at every stage: tensors of whole tiles, aligned to 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from forwardtune.noise import gpu, gpu_launch

    stored, table = STORED[dtype], "*fp32"
    factors = {"u": table, "v": table}
    kernel, pointers, options = {
        "perturb": (
            gpu.kernels.perturb,
            {"out": stored, "source": stored, "table": table},
            gpu_launch.options(2048, 4),
        ),
        "perturb_rows": (
            gpu.kernels.perturb_rows,
            {"out": stored, "source": stored, "rows": "*i64", "table": table},
            gpu_launch.options(1024, 2) | {"aligned": True},
        ),
        "perturb_factored": (
            gpu.kernels.perturb_factored,
            {"out": stored, "source": stored, **factors},
            gpu_launch.options(2048, 4),
        ),
        "update": (
            gpu.kernels.update,
            {"weight": stored, "unchanged": "*i64", "plan": "*i32", "tables": table, **factors},
            gpu_launch.options(1024, 4) | {"entries": 4096},
        ),
        "update_factored": (
            gpu.kernels.update,
            {"weight": stored, "unchanged": "*i64", "plan": "*i32", "tables": table, **factors},
            gpu_launch.options(1024, 4) | {"entries": 0},
        ),
        "perturb_many": (
            gpu.kernels.perturb_many,
            {"like": stored, "tensors": "*i64", "table": table},
            gpu_launch.options(1024, 2) | {"doublings": 9, "tiles": 4},
        ),
        "many_strips": (
            gpu.kernels.many_strips,
            {"out": table, "values": table, "tensors": "*i64", "terms": "*i64"},
            gpu_launch.options(1024, 2) | {"doublings": 9},
        ),
        "update_many": (
            gpu.kernels.update_many,
            {"like": stored, "tensors": "*i64", "unchanged": "*i64", "plan": "*i32", "tables": table},
            gpu_launch.options(1024, 4) | {"doublings": 9, "entries": 4096, "slots": 256, "tiles": 8},
        ),
        "update_factored_many": (
            gpu.kernels.update_many,
            {"like": stored, "tensors": "*i64", "unchanged": "*i64", "plan": "*i32", "tables": table},
            gpu_launch.options(1024, 4) | {"doublings": 9, "entries": 0, "slots": 256, "tiles": 8},
        ),
        "update_products": (
            gpu.kernels.update_products,
            {"like": stored, "tensors": "*i64", "unchanged": "*i64", "plan": "*i32", "factors": table},
            gpu_launch.options(256, 1) | {"doublings": 9, "slots": 256, "tiles": 8, "rank": 1},
        ),
    }[name]
    place = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    launch = {key: options.pop(key) for key in ("num_warps", "enable_fp_fusion")}
    signature = {argument: pointers.get(argument, "i32") for argument in kernel.arg_names}
    signature |= dict.fromkeys(options, "constexpr")
    aligned = [*pointers, *({"count", "offset", "width", "place"} & place.keys())]
    source = ASTSource(
        kernel,
        signature,
        constexprs={place[key]: value for key, value in options.items()},
        attrs={place[key]: [["tt.divisibility", 16]] for key in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch).asm


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "name",
    [
        *("perturb", "perturb_rows", "perturb_factored", "perturb_many"),
        *("update", "update_factored", "update_many", "update_factored_many", "update_products"),
    ],
)
@every_dtype
def test_compiled_kernels_move_16_bytes_at_once_and_fuse_no_arithmetic(name, dtype, capability):
    code = compiled(name, dtype, capability)["ptx"]
    weights = re.findall(r"\b(ld\.global\.cg\S*|st\.global\S*)", code)
    assert weights
    assert all(".v4.b32" in access for access in weights)
    assert not re.search(r"\bfma\.|\bmad\.(rn|f32)|\.ftz|\.approx", code)
    rounding = re.findall(r"\b(?:add|mul)\.(\S*)f32", code)
    assert rounding
    assert set(rounding) == {"rn."}  # written so, the assembler may not fuse them either


@pytest.mark.parametrize("capability", [80, 90])
def test_the_draws_of_many_tensors_compile_and_round_each_product(capability):
    code = compiled("many_strips", torch.float32, capability)["ptx"]
    assert not re.search(r"\bfma\.|\bmad\.(rn|f)|\.ftz|\.approx", code)
    assert re.search(r"\bmul\.rn\.f64", code)
    assert "cvt.rn.f32.f64" in code


@pytest.mark.parametrize(
    "name", ["update", "update_factored", "update_many", "update_factored_many", "update_products"]
)
@every_dtype
def test_the_terms_of_every_step_of_a_compiled_sweep_begin_where_the_plan_says(name, dtype):
    """A bound that the loop over steps carried was compiled as the one of the first step, for all of them."""
    code = compiled(name, dtype, 90)["ttgir"]
    (steps,) = re.findall(r"scf\.for %\w+ = (%\S+) to %steps", code)
    terms = [pair for pair in re.findall(r"scf\.for %\w+ = (%\S+) to (%\S+)", code) if "end" in pair[1]]
    assert len(terms) == 1
    for bound in terms[0]:
        assert re.search(rf"^ *{bound} = tt\.load ", code, re.MULTILINE), (bound, steps)
