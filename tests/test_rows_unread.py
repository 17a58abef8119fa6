"""What no evaluation has read keeps its bits: experts that no token was routed to, rows that were not looked up, positions beyond the text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import support
from forwardtune import MeZO, StepLog, replay
from forwardtune.errors import LogError
from forwardtune.method.masked import Masked
from forwardtune.method.rules import Adam, Momentum
from forwardtune.method.unread import Unread, Used
from forwardtune.noise import Emphasis, Noise, Update
from forwardtune.points import Scratch
from forwardtune.search.held import drop, hold, take
from forwardtune.trajectory import read_log
from forwardtune.trajectory.export import export_trajectory, read_trajectory
from support.packaged import EXPERTS, PACKAGES, build

pytest.importorskip("transformers", reason="needs transformers")

STEPS = 20
RULES = {
    "sgd": "sgd", "sign": "sign", "momentum": Momentum(state="exact"), "momentum in a window": Momentum(state="window"),
    "adam": Adam(state="exact"), "adam in a window": Adam(state="window"),
}  # fmt: skip
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
IDLE = "ignore:.*took no part in the first step"


def texts(step: int) -> torch.Tensor:
    return support.token_batch(1, 6, seed=step % 5)


class Seen:
    """Counts by itself what a model reads: the rows that its embeddings look up, and the experts that its routers choose."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, set[int]] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(self._embedding(f"{name}.weight"))
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and type(module).__name__.endswith("Experts"):
                    module.register_forward_pre_hook(self._experts(f"{name}.{own}"))

    def _embedding(self, name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any) -> None:
            numbers = args[0] if args else torch.empty(0)
            self.rows.setdefault(name, set()).update(numbers.flatten().tolist())

        return look

    def _experts(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.rows.setdefault(name, set()).update(args[1].flatten().tolist())


def assert_only_read_rows_moved(model: nn.Module, before: dict[str, torch.Tensor], seen: Seen) -> None:
    now = dict(model.named_parameters())
    for name, rows in seen.rows.items():
        moved = {i for i, row in enumerate(now[name]) if not support.same_bits(row, before[name][i])}
        assert moved <= rows, name
        assert len(moved) > 0.9 * len(rows), name
        assert len(rows) < len(now[name]), "everything was read: nothing was tested"
    for name, parameter in now.items():
        if name not in seen.rows and "vision" not in name and "projector" not in name:
            assert not support.same_bits(parameter, before[name]), name


def run(model: nn.Module, path: Path | None = None, **settings: Any) -> MeZO:
    optimizer = MeZO(model, lr=1e-3, weight_decay=0.1, **settings)
    log = StepLog(path, optimizer) if path else None
    for step in range(STEPS):
        optimizer.step(support.closure_for(model, texts(step)))
    if log:
        log.finish()
        log.close()
    return optimizer


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_without_tokens_keep_their_bits(family, implementation, tmp_path):
    model = build(EXPERTS, family)
    model.set_experts_implementation(implementation)
    seen, before = Seen(model), support.snapshot(model)
    optimizer = run(model, tmp_path / "steps.jsonl")
    assert isinstance(optimizer.perturbation, Scratch)
    assert len(seen.rows) == 5
    assert_only_read_rows_moved(model, before, seen)
    again = build(EXPERTS, family)
    assert replay(tmp_path / "steps.jsonl", again) == STEPS
    support.assert_same_bits(again, support.snapshot(model))


@every_rule
def test_every_rule_leaves_them_alone_and_is_replayed(rule, tmp_path):
    model = build(EXPERTS, "qwen3_moe")
    seen, before = Seen(model), support.snapshot(model)
    optimizer = run(model, tmp_path / "steps.jsonl", rule=rule)
    assert_only_read_rows_moved(model, before, seen)
    export_trajectory(read_log(tmp_path / "steps.jsonl"), tmp_path / "run.safetensors")
    for source in ("steps.jsonl", "run.safetensors"):
        again = build(EXPERTS, "qwen3_moe")
        assert replay(tmp_path / source, again) == STEPS
        support.assert_same_bits(again, support.snapshot(model))
    for step, update in enumerate(read_trajectory(tmp_path / "run.safetensors").updates[0]):
        logged = read_log(tmp_path / "steps.jsonl").records[step].unread
        assert {i: mask.tolist() for i, mask in update.unread.items()} == {
            i: mask.tolist() for i, mask in logged.items()
        }
    for name, moments in optimizer.history.moments.items():
        for moment in moments:
            untouched = set(range(len(before[name]))) - seen.rows.get(name, set(range(len(before[name]))))
            assert not moment.view(before[name].shape)[sorted(untouched)].any()


@pytest.mark.parametrize("kind", [Momentum, Adam])
def test_exact_and_window_agree_where_rows_join_late(kind):
    models = [build(EXPERTS, "qwen3_moe") for _ in range(2)]
    for model, state in zip(models, ("exact", "window"), strict=True):
        run(model, rule=kind(state=state))
    support.assert_same_bits(models[0], support.snapshot(models[1]))


@pytest.mark.parametrize("cut", [1, 7])
@pytest.mark.parametrize("rule", ["sgd", Adam(state="exact"), Adam(state="window")], ids=str)
def test_a_run_goes_on_with_the_rows_that_it_had(rule, cut, tmp_path):
    path, whole = tmp_path / "steps.jsonl", build(EXPERTS, "qwen3_moe")
    run(whole, path, rule=rule)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: 1 + cut]))
    model = build(EXPERTS, "qwen3_moe")
    optimizer = MeZO(model, lr=1e-3, weight_decay=0.1, rule=rule)
    log = StepLog.resume(path, optimizer)
    for step in range(cut, STEPS):
        optimizer.step(support.closure_for(model, texts(step)))
    log.finish()
    log.close()
    support.assert_same_bits(model, support.snapshot(whole))
    without_time = [
        [{**json.loads(line), "seconds": 0, "check": 0} for line in text]
        for text in (lines[1:], path.read_text().splitlines()[1:])
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize("rule", ["sgd", Adam(state="window")], ids=str)
def test_a_saved_state_knows_them_too(rule):
    model = build(EXPERTS, "qwen3_moe")
    optimizer = MeZO(model, lr=1e-3, rule=rule)
    for step in range(3):
        optimizer.step(support.closure_for(model, texts(step)))
    other = copy.deepcopy(model)
    again = MeZO(other, lr=1e-3, rule=rule)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        optimizer.step(support.closure_for(model, texts(step)))
        again.step(support.closure_for(other, texts(step)))
    support.assert_same_bits(other, support.snapshot(model))


def test_positions_beyond_the_text_keep_their_bits(tmp_path):
    """OPT's head is its embedding, which is read as a whole."""
    model = support.tiny_model("opt")
    before = support.snapshot(model)
    run(model, tmp_path / "steps.jsonl")
    name = "model.decoder.embed_positions.weight"
    now = dict(model.named_parameters())
    moved = {i for i, row in enumerate(now[name]) if not support.same_bits(row, before[name][i])}
    assert moved == set(range(2, 8))  # OPT counts from 2
    assert all(not support.same_bits(p, before[n]) for n, p in now.items() if n != name)
    again = support.tiny_model("opt")
    replay(tmp_path / "steps.jsonl", again)
    support.assert_same_bits(again, support.snapshot(model))


@pytest.mark.filterwarnings(IDLE)
def test_nothing_of_a_vision_tower_moves():
    model = build(PACKAGES, "gemma3")
    before = support.snapshot(model)
    run(model)
    for name, parameter in model.named_parameters():
        assert support.same_bits(parameter, before[name]) == ("vision" in name or "projector" in name), name


def test_everything_moves_where_that_is_wanted():
    model = build(EXPERTS, "qwen3_moe")
    before = support.snapshot(model)
    optimizer = run(model, move="all")
    assert not optimizer.last.unread
    for name, parameter in model.named_parameters():
        rows = zip(parameter, before[name], strict=True)
        assert not any(support.same_bits(row.view(-1), was.view(-1)) for row, was in rows), name
    with pytest.raises(ValueError, match="unknown move 'every': choose read or all"):
        MeZO(model, move="every")


def test_what_the_log_takes(tmp_path):
    """A row is named once in a run: 20 steps of five texts take so much more than if everything moved."""
    sizes = {}
    for move in ("read", "all"):
        run(build(EXPERTS, "qwen3_moe"), tmp_path / f"{move}.jsonl", move=move)
        lines = (tmp_path / f"{move}.jsonl").read_text().splitlines()[1:-1]
        sizes[move] = [len(line) for line in lines]
    more = [a - b for a, b in zip(sizes["read"], sizes["all"], strict=True)]
    assert sum(more[:5]) / 5 < 200
    assert sum(more[5:]) / 15 < 20  # an expert now and then, as routers move


def test_drafts_that_are_dropped_leave_a_log_that_is_replayed(tmp_path):
    """What they read counts as read, and the next step's line says so."""
    model = build(EXPERTS, "qwen3_moe")
    optimizer = MeZO(model, lr=1e-3)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        for step, ends in enumerate((drop, lambda o: take(o, 1e-3))):
            hold(optimizer)
            for text in range(2):
                optimizer.step(support.closure_for(model, texts(2 * step + text)))
            ends(optimizer)
    again = build(EXPERTS, "qwen3_moe")
    assert replay(tmp_path / "steps.jsonl", again) == 2
    support.assert_same_bits(again, support.snapshot(model))


def test_rows_that_are_none_are_refused(tmp_path):
    run(build(EXPERTS, "qwen3_moe"), tmp_path / "steps.jsonl")
    from forwardtune.trajectory.format import seal, unseal

    lines, check = (tmp_path / "steps.jsonl").read_text().splitlines(), ""
    _, check = unseal("", lines[0])
    for wrong in ({"0": "400"}, {"99": "0"}, {"0": "5,3"}, ["0"]):
        content = json.loads(lines[1]) | {"rows": wrong}
        content.pop("check")
        (tmp_path / "bad.jsonl").write_text(lines[0] + "\n" + seal(check, content)[0] + "\n")
        with pytest.raises(LogError, match="a field of the step is missing or of another kind"):
            read_log(tmp_path / "bad.jsonl")


# --- the parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", support.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 5), (700, 700), (3, 4, 5), (5,), (3, 600, 600)], ids=str)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "emphasis", [None, Emphasis(moved=(1.0, 1.0, 3.0), limits=(None, None, 1.5))], ids=["even", "uneven"]
)
def test_rows_that_were_read_get_the_bits_of_an_ordinary_update(shape, emphasis, rank, dtype):
    from forwardtune.noise import GAUSSIAN, LowRank

    noise = Noise(7, GAUSSIAN, LowRank(1) if rank else None, emphasis)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    unread = torch.zeros(shape[0], dtype=torch.bool)
    unread[1::2] = True
    updates = [Update(3, (0.5, -0.25), 0.75), Update(4, (0.5,)), Update(5, (1.0,))]
    later = unread.clone()
    later[1] = False
    expected, kept = weight.clone(), weight.clone()
    for update, mask in zip(updates, (unread, later, torch.zeros_like(unread)), strict=True):
        before = expected.clone()
        noise.update(expected, [update], tensor=2)
        expected[mask] = before[mask]
    masked = Masked.of(noise, shape, {3: unread, 4: later})
    masked.update(kept, updates, tensor=2)
    assert support.same_bits(kept, expected)
    ones = weight.clone()
    count = int(masked.update(ones, updates[:1], tensor=2))
    assert count == int((ones == weight).sum())


@pytest.mark.parametrize("piece", [1, 20, 60, 10**6])
def test_pieces_of_rows_and_runs_of_pieces_change_no_bit(piece, monkeypatch):
    """Rows that were read, rows that were not and both, in pieces of a row, of two, of six, and of all."""
    noise, shape = Noise(7), (23, 10)
    unread = torch.tensor([False] * 7 + [True] * 9 + [False, True] * 3 + [True])
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, found = weight.clone(), weight.clone()
    noise.update(expected, [Update(3, (0.5,))], tensor=2)
    expected[unread] = weight[unread]
    monkeypatch.setattr("forwardtune.method.masked._PIECE", piece)
    handled: list[int] = []
    right = Noise.update
    monkeypatch.setattr(
        Noise, "update", lambda self, w, *a, **k: [handled.append(w.numel()), right(self, w, *a, **k)][1]
    )
    count = Masked.of(noise, shape, {3: unread}).update(found, [Update(3, (0.5,))], tensor=2)
    assert support.same_bits(found, expected)
    assert int(count) == int((found == weight).sum())
    if piece < 100:  # what follows each other is one piece, and what was not read at all is none
        assert max(handled) >= 70 - piece
        assert sum(handled) <= 10 * int((~unread).sum()) + 6 * piece


def test_what_was_read_is_merged():
    a, b = Used(), Used()
    a.read(0)
    a.read_rows(1, torch.tensor([0, 2]), 4)
    a.read_rows(2, torch.tensor([1]), 4)
    b.read_rows(1, torch.tensor([3]), 4)
    b.read(2)
    b.read_rows(3, torch.tensor([[0, 0]]), 2)
    both = a.merged(b)
    assert both == {0, 1, 2, 3}
    assert {i: mask.tolist() for i, mask in both.rows.items()} == {1: [True, False, True, True], 3: [True, False]}
    assert not Used.of({1}).merged(a).rows.keys() & {1}  # a plain set is of whole tensors
    b.read(3)
    b.read_rows(3, torch.tensor([1]), 2)
    assert 3 not in b.rows


def test_a_tensor_that_was_read_as_a_whole_once_has_no_unread_rows():
    class Tensors:
        id = 0

    tuned: Any = [Tensors]
    part, whole = Used(), Used({0})
    part.read_rows(0, torch.tensor([1]), 3)
    state = Unread()
    assert state.after(part, tuned)[0].tolist() == [True, False, True]
    assert state.after(part, tuned)[0] is state.after(part, tuned)[0]
    assert state.after(whole, tuned) == {}
    assert state.after(part, tuned) == {}
    everything = Unread()
    assert everything.after(Used(), tuned) == {}  # nothing was seen to be read
    assert everything.after(part, tuned) == {}


def test_rows_that_no_example_looks_up_keep_their_bits_on_a_side_path():
    model = support.tiny_model("llama_untied")
    before = support.snapshot(model)
    optimizer = MeZO(model, lr=1e-3, assignment="example")
    ids = support.token_batch(3, 6)
    for _ in range(3):
        optimizer.step(lambda: model(input_ids=ids).logits.float().pow(2).mean(dim=(1, 2)))
    name = "model.embed_tokens.weight"
    now = dict(model.named_parameters())[name]
    moved = {i for i, row in enumerate(now) if not support.same_bits(row, before[name][i])}
    assert moved == set(ids.flatten().tolist())


@pytest.mark.filterwarnings(IDLE)
@pytest.mark.parametrize(
    "rule", [Momentum(state="window", window=2), Adam(state="window", window=2)], ids=["momentum", "adam"]
)
def test_a_step_that_left_a_tensor_alone_has_its_place_in_a_window(tmp_path: Path, rule: Any) -> None:
    """One step at a time as in the run, or all of them at once as in replay."""

    def net() -> nn.Sequential:
        both = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        for number, parameter in enumerate(both.parameters()):
            parameter.data.fill_(0.1 + 0.2 * number)
        return both

    tuned, path = net(), tmp_path / "steps.jsonl"
    optimizer = MeZO(tuned, lr=1e-2, rule=rule)
    with StepLog(path, optimizer):
        for step in range(9):  # two in a row without the first layer, which fills the window
            x = torch.ones(3)
            optimizer.step(lambda x=x, step=step: (tuned if step % 4 in (0, 3) else tuned[1])(x).square().sum())  # type: ignore[misc]
    again = net()
    assert replay(path, again) == 9
    assert all(map(support.same_bits, again.parameters(), tuned.parameters()))
