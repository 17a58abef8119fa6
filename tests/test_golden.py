"""Logs of earlier versions replay to the digest that they end with, whatever has been moved since.

``python tests/test_golden.py`` writes those in ``tests/golden`` that are missing; one that is there is never written again.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from forwardtune import MeZO, MeZOConfig, MeZOTrainer, StepLog, replay
from forwardtune.method.rules import Adam
from forwardtune.models import tune
from forwardtune.trajectory import read_log
from support import tiny_model, token_batch, tokenizer

FOLDER = Path(__file__).parent / "golden"
RULES = ("sgd", "sign", "momentum", "adam")
DIRECTIONS = ("gaussian", "rademacher")
ESTIMATORS: dict[str, dict[str, Any]] = {
    "spsa": {"probes": 2},
    "one_sided": {"estimator": "one_sided", "probes": 2},
    "sigma": {"estimator": "one_sided", "normalize": "sigma", "probes": 3},
    "rank": {"normalize": "rank", "probes": 2},
}
#: Directions of low rank, and of each example.
STRUCTURES: dict[str, dict[str, Any]] = {
    "low_rank": {"rank": 2, "refresh": 3, "rule": "momentum"},
    "example": {"assignment": "example", "clip_coefficient": 0.4},
    "example_signs": {
        "assignment": "example",
        "rank": 2,
        "refresh": 5,
        "direction": "rademacher",
        "rule": Adam(root="library"),
        "probes": 2,
    },
    "adam_nearest": {"rule": "adam", "probes": 2},
    "example_folds": {"assignment": "example", "refresh": 5, "fold": "refresh", "probes": 2},
}
METHODS = ["-".join(names) for names in itertools.product(RULES, DIRECTIONS, ESTIMATORS)] + [*STRUCTURES]
STEPS = 12


class Net(nn.Module):
    """Two layers and a part that the data seldom reach, with weights that no random generator decides."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, dtype=torch.bfloat16)
        self.often, self.seldom = nn.Linear(4, 4, dtype=torch.float16), nn.Linear(4, 4)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                values = torch.arange(parameter.numel(), dtype=torch.float64) * 37 % 101 / 101 - 0.5
                parameter.copy_((values / (number + 1)).view(parameter.shape))

    def losses(self, step: int) -> torch.Tensor:
        x = self.often(self.table(torch.tensor([step % 7, 3])).half()).float()
        return ((self.seldom(x) if step % 3 == 0 else x) - 0.25).square().mean(1)

    def forward(self, step: int) -> torch.Tensor:
        return self.losses(step).mean()


def method(name: str) -> tuple[nn.Module, MeZO]:
    net = Net()
    groups = [
        {"params": [*net.table.parameters(), *net.often.parameters()], "weight_decay": 0.1},
        {"params": [*net.seldom.parameters()]},
    ]
    settings = STRUCTURES.get(name)
    if settings is not None and "fold" in settings:
        groups[0]["weight_decay"] = 0.0
    if settings is None:
        rule, direction, estimator = name.split("-")
        rule = Adam(root="library") if rule == "adam" else rule  # as logs have it that do not say
        settings = {"rule": rule, "direction": direction, **ESTIMATORS[estimator]}
    return net, MeZO(groups, lr=1e-2, eps=1e-2, seed=2**40 + 1, module=net, **settings)


def base(name: str) -> nn.Module:
    """The weights that a golden run begins with."""
    if name in METHODS:
        return Net()
    model = tiny_model()
    return tune(model, tokenizer(), "lora", seed=1) if name == "lora" else model


def write(name: str, path: Path) -> None:
    """Make a golden log."""
    if name in METHODS:
        net, optimizer = method(name)
        loss = net.losses if optimizer.estimator.per_example else net
        with StepLog(path, optimizer):
            for step in range(STEPS):
                optimizer.step(lambda step=step: loss(step))
                if step == 6:
                    optimizer.fold()
        return
    rows = [{"input_ids": row, "labels": row} for row in token_batch(16, 11).tolist()]
    settings = (
        {"learning_rate": "auto", "eps": "auto", "max_steps": 120}
        if name == "search"
        else {"learning_rate": 1e-3, "max_steps": 5}
    )
    config = MeZOConfig(
        str(path.parent / name),
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    trainer = MeZOTrainer(model=base(name), args=config, train_dataset=rows)
    trainer.train()
    trainer.step_log.rename(path)


ALL = [*METHODS, "search", "lora"]


@pytest.mark.parametrize("name", ALL)
def test_golden_log_replays_to_its_digest(name):
    log = read_log(FOLDER / f"{name}.jsonl")
    assert log.end is not None
    assert replay(log, base(name)) == log.steps
    if name == "search":
        assert log.rollbacks


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_today_moves_by_the_same_rule(name):
    """The golden run's coefficients, gone on with: what a resumed optimizer remembers is what it remembered."""
    log = read_log(FOLDER / f"{name}.jsonl")
    _net, optimizer = method(name)
    assert optimizer.tuned.digest() == log.header["base"]
    for record in log.records:
        optimizer.take(record)
        if record.step + 1 in log.folds:
            optimizer.fold()
    assert optimizer.tuned.digest() == log.end["digest"]


if __name__ == "__main__":
    for each in ALL:
        if not (FOLDER / f"{each}.jsonl").exists():
            write(each, FOLDER / f"{each}.jsonl")
