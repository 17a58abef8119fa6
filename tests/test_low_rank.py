"""Directions of low rank: their definition against independent arithmetic, and every way to them against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import support
from forwardtune.noise import DIRECTIONS, LowRank, Noise, Update, definition
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
