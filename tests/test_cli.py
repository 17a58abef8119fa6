"""The command line, as a user meets it: what it writes, what it says, and how a run survives whatever ends it."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import support
from forwardtune import MeZO, StepLog
from forwardtune.trajectory import read_log, replay
from support.command import FREE_TEXT, STEPS, Setting, cli, done, files, process, read, refused, weights, write_task
from support.logs import log_lines
from support.ranks import forked

ABSENT_DEVICE = "mps" if torch.cuda.is_available() else "cuda"


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert done(*setting.train(folder)).out == ""  # without --json
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# --- what a run leaves behind ------------------------------------------------------------------------------------


def test_train_writes_an_ordinary_model_folder(setting: Setting, finished: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(setting.model)
    assert replay(finished / "steps.jsonl", expected) == STEPS
    found = AutoModelForCausalLM.from_pretrained(finished)
    support.assert_same_bits(found, support.snapshot(expected))
    assert weights(finished) != weights(setting.model)
    written = {path.name for path in finished.iterdir()}
    results = {"metrics.json", "outcomes.json", "history.jsonl", "dev.jsonl"}
    assert {"config.json", "tokenizer.json", "steps.jsonl"} | results <= written
    assert "initial.safetensors" not in written  # there is no adapter
    assert not list(finished.glob("*.partial"))
    assert not list(finished.glob("checkpoint-*"))


def test_metrics_say_what_the_run_did(setting: Setting, finished: Path) -> None:
    metrics = read(finished)
    assert {"seconds", "seconds_per_step", "peak_memory_bytes", "inference_peak_memory_bytes"} <= metrics.keys()
    log = read_log(finished / "steps.jsonl")
    assert metrics["seconds"] == pytest.approx(sum(record.seconds for record in log.records))
    assert metrics["seconds_per_step"] == pytest.approx(metrics["seconds"] / STEPS)
    assert metrics["peak_memory_bytes"] > 2**20 < metrics["inference_peak_memory_bytes"]
    for when, model in (("before", setting.model), ("test", finished)):
        assert json.loads(cli(*setting.eval(model=model, batch_size=4)).out)["test"] == metrics[when]
    assert metrics["before"]["loss"] != metrics["test"]["loss"]
    for key, value in (("command", "train"), ("method", "mezo"), ("model", str(setting.model)), ("task", "task")):
        assert metrics[key] == value
    assert (metrics["metric"], metrics["steps"], metrics["skipped_steps"]) == ("accuracy", STEPS, 0)
    assert (metrics["best_step"], metrics["truncated_prompts"]) == (STEPS, 0)
    assert metrics["splits"] == {"train": 11, "dev": 3, "test": 6}
    recorded = dict(log.header["run"])
    assert metrics["split_rule"] == recorded.pop("split_rule") == "forwardtune"
    assert metrics["settings"].items() >= recorded.items()
    assert log.header["run"].items() >= {"lr": 1e-3, "eps": 1e-3, "steps": STEPS, "batch_size": 4, "seed": 0}.items()


def test_stdout_carries_json_alone(setting: Setting, tmp_path: Path) -> None:
    """In a process of its own, so that nothing any library prints is missed."""
    with process(*setting.train(tmp_path / "run", json=True)) as train:
        out, err = train.communicate()
    assert train.returncode == 0, err
    assert out.count("\n") == 1
    assert json.loads(out) == read(tmp_path / "run")
    for words in ("before", "after", "peak memory", "s a step", str(tmp_path / "run")):
        assert words in err
    assert "Traceback" not in err
    assert "Warning" not in err


@pytest.mark.parametrize("flag", [[], ["--json"]], ids=["plain", "json"])
def test_eval_prints_one_json_object(setting: Setting, flag: list[str]) -> None:
    ran = done(*setting.eval(), *flag)
    assert ran.out.count("\n") == 1
    result = json.loads(ran.out)
    found = [result[key] for key in ("command", "method", "model", "task", "metric")]
    assert found == ["eval", "zero-shot", str(setting.model), "task", "accuracy"]
    assert result["test"].keys() == {"accuracy", "loss", "examples", "macro_f1", "calibration_error"}
    assert result["test"]["examples"] == result["splits"]["test"] == 6
    assert 0 <= result["test"]["accuracy"] <= 1 < 10 * result["test"]["loss"]


@pytest.mark.parametrize(
    ("changes", "header"),
    [
        ({"dtype": "bfloat16"}, {}),
        ({"dtype": "float16"}, {}),
        ({"probes": 2, "direction": "rademacher"}, {"probes": 2, "direction": "rademacher"}),
        ({"seed": 7, "eps": 1e-2, "perturbation": "copy"}, {"seed": 7, "eps": 1e-2}),
        ({"lr_scheduler": "linear", "weight_decay": 0.1}, {"groups": [{"weight_decay": 0.1}, {"weight_decay": 0.0}]}),
    ],
    ids=lambda value: "-".join(value),
)
def test_replay_rebuilds_the_saved_file_bit_for_bit(
    setting: Setting, tmp_path: Path, changes: dict[str, object], header: dict[str, object]
) -> None:
    run, rebuilt = tmp_path / "run", tmp_path / "rebuilt"
    done(*setting.train(run, **changes))
    log = read_log(run / "steps.jsonl")
    assert {key: log.header[key] for key in header} == header
    assert {t["dtype"] for t in log.header["tensors"]} == {changes.get("dtype", "float32")}
    ran = done("replay", run / "steps.jsonl", "--model", setting.model, "--output-dir", rebuilt)
    assert "verified" in ran.err
    assert weights(rebuilt) == weights(run)
    assert (rebuilt / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_export_is_small_and_replays_to_the_same_file(setting: Setting, finished: Path, tmp_path: Path) -> None:
    exported = tmp_path / "trajectory.safetensors"
    assert done("export", finished / "steps.jsonl", "--output", exported).out == ""
    assert exported.stat().st_size < (finished / "steps.jsonl").stat().st_size
    ran = done("replay", exported, "--model", setting.model, "--output-dir", tmp_path / "rebuilt")
    assert "verified" in ran.err
    assert weights(tmp_path / "rebuilt") == weights(finished)


def test_inspect_describes_the_log(finished: Path) -> None:
    ran = done("inspect", finished / "steps.jsonl", "--json")
    facts = json.loads(ran.out)
    log = read_log(finished / "steps.jsonl")
    assert (facts["intact"], facts["finished"], facts["torn_last_line"]) == (True, True, False)
    assert (facts["steps"], facts["skipped_steps"], facts["learning_rates"]) == (STEPS, 0, [1e-3])
    assert (facts["first_loss"], facts["last_loss"]) == (log.records[0].loss, log.records[-1].loss)
    assert facts["weights"] == sum(p.numel() for p in support.tiny_model().parameters())
    assert facts["tuned_digest"] == log.end["digest"]
    human = cli("inspect", finished / "steps.jsonl")
    assert (human.code, human.err) == (0, "")
    assert "every line is intact" in human.out
    for words in (f"steps: {STEPS}", "seed: 0", "direction: gaussian"):
        assert words in human.out


def test_inspect_tells_a_torn_and_unfinished_log(copy: Path) -> None:
    log = copy / "steps.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:4]) + b'{"step":3,"lr"')
    facts = json.loads(cli("inspect", log, "--json").out)
    assert (facts["finished"], facts["torn_last_line"], facts["steps"]) == (False, True, 3)
    human = cli("inspect", log).out
    assert "torn" in human
    assert "--resume" in human


def test_save_steps_leaves_checkpoints_that_load(setting: Setting, finished: Path, tmp_path: Path) -> None:
    """And are what a replay of so many steps rebuilds."""
    run = tmp_path / "run"
    done(*setting.train(run, save_steps=2))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert weights(run) == weights(run / "checkpoint-6") == weights(finished)
    rebuilt = tmp_path / "rebuilt"
    done("replay", run / "steps.jsonl", "--model", setting.model, "--output-dir", rebuilt, "--steps", 2)
    found = AutoModelForCausalLM.from_pretrained(run / "checkpoint-2")
    support.assert_same_bits(found, support.snapshot(AutoModelForCausalLM.from_pretrained(rebuilt)))


# --- interrupted and resumed -------------------------------------------------------------------------------------


def wait_for_steps(log: Path, steps: int, running: subprocess.Popen[str]) -> None:
    """Until the log holds its header and so many steps."""
    while not log_holds(log, steps):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.002)


def log_holds(log: Path, steps: int) -> bool:
    """Whether a log holds its header and so many steps."""
    return log.exists() and log.read_bytes().count(b"\n") >= 1 + steps


def assert_ends_like_an_uninterrupted_run(setting: Setting, run: Path) -> None:
    """Resume for a few more steps, and take as many steps at once in another folder."""
    taken = read_log(run / "steps.jsonl").steps
    done(*setting.resume(run, steps=taken + 2))
    whole = run.parent / "whole"
    done(*setting.train(whole, steps=taken + 2))
    assert weights(run) == weights(whole)
    logs = [read_log(folder / "steps.jsonl") for folder in (run, whole)]
    assert [r.losses for r in logs[0].records] == [r.losses for r in logs[1].records]
    assert logs[0].end == logs[1].end
    metrics = [read(folder) for folder in (run, whole)]
    for key in ("before", "test", "dev", "best_step", "sign_test", "splits"):
        assert metrics[0][key] == metrics[1][key], key
    for name in ("outcomes.json", "dev.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_ctrl_c_stops_after_the_step_and_says_how_to_go_on(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with process(*setting.train(run, steps=10**6)) as running:
        wait_for_steps(run / "steps.jsonl", 3, running)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    assert (running.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert re.search(f"forwardtune train --output-dir {run} --resume", err)
    taken = read_log(run / "steps.jsonl").steps
    assert re.search(f"after step {taken}\\b", err)
    assert_ends_like_an_uninterrupted_run(setting, run)


def test_killed_again_and_again(setting: Setting, tmp_path: Path) -> None:
    """SIGKILL before the first step (or hardly later), then twice in later steps."""
    run = tmp_path / "run"
    arguments = setting.train(run, steps=10**6)
    for steps in (0, 4, 9):
        running = forked(lambda arguments=arguments: cli(*arguments).code)
        while not log_holds(run / "steps.jsonl", steps):
            assert running.is_alive()
            time.sleep(0.002)
        running.kill()
        running.join()
        arguments = setting.resume(run)
    assert_ends_like_an_uninterrupted_run(setting, run)


@pytest.mark.parametrize(
    ("steps", "saving"),
    [(None, {}), *((steps, saving) for steps in (0, 1, 3, 6) for saving in ({}, {"save_steps": 2}))],
    ids=str,
)
def test_log_cut_after_any_step_resumes_to_the_same_bits(
    setting: Setting, finished: Path, tmp_path: Path, steps: int | None, saving: dict[str, object]
) -> None:
    """The folder as a kill leaves it right after a step was logged: no later file, and a log without an end.

    Or before the log was opened: the untuned model was measured, and nothing else done.
    """
    run = tmp_path / "run"
    run.mkdir()
    for name in ("metrics.json", "outcomes.json"):
        (run / name).write_text(json.dumps({"before": read(finished / name)["before"]}))
    if steps is None:
        done(*setting.train(run))
    else:
        lines = (finished / "steps.jsonl").read_bytes().splitlines(keepends=True)
        (run / "steps.jsonl").write_bytes(b"".join(lines[: 1 + steps]))
        done(*setting.resume(run, **saving))
    assert weights(run) == weights(finished)
    assert read_log(run / "steps.jsonl").end == read_log(finished / "steps.jsonl").end


def test_resumed_run_may_not_change_its_settings(setting: Setting, copy: Path) -> None:
    before = files(copy)
    for changes, words in (
        ({"lr": 1e-4}, "--lr 0.001, not 0.0001"),
        ({"batch_size": 8}, "--batch-size 4, not 8"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"dtype": "bfloat16"}, "--dtype"),
        ({"task": "reviews"}, "--task"),
    ):
        ran = cli(*setting.resume(copy, **changes))
        assert ran.code == 2
        assert words in ran.err
    assert files(copy) == before


def test_run_resumes_from_another_folder_as_it_was_told(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths are those of the folder in which it began, and --no-before is kept."""
    (tmp_path / "elsewhere").mkdir()
    write_task(tmp_path / "task")
    shutil.copytree(tmp_path / "task", tmp_path / "data")
    shutil.copytree(setting.model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    there = Setting(Path("model"), Path("task/task.yaml"))
    done(*there.train(Path("run"), no_before=True, steps=2, data_dir="data"))
    paths = {"model": "model", "task": "task/task.yaml", "data_dir": "data"}
    recorded = {name: str(tmp_path / path) for name, path in paths.items()} | {"no_before": True}
    assert read_log("run/steps.jsonl").header["run"].items() >= recorded.items()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done(*setting.resume(Path("../run"), steps=3))
    metrics = read(tmp_path / "run")
    assert metrics["steps"] == 3
    assert "before" not in metrics
    done(*setting.resume(Path("../run"), steps=4, task="../task/task.yaml"))  # named again, from here


def test_task_that_was_moved_is_asked_for(setting: Setting, tmp_path: Path) -> None:
    path = write_task(tmp_path / "task")
    done(*setting.train(tmp_path / "run", task=path, steps=1))
    shutil.move(tmp_path / "task", tmp_path / "moved")
    with refused(tmp_path, f"has --task {path}, which is not there: say where it is now") as ran:
        ran(cli(*setting.resume(tmp_path / "run", steps=2)))
    with refused(tmp_path, f"has --task {path}, not reviews") as ran:
        ran(cli(*setting.resume(tmp_path / "run", steps=2, task="reviews")))
    done(*setting.resume(tmp_path / "run", steps=2, task=tmp_path / "moved" / "task.yaml"))


@pytest.mark.parametrize("free", [False, True])
def test_tokenizer_without_padding_and_end_serves_as_well(setting: Setting, tmp_path: Path, free: bool) -> None:
    """Whatever fills the rows up is masked."""
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(setting.model).save_pretrained(bare)
    PreTrainedTokenizerFast(tokenizer_object=support.tokenizer().backend_tokenizer).save_pretrained(bare)
    changes = {"answers": None, "target": "reply", "max_new_tokens": "4", "metric": "f1"} if free else {}
    task = write_task(tmp_path / "task", **changes)
    common = ["--task", task, "--batch-size", 4, "--device", "cpu"]
    found = [json.loads(cli("eval", "--model", model, *common).out)["test"] for model in (setting.model, bare)]
    assert found[0] == pytest.approx(found[1])
    assert free or cli("plan", "--alone", "--model", bare, *common, "--steps", 2).code == 0
    for method in ["mezo"] if free else ["mezo", "adam"]:
        done(*Setting(bare, task).train(tmp_path / method, steps=1, method=method, no_before=True))


def test_resumed_run_may_not_draw_its_splits_by_another_rule(setting: Setting, finished: Path, tmp_path: Path) -> None:
    ran = cli(*setting.train(tmp_path / "run", task=write_task(tmp_path), steps=2))
    assert "splits drawn by the rule forwardtune" in ran.err
    write_task(tmp_path, splits="mezo")
    ran = cli(*setting.resume(tmp_path / "run", steps=4))
    assert (ran.code, ran.out) == (2, "")
    assert re.search("splits drawn by the rule forwardtune.* now says mezo.*'splits: forwardtune'", ran.err)


def test_run_of_a_python_program_is_not_resumed_here(tmp_path: Path) -> None:
    """There is no task to resume it on; and whoever inspects its log is not sent here."""
    optimizer = MeZO(support.tiny_model())
    (tmp_path / "run").mkdir()
    StepLog(tmp_path / "run" / "steps.jsonl", optimizer).close()
    ran = cli("train", "--output-dir", tmp_path / "run", "--resume")
    assert (ran.code, ran.out) == (2, "")
    assert "was not started by forwardtune train: go on with it in Python" in ran.err
    assert "Resume it with the program that began it" in cli("inspect", tmp_path / "run").out


def test_completed_run_resumed_is_left_as_it_is(setting: Setting, finished: Path) -> None:
    before = files(finished)
    ran = done(*setting.resume(finished, json=True))
    assert "complete" in ran.err
    assert json.loads(ran.out) == json.loads(before["metrics.json"])
    assert files(finished) == before


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0}, "argument --lr: .* is neither a positive number nor 'auto'"),
        ({"lr": "fast"}, "'fast' is neither"),
        ({"eps": "nan"}, "argument --eps: .* is neither"),
        ({"dtype": "int4"}, "unknown dtype 'int4'.*bfloat16"),
        ({"device": "tpu9"}, "unknown device 'tpu9'.*cpu"),
        ({"device": ABSENT_DEVICE}, f"no {ABSENT_DEVICE} device.*--device cpu"),
        ({"direction": "cauchy"}, "invalid choice.*gaussian"),
        ({"lr_scheduler": "sawtooth"}, "sawtooth"),
        ({"lr_scheduler": "cosine_with_min_lr"}, "cosine_with_min_lr|min_lr"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau|plateau"),
        ({"max_length": 2}, "answers of . tokens.*--max-length"),
        ({"task": "reviws"}, "unknown task 'reviws'.*did you mean reviews"),
        ({"task": "none.yaml"}, "no such task file"),
        ({"task": "sst2"}, "hub.*--data-dir"),
        ({"model": "./none"}, "no such model folder"),
        ({"model": "smolm2-135m"}, "did you mean smollm2-135m"),
        ({"model": "none.gguf"}, "no such model file"),
        ({"data_dir": "none"}, "no test data.*looked for"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_option(setting: Setting, tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with refused(tmp_path, words) as ran:
        ran(cli(*setting.train(tmp_path / "run", **changes)))


@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("train", "--learning-rate=1e-5", "unrecognized arguments: --learning-rate=1e-5; did you mean --lr.$"),
        ("train", "--learning_rate", "did you mean --lr.$"),
        ("train", "--num-train-epochs", "did you mean --epochs"),
        ("train", "--max-steps", "did you mean --steps"),
        ("plan", "--per_device_train_batch_size", "did you mean --batch-size"),
        ("train", "--mdoel", "did you mean --model"),
        ("train", "--xyzzy", "unrecognized arguments: --xyzzy$"),
        ("train", "--batch", "did you mean --batch-size"),  # an abbreviation is no option
        ("train", "--lora", "may be short for --lora-rank or --lora-alpha or --lora-targets"),
        ("train", "--resum", "did you mean --resume"),
        ("eval", "--calib", "did you mean --calibrate"),
        ("probe", "--dev", "may be short for --device or --dev-examples"),
        ("sweep", "--job=2", "did you mean --jobs"),
        ("report", "--no-plot", "did you mean --no-plots"),
        ("replay", "--output", "did you mean --output-dir"),
        ("inspect", "--js", "did you mean --json"),
        ("export", "--out=x", "did you mean --output"),
        ("eval", "--steps", "unrecognized arguments: --steps"),  # of another command
    ],
)
def test_what_is_no_option_is_refused_with_the_one_that_was_meant(
    tmp_path: Path, command: str, option: str, words: str
) -> None:
    required = {"train": ["--output-dir", tmp_path / "run"], "sweep": ["f"], "report": ["f"], "inspect": ["f"]}
    required |= {"export": ["f"], "replay": ["f", "--model", "m", "--output-dir", tmp_path / "run"]}
    with refused(tmp_path, words) as ran:
        ran(cli(command, *required.get(command, []), option))


def test_learning_rate_beyond_float32_ends_with_a_message(setting: Setting, tmp_path: Path) -> None:
    ran = cli(*setting.train(tmp_path / "run", lr=1e300))
    assert ran.code in (1, 2)
    assert re.search("learning rate|--lr", ran.err)


def test_bad_rows_are_counted_and_the_option_that_skips_them_is_named(setting: Setting, tmp_path: Path) -> None:
    path = write_task(tmp_path / "task")
    file = path.parent / "train.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*rows[:3], '{"text": "", "label": 1, "reply": "a"}', *rows[3:]]), encoding="utf-8")
    with refused(tmp_path, r"'text' is empty.*\(1 of 1\d examples cannot be used\): --on-bad-row skip leaves") as ran:
        ran(cli(*setting.train(tmp_path / "run", task=path, dev_examples=0)))
    run = tmp_path / "run"
    ran = done(*setting.train(run, task=path, steps=1, on_bad_row="skip"))
    assert (
        ran.err.count(f"1 rows of {file} are left out, the first because of: {file}, example 4: column 'text' is") == 1
    )
    assert read(run)["skipped_rows"] == {"train": 1, "dev": 1}
    assert read_log(run / "steps.jsonl").header["run"]["on_bad_row"] == "skip"
    assert cli(*setting.resume(run, steps=2)).code == 0  # the log knows it


def test_data_that_cannot_teach_are_one_warning(setting: Setting, tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", test="train.jsonl")
    ran = done(*setting.train(tmp_path / "run", task=path, steps=1, no_before=True))
    told = [line for line in ran.err.splitlines() if line.startswith("forwardtune: warning: ")]
    assert len(told) == 1, ran.err
    assert f"training and test examples both come from {path.parent / 'train.jsonl'}" in told[0]


def test_folder_that_is_no_model(setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    for name, words in (("empty", "not a model folder.*no config.json"), ("broken", "could not be loaded")):
        with refused(tmp_path, words) as ran:
            ran(cli("eval", "--model", tmp_path / name, "--task", setting.task, "--device", "cpu"))


def test_output_folder_that_is_taken(setting: Setting, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("a file")
    for folder, words, code in (
        (copy, "holds another run.*--resume.*nothing was overwritten", 2),
        (tmp_path / "foreign", "not empty.*another --output-dir.*nothing was overwritten", 2),
        (file, "--output-dir", 2),
        (file / "below", "file", 1),
    ):
        with refused(tmp_path, words, code) as ran:
            ran(cli(*setting.train(folder)))
    for folder in (copy, tmp_path / "foreign", file):
        with refused(tmp_path, "--output-dir") as ran:
            ran(cli("replay", copy / "steps.jsonl", "--model", setting.model, "--output-dir", folder))
    with refused(tmp_path, "no run to resume") as ran:
        ran(cli(*setting.resume(tmp_path / "foreign")))
    with refused(tmp_path, "exists.*nothing was overwritten") as ran:
        ran(cli("export", copy / "steps.jsonl", "--output", file))


def test_damaged_log_is_refused_by_every_command_that_reads_it(setting: Setting, copy: Path, tmp_path: Path) -> None:
    log = copy / "steps.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"loss":', b'"lass":')
    log.write_bytes(b"".join(lines))
    for arguments in (
        setting.resume(copy),
        ["inspect", log],
        ["inspect", log, "--json"],
        ["replay", log, "--model", setting.model, "--output-dir", tmp_path / "new"],
        ["export", log, "--output", tmp_path / "new.safetensors"],
    ):
        with refused(tmp_path, "line 3: its checksum does not fit.*Restore") as ran:
            ran(cli(*arguments))


def test_log_that_is_missing_or_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "empty.jsonl").write_text("")
    for name, words in (
        ("none.jsonl", "no such file"),
        ("", "holds no steps.jsonl: give the folder of a run"),
        ("notes.jsonl", "not a step log"),
        ("empty.jsonl", "missing or cut off"),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli("inspect", tmp_path / name))


def test_replay_over_the_wrong_model(setting: Setting, finished: Path, tmp_path: Path) -> None:
    others = {"other": support.tiny_model(seed=1), "gpt2": support.tiny_model("gpt2")}
    for name, model in others.items():
        model.save_pretrained(tmp_path / name)
        support.tokenizer().save_pretrained(tmp_path / name)
    for model, words in (
        (tmp_path / "other", f"not the weights.*began with.*{setting.model}"),
        (tmp_path / "gpt2", "this model does not have"),
        (finished, "not the weights.*untuned"),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli("replay", finished / "steps.jsonl", "--model", model, "--output-dir", tmp_path / "new"))


def test_unfinished_log_is_replayed_only_as_far_as_one_says(setting: Setting, copy: Path, tmp_path: Path) -> None:
    log = copy / "steps.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:4]))
    replay_it = ["replay", log, "--model", setting.model, "--output-dir", tmp_path / "new"]
    with refused(tmp_path, "no end line.*--steps 3") as ran:
        ran(cli(*replay_it))
    with refused(tmp_path, "holds 3 steps: 4 cannot be replayed") as ran:
        ran(cli(*replay_it, "--steps", 4))
    with refused(tmp_path, "no end line.*resume") as ran:
        ran(cli("export", log, "--output", tmp_path / "new.safetensors"))
    done(*replay_it, "--steps", 3)


# --- failing runs ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writing beyond it fails, as on a full disk; Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("where", ["log", "model"])
def test_full_disk_loses_nothing(setting: Setting, finished: Path, tmp_path: Path, where: str) -> None:
    run = tmp_path / "run"
    lines = (finished / "steps.jsonl").read_bytes().splitlines(keepends=True)
    size = {"log": len(b"".join(lines[:4])) + 20, "model": len(weights(finished)) - 1000}[where]
    with files_no_larger_than(size):
        ran = cli(*setting.train(run))
    assert (ran.code, ran.out) == (1, ""), ran.err
    assert re.search({"log": "could not be written.*File too large.*resume", "model": "File too large"}[where], ran.err)
    assert read_log(run / "steps.jsonl").steps == {"log": 3, "model": STEPS}[where]
    done(*setting.resume(run))
    assert weights(run) == weights(finished)


def test_loss_that_is_not_finite_ends_the_run_with_advice(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = cli(*setting.train(run, steps=50, lr=1e30, dtype="float16"))
    assert (ran.code, ran.out) == (1, "")
    assert re.search("not finite.*Lower the learning rate", ran.err)
    log = read_log(run / "steps.jsonl")
    assert log.steps < 50
    assert not log.torn
    assert [record.skipped for record in log.records[-11:]] == [False] + [True] * 10
    assert all(tensor.isfinite().all() for tensor in load_file(setting.model / "model.safetensors").values())


@pytest.mark.parametrize("method", ["mezo", "adam"])
def test_a_run_is_reported_to_tensorboard(setting: Setting, tmp_path: Path, method: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    done(*setting.train(run, method=method, report_to="tensorboard", eval_steps=3))
    (file,) = run.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert "train/loss" in scalars
    (name,) = [one for one in scalars if one.endswith("dev_loss")]
    assert [(event.step, event.value) for event in events.Scalars(name)] == [
        (line["step"], pytest.approx(line["dev"]["loss"])) for line in read(run / "dev.jsonl")
    ]
    with refused(tmp_path, "'tensorbord' is none of tensorboard, wandb, trackio; did you mean tensorboard") as ran:
        ran(cli(*setting.train(tmp_path / "other", report_to="tensorbord")))


def test_a_tracker_that_is_not_installed(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forwardtune.cli.methods.find_spec", lambda name: None if name == "wandb" else name)
    with refused(tmp_path, "--report-to tensorboard,wandb needs wandb: pip install wandb") as ran:
        ran(cli(*setting.train(tmp_path / "run", report_to="tensorboard, wandb")))


def test_version_and_usage() -> None:
    assert re.fullmatch(r"forwardtune \d+\.\d+.*\n", cli("--version").out)
    ran = cli()
    assert (ran.code, ran.out) == (2, "")
    assert "usage: forwardtune" in ran.err


def test_a_process_of_a_launcher_is_refused_before_anything_is_loaded(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    ran = cli(*setting.train(tmp_path / "run"))
    assert ran.code == 2
    assert "2 processes" in ran.err
    assert "loading" not in ran.err
    assert not (tmp_path / "run").exists()


# --- a direction for each example ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ({}, {"objective": "accuracy", "eps": 0.1}),
        ({}, {"lr": "auto", "eps": "auto", "steps": 110, "rule": "momentum"}),
        ({}, {"tune": "lora", "probes": 2, "estimator": "one_sided", "clip_coefficient": 1.0}),
        (FREE_TEXT, {"objective": "loss + f1", "rank": 2, "refresh": 3}),
    ],
    ids=["accuracy", "auto", "lora", "generated"],
)
def test_every_example_may_have_a_direction(
    setting: Setting, tmp_path: Path, task: dict[str, Any], changes: dict[str, Any]
) -> None:
    """The run is replayed to what it saved; resumed behind a cut, it is the same run."""
    if task:
        setting = Setting(setting.model, write_task(tmp_path / "task", **task))
    run = tmp_path / "run"
    done(*setting.train(run, assignment="example", **changes))
    log = read_log(run / "steps.jsonl")
    assert {record.examples for record in log.records} <= {3, 4}  # the last minibatch of a pass is short
    again = shutil.copytree(run, tmp_path / "again")
    lines = (again / "steps.jsonl").read_bytes().splitlines(keepends=True)
    steps = [i for i, line in enumerate(lines) if line.startswith(b'{"step"')]
    (again / "steps.jsonl").write_bytes(b"".join(lines[: steps[3]]))
    (again / "metrics.json").unlink()
    done(*setting.resume(again))
    assert log_lines(again) == log_lines(run)
