"""Updates of weights that live beside the device: moved on it, a piece at a time, with the bits that they get where they live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.cli.costs import Rehearsed
from forwardtune.method.rule import move_all
from forwardtune.method.rules import RULES, SGD, Adam, Momentum, Sign
from forwardtune.noise import Noise
from forwardtune.optimizer import InterruptedUpdateError
from forwardtune.search.held import hold, trial
from forwardtune.storage import Offloaded
from forwardtune.storage.ferry import Ferry
from forwardtune.trajectory import ReturnPoint, keep_base
from support import assert_same_bits, snapshot
from support.offload import Beside, interrupting, tuned

pytest.importorskip("transformers", reason="needs transformers")

PIECE = 1536  # bytes: matrices of the tiny models come in several pieces, which end within rows

METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"rule": "sgd"},
    "sign": {"rule": Sign()},
    "momentum": {"rule": Momentum(state="exact")},
    "momentum of a window": {"rule": Momentum(window=2)},
    "adam": {"rule": Adam(state="exact")},
    "adam of a window": {"rule": Adam(window=2)},
    "muon": {"rule": "muon", "rank": 2, "refresh": 10},
    "low rank": {"rank": 2, "probes": 2, "estimator": "one_sided"},
    "some layers": {"active_layers": 1, "modify": "variance"},
    "sparse": {"sparsity": 0.5},
    "side path": {"perturbation": "side_path", "rank": 1},
    "both signs": {"assignment": "example", "perturbation": "both_signs"},
}


@pytest.fixture(autouse=True)
def no_update_on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*args: Any) -> Any:
        pytest.fail("an update on the host")

    monkeypatch.setattr(Offloaded, "change", refuse)
    monkeypatch.setattr("forwardtune.storage.ferry._PIECE", PIECE)
    monkeypatch.setattr("forwardtune.storage.offloaded._SMALL", 0)
    return


def test_every_rule_is_among_the_methods() -> None:
    rules = (method.get("rule", "sgd") for method in METHODS.values())
    assert {rule if isinstance(rule, str) else rule.name for rule in rules} == set(RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_has_the_bits_of_a_resident_one(method: str, dtype: torch.dtype) -> None:
    settings = {"weight_decay": 0.1, **METHODS[method]}
    resident = tuned(support.tiny_model("llama", dtype), **settings)
    home = Beside()
    assert tuned(support.tiny_model("llama", dtype), **settings, storage=home) == resident
    assert home.streams.idle


@pytest.mark.parametrize("settings", [{"rule": "sgd"}, {"rule": Adam(window=2)}, {"rank": 2}], ids=str)
def test_experts_that_no_token_reached_stay_as_they_are(settings: dict[str, Any]) -> None:
    resident = tuned(support.tiny_model("qwen3_moe"), **settings)
    assert tuned(support.tiny_model("qwen3_moe"), **settings, storage=Beside()) == resident


@pytest.mark.parametrize(
    "rule", [SGD("base"), Momentum(window=2, decay_towards="base")], ids=lambda rule: type(rule).__name__
)
def test_weights_decay_towards_those_of_the_beginning(tmp_path: Path, rule: Any) -> None:
    def run(folder: str, **settings: Any) -> str:
        model = support.tiny_model()
        optimizer = MeZO(model, lr=1e-3, weight_decay=20.0, rule=rule, **settings)
        keep_base(tmp_path / folder, optimizer)
        with StepLog(tmp_path / f"{folder}.jsonl", optimizer):
            for _ in range(3):
                optimizer.step(support.closure_for(model, support.token_batch()))
        return optimizer.tuned.digest()

    assert run("offloaded", storage=Beside(poison=False)) == run("resident")
    again = support.tiny_model()
    Beside().place(again)
    assert replay(tmp_path / "resident.jsonl", again) == 3


LINEAR = ("sgd", "momentum of a window", "low rank")


@pytest.mark.parametrize(
    ("method", "average"), [*((method, "last:3") for method in LINEAR), *((m, None) for m in (*LINEAR, "adam", "muon"))]
)
def test_a_log_is_replayed_there(tmp_path: Path, method: str, average: str | None) -> None:
    model = support.tiny_model("llama", torch.bfloat16)
    optimizer = MeZO(model, lr=1e-3, weight_decay=0.1, **METHODS[method])
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for _ in range(5):
            optimizer.step(support.closure_for(model, support.token_batch()))
    digests = []
    for home in (None, Beside()):
        again = support.tiny_model("llama", torch.bfloat16)
        if home is not None:
            home.place(again)
        replay(tmp_path / "steps.jsonl", again, average=average)
        digests.append(MeZO(again).tuned.digest())
    assert digests[0] == digests[1]


def test_values_with_strides_of_their_own_are_moved_too() -> None:
    def run(**settings: Any) -> str:
        layer = nn.Linear(40, 60)
        with torch.no_grad():
            layer.weight.data = torch.linspace(-1, 1, 2400).view(40, 60).T
            layer.bias.fill_(0.5)
        optimizer = MeZO(layer, lr=1e-3, **settings)
        for _ in range(3):
            optimizer.step(lambda: layer(torch.ones(2, 40)).square().sum())
        return optimizer.tuned.digest()

    assert run(storage=Beside()) == run()


def test_a_trial_comes_and_goes(tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> tuple[str, str]:
        model = support.tiny_model("llama", torch.bfloat16)
        optimizer = MeZO(model, lr=1e-3, rule=Momentum(state="exact"), **settings)
        loss = support.closure_for(model, support.token_batch())
        optimizer.step(loss)
        point = ReturnPoint(tmp_path / folder, optimizer, "")
        hold(optimizer)
        optimizer.step(loss)
        optimizer.step(loss)
        with trial(optimizer, 1e-2, point):
            tried = optimizer.tuned.digest()
        return tried, optimizer.tuned.digest()

    assert run("offloaded", storage=Beside(poison=False)) == run("resident")


def test_a_rehearsed_step_leaves_the_weights_to_the_bit() -> None:
    model = support.tiny_model("llama", torch.bfloat16)
    before = snapshot(model)
    optimizer = MeZO(model, lr=1e-1, rule=Rehearsed(SGD()), storage=Beside(poison=False))
    optimizer.step(support.closure_for(model, support.token_batch()))
    assert_same_bits(model, before)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_more_than_three_pieces_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = Noise.update, []

    def look(self: Noise, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((weight.untyped_storage().data_ptr(), weight.nbytes))
        return real(self, weight, *args, **kwargs)

    monkeypatch.setattr(Noise, "update", look)
    model, home = support.tiny_model(), Beside()
    assert max(p.nbytes for p in model.parameters()) > 4 * PIECE
    tuned(model, storage=home)
    assert home.on_the_way <= 3 * PIECE
    homes = {home.read(parameter).untyped_storage().data_ptr() for parameter in model.parameters()}
    assert not homes & {place for place, _ in seen}
    assert max(size for _, size in seen) == PIECE


def test_rooms_of_small_weights_are_small() -> None:
    layer, home = nn.Linear(8, 8), Beside()
    optimizer = MeZO(layer, storage=home)
    optimizer.step(lambda: layer(torch.ones(2, 8)).square().sum())
    assert home.on_the_way == 3 * layer.weight.nbytes


def test_two_passes_over_a_tensor_see_each_other() -> None:
    """A rule of somebody's own may ask for the pieces twice."""
    home = Beside()
    layer = nn.Linear(40, 50, bias=False)
    home.place(layer)
    expected = 4 * home.read(layer.weight)
    for _ in range(2):
        for _, (piece,) in home.pieces(layer.weight):
            piece.mul_(2)
    assert not torch.equal(home.read(layer.weight), expected), "nothing was late"
    home.wait()
    assert torch.equal(home.read(layer.weight), expected)


def test_what_lies_beside_comes_in_the_same_pieces() -> None:
    ferry = Ferry(torch.device("cpu"))
    half, whole = torch.arange(1000).bfloat16(), torch.arange(1000.0)
    ends = [0]
    for lo, (a, b) in ferry.trips([half, whole], unit=10):
        assert lo == ends[-1]
        assert torch.equal(a, half[lo : lo + len(a)])
        assert torch.equal(b, whole[lo : lo + len(a)])
        b.add_(1)
        ends.append(lo + len(a))
    assert ends[-1] == 1000
    assert len(ends) > 3
    assert all(end % 10 == 0 for end in ends)
    assert torch.equal(whole, torch.arange(1.0, 1001.0))


# --- a forward pass --------------------------------------------------------------------------------------------------


def test_weights_set_out_for_a_forward_pass_before_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones come on the stream of those that come for an update, in the same memory; others do without."""
    model, tokens, home = support.tiny_model(), support.token_batch(), Beside()
    expected = model(tokens).logits
    home.place(model)
    assert torch.equal(model(tokens).logits, expected)
    came, copies = home.on_the_way, len(home.streams.side[0].todo)
    assert came == 3 * PIECE
    assert copies > sum(parameter.nbytes for parameter in model.parameters()) / PIECE
    monkeypatch.setattr("forwardtune.storage.offloaded._SMALL", 1 << 30)
    assert torch.equal(model(tokens).logits, expected)
    assert len(home.streams.side[0].todo) == copies


def test_a_closure_between_updates_sees_what_went_last() -> None:
    model, tokens, home = support.tiny_model(), support.token_batch(), Beside()
    optimizer = MeZO(model, lr=1e-2, storage=home)
    optimizer.step(support.closure_for(model, tokens))
    resident = support.tiny_model()
    MeZO(resident, lr=1e-2).step(support.closure_for(resident, tokens))
    assert torch.equal(model(tokens).logits, resident(tokens).logits)


# --- interrupts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 5, 30])
def test_an_interrupt_in_an_update_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    model, home = support.tiny_model(), Beside(poison=False)
    optimizer = MeZO(model, lr=1e-2, storage=home)
    loss = support.closure_for(model, support.token_batch())
    log = StepLog(tmp_path / "steps.jsonl", optimizer)
    for _ in range(3):
        optimizer.step(loss)
    after = optimizer.tuned.digest()
    with monkeypatch.context() as patch:
        patch.setattr(Noise, "update", interrupting(at))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(loss)
    log.close()
    assert home.streams.idle, "what went has arrived"
    with pytest.raises(InterruptedUpdateError):
        optimizer.step(loss)
    for parameter, base in zip(model.parameters(), support.tiny_model().parameters(), strict=True):
        parameter.data.copy_(base)  # whoever goes on in this process
    assert replay(tmp_path / "steps.jsonl", model, steps=3) == 3
    assert MeZO(model).tuned.digest() == after
    assert json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[3])["step"] == 2


def test_values_that_go_arrive_though_the_rule_fails() -> None:
    class Fails(SGD):
        def move(self, noise: Noise, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if tensor.id == 1:
                raise RuntimeError("no")
            return super().move(noise, tensor, *args, **kwargs)

    layer, home = nn.Linear(40, 50), Beside()
    optimizer = MeZO(layer, lr=1e-1, storage=home)
    updates = [[optimizer.rule.plan(0, [1.0], 0.1, 0.0)]]
    before = optimizer.tuned[0].read().clone()
    with pytest.raises(RuntimeError, match="no"), torch.no_grad():
        move_all(Fails(), optimizer.noise, optimizer.tuned, updates, optimizer.history)
    assert home.streams.idle
    assert not torch.equal(optimizer.tuned[0].read(), before)
