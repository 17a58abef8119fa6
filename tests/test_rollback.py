"""Going back: what a log with rollbacks and notes means, the way back to any step, and steps that are held."""

from __future__ import annotations

import copy
import itertools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from forwardtune import MeZO, StepLog, StepRecord, replay
from forwardtune.errors import InputError
from forwardtune.method.rule import History, Rule, move_all
from forwardtune.method.rules import Adam, Momentum, get_rule
from forwardtune.noise import Update
from forwardtune.optimizer import InterruptedUpdateError
from forwardtune.search.held import drop, hold, move_to_trial, take, trial
from forwardtune.trajectory import LogError, ReturnPoint, export_trajectory, read_log
from forwardtune.trajectory.export import read_trajectory
from forwardtune.trajectory.log import cut_log
from forwardtune.trajectory.point import keep_point, require_room
from forwardtune.trajectory.reader import Rollback
from forwardtune.trajectory.replay import apply_updates
from forwardtune.trajectory.updates import Trajectory, trajectory_of
from support import assert_same_bits, snapshot
from support.logs import log_lines, reseal

# A step, or back to the weights after so many steps: nested, to the same point again, into what was undone, to the base.
COURSE: list[Any] = [*["step"] * 6, 4, *["step"] * 2, 5, "step", 1, *["step"] * 2, 9, "step", 7, 11, "step", 0, "step"]
SKIPPED, FLAT = 2, 4
STEPS = COURSE.count("step")

RULES: dict[str, Rule | str] = {
    "sgd": "sgd",
    "momentum": Momentum(state="exact"),
    "momentum window": Momentum(window=3),
    "adam": Adam(state="exact"),
    "adam window": Adam(window=3),
}


def each(rules: Any) -> pytest.MarkDecorator:
    """Every one of the rules with two dtypes."""
    cases = list(itertools.product(rules, [torch.float32, torch.bfloat16]))
    return pytest.mark.parametrize(("rule", "dtype"), cases, ids=lambda value: str(value).removeprefix("torch."))


every_rule = each(RULES)


def base_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Small weights, the same every time; tensors of several sizes."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    for i, parameter in enumerate(net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 2
    return net.to(dtype)


def optimizer_of(net: nn.Module, rule: str = "sgd", **settings: Any) -> MeZO:
    groups = [{"params": net[0].parameters(), "weight_decay": 0.5}, {"params": net[2].parameters(), "lr": 0.02}]
    return MeZO(groups, lr=0.05, eps=0.01, seed=7, module=net, perturbation="copy", rule=RULES[rule], **settings)


def loss_of(net: nn.Module, step: int) -> Callable[[], Any]:
    """Another minibatch for every step."""
    if step in (SKIPPED, FLAT):
        return lambda: math.nan if step == SKIPPED else 1.0
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step)).to(next(net.parameters()).dtype)
    return lambda: (net(x) - 1).float().square().mean()


def step(net: nn.Module, optimizer: MeZO) -> None:
    optimizer.step(loss_of(net, optimizer.next_step))


def back_to(optimizer: MeZO, log: Path, steps: int) -> None:
    """The way back to any step, by definition: the steps that stand, replayed over the base weights."""
    trajectory = trajectory_of(read_log(log))
    optimizer.interrupted = True
    optimizer.module.load_state_dict(base_model(next(optimizer.module.parameters()).dtype).state_dict())
    optimizer.history = apply_updates(trajectory, optimizer.tuned, trajectory.first(steps), None, keep=True)
    optimizer.interrupted = False


class Run:
    """A run with the course above, and what its weights were after every number of steps."""

    def __init__(
        self, folder: Path, rule: str = "sgd", dtype: torch.dtype = torch.float32, course: list[Any] = COURSE
    ) -> None:
        self.path = folder / "steps.jsonl"
        self.net = base_model(dtype)
        optimizer = optimizer_of(self.net, rule)
        self.weights = [snapshot(self.net)]
        with StepLog(self.path, optimizer) as log:
            self.begin(optimizer, log)
            for number in self.play(optimizer, log, course):
                self.weights[number:] = [snapshot(self.net)]

    def begin(self, optimizer: MeZO, log: StepLog) -> None:
        log.note({"plan": "to go back often"})

    def play(self, optimizer: MeZO, log: StepLog, course: list[Any]) -> Iterator[int]:
        """Yields the number of steps after every event."""
        net = optimizer.module
        assert isinstance(net, nn.Module)
        for event in course:
            if event == "step":
                step(net, optimizer)
            else:
                log.note({"because": f"{event} was better"})
                self.go_back(optimizer, log, event)
                log.rolled_back(event)
            yield optimizer.next_step

    def go_back(self, optimizer: MeZO, log: StepLog, steps: int) -> None:
        back_to(optimizer, log.path, steps)


def standing(course: list[Any]) -> list[list[int]]:
    """By hand: the steps that are in the weights after every number of steps."""
    after: list[list[int]] = [[]]
    for event in course:
        if event == "step":
            after.append([*after[-1], len(after) - 1])
        else:
            after[-1] = after[event]
    return after


def by_hand(records: list[StepRecord], rule: str, dtype: torch.dtype) -> nn.Sequential:
    """Base weights moved by these steps alone, one after another."""
    net = base_model(dtype)
    optimizer = optimizer_of(net, rule)
    history = History()
    for record in records:
        if not record.skipped:
            groups = zip(record.lr, record.weight_decay, strict=True)
            plans = [[optimizer.rule.plan(record.step, record.coefficients, *group)] for group in groups]
            with torch.no_grad():
                move_all(optimizer.rule, optimizer.noise, optimizer.tuned, plans, history)
    return net


# --- what a rollback means -------------------------------------------------------------------------------------------


@every_rule
def test_a_log_with_rollbacks_replays_to_the_steps_that_stand(rule, dtype, tmp_path):
    """For every number of steps: the run's own weights, those of a simulation by hand, of the log and of its export."""
    run = Run(tmp_path, rule, dtype)
    log = read_log(run.path)
    assert log.steps == log.end["end"] == STEPS
    assert log.rollbacks == [Rollback(*pair) for pair in [(6, 4), (8, 5), (9, 1), (11, 9), (12, 7), (12, 11), (13, 0)]]
    exported = tmp_path / "trajectory.safetensors"
    assert export_trajectory(log, exported) == exported.stat().st_size
    trajectory = read_trajectory(exported)
    assert (trajectory.rollbacks, trajectory.digest) == (log.rollbacks, log.end["digest"])
    assert trajectory.header == {key: value for key, value in log.header.items() if key != "versions"}
    for number, steps in enumerate(standing(COURSE)):
        simulated = by_hand([log.records[i] for i in steps], rule, dtype)
        assert_same_bits(simulated, run.weights[number])
        for source in (run.path, exported):
            net = base_model(dtype)
            assert replay(source, net, steps=number) == number
            assert_same_bits(net, run.weights[number])
    for source in (run.path, exported):
        net = base_model(dtype)
        assert replay(source, net) == STEPS  # it compares the digests, too
        assert_same_bits(net, run.weights[-1])


def first_of(rollbacks: list[Rollback], steps: int, total: int) -> list[int]:
    """The steps that :meth:`Trajectory.first` leaves standing."""
    updates = [[Update(i, (1.0,)) for i in range(total)]]
    trajectory = Trajectory(Path("none"), {}, get_rule("sgd"), updates, rollbacks, None)
    (kept,) = trajectory.first(steps)
    assert [update.step for update in kept] == list(range(steps))
    return [update.step for update in kept if update.sizes]


def rollbacks_of(course: list[Any]) -> list[Rollback]:
    done, found = 0, []
    for event in course:
        if event == "step":
            done += 1
        else:
            found.append(Rollback(done, event))
    return found


def random_course(rng: random.Random) -> list[Any]:
    course: list[Any] = []
    for done in range(1, rng.randrange(2, 40)):
        course.append("step")
        while rng.random() < 0.3:
            course.append(rng.randrange(done))
    return course


def test_any_rollbacks_by_brute_force():
    """Nested, into what was undone, to the base, and drawn."""
    rng = random.Random(0)
    courses = [
        [*["step"] * 60, 40, *["step"] * 20, 50, *["step"] * 10, 10, *["step"] * 5],
        [*["step"] * 90, 10, *["step"] * 5, 91, "step", 95],
        ["step", 0, "step", 0, "step", 0],
        *(random_course(rng) for _ in range(300)),
    ]
    for course in courses:
        for number, steps in enumerate(standing(course)):
            assert first_of(rollbacks_of(course), number, course.count("step")) == steps


def test_many_rollbacks_take_no_time():
    """Each goes back into the part before it: a search that began anew for every one would take 2^200 turns."""
    course = [event for done in range(1, 201) for event in ("step", "step", 2 * done - 1)]
    assert first_of(rollbacks_of(course), 400, 400) == standing(course)[-1] == list(range(0, 400, 2))


# --- the lines -------------------------------------------------------------------------------------------------------


def test_the_lines_of_notes_and_rollbacks(tmp_path):
    """Golden: what another program must read."""
    net = base_model()
    optimizer = optimizer_of(net)
    with StepLog(tmp_path / "steps.jsonl", optimizer) as log:
        log.note({"plan": {"tries": 7}})
        step(net, optimizer)
        step(net, optimizer)
        back_to(optimizer, log.path, 1)
        log.rolled_back(1)
        log.note({"held_out": "nan"})
    contents = log_lines(log.path)
    assert contents[0]["format"] == 4
    assert contents[1] == {"note": {"plan": {"tries": 7}}}
    assert [content.get("step") for content in contents[2:4]] == [0, 1]
    assert contents[4:6] == [{"rollback": 1}, {"note": {"held_out": "nan"}}]
    assert list(contents[6]) == ["end", "digest"]
    read = read_log(log.path)
    assert [(note.at, note.content) for note in read.notes] == [(0, {"plan": {"tries": 7}}), (2, {"held_out": "nan"})]
    assert read.rollbacks == [Rollback(2, 1)]


@pytest.mark.parametrize("to", [2, 3, -1, True], ids=repr)
def test_the_writer_refuses_what_the_reader_would(to, tmp_path):
    net = base_model()
    optimizer = optimizer_of(net)
    with StepLog(tmp_path / "steps.jsonl", optimizer) as log:
        step(net, optimizer)
        step(net, optimizer)
        with pytest.raises(ValueError, match="goes back to step"):
            log.rolled_back(to)
    assert replay(log.path, base_model()) == 2


def test_a_rollback_makes_an_end_void_and_a_note_does_not(tmp_path):
    run = Run(tmp_path)
    data = run.path.read_bytes()
    reseal(run.path, lambda contents: contents.append({"note": {"seen": True}}))
    assert replay(run.path, base_model()) == STEPS
    run.path.write_bytes(data)
    reseal(run.path, lambda contents: contents.append({"rollback": 3}))
    assert read_log(run.path).end is None
    net = base_model()
    with pytest.raises(LogError, match="no end line"):
        replay(run.path, net)
    replay(run.path, net, steps=STEPS)
    assert_same_bits(net, run.weights[3])


@pytest.mark.parametrize("pair", [[3, 3], [2, 5], [3, True], [3, "1"], [3], [3, 1, 1], 3, None], ids=repr)
def test_an_export_with_impossible_rollbacks_is_refused(pair, tmp_path):
    run = Run(tmp_path)
    log = read_log(run.path)
    wrong = copy.copy(log)
    object.__setattr__(wrong, "header", {**log.header, "rollbacks": [pair]})
    object.__setattr__(wrong, "rollbacks", [])
    exported = tmp_path / "wrong.safetensors"
    export_trajectory(wrong, exported)
    with pytest.raises(LogError, match="not an intact exported trajectory"):
        read_trajectory(exported)


# --- cutting and resuming --------------------------------------------------------------------------------------------


def test_a_log_is_cut_behind_what_follows_a_step(tmp_path):
    """Notes and rollbacks after the last step that is kept stay: they are of that point."""
    run = Run(tmp_path)
    whole, data = read_log(run.path), run.path.read_bytes()
    for number in range(STEPS, -1, -1):
        log = cut_log(read_log(run.path), number)
        assert repr(log.records) == repr(whole.records[:number])  # repr finds NaN equal to itself
        assert log.rollbacks == [rollback for rollback in whole.rollbacks if rollback.at <= number]
        assert log.notes == [note for note in whole.notes if note.at <= number]
        assert data.startswith(run.path.read_bytes())
        net = base_model()
        replay(log, net, steps=number)
        assert_same_bits(net, run.weights[number])
    assert [note.content for note in log.notes] == [{"plan": "to go back often"}]
    tail = (tmp_path / "steps.cut.jsonl").read_bytes()
    assert sorted((run.path.read_bytes() + tail).splitlines()) == sorted(data.splitlines())


def without_notes(contents: list[dict[str, Any]]) -> None:
    contents[:] = [content for content in contents if "note" not in content]


@every_rule
def test_a_run_that_went_back_resumes_with_the_same_bits(rule, dtype, tmp_path):
    """Killed after any event of its course, and resumed from base weights and log."""
    run = Run(tmp_path, rule, dtype)
    reseal(run.path, without_notes)
    for done in range(0, len(COURSE), 3):
        path = tmp_path / f"{done}.jsonl"
        path.write_bytes(b"".join(run.path.read_bytes().splitlines(keepends=True)[: 1 + done]))
        net = base_model(dtype)
        optimizer = optimizer_of(net, rule)
        with StepLog.resume(path, optimizer) as log:
            assert optimizer.next_step == COURSE[:done].count("step")
            for _ in run.play(optimizer, log, COURSE[done:]):
                pass
        assert_same_bits(net, run.weights[-1])
        assert read_log(path).end["digest"] == read_log(run.path).end["digest"]
        assert read_log(path).rollbacks == read_log(run.path).rollbacks


@every_rule
def test_the_optimizer_goes_on_as_one_that_never_erred(rule, dtype, tmp_path):
    """After going back, what the rule remembers is that of the steps that stand."""
    run = Run(tmp_path, rule, dtype)
    log = read_log(run.path)
    net = base_model(dtype)
    optimizer = optimizer_of(net, rule)
    step_log = StepLog.resume(run.path, optimizer)
    for number in range(STEPS, -1, -1):
        back_to(optimizer, run.path, number)
        assert_same_bits(net, run.weights[number])
        taken = [i for i in standing(COURSE)[number] if not log.records[i].skipped]
        assert optimizer.history.taken == (len(taken) if optimizer.rule.remembers else 0)
        assert [update.step for update in optimizer.history.recent] == (taken[-3:] if "window" in rule else [])
        assert optimizer.next_step == STEPS  # noise is never used twice
    step_log.close()


# --- the point to go back to -----------------------------------------------------------------------------------------

# Steps, and ways back as a watch asks for them: to the point, to a step since then, at once again, to the base.
WAYS: list[Any] = [*["step"] * 6, 0, *["step"] * 4, 8, 8, "step", 8, *["step"] * 5, 14, *["step"] * 2, 17]


class Ways(Run):
    """A run that goes back through a point on disk."""

    def begin(self, optimizer: MeZO, log: StepLog) -> None:
        self.point_path = log.path.with_name("return.bin")
        self.point = ReturnPoint(self.point_path, optimizer, log.base)

    def go_back(self, optimizer: MeZO, log: StepLog, steps: int) -> None:
        self.point.go_back(steps)


@every_rule
def test_a_way_back_is_the_steps_that_stand_replayed(rule, dtype, tmp_path, monkeypatch):
    """To the bit, and with the rule's memory, as the steps after it show.

    All ways back replay each step once at most, and neither read the log nor hash the weights.
    """
    replayed: list[int] = []

    def counted(rule: Any, noise: Any, tuned: Any, updates: Any, history: Any, **options: Any) -> int:
        replayed.extend(update.step for update in updates[0])
        return move_all(rule, noise, tuned, updates, history, **options)

    with monkeypatch.context() as patched:
        patched.setattr("forwardtune.trajectory.point.move_all", counted)
        patched.setattr("forwardtune.trajectory.point.trajectory_of", None)
        patched.setattr("forwardtune.trajectory.point.require_base", None)
        run = Ways(tmp_path, rule, dtype, WAYS)
    assert replayed == [6, 7, 11, 12, 13, 16]
    log = read_log(run.path)
    assert [back.to for back in log.rollbacks] == [0, 8, 8, 8, 14, 17]
    for number, steps in enumerate(standing(WAYS)):
        assert_same_bits(by_hand([log.records[i] for i in steps], rule, dtype), run.weights[number])
    assert replay(log, base_model(dtype)) == WAYS.count("step")  # it compares the digests, too


@every_rule
def test_a_run_resumes_with_the_point_that_it_left(rule, dtype, tmp_path):
    """Killed after any event, before or after its line was written: with other than the base weights, as from a checkpoint."""
    whole = Ways(tmp_path / "whole", rule, dtype, WAYS)
    reseal(whole.path, without_notes)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    for done in range(1, len(WAYS), 2):
        left = Ways(tmp_path / str(done), rule, dtype, WAYS[:done])
        for unwritten in {0, int(WAYS[done - 1] != "step")}:
            left.path.write_bytes(b"".join(lines[: 1 + done - unwritten]))
            net = base_model(dtype)
            optimizer = optimizer_of(net, rule)
            keep_point(left.point_path, optimizer, read_log(left.path))
            with StepLog.resume(left.path, optimizer) as log:
                left.point = ReturnPoint.resume(left.point_path, optimizer, read_log(left.path))
                for _ in left.play(optimizer, log, WAYS[done - unwritten :]):
                    pass
            assert_same_bits(net, whole.weights[-1])
            assert read_log(left.path).rollbacks == read_log(whole.path).rollbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_come_back_to_the_bit(dtype, tmp_path):
    net = base_model(dtype)
    net[0].weight.data = net[0].weight.data.t().contiguous().t()  # not contiguous
    net[0].bias.data[:2] = torch.tensor([-0.0, math.nan], dtype=dtype)
    optimizer = MeZO(net, perturbation="copy")
    before = snapshot(net)
    point = ReturnPoint(tmp_path / "new" / "folder" / "return.bin", optimizer, "digest")
    storage = [parameter.data_ptr() for parameter in net.parameters()]
    for way_back in (point.restore, lambda: point.go_back(0)):
        for parameter in net.parameters():
            parameter.data.zero_()
        way_back()
        assert_same_bits(net, before)
    assert [parameter.data_ptr() for parameter in net.parameters()] == storage
    point.remove()
    assert list(point.path.parent.iterdir()) == []
    assert optimizer.recorders == []
    point.remove()  # nothing to do is no error


def test_only_tuned_weights_are_kept(tmp_path):
    net = base_model()
    net[0].weight.requires_grad_(False)
    point = ReturnPoint(tmp_path / "return.bin", MeZO(net), "digest")
    net[0].weight.data.zero_()
    net[0].bias.data.zero_()
    point.restore()
    assert not net[0].weight.any()
    assert torch.equal(net[0].bias, base_model()[0].bias)


@pytest.mark.parametrize("steps", [1, 7, 9, 10, 12])
def test_there_is_no_way_back_to_what_is_gone(steps, tmp_path):
    """Before the point, undone, or not taken yet; the weights stay."""
    run = Ways(tmp_path, "sgd", torch.float32, [*["step"] * 10, 8, "step"])
    with pytest.raises(ValueError, match=f"no way back to step {steps}: only to step 8"):
        run.point.go_back(steps)
    assert_same_bits(run.net, run.weights[-1])


def other_run(run: Ways) -> None:
    text = run.point_path.read_bytes()
    run.point_path.write_bytes(text.replace(read_log(run.path).header["base"][:8].encode(), b"00000000", 1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.point_path.unlink(),
        lambda run: run.point_path.write_bytes(b"what was here before"),
        lambda run: cut_log(read_log(run.path), 7),  # the point is of step 8
        other_run,
    ],
    ids=["none", "another file", "a log that was cut", "another run"],
)
def test_without_a_point_that_fits_the_base_weights_are_one(spoil, tmp_path):
    run = Ways(tmp_path, "momentum", torch.float32, [*["step"] * 10, 8, "step"])
    spoil(run)
    log = read_log(run.path)
    moved = optimizer_of(run.net, "momentum")
    with pytest.raises(LogError, match=r"not the weights that the run .* began with"):
        keep_point(run.point_path, moved, log)
    with pytest.raises(LogError, match=r"return.bin is no point of the run in"):
        ReturnPoint.resume(run.point_path, moved, log)
    net = base_model()
    optimizer = optimizer_of(net, "momentum")
    keep_point(run.point_path, optimizer, log)
    with StepLog.resume(run.path, optimizer):
        point = ReturnPoint.resume(run.point_path, optimizer, log)
        assert point.steps == 0
        point.go_back(7)
        assert_same_bits(net, run.weights[7])


def test_a_kill_in_mid_write_leaves_no_file_that_would_be_used(tmp_path, monkeypatch):
    """And a file that was cut is refused."""
    path = tmp_path / "return.bin"
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ReturnPoint(path, MeZO(base_model()), "digest")
    assert not path.exists()
    point = ReturnPoint(path, MeZO(base_model()), "digest")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # what it left is gone
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"return.bin is damaged: resume the run without it"):
        point.restore()


@pytest.mark.parametrize(("rule", "moments"), [("sgd", 0), ("momentum", 1), ("adam window", 0), ("adam", 2)])
def test_a_disk_without_room_is_refused(rule, moments, tmp_path, monkeypatch):
    optimizer = optimizer_of(base_model(), rule)
    size = 4 * (1 + moments) * optimizer.tuned.numel
    for free in (0, size - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        with pytest.raises(InputError, match=r"keeps the weights .*Make room, or give a learning rate$"):
            require_room(tmp_path / "return.bin", optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    require_room(tmp_path / "return.bin", optimizer)
    assert list(tmp_path.iterdir()) == []


# --- steps that are held ---------------------------------------------------------------------------------------------

HELD_RULES = {**RULES, "sign": "sign"}
HELD = {"eps": 0.01, "lr": 0.05, "seed": 7, "perturbation": "copy", "weight_decay": 0.5}


def held_run(folder: Path, rule: str, dtype: torch.dtype, before: int = 2, held: int = 5) -> tuple[Any, MeZO, StepLog]:
    """Some steps are taken, others held; one of those is skipped and one flat."""
    net = base_model(dtype)
    optimizer = MeZO(net, rule=HELD_RULES[rule], **HELD)
    log = StepLog(folder / f"{rule}-{dtype}.jsonl", optimizer)
    for _ in range(before):
        step(net, optimizer)
    hold(optimizer)
    for _ in range(held):
        step(net, optimizer)
    return net, optimizer, log


def finished(log: StepLog) -> Path:
    log.finish()
    log.close()
    return log.path


@each(HELD_RULES)
def test_what_is_tried_is_what_is_released(rule, dtype, tmp_path):
    """To the bit, at any learning rate, and no trial leaves a trace in the next one or in what is released."""
    net, optimizer, log = held_run(tmp_path, rule, dtype)
    here, lr = snapshot(net), 0.003
    memory = repr((optimizer.history.taken, optimizer.history.recent))
    moments = copy.deepcopy(optimizer.history.moments)
    tried = {}
    for rate in (lr, 0.5, lr):
        move_to_trial(optimizer, rate)
        if rate in tried:
            assert_same_bits(net, tried[rate])
        tried[rate] = snapshot(net)
        net.load_state_dict(here)
        optimizer.interrupted = False
        assert repr((optimizer.history.taken, optimizer.history.recent)) == memory
        assert moments.keys() == optimizer.history.moments.keys()
        assert all(
            torch.equal(torch.stack(optimizer.history.moments[name]), torch.stack(moments[name])) for name in moments
        )
    assert any(not torch.equal(tried[lr][name], tried[0.5][name]) for name in here)
    assert read_log(log.path).steps == 2

    take(optimizer, lr)
    assert_same_bits(net, tried[lr])
    assert optimizer.held is None
    assert [group["lr"] for group in optimizer.param_groups] == [lr]
    step(net, optimizer)
    read = read_log(finished(log))
    assert [record.lr for record in read.records] == [(0.05,)] * 2 + [(lr,)] * 6
    assert [record.skipped for record in read.records] == [i == SKIPPED for i in range(8)]
    again = base_model(dtype)
    assert replay(read, again) == 8  # release, and the step after it, are steps as any other
    assert_same_bits(again, snapshot(net))


@each(HELD_RULES)
def test_steps_that_are_held_are_estimated_where_the_run_stands(rule, dtype, tmp_path):
    """The weights stay, the losses are those at the same point, and every step has its own directions."""
    net, optimizer, log = held_run(tmp_path, rule, dtype)
    log.close()
    other = base_model(dtype)
    replay(log.path, other, steps=2)
    assert_same_bits(net, snapshot(other))
    for number, record in enumerate(optimizer.held, start=2):
        lone = MeZO(copy.deepcopy(other), eps=0.01, seed=7, perturbation="copy")
        lone.next_step = number
        lone.step(loss_of(lone.module, number))
        assert repr((lone.last.losses, lone.last.coefficients)) == repr((record.losses, record.coefficients))
    assert optimizer.next_step == 7
    assert optimizer.last is optimizer.held[-1]


def test_a_point_undoes_a_trial(tmp_path):
    """As a search does it: hold at the base weights, try, restore, release."""
    net, optimizer, log = held_run(tmp_path, "sgd", torch.bfloat16, before=0)
    point = ReturnPoint(tmp_path / "return.bin", optimizer, log.base)
    for rate in (0.1, 10.0):
        with trial(optimizer, rate, point):
            assert optimizer.interrupted
        assert_same_bits(net, snapshot(base_model(torch.bfloat16)))
    take(optimizer, 0.1)
    assert replay(finished(log), base_model(torch.bfloat16)) == 5
    point.go_back(0)
    assert_same_bits(net, snapshot(base_model(torch.bfloat16)))


def test_steps_that_are_dropped_were_never_estimated(tmp_path):
    net, optimizer, log = held_run(tmp_path, "momentum", torch.float32, held=2)
    drop(optimizer)
    assert (optimizer.next_step, optimizer.held) == (2, None)
    for _ in range(4):
        step(net, optimizer)
    other = base_model()
    plain = MeZO(other, rule=RULES["momentum"], **HELD)
    for _ in range(6):
        step(other, plain)
    assert_same_bits(net, snapshot(other))
    assert read_log(finished(log)).steps == 6
    drop(optimizer)  # nothing is held
    assert optimizer.next_step == 6


def test_no_step_is_taken_on_weights_that_were_tried(tmp_path):
    net, optimizer, log = held_run(tmp_path, "sgd", torch.float32)
    here = snapshot(net)
    move_to_trial(optimizer, 0.1)
    for attempt in (lambda: step(net, optimizer), log.finish):
        with pytest.raises(InterruptedUpdateError):
            attempt()
    net.load_state_dict(here)
    optimizer.interrupted = False
    step(net, optimizer)
    take(optimizer, 0.1)
    assert replay(finished(log), base_model()) == 8


def test_a_trial_that_fits_no_float32_says_so_and_moves_nothing(tmp_path):
    net, optimizer, log = held_run(tmp_path, "sgd", torch.float32)
    here = snapshot(net)
    with pytest.raises(OverflowError):
        move_to_trial(optimizer, 1e300)
    assert_same_bits(net, here)
    optimizer.interrupted = False
    take(optimizer, 1e-3)
    log.close()
    assert read_log(log.path).steps == 7
