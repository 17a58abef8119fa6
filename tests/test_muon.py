"""Momentum in the space of low-rank directions, made orthogonal: against plain linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forwardtune import MeZO
from forwardtune.errors import InputError
from forwardtune.method.muon import orthogonal
from forwardtune.method.rules import Muon
from support import scripted, snapshot

LR = 2.0**-6


def newton_schulz(s: Tensor) -> Tensor:
    """Muon's, of a matrix as a whole, in float64."""
    x = s.double() / torch.linalg.matrix_norm(s.double().T @ s.double()).sqrt()
    for _ in range(5):
        gram = x.T @ x
        x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
    return x


@pytest.mark.parametrize(("height", "rank"), [(1, 1), (7, 2), (300, 4), (5000, 16)])
def test_it_is_newton_schulz_of_the_whole_matrix(height: int, rank: int) -> None:
    torch.manual_seed(height)
    s = torch.randn(height, rank) @ torch.diag(torch.logspace(0, -1, rank))
    o = orthogonal(s)
    # The Gram matrix is rounded by 2^-20 of its largest element, and float32 by 2^-24.
    torch.testing.assert_close(o.double(), newton_schulz(s), rtol=0, atol=1e-4)
    values = torch.linalg.svdvals(o)
    assert 0.65 < values.min() <= values.max() < 1.2


def test_no_order_of_the_rows_and_no_scale_changes_a_bit() -> None:
    """As on another machine, which adds up in another order."""
    torch.manual_seed(0)
    s = torch.randn(999, 5)
    order = torch.randperm(999)
    assert torch.equal(orthogonal(s[order]), orthogonal(s)[order])
    torch.testing.assert_close(orthogonal(2.0**-40 * s), orthogonal(s), rtol=0, atol=1e-6)


@pytest.mark.parametrize("s", [torch.zeros(4, 2), torch.zeros(0, 2), torch.tensor([[1.0, 0.0], [2.0, 0.0]])], ids=str)
def test_what_has_no_direction_is_not_moved(s: Tensor) -> None:
    o = orthogonal(s)
    assert o.isfinite().all()
    assert torch.equal(o == 0, s == 0)


class Two(nn.Module):
    """A matrix and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.linspace(-1, 1, 80, dtype=dtype).view(8, 10))
        self.vector = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype))


def test_steps_are_those_of_a_plain_reference() -> None:
    """V is drawn anew at steps 0 and 4; the window of 3 steps ends behind them."""
    model, rank, mu, decay = Two(), 2, 0.5, 1 - LR * 0.25
    optimizer = MeZO(
        model,
        lr=LR,
        eps=0.5,
        rank=rank,
        refresh=4,
        rule=Muon(mu, window=3),
        perturbation="copy",
        weight_decay=0.25,
        seed=3,
    )
    optimizer.evaluator._checked.add(False)
    expected = {name: weight.double() for name, weight in snapshot(model).items()}
    matrix, vector = (next(t for t in optimizer.tuned if t.name == name) for name in ("matrix", "vector"))
    c: list[float] = []
    for step in range(7):
        difference = 1.0 + step * (-1) ** step
        optimizer.step(scripted(difference, 0.0))
        c.append(difference)
        s, m = torch.zeros(8, rank, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for k in range(max(0, step - 2), step + 1):
            where = {"tensor": matrix.id, "step": k, "probes": [0], "scale": 1.0, "device": torch.device("cpu")}
            if k // 4 == step // 4:
                u, v = optimizer.noise.factors((8, 10), **where)
                s = mu * s + c[k] * u[0].double() * rank**0.5
            z = optimizer.noise.z(model.vector, tensor=vector.id, step=k, probe=0)
            m = mu * m + c[k] * z.double()
        o = newton_schulz(s)
        expected["matrix"] = decay * expected["matrix"] - LR * (8 / rank) ** 0.5 * o @ v[0].double().T
        expected["vector"] = decay * expected["vector"] - LR * m / m.square().mean().sqrt()
        for name in expected:
            torch.testing.assert_close(model.get_parameter(name).detach(), expected[name], rtol=0, atol=1e-5)


def test_a_weight_moves_by_the_rate_whatever_the_loss() -> None:
    moved = []
    for size in (1.0, 1e6):
        model = nn.Linear(40, 60, bias=False)
        before = model.weight.detach().clone()
        optimizer = MeZO(model, lr=LR, eps=0.5, rank=4, refresh=4, rule="muon", perturbation="copy")
        optimizer.evaluator._checked.add(False)
        optimizer.step(scripted(size, 0.0))
        moved.append((model.weight - before).square().mean().sqrt().item() / LR)
    assert moved == pytest.approx([1.0, 1.0], rel=0.3)  # singular values of O from 0.68 to 1.14, and of V


def test_rows_that_were_not_read_stay() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 30)

        def forward(self) -> Tensor:
            return self.table(torch.tensor([3, 5, 5])).double().square().mean()

    model = Words().eval()
    before = snapshot(model)["table.weight"]
    optimizer = MeZO(model, lr=LR, rank=2, refresh=10, rule="muon")
    for _ in range(3):
        optimizer.step(model)
    changed = (model.table.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [3, 5]


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"rank": 2, "probes": 2}, {"rank": 2, "assignment": "example"}, {"rank": 1, "modify": "variance"},
        {"rank": 1, "active_layers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_directions_that_share_no_space_are_refused(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    with pytest.raises(InputError, match="the space that V of low-rank directions spans"):
        MeZO(model, rule="muon", **settings)


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"momentum": "0.9"}, {"window": 0}], ids=str)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be"):
        Muon(**settings)
