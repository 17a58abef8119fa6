"""How the command line speaks: help, hints, versions, where text goes, and what it does with what is there already."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forwardtune.cli import callbacks
from forwardtune.cli.commands import make_parser
from forwardtune.trajectory import read_log
from support.command import STEPS, Setting, cli, done, files, refused, weights, write_task


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done(*setting.train(folder, save_steps=2))
    return folder


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", commands())
def test_every_command_has_an_example_that_it_understands(command: str) -> None:
    text = done(command, "--help").out
    (example,) = re.findall(r"^example:\n  (forwardtune .*)$", text, re.MULTILINE)
    words = shlex.split(example)
    assert words[1] == command
    assert make_parser().parse_args(words[1:]).run


def test_help_shows_the_five_that_matter_first_and_the_rest_in_groups() -> None:
    text = done("train", "--help").out
    groups = re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)
    assert groups[:4] == ["what matters first", "model and data", "method", "run"]
    first = re.findall(r"^  (--[\w-]+)", text.split("what matters first:")[1].split("model and data:")[0], re.MULTILINE)
    assert first == ["--model", "--task", "--time-budget", "--tune", "--output-dir"]
    assert "--rule" in text.split("method:")[1].split("run:")[0]
    for name in make_parser().parse_args(["train"]).__dict__.keys() - {"run", "version", "verbose"}:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["trian"], "invalid choice: 'trian'.*did you mean train"),
        (["train", "--rule", "momentun"], "did you mean momentum"),
        (["train", "--modle", "x"], "did you mean --model"),
        (["chat", "--mod", "x"], "did you mean --model"),
        (["predict", "--input", "a", "--out", "b"], "--output"),
    ],
)
def test_a_misspelt_word_is_refused_with_the_one_that_was_meant(words: list[str], meant: str, tmp_path: Path) -> None:
    with refused(tmp_path, meant) as ran:
        ran(cli(*words))


def test_versions_for_a_report_of_a_fault() -> None:
    assert done("--version").out.count("\n") == 1
    told = done("--version", "--verbose").out
    for name in ("torch", "transformers", "peft", "huggingface_hub"):
        assert f"\n{name} {importlib.metadata.version(name)}\n" in told
    assert f"python {sys.version.split()[0]}" in told
    assert cli("--verbose").code == 2


# --- where text goes --------------------------------------------------------------------------------------------------


def test_nothing_goes_back_where_nobody_watches(setting: Setting, tmp_path: Path) -> None:
    """No carriage return, no colour: whatever is written to files can be read there."""
    command = [sys.executable, "-m", "forwardtune", *setting.train(tmp_path / "run", lr="auto", eps="auto", steps=30)]
    ran = subprocess.run(list(map(str, command)), capture_output=True)  # in bytes: text would have other line ends
    assert ran.returncode == 0, ran.stderr
    assert not re.search(rb"[\r\x1b]", ran.stdout + ran.stderr)
    assert re.search(rb"^tuning: 100%.*30/30", ran.stderr, re.MULTILINE)


def test_no_color_is_heeded(setting: Setting, tmp_path: Path) -> None:
    """At a terminal too."""
    import pty

    own, other = pty.openpty()
    command = [sys.executable, "-m", "forwardtune", *map(str, setting.eval())]
    with subprocess.Popen(command, stdout=other, stderr=other, env={**os.environ, "NO_COLOR": "1"}) as child:
        os.close(other)
        shown = b""
        try:
            while piece := os.read(own, 4096):
                shown += piece
        except OSError:  # the other end was closed
            pass
    assert child.returncode == 0, shown
    assert b"loading" in shown
    assert not re.search(rb"\x1b\[[0-9;]*m", shown)


# --- folders of runs --------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run_is_as_good_as_its_log(setting: Setting, finished: Path, tmp_path: Path) -> None:
    assert done("inspect", finished).out == done("inspect", finished / "steps.jsonl").out
    done("replay", finished, "--model", setting.model, "--output-dir", tmp_path / "again")
    assert weights(tmp_path / "again") == weights(finished)
    done("export", finished, "--output", tmp_path / "run.safetensors")
    with refused(tmp_path, "holds no steps.jsonl: give the folder of a run") as ran:
        ran(cli("inspect", tmp_path))


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "none"])
def test_a_run_that_is_not_finished_names_what_there_is(
    setting: Setting, finished: Path, tmp_path: Path, saved: bool
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lines = (finished / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (run / "steps.jsonl").write_bytes(b"".join(lines[:6]))
    for step in (2, 4) if saved else ():
        shutil.copytree(finished / f"checkpoint-{step}", run / f"checkpoint-{step}")
    there = f"last checkpoint is {run}/checkpoint-4" if saved else "no checkpoint"
    rest = f"forwardtune replay {run} --steps 5.*forwardtune train --output-dir {run} --resume"
    for command in ("eval", "predict", "chat"):
        more = {"eval": ["--task", setting.task], "predict": ["--input", setting.task.parent / "test.csv"]}.get(
            command, []
        )
        more += ["--output", tmp_path / "out.csv"] if command == "predict" else []
        if command == "predict":
            (tmp_path / "new.csv").write_text("text\na film\n")
            more[1] = tmp_path / "new.csv"
        with refused(tmp_path, f"not finished.*{there}.*{rest}") as ran:
            ran(cli(command, "--model", run, *more))
    if saved:
        done(*setting.eval(model=run / "checkpoint-4"))


def test_overwrite_moves_the_old_run_aside(setting: Setting, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = files(run)
    with refused(tmp_path, "--resume to go on with it, --overwrite to move it aside") as ran:
        ran(cli(*setting.train(run)))
    for number in (1, 2):
        ran_again = done(*setting.train(run, overwrite=True, seed=number))
        assert f"what was in {run} is in {run}.{number} now" in ran_again.err
    assert files(tmp_path / "run.1") == before
    seeds = [read_log(tmp_path / name / "steps.jsonl").header["seed"] for name in ("run.2", "run")]
    assert seeds == [1, 2]


def test_overwrite_takes_nothing_that_the_run_reads(setting: Setting, finished: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """And a command that is refused moves nothing."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for changes, words in (
        ({"model": run}, "holds the --model"),
        ({"resume": True}, "leave one of them out"),
        ({"task": tmp_path / "none.yaml"}, "no such task file"),
        ({"lr": 0}, "lr"),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli(*setting.train(run, overwrite=True, **changes)))
    monkeypatch.chdir(run)
    with refused(tmp_path, "is where the command runs") as ran:
        ran(cli(*setting.train(Path(), overwrite=True)))


def test_a_finished_run_says_what_to_do_next(setting: Setting, tmp_path: Path) -> None:
    """The commands that it names are understood."""
    run = tmp_path / "a run"
    told = done(*setting.train(run)).err
    shown = re.findall(r"^  (forwardtune .*)$", told.split("\nnext:\n")[1], re.MULTILINE)
    assert [line.split()[1] for line in shown] == ["predict", "chat", "report"]
    for line in shown:
        options = make_parser().parse_args(shlex.split(line)[1:])
        assert str(run) in (getattr(options, "model", None), *getattr(options, "folder", []))
    assert f"in {STEPS} steps" in told


def test_a_shell_completes_commands_and_options(tmp_path: Path) -> None:
    """By bash itself."""
    script = tmp_path / "completion.bash"
    script.write_text(cli("--print-completion", "bash").out)

    def completed(*words: str) -> list[str]:
        line = f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_forwardtune; echo ${{COMPREPLY[@]}}"
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path
        ).stdout.split()

    assert completed("forwardtune", "pre") == ["predict"]
    assert completed("forwardtune", "train", "--quant") == ["--quantize"]
    assert completed("forwardtune", "train", "--quantize", "n") == ["nf4"]
    (tmp_path / "mine.yaml").touch()
    assert completed("forwardtune", "train", "--task", "mi") == ["mine.yaml"]


# --- memory that libraries keep -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, "7"])
def test_what_libraries_keep_is_bounded_unless_the_user_says_how(
    setting: Setting, tmp_path: Path, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if own is not None:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", own)
    trimmed: list[int] = []
    monkeypatch.setattr(callbacks, "_TRIMMED_EVERY", 0.0)
    monkeypatch.setattr(callbacks.memory, "trim", lambda: trimmed.append(1))
    done(*setting.train(tmp_path / "run"))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == (own or "128")
    assert len(trimmed) >= STEPS
