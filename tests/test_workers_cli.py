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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from forwardtune import MeZOTrainer
from forwardtune.trajectory import read_log
from support import tiny_model, tokenizer
from support.command import FREE_TEXT, Ran, Setting, cli, done, read, write_task
from support.logs import log_lines
from support.ranks import free_port, ranks, ranks_with_a_kill
from support.trainers import quiet_config


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
        assert read(one).get(split) == read(other).get(split)


RUNS: dict[str, tuple[int, dict[str, str | None], dict[str, Any]]] = {
    "queries": (2, {}, {}),
    "parts": (3, {}, {"parts": 4}),
    "search": (2, {}, {"lr": "auto", "eps": "auto", "steps": 60, "rule": "momentum"}),
    "lora": (2, {}, {"tune": "lora", "parts": 2, "eval_steps": 2, "patience": 2}),
    "inputs": (2, {}, {"tune": "lora", "lora_init": "eva", "freeze_a": True}),
    "directions of examples": (3, {}, {"assignment": "example", "perturbation": "side_path", "parts": 3}),
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
    assert [line for line in lines if "step" in line] == [
        line for line in log_lines(tmp_path / "one") if "step" in line
    ]
    refused, _ = launched(2, *setting.train(several, save_steps=2))
    assert refused.code == 2
    assert "holds another run" in refused.err


def test_evaluation_is_divided(setting: Setting, tmp_path: Path) -> None:
    """A rank evaluates its batches alone, and the numbers are those of one process."""
    expected = json.loads(done(*setting.eval(batch_size=2, shots=2, calibrate=True)).out)["test"]
    first, _ = launched(2, *setting.eval(batch_size=2, shots=2, calibrate=True))
    assert json.loads(first.out)["test"] == expected


def moment(draw: random.Random, log: Path) -> Callable[[], bool]:
    """True from a random moment on: after a time, or when a log has grown by so many bytes, and a little later."""
    begun, size = time.monotonic(), log.stat().st_size if log.exists() else 0
    after, growth = draw.choice([(draw.uniform(0.1, 2.0), 0), (60.0, draw.randrange(1, 2000))])
    return lambda: (
        time.monotonic() - begun > after or bool(growth and log.exists() and log.stat().st_size > size + growth)
    )


def test_kills_of_random_ranks_at_random_moments_lose_nothing(setting: Setting, tmp_path: Path) -> None:
    """The launcher starts the group again after each, with two ranks or three. ``FORWARDTUNE_KILLS`` says how many kills."""
    kills, draw = int(os.environ.get("FORWARDTUNE_KILLS", "8")), random.Random(0)
    changes = {"steps": 10 + 20 * kills, "parts": 2, "eval_steps": 25, "rule": "momentum", "no_before": True}
    changes |= {"worker_timeout": "20s"}
    done(*setting.train(tmp_path / "one", **changes))
    several, found, steps = tmp_path / "several", [], []
    for restart in range(kills + 1):
        count = draw.choice((2, 3))

        def work(rank: int, restart: int = restart) -> int:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
            return cli(*setting.train(several, **changes)).code

        last = restart == kills
        victim = draw.randrange(count)
        if last:
            found.append(ranks(count, work, within=120))
        else:
            found.append(ranks_with_a_kill(count, work, victim, moment(draw, several / "steps.jsonl")))
        steps.append(read_log(several / "steps.jsonl").steps if (several / "steps.jsonl").exists() else 0)
        if found[-1] == [0] * count:  # it was over before it could be killed
            assert restart > kills // 2
            break
        assert not last, found[-1]
        assert all(code in (1, None) for code in found[-1]), found[-1]
    noticed = [code for codes in found[:-1] for code in codes].count(1)
    print(f"steps after each kill: {steps}; {noticed} survivors saw it by themselves")
    assert noticed > kills // 2
    assert found[-1] == [0] * len(found[-1])
    assert len(set(steps)) > kills // 3
    same_run(tmp_path / "one", several)


# --- Trainer ----------------------------------------------------------------------------------------------------------


def dataset(rows: int = 10) -> Dataset:
    tokens = torch.randint(5, 300, (rows, 9), generator=torch.Generator().manual_seed(0)).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": [row[:-3] + [-100] * 3 for row in tokens]})


def trained(folder: Path, parts: int = 1, **changes: Any) -> tuple[Any, dict[str, float]]:
    config = quiet_config(folder, **{"max_steps": 5, "learning_rate": 1e-3, "eps": 1e-3, "parts": parts, **changes})
    trainer = MeZOTrainer(
        model=tiny_model(), args=config, train_dataset=dataset(), eval_dataset=dataset(19), processing_class=tokenizer(),
        compute_metrics=lambda predicted: {"mean": float(predicted.predictions.mean())},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    return trainer, {name: value for name, value in metrics.items() if name in ("eval_loss", "eval_mean")}


TRAINERS: dict[str, tuple[int, dict[str, Any]]] = {
    "queries": (2, {"gradient_accumulation_steps": 2}),
    "parts": (3, {"parts": 3, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": "auto", "max_steps": 9}),
    "accumulated parts": (2, {"parts": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}),
    "checkpoints": (2, {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
                        "load_best_model_at_end": True, "max_steps": 6}),
}  # fmt: skip


@pytest.mark.parametrize("run", TRAINERS)
def test_trainer_in_several_processes_is_trainer_in_one(tmp_path: Path, run: str) -> None:
    count, changes = TRAINERS[run]
    one, expected = trained(tmp_path / "one", **changes)

    def work(rank: int) -> tuple[str, dict[str, float], int, str]:
        trainer, metrics = trained(tmp_path / "several", **changes)
        assert type(trainer.model_wrapped) is type(trainer.model)
        return trainer.mezo.tuned.digest(), metrics, trainer.args.process_index, str(trainer.args.device)

    found = ranks(count, work, within=120)
    assert found == [(one.mezo.tuned.digest(), expected, rank, "cpu") for rank in range(count)]
    lines = [log_lines(path) for path in (tmp_path / "one", tmp_path / "several", tmp_path / "several" / "ranks" / "1")]
    for header, *_ in lines:
        header.pop("workers", None)
    assert lines[0] == lines[1] == lines[2]
    checkpoints = {path.name for path in (tmp_path / "several").rglob("checkpoint-*")}
    assert checkpoints == {path.name for path in (tmp_path / "one").glob("checkpoint-*")}


def test_a_script_that_is_started_again_goes_on(tmp_path: Path) -> None:
    """The lines of the script stay as they are: the launcher says that it was started before."""
    one, _ = trained(tmp_path / "one", parts=2)

    def work(rank: int, restarts: int, steps: int) -> str:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts)
        trainer, _ = trained(tmp_path / "several", parts=2, max_steps=steps)
        return str(trainer.mezo.tuned.digest())

    ranks(2, lambda rank: work(rank, 0, 3), within=120)
    assert ranks(3, lambda rank: work(rank, 1, 5), within=120) == [one.mezo.tuned.digest()] * 3
    refused = ranks(2, lambda rank: work(rank, 0, 7), within=120)
    assert all("already holds a run" in str(error) for error in refused)


def test_parts_have_the_loss_of_the_minibatch(tmp_path: Path) -> None:
    """Also where the loss is a mean over tokens: their number is that of the whole minibatch."""
    whole, parted = (read_log(trained(tmp_path / str(parts), parts)[0].step_log).records for parts in (1, 3))
    assert parted[0].losses == pytest.approx(whole[0].losses, rel=1e-5)


def test_a_minibatch_that_is_divided_between_processes_is_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        config = quiet_config(tmp_path, max_steps=2, learning_rate=1e-3, eps=1e-3)
        MeZOTrainer(model=tiny_model(), args=config, train_dataset=dataset().shard(2, rank)).train()

    for error in ranks(2, work):
        assert "rank 1 has another minibatch than rank 0" in str(error)


# --- launches ---------------------------------------------------------------------------------------------------------


def test_bad_launches_are_told_once(setting: Setting, tmp_path: Path) -> None:
    """One message, of rank 0, and exit code 2 on all of them; nothing is left behind."""
    elsewhere = shutil.copytree(setting.task.parent, tmp_path / "other") / "task.yaml"
    lines = (elsewhere.parent / "train.jsonl").read_text().splitlines()
    (elsewhere.parent / "train.jsonl").write_text("\n".join(lines[::-1]))
    (tmp_path / "file").write_text("")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("a step has 2 evaluations, and 3 workers", {"parts": 1}),
        ("rank 1 has seed 1, rank 0 seed 0", {"of_rank": "seed", 1: 1}),
        ("rank 2 has data with the digest", {"of_rank": "task", 2: elsewhere}),
        ("rank 1: .*no such task file", {"of_rank": "task", 1: tmp_path / "nowhere.yaml"}),
        ("rank 1: cannot write to .*/file: every rank", {"of_rank": "output_dir", 1: tmp_path / "file" / "run"}),
        ("--method adam", {"method": "adam", "parts": None}),
        ("--steps must be positive", {"steps": 0}),
    ]
    for number, (words, changes) in enumerate(cases):
        folder = tmp_path / str(number)

        def work(rank: int, folder: Path = folder, changes: dict[str, Any] = changes) -> Ran:
            own = {name: value for name, value in changes.items() if isinstance(name, str) and name != "of_rank"}
            if rank in changes:
                own[changes["of_rank"]] = changes[rank]
            return cli(*setting.train(own.pop("output_dir", folder), **{"parts": 2, "no_before": True, **own}))

        found = ranks(3, work)
        assert [ran.code for ran in found] == [2, 2, 2], (words, found)
        assert re.search(words, found[0].err), found[0].err
        assert found[0].err.count("error: ") == 1
        assert all((ran.out, ran.err) == ("", "") for ran in found[1:])
        assert not (folder / "steps.jsonl").exists()


LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"),
    "accelerate": (
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "PORT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_that_people_have(setting: Setting, tmp_path: Path, launcher: str) -> None:
    """One process is killed on the way where the launcher starts it again."""
    changes = {"steps": 60, "no_before": True}
    done(*setting.train(tmp_path / "one", **changes))
    start = [str(free_port()) if word == "PORT" else word for word in LAUNCHERS[launcher]]
    several = tmp_path / "several"
    process = subprocess.Popen(
        [sys.executable, *start, "-m", "forwardtune", *map(str, setting.train(several, **changes))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, killed = several / "steps.jsonl", False
    while launcher == "torchrun" and process.poll() is None and not killed:
        if log.exists() and log.read_bytes().count(b'"step"') > 5:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert killed is (launcher == "torchrun")
    same_run(tmp_path / "one", several)
