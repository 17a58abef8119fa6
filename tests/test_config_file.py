"""``train --config FILE``: the file says what options say, and options win."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from forwardtune.cli.options import flag, read_config
from forwardtune.config import SCHEMA, Refusal, Train, options, refusals
from forwardtune.errors import InputError
from forwardtune.trajectory import read_log
from support.command import Setting, cli, done, refused, write_task
from test_refusals import ABSENT, named


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("config")))


def write(path: Path, **settings: Any) -> Path:
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in settings.items()}))
    return path


def test_a_file_alone_describes_a_run_which_the_command_line_may_change(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"version: 1\nmodel: {setting.model}\ntask: {setting.task}\noutput-dir: {run}\nsteps: 2\nlr: 1e-3\neps: 1e-3\n"
        "batch-size: 2\ndevice: cpu\nno-before: true\nsave-steps: 1\n"
    )
    done("train", "--config", file)
    header = read_log(run / "steps.jsonl").header["run"]
    assert (header["lr"], header["batch_size"], header["steps"], header["no_before"]) == (1e-3, 2, 2, True)
    # A flag wins before the file and behind it, and a run is resumed with its file.
    for arguments in (["--steps", 3, "--config", file], ["--config", file, "--steps", 4]):
        done("train", *arguments, "--resume")
    assert read_log(run / "steps.jsonl").steps == 4
    done("train", "--batch-size", 4, "--config", file, "--output-dir", tmp_path / "other")
    assert read_log(tmp_path / "other" / "steps.jsonl").header["run"] == {**header, "batch_size": 4, "group_size": 2}
    with refused(run, f"the run in {run} has --batch-size 2, not 4") as told:
        told(cli("train", "--config", file, "--resume", "--batch-size", 4))
    asked = cli("plan", "--config", file, "--batch-size", 4, "--json", "--alone")
    assert asked.code == 0, asked.err
    assert json.loads(asked.out)["settings"]["batch_size"] == 4
    assert "--lr 0.001" in asked.err


def test_every_setting_can_be_in_a_file(tmp_path: Path) -> None:
    values = {
        "device": "cpu",
        "no_before": True,
        "time_budget": "2m",
        "lr": "auto",
        "eps": "1e-3",
        "report_to": "wandb",
    }
    for name, one in options(Train).items():
        values.setdefault(name, one.choices[-1] if one.choices else (one.default if one.default is not None else "3"))
    read = read_config(str(write(tmp_path / "run.yaml", output_dir="out", **values)), "train")
    assert read.pop("output_dir") == "out"
    assert read.keys() == options(Train).keys()
    assert (read["time_budget"], read["lr"], read["eps"], read["patience"]) == (120.0, "auto", 1e-3, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 3\nstpes: 4", "unknown key 'stpes'; did you mean steps?"),
        ("batch_size: 3", "unknown key 'batch_size'; did you mean batch-size?"),
        ("learning_rate: 3", "unknown key 'learning_rate'; did you mean lr?"),
        ("output_dir: x", "unknown key 'output_dir'; did you mean output-dir?"),
        ("lora: x", "unknown key 'lora'; it may be short for lora-rank or lora-alpha or lora-targets"),
        ("xyzzy: x", "unknown key 'xyzzy': keys are the options of the command line, without --"),
        ("resume: true", "resume is an option of the command line alone: give --resume there"),
        ("version: 2", f"version 2 is of another forwardtune, and this one reads version {SCHEMA}"),
        ("version: true", "version True is of another"),
        ("steps: 1.5", "steps cannot be 1.5: it must be a whole number"),
        ("lr: fast", "lr cannot be 'fast': 'fast' is neither a positive number nor 'auto'"),
        ("time-budget: soon", "time-budget cannot be 'soon': 'soon' is no length of time"),
        ("rule: adm", "rule cannot be 'adm': choose sgd, sign, momentum, adam, muon; did you mean adam?"),
        ("no-before: 1", "no-before cannot be 1: it is a flag, write true or false"),
        ("lora-targets: [q_proj]", "give a number or text"),
        ("output-dir: 3", "output-dir cannot be 3"),
        ("steps: 1\nsteps: 2", "'steps' is there twice"),
        ("- steps", "must hold keys such as model, task and steps"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with refused(tmp_path, re.escape(words)) as ran:
        ran(told := cli("train", "--config", file, "--output-dir", tmp_path / "run"))
    assert str(file) in told.err


def test_a_file_that_is_not_there_and_a_folder_that_nothing_names(tmp_path: Path) -> None:
    with refused(tmp_path, "absent.yaml: there is no such file of --config") as ran:
        ran(cli("train", "--config", "absent.yaml"))
    file = write(tmp_path / "run.yaml", steps=3)
    with refused(tmp_path, "required: --output-dir") as ran:
        ran(cli("train", "--config", file))


@pytest.mark.parametrize("row", refusals("train"), ids=named)
def test_a_file_is_refused_by_the_same_table(tmp_path: Path, row: Refusal) -> None:
    settings = {name: value for name, value in {**ABSENT, **row.example}.items() if value is not None}
    file = write(tmp_path / "run.yaml", **settings)
    with refused(tmp_path, "") as ran:
        ran(told := cli("train", "--config", file, "--output-dir", tmp_path / "run"))
    message = row.message(Train(**read_config(str(file), "train")), flag)
    where = "" if "is missing" in message else f"{file}: "
    assert told.err == f"forwardtune: error: {where}{message}\n"


def test_an_option_may_mend_what_the_file_says(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", **ABSENT, rule="sgd", momentum=0.5)
    refusal = cli("train", "--config", file, "--output-dir", "x").err
    assert f"{file}: --momentum belongs to --rule momentum or --rule muon: leave it out" in refusal
    assert "absent.yaml" in cli("train", "--config", file, "--output-dir", "x", "--rule", "momentum").err
    with pytest.raises(InputError, match="unknown key"):
        read_config(str(write(file, shots=3)), "train")
