"""The step log: what it promises to hold, every way in which it can be wrong, and the weights that it gives back."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import forwardtune
from forwardtune import MeZO, StepLog, StepRecord, replay
from forwardtune.trajectory import LogError, export_trajectory, read_log
from forwardtune.trajectory import format as log_format
from forwardtune.trajectory.export import read_trajectory
from forwardtune.trajectory.format import seal, step_content
from forwardtune.trajectory.log import cut_log
from support import assert_same_bits, other_defaults, snapshot, train, trusted
from support.logs import file_size_limit, json_lines, reseal
from support.process import python


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Base weights that are the same on every machine."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).to(dtype)
    for parameter in net.parameters():
        parameter.data = torch.arange(1, parameter.numel() + 1).view(parameter.shape).to(dtype) / 8
    return net


def loss_of(net: nn.Module) -> Callable[[], Tensor]:
    return lambda: net(torch.tensor([[1.0, -0.5]], dtype=next(net.parameters()).dtype)).float().square().sum()


def small_optimizer(params: Any, **settings: Any) -> MeZO:
    return MeZO(params, **{"lr": 0.05, "eps": 2.0**-6, "seed": 5, **settings})


def small_run(path: Path, steps: int = 4, *, finish: bool = True) -> nn.Sequential:
    """Train a small model under a step log; returns it with the weights of the last step."""
    net = small_model()
    optimizer = small_optimizer(net)
    log = StepLog(path, optimizer)
    train(optimizer, *[loss_of(net)] * steps)
    if finish:
        log.finish()
    log.close()
    return net


def go_on(path: Path, upto: int = 6) -> nn.Sequential:
    """Resume a small run from base weights; returns them with the weights of the last step."""
    net = small_model()
    optimizer = small_optimizer(net)
    with StepLog.resume(path, optimizer):
        train(optimizer, *[loss_of(net)] * (upto - optimizer.next_step))
    return net


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "steps.jsonl"


# --- the format ------------------------------------------------------------------------------------------------------


def test_the_header_says_what_the_steps_mean(path):
    net = small_model()
    groups = [{"params": [net[0].weight, net[0].bias], "weight_decay": 0.5}, {"params": list(net[2].parameters())}]
    optimizer = MeZO(groups, lr=0.1, eps=0.25, probes=2, direction="rademacher", seed=2**64 - 1, module=net)
    StepLog(path, optimizer, run={"model": "small"}).close()
    header = json.loads(path.read_text())
    assert list(header) == [
        "format", "noise", "seed", "direction", "estimator", "eps", "probes", "rule", "groups", "tensors", "base",
        "versions", "run", "check",
    ]  # fmt: skip
    assert [header[key] for key in list(header)[:8]] == [4, 1, 2**64 - 1, "rademacher", "spsa", 0.25, 2, "sgd"]
    assert header["groups"] == [{"weight_decay": 0.5}, {"weight_decay": 0.0}]
    assert header["tensors"] == [
        {"name": name, "shape": shape, "dtype": "float32", "group": group}
        for name, shape, group in [("0.bias", [2], 0), ("0.weight", [2, 2], 0), ("2.bias", [1], 1), ("2.weight", [1, 2], 1)]
    ]  # fmt: skip
    assert header["base"] == optimizer.tuned.digest()
    here = ["python", "forwardtune", "torch", "transformers"]
    assert list(header["versions"]) == here + (["numba"] if importlib.util.find_spec("numba") else [])
    assert header["run"] == {"model": "small"}


def test_what_json_cannot_hold_is_refused_before_it_is_written(path):
    optimizer = small_optimizer(small_model())
    with StepLog(path, optimizer) as log:
        data = path.read_bytes()
        for bad in (math.nan, math.inf, {1}):
            with pytest.raises((ValueError, TypeError)):
                log.note({"loss": bad})
        assert path.read_bytes() == data
        log.note({"loss": 1.0})
    assert read_log(path).notes[0].content == {"loss": 1.0}


def test_seconds_are_written_to_the_microsecond():
    record = StepRecord(0, (1.0,), (0.0,), (1.0,), (1.0, 1.0), 1.0, 0, 1.23456789)
    assert step_content(record)["seconds"] == 1.234568


def test_every_line_is_a_sealed_object(path):
    net = small_run(path, steps=2)
    _, *steps, end = json_lines(path)
    fields = ["step", "lr", "coefficients", "losses", "loss", "unchanged", "seconds", "check"]
    assert [list(step) for step in steps] == [fields, fields]
    assert list(end) == ["end", "digest", "check"]
    assert (end["end"], end["digest"]) == (2, small_optimizer(net).tuned.digest())

    previous = ""
    for line in path.read_text().splitlines():
        body, check = line[: line.rindex(',"check"')] + "}", json.loads(line)["check"]
        assert check == hashlib.sha256((previous + body).encode()).hexdigest()[:16]
        previous = check


GOLDEN = (
    r'{"format":4,"noise":1,"seed":5,"direction":"gaussian","estimator":"spsa","eps":0.25,"probes":1,"rule":"sgd",'
    r'"groups":[{"weight_decay":0.5}],"tensors":[{"name":"bias","shape":[1],"dtype":"bfloat16","group":0},'
    r'{"name":"weight","shape":[1,2],"dtype":"bfloat16","group":0}],'
    r'"base":"87f0c6ec25c58057a476ad00c4e4bb32be507f0b38090590c7257895a6be8ad6",'
    r'"versions":{"forwardtune":"golden"},"run":{"model":"g\u00f6ld"},"check":"b4557443476f2d14"}'
    "\n"
    r'{"step":0,"lr":0.5,"coefficients":[1.0],"losses":[1.5,1.0],"loss":1.25,"unchanged":0,"seconds":0.125,'
    r'"check":"a3f59e6a1f1aca73"}'
    "\n"
    r'{"step":1,"lr":0.5,"coefficients":[],"losses":["inf",0.1],"loss":"inf","unchanged":3,"seconds":0.125,'
    r'"check":"f8afd1b506f2664c"}'
    "\n"
    r'{"step":2,"lr":0.5,"coefficients":[-0.39999999999999997],"losses":[0.1,0.3],"loss":0.2,"unchanged":0,'
    r'"seconds":0.125,"check":"ca9bf5cfc77995bc"}'
    "\n"
    r'{"end":3,"digest":"f9f904eeab4ce7edde5a54f7bf9309d6ef6cfe970ec5c046b3dfd88be60553e8",'
    r'"check":"905c272e849666d4"}'
    "\n"
)


def golden_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    """Three steps on scripted losses, the middle one skipped; versions and times, which vary, are set."""
    monkeypatch.setattr(log_format, "versions", lambda: {"forwardtune": "golden"})
    net = golden_base()
    optimizer = trusted(MeZO(net, lr=0.5, eps=0.25, weight_decay=0.5, seed=5, perturbation="copy"))
    with StepLog(path, optimizer, run={"model": "göld"}) as log:
        optimizer.recorders[:] = [lambda record: log.record(dataclasses.replace(record, seconds=0.125))]
        for plus, minus in [(1.5, 1.0), (math.inf, 0.1), (0.1, 0.3)]:
            losses = iter((plus, minus))
            optimizer.step(lambda losses=losses: next(losses))
    return net


def golden_base() -> nn.Linear:
    net = nn.Linear(2, 1, dtype=torch.bfloat16)
    net.weight.data = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)
    net.bias.data = torch.tensor([0.25], dtype=torch.bfloat16)
    return net


def test_the_golden_log(path, monkeypatch):
    """A change of one byte of the format, or one bit of the noise, needs a new version number."""
    golden_run(path, monkeypatch)
    assert path.read_bytes() == GOLDEN.encode()


@pytest.mark.parametrize("version", [2, 3, 4])
def test_golden_logs_of_all_formats_are_replayed_exported_and_resumed(version, path):
    """Format 2 had neither notes nor rollbacks: the same lines otherwise."""
    path.write_text(GOLDEN)
    reseal(path, lambda contents: contents[0].update(format=version))
    assert (path.read_text() == GOLDEN) == (version == 4)
    text, log, exported = path.read_text(), read_log(path), path.with_suffix(".safetensors")
    assert (log.steps, log.rollbacks, log.notes) == (3, [], [])
    export_trajectory(log, exported)
    for source in (path, exported):
        net = golden_base()
        assert replay(source, net) == 3  # it compares the weights with the digest in the end line
        assert not torch.equal(net.weight, golden_base().weight)
    net = golden_base()
    optimizer = MeZO(net, lr=0.5, eps=0.25, weight_decay=0.5, seed=5, perturbation="copy")
    with StepLog.resume(path, optimizer):
        assert optimizer.tuned.digest() == log.end["digest"]
        optimizer.step(lambda: net(torch.ones(2, dtype=torch.bfloat16)).float().square().sum())
    assert path.read_text().startswith(text)
    again = golden_base()
    assert replay(path, again) == 4
    assert_same_bits(again, snapshot(net))


ODD = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, -1e-310, 2.0**-1074, 123456789.123456789]


@pytest.mark.parametrize("lr", [(1e-6, 3e-7), (0.1, 0.1)], ids=["two rates", "one rate"])
def test_floats_come_back_exactly(path, lr):
    net = small_model()
    first, second = net[0].parameters(), net[2].parameters()
    optimizer = MeZO([{"params": first, "weight_decay": 0.1}, {"params": second}], module=net, probes=len(ODD))
    written = [
        StepRecord(0, lr, (0.1, 0.0), tuple(ODD), tuple(2 * ODD), ODD[0], 3, 0.25),
        StepRecord(1, lr, (0.1, 0.0), (), (math.inf, -math.inf, math.nan, 1.0), math.nan, 9, 0.0),
    ]
    log = StepLog(path, optimizer)
    for record in written:
        log.record(record)
    log.close()
    read = read_log(path)
    assert repr(read.records) == repr(written)  # repr tells -0.0 from 0.0 and finds NaN equal to itself
    assert (read.steps, read.end, read.torn, read.length) == (2, None, False, path.stat().st_size)
    assert [record.skipped for record in read.records] == [False, True]


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "sign"])
def test_a_replay_takes_every_step_however_many_go_into_a_sweep(rule, path, monkeypatch):
    """Sweeps are longer than any log here."""
    weights, net = [snapshot(small_model())], small_model()
    optimizer = small_optimizer(net, rule=rule)
    with StepLog(path, optimizer):
        for _ in range(10):
            optimizer.step(loss_of(net))
            weights.append(snapshot(net))
    monkeypatch.setattr("forwardtune.method.rules._STEPS_PER_SWEEP", 3)
    for steps in (2, 3, 4, 6, 7, 9, 10):
        net = small_model()
        replay(path, net, steps=steps)
        assert_same_bits(net, weights[steps])


@pytest.mark.parametrize("rule", ["sgd", "adam", "sign"])
def test_what_torch_makes_by_default_does_not_matter(rule, path):
    net, exported = small_model(), path.with_suffix(".safetensors")
    bases = [small_model() for _ in range(4)]
    data = torch.tensor([[1.0, -0.5]])
    with other_defaults():
        optimizer = small_optimizer(net, rule=rule)
        with StepLog(path, optimizer):
            train(optimizer, *[lambda: net(data).square().sum()] * 3, lambda: math.nan)
        export_trajectory(read_log(path), exported)
        for source, base in zip((path, exported), bases, strict=False):
            replay(source, base)
    for source, base in zip((path, exported), bases[2:], strict=True):
        replay(source, base)
    for base in bases:
        assert_same_bits(base, snapshot(net))


def test_a_log_of_no_steps_is_a_run(path):
    small_run(path, steps=0)
    exported = path.with_suffix(".safetensors")
    export_trajectory(read_log(path), exported)
    for source in (path, exported):
        net = small_model()
        assert replay(source, net) == 0
        assert_same_bits(net, snapshot(small_model()))


@pytest.mark.parametrize("steps", [-1, 5])
def test_steps_that_are_not_there_cannot_be_replayed(steps, path):
    small_run(path)
    exported = path.with_name("run.safetensors")
    export_trajectory(read_log(path), exported)
    for source in (path, exported):
        with pytest.raises(LogError, match=f"{source.name} holds 4 steps"):
            replay(source, small_model(), steps=steps)


def test_an_unfinished_log_is_replayed_on_demand_only(path):
    tuned = small_run(path, finish=False)
    net = small_model()
    with pytest.raises(LogError, match=r"no end line.*steps=4"):
        replay(path, net)
    assert_same_bits(net, snapshot(small_model()))
    progress = []
    assert replay(path, net, steps=4, progress=lambda *at: progress.append(at)) == 4
    assert progress == [(tensors, 4) for tensors in range(1, 5)]
    assert_same_bits(net, snapshot(tuned))


def test_an_exception_leaves_the_log_unfinished(path):
    net = small_model()
    optimizer = small_optimizer(net)
    with pytest.raises(ZeroDivisionError), StepLog(path, optimizer):
        train(optimizer, loss_of(net), lambda: 1 / 0)
    log = read_log(path)
    assert (log.steps, log.end) == (1, None)
    assert optimizer.recorders == []


# --- export ----------------------------------------------------------------------------------------------------------


def test_twenty_thousand_steps_of_a_13b_model_fit_in_100_kb(path):
    """Only the size is at stake: the tensor list is OPT-13B's, the numbers are drawn."""
    sizes = {"hidden_size": 5120, "word_embed_proj_dim": 5120, "ffn_dim": 20480}
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(
            transformers.OPTConfig(**sizes, num_hidden_layers=40, num_attention_heads=40)
        )
    named = sorted(model.named_parameters())
    assert sum(p.numel() for _, p in named) > 12.8e9
    rng = random.Random(0)
    header = {
        "format": 3, "noise": 1, "seed": rng.getrandbits(64), "direction": "gaussian", "estimator": "spsa", "eps": 1e-3,
        "probes": 1, "rule": "sgd", "groups": [{"weight_decay": 0.0}], "base": rng.randbytes(32).hex(), "versions": {},
        "tensors": [{"name": name, "shape": list(p.shape), "dtype": "bfloat16", "group": 0} for name, p in named],
        "run": {"model": "facebook/opt-13b", "task": "sst2"},
    }  # fmt: skip
    records = []
    for step in range(20_000):
        c = rng.gauss(0, 10)
        records.append(StepRecord(step, (1e-7,), (0.0,), (c,), (0.5 + c / 1000, 0.5), 0.5, 0, 1.5))
    check = ""
    with open(path, "w") as file:
        for content in [header, *map(step_content, records), {"end": 20_000, "digest": rng.randbytes(32).hex()}]:
            line, check = seal(check, content)
            file.write(line + "\n")

    exported = path.with_suffix(".safetensors")
    assert export_trajectory(read_log(path), exported) < 100_000
    assert read_trajectory(exported).steps == 20_000


def test_an_export_overwrites_nothing_and_needs_a_finished_run(path):
    small_run(path)
    taken = path.with_name("taken.safetensors")
    taken.write_text("precious")
    with pytest.raises(LogError, match="exists"):
        export_trajectory(read_log(path), taken)
    assert taken.read_text() == "precious"
    unfinished = path.with_name("unfinished.jsonl")
    small_run(unfinished, finish=False)
    with pytest.raises(LogError, match="no end line"):
        export_trajectory(read_log(unfinished), path.with_name("new.safetensors"))
    assert not path.with_name("new.safetensors").exists()


@pytest.mark.parametrize("steps", [None, 1], ids=["all steps", "one step"])
def test_a_damaged_export_is_refused(steps, path):
    """Cut anywhere or altered in any byte, it raises LogError or gives the same weights, never others."""
    small_run(path, steps=2)
    exported = path.with_suffix(".safetensors")
    export_trajectory(read_log(path), exported)
    data = exported.read_bytes()
    tuned = small_model()
    replay(path, tuned, steps=steps)
    damaged = [data[:length] for length in range(len(data))]
    damaged += [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(len(data))]
    for number, wrong in enumerate(damaged):
        exported.write_bytes(wrong)
        net = small_model()
        try:
            replay(exported, net, steps=steps)
        except LogError:
            continue
        assert number >= len(data), f"a prefix of {number} bytes was accepted"
        assert_same_bits(net, snapshot(tuned))


def test_an_export_without_a_checksum_is_replayed_whole_or_not_at_all(path):
    """As early versions wrote it: its digest tells damage after the last step alone."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tuned = snapshot(small_run(path, steps=2))
    exported = path.with_suffix(".safetensors")
    export_trajectory(read_log(path), exported)
    with safe_open(exported, framework="pt") as file:
        metadata, sizes = file.metadata(), file.get_tensor("sizes")
    del metadata["check"]
    save_file({"sizes": sizes}, exported, metadata=metadata)
    net = small_model()
    with pytest.raises(LogError, match=r"without a checksum.*export it again"):
        replay(exported, net, steps=1)
    assert_same_bits(net, snapshot(small_model()))
    assert replay(exported, net) == 2
    assert_same_bits(net, tuned)
    # Nor does a renamed checksum make it an early export.
    save_file({"sizes": sizes}, exported, metadata={**metadata, "chekc": "0" * 64})
    with pytest.raises(LogError, match="not an intact exported trajectory"):
        replay(exported, net, steps=1)


def test_another_file_is_no_export(path):
    from safetensors.torch import save_file

    other = path.with_suffix(".safetensors")
    with pytest.raises(LogError, match="no such file"):
        read_trajectory(other)
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(LogError, match="not an intact exported trajectory"):
        read_trajectory(other)


@pytest.mark.parametrize("part", ["noise", "format"])
def test_an_export_of_another_version_is_refused(part, path):
    """Other noise would give other weights, which a partial replay has no digest to tell."""
    small_run(path)
    log = read_log(path)
    exported = path.with_suffix(".safetensors")
    export_trajectory(dataclasses.replace(log, header={**log.header, part: 6}), exported)
    with pytest.raises(LogError, match=f"version 6 of the.*{part}"):
        replay(exported, small_model(), steps=2)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_log_cut_at_any_byte_is_refused_or_a_prefix(path):
    small_run(path, steps=2)
    data, whole = path.read_bytes(), read_log(path)
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data), -1, -1):
        os.truncate(path, length)
        if length < ends[0]:
            with pytest.raises(LogError, match="first line"):
                read_log(path)
            continue
        log = read_log(path)
        lines = sum(end <= length for end in ends)
        assert log.records == whole.records[: lines - 1]
        assert log.end == (whole.end if length == len(data) else None)
        assert log.length == ends[lines - 1]
        assert log.torn == (length not in ends)


@pytest.mark.parametrize("torn", [0, 20], ids=["whole", "torn"])
@pytest.mark.parametrize(
    "alter", [lambda byte: byte ^ 1, lambda byte: byte ^ 0x80, lambda byte: 10], ids=["bit", "high bit", "newline"]
)
def test_every_altered_byte_is_noticed(alter, torn, path):
    """It raises LogError; only where the line had no end, or lost it, the line may be dropped instead."""
    small_run(path, steps=2)
    data = path.read_bytes()[: -torn or None]
    path.write_bytes(data)
    intact = read_log(path)
    with open(path, "r+b", buffering=0) as file:
        for i, byte in enumerate(data):
            if alter(byte) == byte:
                continue
            os.pwrite(file.fileno(), bytes([alter(byte)]), i)
            try:
                log = read_log(path)
            except LogError:
                continue
            finally:
                os.pwrite(file.fileno(), bytes([byte]), i)
            assert i >= intact.length - 1, f"byte {i} was altered and nothing was noticed"
            assert log.torn
            assert log.end is None
            # Without the newline behind it, the last whole line runs into the torn one and is dropped with it.
            lost = int(torn > 0 and i == intact.length - 1)
            assert log.records == intact.records[: intact.steps - lost]


def line_changes() -> list[Any]:
    count = 5  # header, three steps, end
    changes = [(f"line {i} deleted", lambda lines, i=i: lines.pop(i)) for i in range(count - 1)]
    changes += [(f"line {i} doubled", lambda lines, i=i: lines.insert(i, lines[i])) for i in range(count)]
    changes += [
        (f"lines {i} and {i + 1} swapped", lambda lines, i=i: lines.insert(i, lines.pop(i + 1)))
        for i in range(count - 1)
    ]
    changes += [("empty line at the end", lambda lines: lines.append(b"\n"))]
    return [pytest.param(change, id=name) for name, change in changes]


@pytest.mark.parametrize("change", line_changes())
def test_lines_that_moved_are_noticed(change, path):
    small_run(path, steps=3)
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))
    with pytest.raises(LogError, match=r"line \d+: its checksum does not fit"):
        read_log(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("run.safetensors", b"\x10\x00\x00\x00{}", "not a step log but an exported trajectory: name a steps.jsonl"),
        ("junk", b"hello", "not a step log but something else"),
        ("steps.jsonl", b"", "No step was logged"),
        ("steps.jsonl", b'{"form', "No step was logged"),
        ("steps.jsonl", b'{"format":3,"noise":1', "No step was logged"),
        *(("steps.jsonl", data, "line") for data in (b"\n", b"{}\n", b"\xff\xfe\n", b"hello, this is a text\n")),
        ("absent", None, "no such file"),
        ("", None, "is a folder"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, name, data, message):
    """And not told to be deleted, unless it is a log without a step."""
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(LogError, match=message) as raised:
        read_log(tmp_path / name)
    assert ("delete" in str(raised.value)) == (message == "No step was logged")


def of(**changes: Any) -> Callable[[list[dict[str, Any]]], object]:
    """A header with changes."""
    return lambda contents: contents[0].update(changes)


def with_momentum(**settings: Any) -> Callable[[list[dict[str, Any]]], object]:
    return of(rule="momentum", rule_settings=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of(noise=2), "version 2 of the noise"),
        (of(format=1), "version 1 of the log format"),
        (of(format=6), "version 6 of the log format"),
        (of(direction="sphere"), "the direction 'sphere'"),
        (of(rule="adam"), "the rule 'adam'"),
        (of(rule="muon"), "the rule 'muon'"),
        (of(rule="adam", rule_settings={"momentum": 0.5, "state": "window", "window": 3}), "the rule 'adam'"),
        (of(rule="momentum", rule_settings=None), "the rule 'momentum'"),
        (with_momentum(momentum=0.5, state="auto", window=3), "the rule 'momentum'"),
        (with_momentum(momentum=0.5), "the rule 'momentum'"),
        (with_momentum(momentum=0.5, state="window"), "the rule 'momentum'"),
        (with_momentum(momentum=0.5, state="window", window=3, nesterov=True), "the rule 'momentum'"),
        (lambda contents: contents.pop(2), "line 3: it holds step 2, but step 1 comes next"),
        *(
            (lambda contents, to=to: contents.insert(5, {"rollback": to}),
             r"line 6: it goes back to step .*, after 4 steps\. Restore")
            for to in (4, 5, -1, True, False, "2", 1.0, None, [1])
        ),
        *(
            (lambda contents, note=note: contents.insert(1, {"note": note}), "line 2: its note is no object")
            for note in (1, "text", None, [1])
        ),
    ],
)  # fmt: skip
def test_a_log_that_is_not_understood_is_refused(change, message, path):
    small_run(path)
    reseal(path, change)
    with pytest.raises(LogError, match=message):
        read_log(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda contents: contents[-1].update(digest="0" * 64),
        lambda contents: contents[2].update(coefficients=[1.0]),
        lambda contents: contents[0].update(seed=6),
    ],
    ids=["digest", "coefficient", "seed"],
)
def test_weights_that_differ_from_the_end_line_are_noticed(change, path):
    small_run(path)
    reseal(path, change)
    with pytest.raises(LogError, match="differ from those that the run ended with"):
        replay(path, small_model())


def renamed() -> nn.Module:
    return nn.Sequential(nn.Identity(), *small_model())


def other_shape() -> nn.Module:
    net = small_model()
    net[2] = nn.Linear(2, 3)
    return net


def other_values() -> nn.Module:
    net = small_model()
    net[0].weight.data[0, 0] += 1e-6
    return net


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (renamed, "tunes .*which this model does not have"),
        (other_shape, r"2\.bias is float32 \[1\] in .*, but float32 \[3\] in this model"),
        (lambda: small_model(torch.bfloat16), "but bfloat16"),
        (other_values, "not the weights that the run .* began with"),
    ],
    ids=["names", "shape", "dtype", "values"],
)
def test_a_log_of_another_model_is_not_replayed(other, message, path):
    small_run(path)
    net = other()
    before = snapshot(net)
    with pytest.raises(LogError, match=message):
        replay(path, net)
    assert_same_bits(net, before)


@pytest.mark.parametrize("tied", [True, False], ids=["tied in the run", "tied in the model"])
def test_tied_weights_must_be_tied_in_both(tied, path):
    """Equal values are not enough: the run moved one tensor, or two."""

    def pair(tied: bool) -> nn.ModuleList:
        net = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        net[0].weight.data.fill_(0.5)
        net[1].weight.data.fill_(0.5)
        if tied:
            net[1].weight = net[0].weight
        return net

    net = pair(tied)
    optimizer = MeZO(net, lr=0.1, perturbation="copy")
    with StepLog(path, optimizer):
        optimizer.step(lambda: net[1](net[0](torch.ones(2))).sum())
    with pytest.raises(LogError, match="tied"):
        replay(path, pair(not tied))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_existing_log_is_not_overwritten(path):
    small_run(path)
    before = path.read_bytes()
    with pytest.raises(LogError, match="already holds a run"):
        StepLog(path, small_optimizer(small_model()))
    assert path.read_bytes() == before


def test_a_second_writer_is_refused(path):
    """It learns so before its weights are moved, and the first goes on undisturbed."""
    net, second = small_model(), small_model()
    optimizer = small_optimizer(net)
    with StepLog(path, optimizer):
        optimizer.step(loss_of(net))
        with pytest.raises(LogError, match="being written by another process"):
            StepLog.resume(path, small_optimizer(second)).close()
        assert_same_bits(second, snapshot(small_model()))
        optimizer.step(loss_of(net))
    assert replay(path, second) == 2
    assert_same_bits(second, snapshot(net))


def test_the_last_line_that_moved_the_weights_is_known_to_writer_and_reader(path):
    """A checkpoint that is saved then names it. Notes move nothing."""
    net = small_model()
    optimizer = small_optimizer(net)
    known = []
    with StepLog(path, optimizer) as log:
        assert log.step_check is None
        for step in range(3):
            optimizer.step(loss_of(net))
            log.note({"step": step})
            known.append(log.step_check)
        log.rolled_back(1)
        rolled = log.step_check
    lines = json_lines(path)
    assert known == [line["check"] for line in lines if "step" in line]
    assert rolled == next(line["check"] for line in lines if "rollback" in line)
    assert read_log(path).step_checks == [*known[:2], rolled]
    again = StepLog.resume(path, optimizer)
    assert again.step_check == rolled
    again.close()


def test_a_writer_of_another_process_is_noticed_until_it_ends(path):
    """Also when it cut the log, which replaces the file, and when it was killed, which leaves the lock's file behind."""
    script = """
        import pathlib, sys, time
        from forwardtune.trajectory.lock import LogLock
        lock = LogLock(pathlib.Path(sys.argv[1]))
        print("locked", flush=True)
        time.sleep(60)
    """
    small_run(path)
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "locked\n"
        path.with_name("copy").write_bytes(path.read_bytes())
        path.with_name("copy").replace(path)
        with pytest.raises(LogError, match="being written by another process"):
            StepLog.resume(path, small_optimizer(small_model()))
    finally:
        other.kill()
        other.communicate()
    assert path.with_name("steps.jsonl.lock").exists()
    StepLog.resume(path, small_optimizer(small_model())).close()
    assert not path.with_name("steps.jsonl.lock").exists()


def test_a_folder_is_made_and_an_impossible_one_refused(path):
    small_run(path.parent / "new" / "folder" / "steps.jsonl")
    path.write_text("a file")
    with pytest.raises(LogError, match="cannot be written"):
        StepLog(path / "steps.jsonl", small_optimizer(small_model()))


def test_a_failed_start_leaves_no_file(path):
    with pytest.raises((LogError, TypeError)):
        StepLog(path, small_optimizer(small_model()), run={"model": object()})
    assert not path.exists()


def test_weight_decay_cannot_change_under_a_log(path):
    net = small_model()
    optimizer = small_optimizer(net, weight_decay=0.1)
    log = StepLog(path, optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.2
    with pytest.raises(LogError, match="weight decay changed"):
        optimizer.step(loss_of(net))
    log.close()


def test_a_full_disk_costs_at_most_the_step_that_it_met(path):
    whole = small_run(path.with_name("whole.jsonl"), steps=6)

    net = small_model()
    optimizer = small_optimizer(net)
    log = StepLog(path, optimizer)
    train(optimizer, *[loss_of(net)] * 2)
    with file_size_limit(path.stat().st_size + 50), pytest.raises(LogError, match=r"could not be written.*make room"):
        optimizer.step(loss_of(net))
    after = small_model()
    replay(path.with_name("whole.jsonl"), after, steps=3)
    assert_same_bits(net, snapshot(after))  # a whole step, not half of one
    with file_size_limit(path.stat().st_size):
        log.close()
    read = read_log(path)
    assert (read.steps, read.torn) == (2, True)

    assert_same_bits(go_on(path), snapshot(whole))
    assert replay(path, small_model()) == 6


def test_a_log_is_never_written_with_a_gap(path):
    """Whoever goes on after a full disk either keeps a whole log, or is told that it no longer grows."""
    net = small_model()
    optimizer = small_optimizer(net)
    with suppress(LogError), StepLog(path, optimizer):
        optimizer.step(loss_of(net))
        with file_size_limit(path.stat().st_size + 50), pytest.raises(LogError):
            optimizer.step(loss_of(net))
        optimizer.step(loss_of(net))
    log = read_log(path)
    assert replay(log, small_model(), steps=log.steps) == log.steps


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "steps"),
    [
        (lambda path: os.truncate(path, path.stat().st_size - 1), 3),  # of the end line
        (lambda path: os.truncate(path, path.read_bytes().rindex(b'{"end"') - 1), 2),
        (lambda path: os.truncate(path, path.read_bytes().rindex(b'{"end"') - 30), 2),
        (lambda path: cut_log(read_log(path), 2), 2),
        (lambda path: None, 3),
    ],
    ids=["torn end", "torn newline", "torn step", "cut", "finished"],
)
def test_what_is_left_of_a_run_goes_on(left, steps, path):
    whole = small_run(path.with_name("whole.jsonl"), steps=6)
    small_run(path, steps=3)
    left(path)
    assert read_log(path).steps == steps
    assert_same_bits(go_on(path), snapshot(whole))
    log = read_log(path)
    assert (log.torn, log.end["end"]) == (False, 6)
    assert replay(log, small_model()) == 6


def test_skipped_steps_in_a_row_are_counted_across_a_resume(path):
    net = small_model()
    optimizer = small_optimizer(net, max_skipped=3)
    log = StepLog(path, optimizer)
    train(optimizer, *[lambda: math.nan] * 2)
    log.close()
    optimizer = small_optimizer(small_model(), max_skipped=3)
    with pytest.raises(forwardtune.NonFiniteLossError), StepLog.resume(path, optimizer):
        optimizer.step(lambda: math.nan)


def regrouped(net: nn.Module) -> MeZO:
    return small_optimizer([{"params": net[0].parameters()}, {"params": net[2].parameters()}], module=net)


def fewer(net: nn.Module) -> MeZO:
    net[2].bias.requires_grad_(False)
    return small_optimizer(net)


def with_settings(**settings: Any) -> Callable[[nn.Module], MeZO]:
    return lambda net: small_optimizer(net, **settings)


@pytest.mark.parametrize(
    ("make", "net", "message"),
    [
        (with_settings(seed=6), small_model, "another run: seed is 5 in the log, 6 here"),
        (with_settings(eps=2.0**-5), small_model, "another run: eps is 0.015625 in the log, 0.03125 here"),
        (with_settings(probes=2), small_model, "another run: probes is 1 in the log, 2 here"),
        (with_settings(direction="rademacher"), small_model, "direction is 'gaussian' in the log, 'rademacher' here"),
        (with_settings(weight_decay=0.1), small_model, "groups is .*0.0.* in the log, .*0.1.* here"),
        (regrouped, small_model, "groups is"),
        (fewer, small_model, r"1 tensors are tuned only in the log, such as 2\.bias"),
        (small_optimizer, renamed, "tensors are tuned only in"),
        (small_optimizer, other_shape, r"2\.bias is float32 \[1\] \(group 0\) in the log, float32 \[3\]"),
        (small_optimizer, other_values, "not the weights that the run .* began with"),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_another_run_is_refused_on_resuming(steps, make, net, message, path):
    small_run(path, steps=steps, finish=False)
    model = net()
    weights, data = snapshot(model), path.read_bytes()
    with pytest.raises(LogError, match=message):
        StepLog.resume(path, make(model)).close()
    assert_same_bits(model, weights)
    assert path.read_bytes() == data


def test_an_optimizer_that_has_taken_steps_goes_on_from_the_last_one_only(path):
    net = small_run(path, steps=3, finish=False)
    optimizer = small_optimizer(net)
    optimizer.fast_forward(read_log(path).records[:2])
    with pytest.raises(LogError, match="holds 3 steps, the optimizer has taken 2"):
        StepLog.resume(path, optimizer)
    optimizer.fast_forward(read_log(path).records)
    with StepLog.resume(path, optimizer):
        optimizer.step(loss_of(net))
    assert replay(path, small_model()) == 4


def test_a_step_after_the_end_makes_it_void_until_the_next(path):
    small_run(path)
    net = small_model()
    optimizer = small_optimizer(net)
    log = StepLog.resume(path, optimizer)
    assert read_log(path).end is not None
    optimizer.step(loss_of(net))
    assert read_log(path).end is None
    with pytest.raises(LogError, match=r"no end line.*steps=5"):
        replay(path, small_model())
    log.finish()
    log.close()
    assert read_log(path).end["end"] == 5
    again = small_model()
    assert replay(path, again) == 5
    assert_same_bits(again, snapshot(net))


def test_cutting_a_log_keeps_its_tail(path):
    small_run(path, steps=5)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    tail = path.with_name("steps.cut.jsonl")

    assert cut_log(read_log(path), 5) == read_log(path)
    assert path.read_bytes() == data
    assert not tail.exists()

    log = cut_log(read_log(path), 3)
    assert (log.steps, log.end) == (3, None)
    assert path.read_bytes() + tail.read_bytes() == data

    assert cut_log(log, 0).steps == 0
    assert path.read_bytes() == lines[0]
    assert tail.read_bytes() == b"".join(lines[4:] + lines[1:4])  # appended: nothing is ever lost
    assert sorted(file.name for file in path.parent.iterdir()) == [tail.name, path.name]


# The parent imports once and forks a process for each attempt, so that a dozen kills cost a second or two.
SURVIVOR = """
    import os, random, signal, sys, time
    from pathlib import Path

    import torch
    from torch import nn
    from forwardtune import MeZO, StepLog
    from forwardtune.trajectory import LogError, read_log

    STEPS, KILLS = 200, 12
    folder, rng = Path(sys.argv[1]), random.Random(0)
    torch.set_num_threads(1)

    def train(path):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(torch.bfloat16)
        inputs = torch.randn(STEPS, 3, 4, dtype=torch.bfloat16)
        optimizer = MeZO(net, lr=1e-2, seed=1, probes=2, weight_decay=0.1)
        if path.exists() and b"\\n" not in path.read_bytes():
            path.unlink()  # killed before the header was whole: the remedy that the error names
        log = StepLog.resume(path, optimizer) if path.exists() else StepLog(path, optimizer)
        with log:
            while optimizer.next_step < STEPS:
                batch = inputs[optimizer.next_step]
                optimizer.step(lambda: (net(batch) - 1).float().square().mean())

    def attempt(path):
        child = os.fork()
        if child:
            return child
        try:
            train(path)
            os._exit(0)
        finally:
            os._exit(1)

    def size(path):
        return path.stat().st_size if path.exists() else 0

    whole, path = folder / "whole.jsonl", folder / "steps.jsonl"
    train(whole)
    kills = tears = 0
    while kills < KILLS:
        child = attempt(path)
        if kills % 4 == 0:  # while it starts, or reads and replays the log
            time.sleep(rng.uniform(0, 0.02))
        else:
            target = size(path) + rng.uniform(0, size(whole) / KILLS)
            while size(path) < target and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        kills += 1
        # The kernel takes a line in one piece. A power cut does not, so some last lines are torn by hand.
        last = path.read_bytes().splitlines(keepends=True)[1:][-1:] if path.exists() else []
        if last and rng.random() < 0.5:
            os.truncate(path, size(path) - rng.randrange(1, len(last[0])))
            tears += 1
    killed_at = read_log(path).steps
    assert os.waitpid(attempt(path), 0)[1] == 0
    print(kills, tears, killed_at, read_log(whole).end["digest"], read_log(path).end["digest"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_survives_kill_9_at_any_moment(tmp_path):
    """Killed a dozen times and resumed each time, it ends with the weights of a run that never stopped."""
    kills, tears, killed_at, expected, digest = python(SURVIVOR, tmp_path).split()
    assert int(kills) == 12
    assert int(tears) > 2
    assert 20 < int(killed_at) < 200  # the kills fell into the run
    assert digest == expected
