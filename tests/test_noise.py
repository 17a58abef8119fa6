"""The noise: its definition against independent arithmetic, its statistics, and every fast path against the definition.

Statistical tests compare a statistic with its expectation in units of its standard deviation, over fixed seeds, and
allow five: one chance in 1.7 million of a false alarm for each comparison, had the seeds been drawn at random.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import support
from forwardtune import noise
from forwardtune.noise import (
    DIRECTIONS,
    GAUSSIAN,
    NOISE_VERSION,
    RADEMACHER,
    ROUNDING_PROBE,
    Noise,
    Update,
    definition,
    directions,
    get_direction,
)
from forwardtune.noise.philox import half_words, philox
from support.process import python

try:
    from forwardtune.noise import cpu
except ImportError:  # other files of tests import this one, also where Numba is missing
    cpu = None

SEED = 0x0123456789ABCDEF
SIGMAS = 5
SAMPLE = 1 << 20
# Around the 8 elements of a block and the 512 of a tile of the fast path.
SIZES = (0, 1, 7, 8, 511, 512, 513, 1500)
# The last one lies in the highest blocks that a 32-bit counter can number.
STARTS = (0, 1, 8, 511, 513, 2**35 - 2**12)
THREADED = 2**17 + 2**16 + 77  # more than a second thread needs, and no multiple of a tile

every_direction = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
every_dtype = pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
half_dtype = pytest.mark.parametrize("dtype", support.HALF, ids=str)


def hostile(dtype: torch.dtype, count: int) -> Tensor:
    """Weights of every magnitude of the dtype, subnormals and both zeros among them; the last two cannot grow."""
    generator = torch.Generator().manual_seed(count)
    smallest, largest = torch.finfo(dtype).smallest_normal / 1024, torch.finfo(dtype).max
    exponents = torch.empty(count, dtype=torch.float64).uniform_(
        math.log2(smallest), math.log2(largest), generator=generator
    )
    x = torch.randn(count, generator=generator, dtype=torch.float64).sign() * 2.0**exponents
    x[0::3] = torch.randn(x[0::3].shape, generator=generator, dtype=torch.float64) * 0.02
    x[4::16], x[9::16] = 0.0, -0.0
    x[-2:] = torch.tensor([largest, -math.inf], dtype=torch.float64)[: len(x[-2:])]
    return x.to(dtype)


def all_values(dtype: torch.dtype) -> Tensor:
    """The 65,536 values of a 16-bit dtype."""
    return torch.arange(2**16).to(torch.uint16).view(dtype)


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    equal = support.same_bits(actual.reshape(-1), expected.reshape(-1))  # flat, as a scalar cannot be seen as bytes
    assert equal, f"{(actual != expected).sum()} of {actual.numel()} differ"


# --- the definition --------------------------------------------------------------------------------------------------


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox-4x32-10 as the paper writes it, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def plain_half_word(seed: int, tensor: int, step: int, probe: int, element: int) -> int:
    """The specification, word for word: half-word ``i mod 8`` of block ``i div 8``, low half first."""
    high, low = divmod(seed, 2**32)
    word = plain_philox((element // 8, tensor, step, probe), (low, high))[element % 8 // 2]
    return word // 2**16 if element % 2 else word % 2**16


# Counter, key and output.
RANDOM123 = pytest.mark.parametrize(
    ("counter", "key", "output"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "ones", "pi"],
)


@RANDOM123
def test_philox_gives_the_known_answers_of_random123(counter, key, output):
    counter, key, output = ([int(word, 16) for word in words.split()] for words in (counter, key, output))
    assert plain_philox(counter, key) == output
    assert list(philox(tuple(counter), tuple(key))) == output
    tensors = philox(tuple(torch.tensor([word]) for word in counter), tuple(key))
    assert [int(word) for word in tensors] == output


@pytest.mark.parametrize("start", STARTS)
def test_an_element_takes_its_half_word_low_half_first(start):
    address = (SEED, 3, 2**32 - 1, 5)
    expected = [plain_half_word(*address, start + i) for i in range(19)]
    assert half_words(*address, start, 19).tolist() == expected


# Noise version 1, for seed 0x0123456789abcdef, tensor 7, step 11, probe 1. Were these to change, every log written so
# far would replay to other weights: a change of bits is a new version beside this one.
GOLDEN = {
    "gaussian": (
        [-0.132285312, 0.893201053, 1.31458378, -0.188089564, -1.59359527, -0.451597214],
        "f423332f5d3a8b4ec3b745a08ae7d81a803f8af8267d7673e28e98caef35f70a",
    ),
    "rademacher": (
        [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0],
        "6eebd20ce78bce77b535a768d5ae8c72b2e42bee10ace8666d79b59bd8a028a4",
    ),
}


@every_direction
def test_the_bits_of_noise_version_1_stay_as_they_are(direction):
    assert NOISE_VERSION == 1
    first, digest = GOLDEN[direction.name]
    z = Noise(SEED, direction).z(torch.empty(10_007), tensor=7, step=11, probe=1)
    assert_equal_bits(z[: len(first)], torch.tensor(first))
    assert hashlib.sha256(z.numpy().astype("<f4").tobytes()).hexdigest() == digest


@every_direction
def test_z_has_the_shape_of_the_tensor_in_row_major_order(direction):
    noise, address = Noise(SEED, direction), {"tensor": 1, "step": 2, "probe": 3}
    flat = noise.z(torch.empty(35), **address)
    for like in (torch.empty(5, 7), torch.empty(7, 5).t(), torch.empty(5, 7, dtype=torch.float16)):
        assert_equal_bits(noise.z(like, **address), flat.view(5, 7))
    assert noise.z(torch.empty(3, 0), **address).shape == (3, 0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 2\\*\\*64 - 1"):
        Noise(seed)


def test_an_unknown_direction_is_refused_with_the_known_ones():
    assert get_direction("rademacher") is RADEMACHER
    assert get_direction(GAUSSIAN) is GAUSSIAN
    with pytest.raises(ValueError, match="unknown direction 'cauchy': choose one of gaussian, rademacher"):
        get_direction("cauchy")


# --- statistics ------------------------------------------------------------------------------------------------------


def test_the_gaussian_table_is_the_same_each_time_it_is_made():
    """Whatever dtype torch makes tensors of."""
    assert_equal_bits(directions._gaussian_values(), GAUSSIAN.values)
    with support.other_defaults("cpu"):
        assert_equal_bits(directions._gaussian_values(), GAUSSIAN.values)


def test_a_table_that_comes_out_otherwise_is_refused(monkeypatch):
    """As on a machine whose logarithm rounds otherwise."""
    inverse = NormalDist.inv_cdf
    monkeypatch.setattr(NormalDist, "inv_cdf", lambda self, p: inverse(self, p) + 1e-7)
    with pytest.raises(RuntimeError, match="differs from the one of noise version 1"):
        directions._gaussian_values()


def test_the_gaussian_table_is_symmetric_with_unit_variance_and_kurtosis_2_99():
    values = GAUSSIAN.values.double()
    assert torch.equal(values, -values.flip(0))
    assert torch.all(values.diff() > 0)
    # 4,096 float32 roundings of relative size 2**-24 leave the second moment well within 1e-7.
    assert values.pow(2).mean().item() == pytest.approx(1, abs=1e-7)
    assert values.pow(4).mean().item() == pytest.approx(2.99, abs=0.005)


@every_direction
def test_a_large_sample_has_the_moments_of_its_table(direction):
    """Mean, variance and kurtosis, each within five standard deviations: a false alarm in 1.7 million."""
    z = Noise(SEED, direction).z(torch.empty(SAMPLE), tensor=0, step=0, probe=0).double()
    values = direction.values.double()
    for power in (1, 2, 4):
        moment, deviation = values.pow(power).mean(), values.pow(power).std(correction=0)
        # Rademacher's even moments do not vary at all.
        assert abs(z.pow(power).mean() - moment) <= SIGMAS * deviation / math.sqrt(SAMPLE), power


@every_direction
def test_every_entry_of_the_table_is_equally_likely(direction):
    """Chi-square against its mean and variance, both ways: too even is as wrong. A false alarm in about a million."""
    index = half_words(SEED, 2, 3, 0, 0, SAMPLE) >> direction.shift
    bins = 2**direction.bits
    counts = torch.bincount(index, minlength=bins).double()
    statistic = ((counts - SAMPLE / bins) ** 2 / (SAMPLE / bins)).sum().item()
    if bins > 2:
        assert abs(statistic - (bins - 1)) < SIGMAS * math.sqrt(2 * (bins - 1))
    else:  # one degree of freedom: the square of a standard normal
        assert statistic < SIGMAS**2


ORIGIN = {"seed": SEED, "tensor": 4, "step": 5, "probe": 0, "start": 0}


@every_direction
@pytest.mark.parametrize(
    "other",
    [
        *({"seed": SEED ^ 1 << bit} for bit in (0, 31, 32, 63)),
        *({"tensor": tensor} for tensor in (0, 3, 5, 2**31)),
        *({"step": step} for step in (4, 6, 2**31)),
        *({"probe": probe} for probe in (1, 2, ROUNDING_PROBE)),
        *({"start": lag} for lag in (1, 2, 3, 7, 8, 16, 511, 512)),
        {"tensor": 5, "step": 4},
    ],
    ids=str,
)
def test_noise_is_independent_of_its_neighbours(direction, other):
    """Correlation with other tensors, steps, probes, seeds and elements: a false alarm in 1.7 million for each."""

    def z(address: dict[str, int]) -> Tensor:
        return definition.directions(direction, **address, count=SAMPLE // 8)

    a, b = z(ORIGIN), z(ORIGIN | other)
    assert abs(float(a.double() @ b.double())) < SIGMAS * math.sqrt(SAMPLE // 8)
    # Equal entries by chance alone: one in 4,096 or one in two.
    chance = 2.0**-direction.bits
    assert (a == b).double().mean() < chance + SIGMAS * math.sqrt(chance / (SAMPLE // 8))


# --- the fast sweeps give the bits of the definition -----------------------------------------------------------------


@every_dtype
@every_direction
def test_perturb_equals_the_definition(direction, dtype):
    for size in SIZES:
        source = hostile(dtype, size)
        for start in STARTS:
            for scale in (1e-3, -1e-3, 1.0, 3e-7, 1e-42):
                arguments = (direction, SEED, 7, 11, 1, scale, start)
                expected = torch.full_like(source, math.nan)
                definition.perturb(expected, source, *arguments)
                poisoned = torch.full_like(source, math.nan)
                cpu.perturb(poisoned, source, *arguments)
                assert_equal_bits(poisoned, expected)
                aliased = source.clone()
                cpu.perturb(aliased, aliased, *arguments)
                assert_equal_bits(aliased, expected)


@every_dtype
@every_direction
def test_perturb_is_the_source_plus_scaled_z_rounded_once(direction, dtype):
    """The definition itself, from z alone."""
    noise, address = Noise(SEED, direction), {"tensor": 7, "step": 11, "probe": 1}
    source = hostile(dtype, 1000)
    out = torch.full_like(source, math.nan)
    noise.perturb(out, source, **address, scale=2.0**-9)  # a power of two scales without rounding
    assert_equal_bits(out, (source.float() + 2.0**-9 * noise.z(source, **address)).to(dtype))


@pytest.mark.parametrize("width", [1, 7, 513])
@pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
@every_direction
def test_rows_of_a_table_equal_those_of_the_whole(direction, dtype, width):
    noise, address = Noise(SEED, direction), {"tensor": 2, "step": 3, "probe": 1, "scale": 1e-2}
    table = hostile(dtype, 40 * width).view(40, width)
    whole = torch.full_like(table, math.nan)
    noise.perturb(whole, table, **address)
    columns_first = table.t().contiguous().t()
    for rows in (torch.tensor([[39, 0, 7], [7, 1, 38]]), torch.tensor([], dtype=torch.int64)):
        for numbers in (rows, rows.int()):
            assert_equal_bits(noise.perturb_rows(table, numbers, **address), whole[rows])
            assert_equal_bits(noise.perturb_rows(columns_first, numbers, **address), whole[rows])


def test_a_single_row_is_computed_beside_the_table():
    """A look-up by a number without dimensions, which indexing answers with a view of the table."""
    noise, address = Noise(SEED), {"tensor": 2, "step": 3, "probe": 1, "scale": 1e-2}
    table = hostile(torch.float32, 40 * 7).view(40, 7)
    before = table.clone()
    row = noise.perturb_rows(table, torch.tensor(5), **address)
    assert_equal_bits(table, before)
    assert_equal_bits(row, noise.perturb_rows(table, torch.tensor([5]), **address)[0])


@pytest.mark.parametrize("row", [-1, 40])
@pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
def test_a_row_outside_the_table_is_an_index_error(dtype, row):
    table = torch.zeros(40, 7, dtype=dtype)
    with pytest.raises(IndexError):
        Noise(SEED).perturb_rows(table, torch.tensor([0, row]), tensor=0, step=0, probe=0, scale=1.0)


def run_of_updates() -> list[Update]:
    """More steps than one sweep fuses: several probes, decay alone, both, nothing at all, and sizes of zero."""
    kinds = [
        lambda step: Update(step, (1e-3,)),
        lambda step: Update(step, (-2e-6, 0.0, 3e-4)),
        lambda step: Update(step, (), decay=0.96875),
        lambda step: Update(step, (0.0,)),
        lambda step: Update(step, (0.0, 1e-5), decay=0.998046875),
        lambda step: Update(step, (1e-42, 2.0)),
    ]
    return [kinds[i % len(kinds)](1000 - 7 * i) for i in range(40)]


@every_dtype
@every_direction
def test_fused_updates_equal_the_definition_and_the_same_updates_one_by_one(direction, dtype):
    updates = run_of_updates()
    for size in SIZES:
        for start in (0, 509):
            where = (direction, SEED, 7, start)
            expected, fused, single = (hostile(dtype, size) for _ in range(3))
            unchanged = definition.update(expected, updates, *where)
            assert cpu.update(fused, updates, *where) == unchanged
            assert sum(cpu.update(single, [update], *where) for update in updates) == unchanged
            assert_equal_bits(fused, expected)
            assert_equal_bits(single, expected)


@every_dtype
def test_a_step_with_nothing_to_do_changes_nothing(dtype):
    weight = hostile(dtype, 513)
    before = weight.clone()
    updates = [Update(0, ()), Update(1, (0.0, 0.0)), Update(2, (0.0,), decay=1.0)]
    assert all(update.is_empty for update in updates)
    assert Noise(SEED).update(weight, updates, tensor=0) == 3 * 513
    assert Noise(SEED).update(weight, [], tensor=0) == 0
    assert_equal_bits(weight, before)


def test_an_update_decays_first_and_then_adds_its_probes_in_order():
    """The definition itself, from z alone, in float32, where nothing is rounded stochastically."""
    noise = Noise(SEED)
    weight = hostile(torch.float32, 1000)
    z = [noise.z(weight, tensor=7, step=9, probe=probe) for probe in range(3)]
    expected = ((weight * 0.75) + 2.0**-8 * z[0]) + -(2.0**-5) * z[2]
    unchanged = int((expected == weight).sum())
    assert noise.update(weight, [Update(9, (2.0**-8, 0.0, -(2.0**-5)), decay=0.75)], tensor=7) == unchanged
    assert_equal_bits(weight, expected)


@every_dtype
@pytest.mark.parametrize("count", [1, 2])
def test_threads_and_shards_give_the_bits_of_the_whole(dtype, count, monkeypatch):
    monkeypatch.setattr(cpu, "_MIN_PER_THREAD_IN_FORWARD", cpu._MIN_PER_THREAD)
    source = hostile(dtype, THREADED)
    updates = run_of_updates()[:3]
    table, rows = source[: THREADED // 77 * 77].view(-1, 77), torch.arange(THREADED // 77 - 1, -1, -1)
    perturbed, updated = torch.full_like(source, math.nan), source.clone()
    definition.perturb(perturbed, source, GAUSSIAN, SEED, 7, 11, 1, 1e-3)
    unchanged = definition.update(updated, updates, GAUSSIAN, SEED, 7)

    noise, address = Noise(SEED), {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-3}
    with support.threads(count):
        out, weight = torch.full_like(source, math.nan), source.clone()
        noise.perturb(out, source, **address)
        assert_equal_bits(out, perturbed)
        assert_equal_bits(noise.perturb_rows(table, rows, **address), perturbed[: table.numel()].view_as(table)[rows])
        assert noise.update(weight, updates, tensor=7) == unchanged
        assert_equal_bits(weight, updated)

        out, weight = torch.full_like(source, math.nan), source.clone()
        cuts, moved = [0, 3, 515, THREADED - 1, THREADED], 0
        for lo, hi in pairwise(cuts):
            noise.perturb(out[lo:hi], source[lo:hi], **address, start=lo)
            moved += noise.update(weight[lo:hi], updates, tensor=7, start=lo)
        assert_equal_bits(out, perturbed)
        assert_equal_bits(weight, updated)
        assert moved == unchanged


def test_large_tensors_really_run_in_two_threads():
    ranges = []
    with support.threads(2):
        cpu._spread(lambda lo, hi: ranges.append((lo, hi)), THREADED, 512, cpu._MIN_PER_THREAD)
    (first, middle), (start, last) = sorted(ranges)
    assert (first, last) == (0, THREADED)
    assert middle == start
    assert start % 512 == 0


@pytest.mark.parametrize("piece", [20, 512])
@pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
def test_the_pieces_of_the_definition_change_no_bit(dtype, piece, monkeypatch):
    """They are larger than any tensor here, and it is what everything is held against."""

    def sweeps() -> list[Tensor | int]:
        source = hostile(dtype, 600) if dtype != torch.float64 else torch.linspace(-1, 1, 600, dtype=dtype)
        out, updated, stored = torch.full_like(source, math.nan), source.clone(), source.clone()
        x = (source if dtype == torch.float64 else source.float()) * 1.001
        definition.perturb(out, source, GAUSSIAN, SEED, 7, 11, 1, 1e-3, 5)
        updates = [Update(9, ()), Update(10, (1e-3, 1e-4), 0.875), Update(11, (0.0,))]
        counts = [
            definition.update(updated, updates, GAUSSIAN, SEED, 7, 5),
            definition.store(stored, x, SEED, 7, 11, 5),
        ]
        return [out, updated, stored, *map(int, counts)]

    whole = sweeps()
    monkeypatch.setattr(definition, "_CHUNK", piece)
    *parts, updated, stored = sweeps()
    for part, expected in zip(parts, whole, strict=False):
        assert_equal_bits(part, expected)
    assert [updated, stored] == whole[3:]


def test_rows_far_down_a_table_have_the_noise_of_their_place():
    """Beyond the 2**32nd element; no such table fits here, so all its rows are one."""
    noise, address = Noise(SEED), {"tensor": 2, "step": 3, "probe": 1, "scale": 1e-2}
    row = torch.linspace(-1, 1, 8).view(1, 8)
    rows = torch.tensor([2**31 + 3, 5, 2**32 - 1])
    expected = torch.empty(3, 8)
    for out, number in zip(expected, rows.tolist(), strict=True):
        noise.perturb(out, row[0], **address, start=8 * number)
    assert_equal_bits(noise.perturb_rows(row.expand(2**32, 8), rows, **address), expected)


def test_a_slow_path_is_told_once_with_the_remedy(monkeypatch):
    """And not for float64, which has no other."""
    sweep = {"tensor": 0, "step": 0, "probe": 0, "scale": 1.0}
    monkeypatch.setattr(noise.backends, "_on_cpu", lambda dtype: "install numba")
    monkeypatch.setattr(noise.backends, "_told", False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x = torch.zeros(3, dtype=dtype)
            Noise(SEED).perturb(x, x, **sweep)
    assert [str(warning.message) for warning in told] == [
        "forwardtune computes its noise with plain torch here: the same bits, but slowly (install numba)"
    ]
    assert "no kernel for meta" in str(noise.backends.fast(torch.device("meta"), torch.float32))


@pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
def test_what_torch_makes_by_default_does_not_matter(dtype):
    source = torch.linspace(-1, 1, 60, dtype=dtype).view(12, 5)
    x, rows = torch.linspace(-1, 1, 60, dtype=dtype if dtype == torch.float64 else torch.float32), torch.tensor([3, 1])
    address, updates = {"tensor": 7, "step": 11, "probe": 1}, [Update(9, (1e-3, 1e-4), 0.875)]
    plain = (GAUSSIAN, SEED, 7)

    def sweeps() -> list[Tensor]:
        """Kernels and definition."""
        out, updated, stored, plainly, plain_update = (source.clone() for _ in range(5))
        noise = Noise(SEED)
        noise.perturb(out, source, **address, scale=1e-2)
        noise.update(updated, updates, tensor=7)
        noise.store(stored.view(-1), x, tensor=7, step=3)
        definition.perturb(plainly.view(-1), source.view(-1), *plain, 11, 1, 1e-2)
        definition.update(plain_update.view(-1), updates, *plain)
        plain_store = source.clone()
        definition.store(plain_store.view(-1), x, SEED, 7, 3)
        assert_equal_bits(plain_store, stored)
        z = noise.z(source, **address)
        return [out, updated, stored, plainly, plain_update, z, noise.perturb_rows(source, rows, **address, scale=1.0)]

    expected = sweeps()
    with support.other_defaults():
        found = sweeps()
    for one, other in zip(found, expected, strict=True):
        assert_equal_bits(one, other)


LAYOUTS = {
    "transposed": lambda x: x.view(30, 50).t(),
    "strided": lambda x: x[::2],
    "column": lambda x: x.view(50, 30)[:, 3],
    "permuted": lambda x: x.view(5, 6, 50).permute(2, 0, 1),
    "scalar": lambda x: x[7],
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_does_not_matter(dtype, layout):
    noise, address = Noise(SEED), {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-3}
    strided = layout(hostile(dtype, 1500))
    contiguous = strided.clone(memory_format=torch.contiguous_format)
    expected = torch.full_like(contiguous, math.nan)
    noise.perturb(expected, contiguous, **address)

    storage = torch.full((1500,), math.nan, dtype=dtype)
    for source, out in ((strided, torch.full_like(contiguous, math.nan)), (contiguous, layout(storage))):
        noise.perturb(out, source, **address)
        assert_equal_bits(out, expected)
    assert storage.isnan().sum() >= 1500 - strided.numel()  # nothing was written beside the view

    updates = run_of_updates()[:3]
    assert noise.update(strided, updates, tensor=7) == noise.update(contiguous, updates, tensor=7)
    assert_equal_bits(strided, contiguous)


@half_dtype
def test_infinity_and_nan_stay_what_they_are(dtype):
    """Every bit pattern of the dtype, through the definition and the fast path; and what overflows keeps its sign."""
    stored, largest = all_values(dtype), torch.finfo(dtype).max
    for backend in (definition, cpu):
        out, weight = torch.zeros_like(stored), stored.clone()
        backend.perturb(out, stored, GAUSSIAN, SEED, 0, 0, 0, 1e-3)
        backend.update(weight, [Update(0, (1e-3,)), Update(1, (1e-3,), decay=0.5)], GAUSSIAN, SEED, 0)
        for result in (out, weight):
            assert torch.equal(result.isnan(), stored.isnan())
            assert torch.equal(result[stored.isinf()], stored[stored.isinf()])
        weight = torch.tensor([largest, -largest] * 300).to(dtype)
        signs = weight.sign()
        backend.update(weight, [Update(0, (), decay=2.0)], GAUSSIAN, SEED, 0)
        assert torch.equal(weight, signs * math.inf)


# --- stochastic rounding ---------------------------------------------------------------------------------------------


def finite_values(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype in float32, ascending; the two zeros are one."""
    values = all_values(dtype).float()
    return values[values.isfinite()].unique()


def expectation(x: float, dtype: torch.dtype) -> tuple[Fraction, int]:
    """The mean of the rounded value over all 65,536 random values, exactly, and how many values there are."""
    rounded = definition.round_stochastically(torch.full((2**16,), x), torch.arange(2**16), dtype)
    values, counts = rounded.unique(return_counts=True)
    total = sum(Fraction(value) * count for value, count in zip(values.tolist(), counts.tolist(), strict=True))
    return total / 2**16, len(values)


def float32(x: float) -> float:
    return torch.tensor(x).item()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("dtype", "x"),
    [
        *((torch.bfloat16, x) for x in (0.02, 1e-6, 1 / 3, 1.9999, 123.456, 3e38, 1e-38, 1e-39)),
        *((torch.float16, x) for x in (0.02, 2.0**-14, 1 / 3, 1.9999, 123.456, 65503.0)),
        # float16 subnormals: of these, x / 2**-24 has at most 16 bits behind the point.
        *((torch.float16, x * 2.0**-24) for x in (0.5, 1.5, 1023.5, 1 / 65536, 700 + 12345 / 65536)),
    ],
    ids=str,
)
def test_the_expectation_of_a_rounded_value_is_the_value(dtype, x, sign):
    x = float32(sign * x)
    mean, neighbours = expectation(x, dtype)
    assert mean == Fraction(x)
    assert neighbours == (1 if x == torch.tensor(x).to(dtype).item() else 2)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", [1e-9, 5.97e-8, 1e-7, 1e-6, 3.3e-6, 6.1e-5])
def test_the_expectation_in_the_float16_subnormals_is_off_by_less_than_a_65536th_of_the_spacing(x, sign):
    x = float32(sign * x)
    mean, _ = expectation(x, torch.float16)
    assert abs(mean - Fraction(x)) < Fraction(1, 2**16) * Fraction(1, 2**24)


@half_dtype
def test_a_representable_value_never_moves(dtype):
    x = all_values(dtype).float()
    x = x[x.isfinite()]
    for random in (0, 1, 2**15, 2**16 - 1):
        assert_equal_bits(definition.round_stochastically(x, torch.full(x.shape, random), dtype), x)


@half_dtype
def test_a_rounded_value_is_one_of_the_two_neighbours_with_the_sign_of_the_value(dtype):
    grid = finite_values(dtype)
    generator = torch.Generator().manual_seed(0)
    span = math.log2(grid[grid > 0].min().item()) - 3, math.log2(grid.max().item())
    x = 2.0 ** torch.empty(200_000, dtype=torch.float64).uniform_(*span, generator=generator)
    x = (x * torch.randn(x.shape, generator=generator).sign()).float()
    x = x[x.abs() <= grid.max()]
    above = torch.searchsorted(grid, x)
    below = torch.where(grid[above] == x, above, above - 1)
    for random in (torch.randint(2**16, x.shape, generator=generator), torch.zeros_like(above)):
        rounded = definition.round_stochastically(x, random, dtype)
        assert torch.all((rounded == grid[below]) | (rounded == grid[above]))
        assert torch.equal(rounded.signbit(), x.signbit())


# --- which code runs -------------------------------------------------------------------------------------------------


def test_float64_weights_take_the_definition_and_no_rounding():
    noise, address = Noise(SEED), {"tensor": 7, "step": 11, "probe": 1}
    weight = torch.randn(513, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = noise.z(weight, **address).double()
    out = torch.full_like(weight, math.nan)
    noise.perturb(out, weight, **address, scale=0.5)
    assert_equal_bits(out, weight + 0.5 * z)
    rows = torch.tensor([26, 3])
    table = noise.perturb_rows(weight.view(27, 19), rows, **address, scale=0.5)
    assert_equal_bits(table, out.view(27, 19)[rows])
    expected = weight * 0.75 + 0.5 * z
    assert noise.update(weight, [Update(11, (0.0, 0.5), decay=0.75)], tensor=7) == 0
    assert_equal_bits(weight, expected)


def everything() -> str:
    """A digest over every sweep, every dtype and both directions."""
    state = hashlib.sha256()
    for direction in DIRECTIONS.values():
        noise, address = Noise(SEED, direction), {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-3}
        for dtype in (*support.DTYPES, torch.float64):
            weight = ((torch.arange(1500) - 750) / 2048).view(50, 30).to(dtype)
            out = torch.full_like(weight, math.nan)
            noise.perturb(out, weight, **address)
            rows = noise.perturb_rows(weight, torch.tensor([[3, 49]]), **address)
            unchanged = noise.update(weight, run_of_updates(), tensor=7)
            for tensor in (out, rows, weight, torch.as_tensor(unchanged)):
                state.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
    return state.hexdigest()


# Replay needs more than the bits of z: the order of additions and the rounding are part of version 1 too.
EVERYTHING = "1de789da83fec8a91af9bfa4b525b2c763e67d848cb188b04f166cab67c4e5d7"


def test_the_bits_of_all_sweeps_stay_as_they_are():
    assert everything() == EVERYTHING


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None
import torch, test_noise
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(test_noise.everything())
print(*(warning.message for warning in caught), sep="\\n")
"""


def test_without_numba_the_bits_are_the_same_and_one_warning_says_that_it_is_slow():
    digest, message = python(WITHOUT_NUMBA).splitlines()
    assert digest == EVERYTHING
    assert "the same bits, but slowly (install numba)" in message


def test_compiled_loops_use_the_widest_vectors_of_the_processor() -> None:
    """LLVM takes half of them by itself on processors with AVX-512."""
    numba = pytest.importorskip("numba")
    from forwardtune.noise.cpu_conversions import wide_vectors

    if "+avx512f" not in numba.core.registry.cpu_target.target_context.codegen()._get_host_cpu_features():
        pytest.skip("needs AVX-512")

    @numba.njit
    def scaled(x):  # type: ignore[no-untyped-def]
        wide_vectors()
        for i in range(x.shape[0]):
            x[i] = x[i] * x[i]

    scaled(torch.zeros(64).numpy())
    (code,) = scaled.inspect_asm().values()
    assert "zmm" in code
