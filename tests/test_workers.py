"""Several processes share a step: same bits as one, and none of them waits for one that is gone."""

from __future__ import annotations

import copy
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from forwardtune import MeZO, StepLog
from forwardtune.errors import InputError, WorkerError
from forwardtune.trajectory import read_log
from forwardtune.workers import Alone, Parts, Unit, cut, deal
from forwardtune.workers.ranks import Ranks
from support.logs import log_lines
from support.ranks import free_port, ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*took no part in the first step", "ignore:.*at the same point")
EXAMPLES = 6


class Net(nn.Module):
    """Two layers, in two dtypes, and one that is entered by the examples of one half alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(4, 8)
            self.second = nn.Linear(8, 3, dtype=torch.bfloat16)
            self.seldom = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.tanh(self.first(x)).bfloat16()).float()
        return y + self.seldom(x) if bool((x[:, 0] > 0).all()) else y


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(EXAMPLES, 4, generator=generator), torch.randint(3, (EXAMPLES,), generator=generator)
    return x[(-x[:, 0]).argsort()], y


def parts_of(model: nn.Module, step: int, parts: int, *, per_example: bool) -> Parts:
    x, y = batch(step)

    def closure(rows: slice) -> Callable[[], torch.Tensor]:
        def losses() -> torch.Tensor:
            found = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
            return found if per_example else found.sum() / EXAMPLES

        return losses

    rows = [slice(numbers[0], numbers[-1] + 1) for numbers in cut(range(EXAMPLES), parts)]
    return Parts([closure(own) for own in rows], [own.stop - own.start for own in rows])


def run(workers: Alone, folder: Path, steps: int = 5, **settings: Any) -> tuple[list[dict[str, Any]], str]:
    """The lines of a run's log, and the digest of the weights at its end."""
    model = Net().eval()
    optimizer = MeZO(model, lr=0.05, workers=workers, **settings)
    path = folder / f"steps.{workers.rank}.jsonl"
    with StepLog(path, optimizer):
        for step in range(steps):
            optimizer.step(parts_of(model, step, settings.get("parts", 1), per_example=optimizer.estimator.per_example))
    lines = log_lines(path)
    lines[0].pop("workers", None)
    return lines, optimizer.tuned.digest()


SHARED = {
    "queries": {"probes": 2},
    "two sides, two of three ranks": {"parts": 2},
    "one-sided": {"estimator": "one_sided", "probes": 3, "normalize": "sigma", "parts": 2},
    "examples": {"parts": 3, "rule": "momentum"},
    "directions of examples": {"assignment": "example", "parts": 4, "perturbation": "side_path"},
    "directions of examples, queries": {"assignment": "example", "probes": 2},
    "copy": {"perturbation": "copy", "parts": 3, "rule": "adam"},
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("settings", SHARED.values(), ids=SHARED)
def test_any_number_of_ranks_gives_the_bits_of_one_process(
    tmp_path: Path, settings: dict[str, Any], count: int
) -> None:
    expected = run(Alone(), tmp_path, **settings)
    (tmp_path / "steps.0.jsonl").unlink()
    if settings.get("parts") == 3 and "perturbation" not in settings:  # one rank alone reads it
        assert len({line.get("unused") for line in expected[0] if "step" in line}) == 2
    for found in ranks(count, lambda rank: run(Ranks(30), tmp_path, **settings)):
        assert found == expected


def test_what_crosses_the_wire_is_a_frame_a_step(tmp_path: Path) -> None:
    def sent(rank: int) -> list[int]:
        workers = Ranks(30)
        model = Net().eval()
        optimizer = MeZO(model, workers=workers, probes=4)
        counts = []
        for _ in range(3):
            before = workers.sent
            optimizer.step(lambda: model(batch(0)[0]).square().mean())
            counts.append(workers.sent - before)
        return counts[1:]

    assert ranks(2, sent) == [[64, 64]] * 2


def test_a_nan_and_an_infinity_travel_as_they_are() -> None:
    def losses(rank: int) -> tuple[float, ...]:
        values = iter([math.nan, -math.inf] if rank else [0.1, 1e308])
        optimizer = MeZO(Net().eval(), workers=Ranks(30), probes=2, perturbation="copy")
        optimizer.evaluator.prepare = lambda *a: optimizer.evaluator._made()  # type: ignore[method-assign]
        optimizer.step(lambda: next(values))
        assert optimizer.last is not None
        return optimizer.last.losses

    for found in ranks(2, losses):
        assert repr(found) == repr((0.1, 1e308, math.nan, -math.inf))


def test_the_header_says_what_the_ranks_compute_with(tmp_path: Path) -> None:
    ranks(2, lambda rank: run(Ranks(30), tmp_path, parts=2))
    header = read_log(tmp_path / "steps.1.jsonl").header
    assert header["parts"] == 2
    assert header["workers"] == {"ranks": 2, "processor": header["workers"]["processor"], "threads": 1}
    assert header["workers"]["processor"]


def test_units_are_dealt_in_runs_of_almost_one_length() -> None:
    assert deal(2, 2, 2) == [[Unit(0, 0), Unit(0, 1)], [Unit(1, 0), Unit(1, 1)]]
    assert [len(units) for units in deal(2, 8, 3)] == [5, 5, 6]
    assert [unit for units in deal(3, 5, 4) for unit in units] == [
        Unit(query, part) for query in range(3) for part in range(5)
    ]
    assert [len(part) for part in cut(range(7), 3)] == [2, 2, 3]
    assert [len(part) for part in cut(range(2), 3)] == [1, 1]


# --- what is refused --------------------------------------------------------------------------------------------------


def outcome(change: Callable[[int], dict[str, Any]]) -> list[Any]:
    """Of two ranks that take a step each, with different settings."""

    def work(rank: int) -> None:
        settings = change(rank)
        model = Net(settings.pop("model", 0)).eval()
        digest = settings.pop("data", b"")
        optimizer = MeZO(model, workers=Ranks(settings.pop("timeout", 30)), **settings)
        optimizer.step(Parts([lambda: model(batch(0)[0]).square().mean()], digest=digest))

    return ranks(2, work)


REFUSED = {
    "rank 1 has weights with the digest": lambda rank: {"model": rank},
    "rank 1 has seed 1, rank 0 seed 0": lambda rank: {"seed": rank},
    "rank 1 has learning rates": lambda rank: {"lr": 1e-3 * (rank + 1)},
    "rank 1 has eps": lambda rank: {"eps": 1e-3 * (rank + 1)},
    "rank 1 has another minibatch": lambda rank: {"data": bytes([rank])},
}


@pytest.mark.parametrize("words", REFUSED)
def test_ranks_that_differ_are_refused_on_all_of_them(words: str) -> None:
    for error in outcome(REFUSED[words]):
        assert isinstance(error, InputError)
        assert words in str(error)


def test_another_version_of_a_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from forwardtune import optimizer

    def change(rank: int) -> dict[str, Any]:
        monkeypatch.setattr(optimizer, "versions", lambda: {"torch": f"2.{rank}"})
        return {}

    for error in outcome(change):
        assert "rank 1 has torch version 2.1, rank 0 torch version 2.0" in str(error)


def test_more_ranks_than_evaluations_are_refused() -> None:
    def work(rank: int) -> None:
        model = Net().eval()
        MeZO(model, workers=Ranks(30)).step(lambda: model(batch(0)[0]).square().mean())

    for error in ranks(3, work):
        assert isinstance(error, InputError)
        assert "2 evaluations, and 3 workers" in str(error)
        assert "at least 2 (parts)" in str(error)


def test_a_rank_that_does_not_come_is_named() -> None:
    began = time.monotonic()
    first, _, last = ranks(3, lambda rank: Ranks(1.0), missing=(1,))
    assert isinstance(first, InputError)
    assert "rank 1 of 3 did not come within 1 s" in str(first)
    # Who looks a moment later finds the store gone with rank 0.
    assert "rank 1 of 3 did not come" in str(last) or "has given up waiting: see its message" in str(last)
    assert time.monotonic() - began < 10


def test_a_master_that_cannot_be_reached_is_named() -> None:
    def work(rank: int) -> None:
        os.environ["MASTER_PORT"] = str(free_port())
        Ranks(1.0)

    _, error = ranks(2, work, missing=(0,))
    assert "rank 0 cannot be reached at MASTER_ADDR=127.0.0.1" in str(error)


def test_ranks_meet_at_the_loopback_address() -> None:
    def listening(rank: int) -> list[str]:
        del os.environ["MASTER_ADDR"]
        Ranks(30)
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        own = {os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if is_socket(number)}
        return [fields[1].split(":")[0] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in own]

    def is_socket(number: str) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{number}").startswith("socket")
        except OSError:
            return False

    for addresses in ranks(2, listening):
        assert addresses
        assert set(addresses) == {"0100007F"}


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_other_weights_are_named_and_the_log_is_intact(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        model = Net().eval()
        optimizer = MeZO(model, lr=0.05, workers=Ranks(30, check_every=4), parts=3)
        with StepLog(tmp_path / f"{rank}.jsonl", optimizer):
            for step in range(9):
                if (rank, step) == (2, 2):
                    model.first.weight.data[0, 0] += 1e-6
                optimizer.step(parts_of(model, step, 3, per_example=False))

    for error in ranks(3, work):
        assert isinstance(error, WorkerError)
        assert "after 4 steps rank 2 has other weights" in str(error)
    for rank in range(3):
        assert read_log(tmp_path / f"{rank}.jsonl").steps == 4


def test_what_one_rank_raises_ends_them_all() -> None:
    def work(rank: int) -> None:
        def closure() -> float:
            if rank:
                raise MemoryError("no room")
            return 1.0

        MeZO(Net().eval(), workers=Ranks(30)).step(closure)

    first, second = ranks(2, work)
    assert isinstance(first, WorkerError)
    assert str(first) == "rank 1: MemoryError: no room"
    assert isinstance(second, MemoryError)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_gone_or_hangs_is_noticed(how: signal.Signals) -> None:
    def work(rank: int) -> tuple[str, float]:
        model = Net().eval()
        optimizer = MeZO(model, workers=Ranks(2.0))
        try:
            for step in range(100):
                if (rank, step) == (1, 3):
                    os.kill(os.getpid(), how)
                began = time.monotonic()
                optimizer.step(lambda: model(batch(0)[0]).square().mean())
        except WorkerError as error:
            return str(error), time.monotonic() - began
        return "", math.inf

    (words, seconds), _ = ranks(2, work, within=6)
    assert "a process of the run is gone, or did not answer in time" in words
    assert seconds < (0.5 if how == signal.SIGKILL else 3)


def test_copies_of_an_optimizer_are_of_the_same_group() -> None:
    def work(rank: int) -> int:
        return copy.deepcopy(MeZO(Net().eval(), workers=Ranks(30))).workers.rank

    assert ranks(2, work) == [0, 1]


def test_work_is_divided_and_its_results_keep_their_order() -> None:
    def work(rank: int) -> tuple[list[list[Any]], list[int], bool, bool, str]:
        workers = Ranks(30)
        own: list[int] = []
        results = workers.divided(lambda item: [own.append(item), 0.1 * item, math.inf, None][1:], range(5))
        return results, own, workers.any(rank == 1), workers.any(False), workers.first(lambda: f"of {rank}")

    first, second = ranks(2, work)
    assert first[0] == second[0] == [[0.1 * item, math.inf, None] for item in range(5)]
    assert (first[1], second[1]) == ([0, 2, 4], [1, 3])
    assert first[2:] == second[2:] == (True, False, "of 0")
