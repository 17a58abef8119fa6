"""Directions of low rank: their definition against independent arithmetic, and every way to them against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import support
from forwardtune.errors import InputError
from forwardtune.noise import DIRECTIONS, GAUSSIAN, LowRank, Noise, Update, backends, cpu, definition
from forwardtune.noise.philox import half_words
from test_noise import assert_equal_bits, hostile

SEED = 0x0123456789ABCDEF
# Rows shorter and longer than a tile of 512, and of no multiple of a block of 8.
SHAPES = [(40, 33), (9, 1030), (2, 5, 64), (700, 3), (300, 8)]
STRUCTURES = [LowRank(1), LowRank(2, refresh=3), LowRank(3), LowRank(4, refresh=2)]

every_direction = pytest.mark.parametrize("direction", DIRECTIONS.values(), ids=DIRECTIONS)
every_dtype = pytest.mark.parametrize("dtype", [*support.DTYPES, torch.float64], ids=str)
every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


def weights(dtype: torch.dtype, *shape: int) -> Tensor:
    count = math.prod(shape)
    flat = hostile(dtype, count) if dtype != torch.float64 else torch.linspace(-1, 1, count, dtype=dtype).pow(5)
    return flat.view(shape)


# --- the definition --------------------------------------------------------------------------------------------------


def factors_by_hand(noise: Noise, shape: tuple[int, ...], tensor: int, step: int, probe: int, scale: float):
    """U, scaled, and V, as the specification writes them."""
    structure, height, width = noise.structure, math.prod(shape[:-1]), shape[-1]
    rank, values = structure.rank, noise.direction.values.numpy()

    def entries(at: int, lo: int, hi: int) -> np.ndarray:
        return half_words(noise.seed, tensor, at, probe, lo, hi - lo).numpy() >> (16 - noise.direction.bits)

    scaled = (values.astype(np.float64) * (scale / math.sqrt(rank))).astype(np.float32)
    u = scaled[entries(step, 0, height * rank)].reshape(height, rank)
    at = structure.refresh * (step // structure.refresh)
    v = values[entries(at, height * rank, (height + width) * rank)].reshape(width, rank)
    return u, v


def add_by_hand(x: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """x in float32 or float64: a rounded product and a rounded sum at a time."""
    for rho in range(u.shape[1]):
        x = x + (u[:, rho, None].astype(x.dtype) * v[None, :, rho].astype(x.dtype)).reshape(x.shape)
    return x


def arithmetic(weight: Tensor) -> np.ndarray:
    return (weight if weight.dtype == torch.float64 else weight.float()).numpy()


@every_structure
@every_direction
@every_dtype
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_a_perturbed_matrix_is_the_source_plus_the_product_of_its_factors(dtype, direction, structure):
    noise = Noise(SEED, direction, structure)
    for shape in SHAPES:
        if not noise.is_low_rank(shape):
            continue
        source = weights(dtype, *shape)
        u, v = factors_by_hand(noise, shape, 7, 11, 1, -3e-3)
        expected = torch.from_numpy(add_by_hand(arithmetic(source), u, v)).to(dtype)
        out = torch.full_like(source, math.nan)
        noise.perturb(out, source, tensor=7, step=11, probe=1, scale=-3e-3)
        assert_equal_bits(out, expected)
        u, v = factors_by_hand(noise, shape, 7, 11, 1, 1.0)
        z = add_by_hand(np.zeros(shape, np.float32), u, v)
        assert_equal_bits(noise.z(source, tensor=7, step=11, probe=1), torch.from_numpy(z))


def updated_by_hand(noise: Noise, weight: Tensor, updates: list[Update], tensor: int) -> tuple[Tensor, int]:
    unchanged = 0
    for item in updates:
        before = weight
        if not item.is_empty:
            x = arithmetic(weight) * np.float32(item.decay)
            for probe, size in enumerate(item.sizes):
                if size != 0:
                    x = add_by_hand(x, *factors_by_hand(noise, weight.shape, tensor, item.step, probe, size))
            x = torch.from_numpy(x)
            if weight.dtype in support.HALF:
                random = half_words(noise.seed, tensor, item.step, 0xFFFFFFFF, 0, weight.numel()).view(weight.shape)
                x = definition.round_stochastically(x, random, weight.dtype)
            weight = x.to(weight.dtype)
        unchanged += int((weight == before).sum())
    return weight, unchanged


UPDATES = [
    Update(1000, (1e-3,)),
    Update(1001, (-2e-6, 0.0, 3e-4)),
    Update(1002, (), decay=0.96875),
    Update(1003, (0.0,)),
    Update(1004, (1e-4, 2e-4, -3e-4, 4e-4, 5e-4, -1e-3), decay=0.998046875),
    Update(7, (1e-42, 2.0)),
]


@every_structure
@every_direction
@every_dtype
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_updates_add_the_products_of_their_probes_in_order(dtype, direction, structure):
    noise = Noise(SEED, direction, structure)
    for shape in SHAPES:
        if not noise.is_low_rank(shape):
            continue
        fused, single = (weights(dtype, *shape) for _ in range(2))
        expected, unchanged = updated_by_hand(noise, fused.clone(), UPDATES, 7)
        assert noise.update(fused, UPDATES, tensor=7) == unchanged
        assert sum(noise.update(single, [item], tensor=7) for item in UPDATES) == unchanged
        assert_equal_bits(fused, expected)
        assert_equal_bits(single, expected)


def test_without_kernels_the_bits_are_the_same(monkeypatch):
    def everything() -> list[Tensor]:
        found = []
        for dtype in support.DTYPES:
            noise, weight = Noise(SEED, GAUSSIAN, LowRank(2, refresh=3)), weights(dtype, 40, 33)
            rows, probes = torch.tensor([3, 39, 3]), torch.tensor([0, 2, 1])
            address = {"tensor": 7, "step": 11, "scale": 1e-3}
            found += [
                noise.perturb_rows(weight, rows, **address, probe=1),
                *all_factors(noise, weight.shape, **address),
            ]
            found += [
                noise.factor_rows(weight.shape, rows, probes, **address),
                noise.z(weight, tensor=7, step=5, probe=0),
            ]
            found += [noise.direction_rows(weight.shape, rows, probes, **address)]
            found += [torch.as_tensor(noise.update(weight, UPDATES, tensor=7)), weight]
        return found

    expected = everything()
    monkeypatch.setattr(backends, "fast", lambda device, dtype: "none")
    monkeypatch.setattr(backends, "_told", True)
    for one, other in zip(everything(), expected, strict=True):
        assert_equal_bits(one, other)


# --- pieces, rows, layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dtype
def test_pieces_that_begin_and_end_anywhere_have_the_bits_of_the_whole(dtype, shape):
    noise, address = Noise(SEED, GAUSSIAN, LowRank(1, refresh=3)), {"tensor": 7, "step": 11, "probe": 1}
    source = weights(dtype, *shape)
    flat, whole, updated = source.view(-1), torch.empty_like(source), source.clone()
    noise.perturb(whole, source, **address, scale=1e-2)
    unchanged = noise.update(updated, UPDATES, tensor=7)
    z = noise.z(source, **address).view(-1)
    last = len(flat)
    out, moved, count = torch.full_like(flat, math.nan), flat.clone(), 0
    for lo, hi in pairwise(sorted([0, 5, 6, 6, shape[-1] + 1, last // 2 + 3, last - 1, last])):
        where = {"start": lo, "shape": shape}
        noise.perturb(out[lo:hi], flat[lo:hi], **address, **where, scale=1e-2)
        count += noise.update(moved[lo:hi], UPDATES, tensor=7, **where)
        assert_equal_bits(noise.z(flat[lo:hi], **address, **where), z[lo:hi])
    assert_equal_bits(out, whole.view(-1))
    assert_equal_bits(moved, updated.view(-1))
    assert count == unchanged


def test_threads_give_the_bits_of_the_whole(monkeypatch):
    monkeypatch.setattr(cpu, "_MIN_PER_THREAD_IN_FORWARD", cpu._MIN_PER_THREAD)
    noise, address = Noise(SEED, GAUSSIAN, LowRank(2)), {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-2}
    results = []
    for count in (1, 2):
        with support.threads(count):
            weight = weights(torch.bfloat16, 2**11 + 3, 101)
            out = torch.empty_like(weight)
            noise.perturb(out, weight, **address)
            results.append((out, noise.update(weight, UPDATES, tensor=7), weight))
    assert_equal_bits(results[1][0], results[0][0])
    assert_equal_bits(results[1][2], results[0][2])
    assert results[1][1] == results[0][1]


def test_long_runs_of_steps_are_applied_in_parts_with_the_same_bits(monkeypatch):
    """So that the factors of thousands of steps need not exist at once."""
    noise, made = Noise(SEED, GAUSSIAN, LowRank(2, refresh=3)), []
    weight, again = (weights(torch.bfloat16, 40, 33) for _ in range(2))
    noise.update(weight, UPDATES * 3, tensor=7)
    right = cpu.update_factored

    def noted(flat: Tensor, updates: list[Update], u: Tensor, *arguments) -> int:
        made.append((len(updates), len(u)))
        return right(flat, updates, u, *arguments)

    monkeypatch.setattr(cpu, "update_factored", noted)
    monkeypatch.setattr("forwardtune.noise.factored._OF_ONE", 6 * 2 * 73)
    noise.update(again, UPDATES * 3, tensor=7)
    assert_equal_bits(again, weight)
    assert sum(steps for steps, _ in made) == len(UPDATES) * 3
    assert max(terms for _, terms in made) == 6  # the most that a step of these has
    assert len(made) > 3


@every_structure
@every_dtype
def test_rows_of_a_table_are_those_of_the_whole(dtype, structure):
    noise, address = Noise(SEED, GAUSSIAN, structure), {"tensor": 2, "step": 4, "probe": 1, "scale": 1e-2}
    table = weights(dtype, 60, 33)
    whole = torch.empty_like(table)
    noise.perturb(whole, table, **address)
    for rows in (torch.tensor([[59, 0, 7], [7, 1, 38]]), torch.tensor(5), torch.tensor([], dtype=torch.int64)):
        assert_equal_bits(noise.perturb_rows(table, rows, **address), whole[rows])
    assert_equal_bits(noise.perturb_rows(table.t().contiguous().t(), torch.tensor([3]), **address), whole[[3]])
    with pytest.raises(IndexError):
        noise.perturb_rows(table, torch.tensor([60]), **address)


@every_dtype
def test_layout_does_not_matter(dtype):
    noise, address = Noise(SEED, GAUSSIAN, LowRank(2)), {"tensor": 7, "step": 11, "probe": 1, "scale": 1e-3}
    strided = weights(dtype, 33, 40).t()
    contiguous = strided.contiguous()
    expected, out = torch.empty_like(contiguous), weights(dtype, 33, 40).t()
    noise.perturb(expected, contiguous, **address)
    noise.perturb(out, strided, **address)
    assert_equal_bits(out, expected)
    assert noise.update(strided, UPDATES, tensor=7) == noise.update(contiguous, UPDATES, tensor=7)
    assert_equal_bits(strided, contiguous)


# --- directions for who multiplies with them -------------------------------------------------------------------------


def all_factors(noise: Noise, shape: Sequence[int], **address) -> tuple[Tensor, Tensor]:
    return noise.factors(shape, probes=range(3), device=torch.device("cpu"), **address)


@every_structure
@every_direction
def test_factors_are_those_of_the_specification(direction, structure):
    noise = Noise(SEED, direction, structure)
    u, v = all_factors(noise, (40, 33), tensor=7, step=11, scale=1e-3)
    for probe in range(3):
        left, right = factors_by_hand(noise, (40, 33), 7, 11, probe, 1e-3)
        assert_equal_bits(u[probe], torch.from_numpy(left))
        assert_equal_bits(v[probe], torch.from_numpy(right))
    minus, same = all_factors(noise, (40, 33), tensor=7, step=11, scale=-1e-3)
    assert_equal_bits(minus, -u)
    assert_equal_bits(same, v)
    rows, probes = torch.tensor([39, 0, 5, 5]), torch.tensor([2, 0, 1, 2])
    found = noise.factor_rows((40, 33), rows, probes, tensor=7, step=11, scale=1e-3)
    assert_equal_bits(found, u[probes, rows])


def test_v_stays_for_as_many_steps_as_it_is_asked_to():
    noise = Noise(SEED, GAUSSIAN, LowRank(1, refresh=3))
    made = [all_factors(noise, (40, 33), tensor=7, step=step, scale=1.0) for step in range(7)]
    for (u, v), (next_u, next_v), step in zip(made, made[1:], range(6), strict=False):
        assert not torch.equal(u, next_u)
        assert torch.equal(v, next_v) == ((step + 1) % 3 != 0)


@every_direction
def test_full_directions_of_several_probes_are_those_of_each(direction):
    noise, rows, probes = Noise(SEED, direction), torch.tensor([39, 0, 5, 5]), torch.tensor([2, 0, 1, 2])
    address = {"tensor": 7, "step": 11}
    many = noise.directions((40, 33), probes=range(3), scale=0.3, device=torch.device("cpu"), **address)
    for probe in range(3):
        flat = definition.directions(direction, SEED, 7, 11, probe, 0, 40 * 33, scale=0.3)
        assert_equal_bits(many[probe], flat.view(40, 33))
        assert_equal_bits(
            noise.z(torch.empty(40, 33), probe=probe, **address).view(-1),
            definition.directions(direction, SEED, 7, 11, probe, 0, 40 * 33),
        )
    assert_equal_bits(noise.direction_rows((40, 33), rows, probes, scale=0.3, **address), many[probes, rows])
    assert noise.direction_rows((40, 33), rows[:0], probes[:0], scale=0.3, **address).shape == (0, 33)


def test_norms_and_tiny_matrices_keep_their_full_directions():
    low, full, address = Noise(SEED, GAUSSIAN, LowRank(2)), Noise(SEED), {"tensor": 7, "step": 11, "probe": 1}
    for shape in ((64,), (), (4, 4), (64, 2), (1, 64), (0, 64)):
        assert not low.is_low_rank(shape)
        weight, other = torch.ones(shape), torch.ones(shape)
        assert_equal_bits(low.z(weight, **address), full.z(weight, **address))
        assert low.update(weight, UPDATES, tensor=7) == full.update(other, UPDATES, tensor=7)
        assert_equal_bits(weight, other)
    assert [low.is_low_rank(shape) for shape in ((4, 4), (4, 5), (2, 2, 5))] == [False, True, True]  # 2 (4 + 5) < 20
    assert not full.is_low_rank((64, 64))


@every_direction
@pytest.mark.parametrize("rank", [1, 4])
def test_entries_have_mean_0_and_variance_1_and_rank(direction, rank):
    """Over 2,000 directions, which are independent: within five standard deviations."""
    noise, many = Noise(SEED, direction, LowRank(rank)), 2000
    u, v = noise.factors((12, 10), tensor=1, step=0, probes=range(many), scale=1.0, device=torch.device("cpu"))
    z = u.double() @ v.double().mT
    assert int(torch.linalg.matrix_rank(z[0])) <= rank
    # The kurtosis of a product of two standard normal numbers is 9, which bounds the variance of z^2 by 8.
    assert z.mean(0).abs().max() < 5 / math.sqrt(many)
    assert (z.pow(2).mean(0) - 1).abs().max() < 5 * math.sqrt(8 / many)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "2", None])
def test_a_rank_or_refresh_that_is_no_number_of_columns_or_steps_is_refused(wrong):
    with pytest.raises(InputError, match="rank of a low-rank direction must be an integer of at least 1"):
        LowRank(wrong)
    with pytest.raises(InputError, match="refresh of a low-rank direction must be an integer of at least 1"):
        LowRank(1, refresh=wrong)


def test_a_piece_without_the_shape_of_its_tensor_is_refused():
    noise, piece = Noise(SEED, GAUSSIAN, LowRank(1)), torch.zeros(64)
    for call in (
        lambda: noise.perturb(piece, piece, tensor=0, step=0, probe=0, scale=1.0, start=64),
        lambda: noise.update(piece, UPDATES, tensor=0, start=64),
        lambda: noise.z(piece, tensor=0, step=0, probe=0, start=64),
    ):
        with pytest.raises(ValueError, match="tensor's shape: pass it"):
            call()


# --- Triton ----------------------------------------------------------------------------------------------------------


def test_the_kernels_of_a_gpu_give_the_same_bits_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton")
    from triton.language import standard

    from test_noise_gpu import load_interpreted

    module = load_interpreted()
    module.kernels.add = standard._sum_combine

    def everything(dtype: torch.dtype, structure: LowRank, shape: tuple[int, ...]) -> list[Tensor]:
        noise, weight = Noise(SEED, GAUSSIAN, structure), weights(dtype, *shape)
        rows, probes = torch.tensor([3, 8, 3]), torch.tensor([0, 2, 1])
        address = {"tensor": 7, "step": 11, "scale": 1e-3}
        piece, where = weight.view(-1)[13:-3], {"start": 13, "shape": shape}
        found = [
            noise.perturb_rows(weight, rows, **address, probe=1),
            noise.factor_rows(shape, rows, probes, **address),
        ]
        found += [noise.direction_rows(shape, rows, probes, **address), *all_factors(noise, shape, **address)]
        found += [noise.z(piece, tensor=7, step=2**31 + 5, probe=0, **where)]
        found += [torch.as_tensor(noise.update(piece, UPDATES, tensor=7, **where)), weight]
        return found

    cases = zip(support.DTYPES, STRUCTURES, [(9, 130), (40, 33), (170, 8)], strict=False)
    for case in list(cases):
        expected = everything(*case)
        with monkeypatch.context() as patch:
            fast = dict.fromkeys(module.DTYPES, module)
            patch.setattr(backends, "fast", lambda device, dtype, fast=fast: fast[dtype])
            for one, other in zip(everything(*case), expected, strict=True):
                assert_equal_bits(one, other)


def test_the_factors_of_several_tensors_are_those_of_each():
    noise, cpu = Noise(5, GAUSSIAN, LowRank(2, 3)), torch.device("cpu")
    places = [(3, (40, 33)), (4, (64, 16)), (9, (7, 8, 30))]
    for step in (0, 4):
        many = noise.factors_of(places, step=step, probes=[0, 2, 5], device=cpu)
        for (tensor, shape), found in zip(places, many, strict=True):
            one = noise.factors(shape, tensor=tensor, step=step, probes=[0, 2, 5], scale=1.0, device=cpu)
            for a, b in zip(found, one, strict=True):
                assert torch.equal(a, b.mT.flatten(0, 1))
