"""The command line and Trainer in several processes: the run of one process, told by rank 0, kept by all."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from forwardtune import MeZOTrainer
from forwardtune.trajectory import read_log
from support import tiny_model, tokenizer
from support.command import FREE_TEXT, Ran, Setting, cli, done, flags, read, write_task
from support.logs import log_lines
from support.ranks import free_port, ranks, ranks_with_a_kill
from support.trainers import quiet_config

pytestmark = pytest.mark.usefixtures("short_collections")


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


def launched(count: int, *arguments: object, **environment: str) -> list[Ran]:
    """A command on so many ranks, in the order of ranks."""

    def work(rank: int) -> Ran:
        os.environ.update(environment)
        return cli(*arguments)

    found = ranks(count, work, within=120)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    for other in found[1:]:
        assert (other.out, other.err) == ("", "")
    return found


def same_run(one: Path, other: Path) -> None:
    """Two folders hold the same run: log, weights, and what was measured."""
    first, second = log_lines(one), log_lines(other)
    for header in (first[0], second[0]):
        header.pop("workers", None)
        header["run"] = {name: value for name, value in header["run"].items() if name not in ("parts", "output_dir")}
    assert first == second
    weights = [path.name for path in one.glob("*.safetensors")]
    assert weights
    for name in weights:
        assert (one / name).read_bytes() == (other / name).read_bytes()
    for name in ("outcomes.json", "dev.jsonl", "completions.jsonl"):
        assert (one / name).exists() == (other / name).exists()
        if (one / name).exists():
            assert read(one / name) == read(other / name)
    for split in ("before", "test"):
        assert read(one)[split] == read(other)[split]


RUNS: dict[str, tuple[int, dict[str, str | None], dict[str, Any]]] = {
    "queries": (2, {}, {}),
    "parts": (3, {}, {"parts": 4}),
    "search": (2, {}, {"lr": "auto", "eps": "auto", "steps": 60, "rule": "momentum"}),
    "lora": (2, {}, {"tune": "lora", "parts": 2, "eval_steps": 2, "patience": 2}),
    "directions of examples": (3, {}, {"assignment": "example", "parts": 3}),
    "generated": (3, FREE_TEXT, {"objective": "loss + f1", "parts": 4, "temperature": 0.7, "log_completions": 2}),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_of_several_ranks_is_that_of_one_process(setting: Setting, tmp_path: Path, run: str) -> None:
    count, task, changes = RUNS[run]
    if task:
        setting = Setting(setting.model, write_task(tmp_path / "task", **task))
    done(*setting.train(tmp_path / "one", **changes))
    first, *_ = launched(count, *setting.train(tmp_path / "several", **changes))
    assert first.code == 0, first.err
    same_run(tmp_path / "one", tmp_path / "several")
    for rank in range(1, count):
        own = tmp_path / "several" / "ranks" / str(rank)
        assert log_lines(own) == log_lines(tmp_path / "several")
        assert not (own / "model.safetensors").exists()


@pytest.mark.parametrize("lost", [0, 1])
def test_whose_log_is_lost_takes_it_from_another_rank(setting: Setting, tmp_path: Path, lost: int) -> None:
    """Killed after four steps, with the disk of one rank lost; three ranks go on where there were two."""
    done(*setting.train(tmp_path / "one", parts=2, tune="lora"))
    several = tmp_path / "several"
    launched(2, *setting.train(several, parts=2, tune="lora"))
    for folder in (several, several / "ranks" / "1"):
        path = folder / "steps.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        steps = [i for i, line in enumerate(lines) if line.startswith(b'{"step"')]
        path.write_bytes(b"".join(lines[: steps[4]]) + lines[steps[4]][:20])  # torn
    for path in [several] if lost == 0 else [several / "ranks" / "1"]:
        for file in [file for file in path.iterdir() if file.is_file()]:
            file.unlink()
    first, *_ = launched(3, *setting.resume(several))
    assert first.code == 0, first.err
    same_run(tmp_path / "one", several)
    assert log_lines(several / "ranks" / "2")[1:] == log_lines(several)[1:]


def test_what_a_launcher_starts_again_goes_on(setting: Setting, tmp_path: Path) -> None:
    done(*setting.train(tmp_path / "one", save_steps=2))
    several = tmp_path / "several"
    launched(2, *setting.train(several, steps=3, save_steps=2))
    first, _ = launched(2, *setting.train(several, save_steps=2), TORCHELASTIC_RESTART_COUNT="1")
    assert first.code == 0, first.err
    lines = log_lines(several)
    assert [line for line in lines if "step" in line] == [line for line in log_lines(tmp_path / "one") if "step" in line]
    refused, _ = launched(2, *setting.train(several, save_steps=2))
    assert refused.code == 2
    assert "holds another run" in refused.err


def test_evaluation_is_divided(setting: Setting, tmp_path: Path) -> None:
    """A rank evaluates its batches alone, and the numbers are those of one process."""
    expected = json.loads(done(*setting.eval(batch_size=2, shots=2, calibrate=True)).out)["test"]
    first, _ = launched(2, *setting.eval(batch_size=2, shots=2, calibrate=True))
    assert json.loads(first.out)["test"] == expected


def test_kills_of_random_ranks_at_random_moments_lose_nothing(setting: Setting, tmp_path: Path) -> None:
    """The launcher starts the group again after each, with two ranks or three. ``FORWARDTUNE_KILLS`` says how many kills."""
    kills, draw = int(os.environ.get("FORWARDTUNE_KILLS", "12")), random.Random(0)
    changes = {"steps": 20 + 12 * kills, "parts": 2, "eval_steps": 30, "rule": "momentum", "no_before": True}
    changes |= {"worker_timeout": "20s"}
    done(*setting.train(tmp_path / "one", **changes))
    several, found, steps = tmp_path / "several", [], []
    for restart in range(kills + 1):
        count = draw.choice((2, 3))

        def work(rank: int, restart: int = restart) -> int:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
            return cli(*setting.train(several, **changes)).code

        last = restart == kills
        victim, moment = draw.randrange(count), 600.0 if last else draw.uniform(0.1, 2.0)
        found.append(ranks_with_a_kill(count, work, victim, moment))
        steps.append(read_log(several / "steps.jsonl").steps if (several / "steps.jsonl").exists() else 0)
        assert last or all(code in (1, None) for code in found[-1]), found[-1]
    noticed = [code for codes in found[:-1] for code in codes].count(1)
    print(f"steps after each kill: {steps}; {noticed} survivors saw it by themselves")
    assert noticed > kills // 2
    assert found[-1] == [0] * len(found[-1])
    assert len(set(steps)) > kills // 3
    same_run(tmp_path / "one", several)
