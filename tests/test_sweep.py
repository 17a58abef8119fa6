"""Sweeps: the file, the runs it stands for, and what happens to them when something goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import support
from forwardtune.cli.commands import make_parser
from forwardtune.errors import InputError
from forwardtune.models import load_model
from forwardtune.paper.sweep import Run, Sweep, SweepFolder, read_sweep, run_sweep
from forwardtune.paper.sweep.bases import prepare_bases
from forwardtune.paper.sweep.plan import show
from forwardtune.paper.sweep.runner import thread_limits, time_left
from support.command import cli, done

SHIPPED = sorted((Path(__file__).parent.parent / "sweeps").glob("*.yaml"))


def read(tmp_path: Path, text: str, data_dir: str | None = None) -> Sweep:
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    return read_sweep(path, data_dir)


# --- the file --------------------------------------------------------------------------------------------------------

GRID = """
name: a grid
model: some/model
tasks: [sst2, rte]
seeds: [0, 7]
options: {batch-size: 16, steps: 300}
methods:
  Zero-shot: {command: eval, seeds: [0]}
  MeZO: {command: train, lr: [1e-5, 3e-5], tune: [all, lora]}
  Adam: {command: train, method: adam, lr: 1e-4, tasks: [rte], steps: 5}
task-options:
  rte: {max-length: 99}
"""


def test_a_file_is_the_product_of_its_lists(tmp_path: Path) -> None:
    runs = read(tmp_path, GRID).runs
    assert len(runs) == 2 * 1 + 2 * 2 * 4 + 1 * 2
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)  # a whole table for one seed first
    mezo = next(run for run in runs if run.folder == "rte/mezo/lr-3e-5_tune-lora/seed-7")
    assert mezo.point == {"lr": 3e-5, "tune": "lora"}
    assert mezo.options == {
        "method": "mezo",
        "batch-size": 16,
        "steps": 300,
        "lr": 3e-5,
        "tune": "lora",
        "max-length": 99,
    }
    assert mezo.title == "rte, MeZO, lr 3e-5, tune lora, seed 7"
    zero_shot = next(run for run in runs if run.method == "Zero-shot" and run.task == "sst2")
    assert zero_shot.folder == "sst2/zero-shot/seed-0"
    assert zero_shot.options == {"batch-size": 16}  # eval has no --steps
    assert {(run.task, run.options["steps"]) for run in runs if run.method == "Adam"} == {("rte", 5)}
    several = "model: [a/one, two.gguf]\ntasks: [reviews, sst2]\nmethods: {Z: {command: eval}}"
    found = {run.folder: run.options.get("data-dir") for run in read(tmp_path, several, data_dir="data").runs}
    assert found == {  # the task that brings its data is not sent to the folder
        f"{model}/{task}/z/seed-0": folder
        for model in ("one", "two")
        for task, folder in (("reviews", None), ("sst2", "data"))
    }


def test_a_run_is_a_command_line_that_the_commands_understand(tmp_path: Path) -> None:
    for run in read(tmp_path, GRID, data_dir="data").runs:
        parsed = make_parser().parse_args(run.arguments("out", model="base"))
        assert (parsed.model, parsed.task, parsed.seed) == ("base", run.task, run.seed)
        assert (parsed.output_dir, parsed.data_dir) == ("out", "data")
        for name, value in run.options.items():
            assert getattr(parsed, name.replace("-", "_")) == value


def test_numbers_and_flags_are_read_as_the_command_line_reads_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-6 as text, 1.0e-6 as a number."""
    text = "model: m\ntasks: sst2\nmethods:\n  A: {command: train, lr: [1e-6, 0.002], no-before: true}\n"
    text += "  B: {command: eval, calibrate: [true, false]}\n"
    first, second, calibrated, plain = read(tmp_path, text).runs
    assert (first.options["lr"], second.options["lr"]) == (1e-6, 0.002)
    assert "--no-before" in first.arguments("D")
    assert "--calibrate" in calibrated.arguments("D")
    assert "--calibrate" not in plain.arguments("D")
    assert (calibrated.folder, plain.folder) == ("sst2/b/calibrate-true/seed-0", "sst2/b/calibrate-false/seed-0")
    same = read(tmp_path, text.replace("1e-6", "0.000001").replace("0.002", "2.0e-3")).runs
    assert [run.folder for run in same] == [run.folder for run in (first, second, calibrated, plain)]


@pytest.mark.parametrize("value", [1e-4, 1e-6, 1.5e-7, 1e-3 / 3, 0.01, 0.1, 2.0, 1e20, 1.5e30, 300])
def test_a_number_is_shown_without_loss(value: float) -> None:
    assert float(show(value)) == value
    assert show(1e-4) == "1e-4"


BASE = "model: m\ntasks: [sst2]\nmethods:\n  A: {command: train}\n"
WRONG = {
    "- a": "must hold keys",
    "model: [": "not valid YAML",
    BASE.replace("model", "modle"): "did you mean model?",
    "tasks: [sst2]\nmethods: {A: {command: eval}}": "model is missing",
    BASE.replace("sst2", "sst3"): "did you mean sst",
    BASE.replace("command: train", "steps: 3"): "must have command",
    BASE.replace("train", "trian"): "did you mean train?",
    BASE.replace("train", "replay"): "must have command: eval, probe or train",
    BASE.replace("train", "train, stepz: 3"): "did you mean steps?",
    BASE.replace("train", "train, batch_size: 3"): "did you mean batch-size?",
    BASE.replace("train", "eval, lr: 1e-5"): "forwardtune eval has no option --lr",
    BASE.replace("train", "train, seed: 3"): "give seeds: a list",
    BASE.replace("train", "train, resume: true"): "the sweep sets --resume itself",
    BASE.replace("train", "train, lr: fast"): "lr cannot be 'fast': 'fast' is neither a positive number nor 'auto'",
    BASE.replace("train", "train, steps: 1.5"): "steps cannot be 1.5: it must be a whole number",
    BASE.replace("train", "train, method: adm"): "did you mean adam?",
    BASE.replace("train", "train, lr: []"): "empty list",
    BASE.replace("train", "train, lr: [1e-5, 0.00001]"): "same value twice",
    BASE.replace("train", "train, no-before: 1"): "it is a flag",
    BASE.replace("train", "train, tune: no"): "quote them",
    BASE.replace("train", "train, tune: ['a.b*c', 'a.b+c']"): "would share the folder",
    BASE.replace("train", "train, tasks: [rte]"): "unknown method A: task 'rte'",
    BASE.replace("train", "train, seeds: [-1]"): "whole numbers",
    BASE + "  A: {command: eval}\n": "'A' is there twice",
    BASE + "  a!: {command: eval}\n": "would share the folder",
    BASE + "seeds: [0, 0]": "same seed twice",
    BASE + "seeds: [true]": "whole numbers",
    BASE + "options: {shots: 3}": "has no option --shots",
    BASE + "task-options: {rte: {steps: 3}}": "unknown task-options of a task 'rte'",
    BASE + "task-options: {sst2: {stps: 3}}": "did you mean steps?",
    BASE + "keep-models: 3": "true or false",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_wrong_in_a_file_is_said_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"file\.yaml") as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_are_right(path: Path) -> None:
    sweep = read_sweep(path)
    assert {run.method for run in sweep.runs} == set(sweep.methods)
    if path.stem == "opt-13b":  # the paper's grid
        assert len(sweep.tasks) == 11
        mezo = [run for run in sweep.runs if run.method == "MeZO" and run.task == "cb"]
        assert [run.point for run in mezo] == [{"lr": 1e-6}, {"lr": 1e-7}]
        assert mezo[0].options | {"steps": 20000, "eps": 1e-3, "batch-size": 16, "dev-examples": 100} == mezo[0].options


# --- running ---------------------------------------------------------------------------------------------------------

# Stands for the command line: a real process, which does what its --do says.
PROGRAM = """
import json, os, pathlib, signal, sys, time

arguments = sys.argv[1:]
given = dict(zip(arguments[1::2], arguments[2::2]))
folder = pathlib.Path(given["--output-dir"])
with open(os.environ["STARTS"], "a") as file:
    file.write(json.dumps(arguments) + "\\n")

def finish(**more):
    folder.mkdir(parents=True, exist_ok=True)
    test = {"accuracy": 0.5, "examples": 4}
    (folder / "metrics.json").write_text(json.dumps({"test": test, "dev": test, **more}))

do = given["--do"]
if "--resume" not in arguments and folder.exists() and any(folder.iterdir()):
    sys.exit("the folder is not empty")
if do == "score":
    finish(threads=os.environ.get("OMP_NUM_THREADS"))
    for name in ("model-00001.safetensors", "adapter_model.safetensors", "checkpoint-3/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("weights")
elif do == "fail":
    print("a bar\\r 3%", flush=True)
    sys.exit("forwardtune: error: out of memory: lower --batch-size")
elif do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif do == "wait":
    if "--resume" in arguments:
        finish(resumed=True)
        sys.exit()
    folder.mkdir(parents=True)
    (folder / "steps.jsonl").write_text(str(os.getpid()))
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        try:
            time.sleep(0.5)
        except KeyboardInterrupt:
            (folder / "twice").touch()
        sys.exit(130)
elif do == "meet":
    me = pathlib.Path(os.environ["STARTS"]).parent / given["--seed"]
    me.touch()
    end = time.monotonic() + 20
    while len(list(me.parent.glob("[0-9]"))) < 2:
        if time.monotonic() > end:
            sys.exit("nobody came")
        time.sleep(0.02)
    finish()
"""


class Bench:
    """A sweep's folder, a program that stands for the command line, and what was said."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = SweepFolder(tmp_path / "out")
        self.program = tmp_path / "program.py"
        self.program.write_text(PROGRAM, encoding="utf-8")
        self.said: list[str] = []
        self._starts = tmp_path / "starts"
        monkeypatch.setenv("STARTS", str(self._starts))

    @property
    def starts(self) -> list[list[str]]:
        """The command lines that were run."""
        return [json.loads(line) for line in self._starts.read_text().splitlines()] if self._starts.exists() else []

    def sweep(self, *what: str, keep_models: bool = False, **options: Any) -> Sweep:
        runs = [
            Run(f"{do}/seed-{seed}", "train", "m", "sst2", do, seed, {}, {"do": do, **options})
            for seed, do in enumerate(what)
        ]
        return Sweep("bench", ["m"], ["sst2"], {"sst2": "accuracy"}, list(what), keep_models, runs)

    def run(self, sweep: Sweep, jobs: int = 1) -> Any:
        program = (sys.executable, "-S", str(self.program))
        return run_sweep(sweep, self.folder, bases={}, jobs=jobs, say=self.said.append, program=program)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_failing_run_is_marked_and_the_others_go_on(bench: Bench) -> None:
    sweep = bench.sweep("fail", "kill", "score", "nothing")
    outcome = bench.run(sweep)
    failing, killed, _, nothing = sweep.runs
    assert (outcome.finished, outcome.failed, outcome.stopped) == (1, [failing, killed, nothing], False)
    assert "without a metrics.json" in str(bench.folder.failure(nothing))
    assert bench.folder.failure(failing) == "out of memory: lower --batch-size"
    assert "memory runs out" in str(bench.folder.failure(killed))
    assert [bench.folder.state(run) for run in sweep.runs] == ["failed", "failed", "finished", "failed"]
    assert "3%" in bench.folder.log_file(failing).read_text()
    assert bench.said[0].startswith("[1/4] sst2, fail, seed 0: failed: out of memory: lower --batch-size")
    assert bench.said[2].startswith("[3/4] sst2, score, seed 2: accuracy test 50.0, dev 50.0, ")

    bench.run(sweep)  # failed ones are tried again, finished ones are not
    did = [start[start.index("--do") + 1] for start in bench.starts]
    assert did == ["fail", "kill", "score", "nothing", "fail", "kill", "nothing"]


def test_an_unfinished_run_begins_again_in_an_empty_folder(bench: Bench) -> None:
    """metrics.json without test is what a killed train leaves before its first step."""
    sweep = bench.sweep("score")
    left = bench.folder.of(sweep.runs[0])
    left.mkdir(parents=True)
    (left / "metrics.json").write_text('{"before": {}}')
    assert bench.folder.state(sweep.runs[0]) == "new"
    assert bench.run(sweep).finished == 1


def test_ctrl_c_stops_the_runs_and_the_next_sweep_resumes_them(bench: Bench) -> None:
    sweep = bench.sweep("wait", "score")
    steps = bench.folder.of(sweep.runs[0]) / "steps.jsonl"

    def interrupt() -> None:
        end = time.monotonic() + 30
        while not steps.exists() and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    handler = signal.getsignal(signal.SIGINT)
    thread.start()
    outcome = bench.run(sweep)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is handler
    assert (outcome.finished, outcome.failed, outcome.stopped) == (0, [], True)
    assert [bench.folder.state(run) for run in sweep.runs] == ["started", "new"]

    outcome = bench.run(sweep)
    assert (outcome.finished, outcome.stopped) == (2, False)
    assert "--resume" in bench.starts[1]
    assert bench.starts[1][:-1] == bench.starts[0]
    metrics = bench.folder.metrics(sweep.runs[0])
    assert metrics is not None
    assert metrics["resumed"]


def test_runs_may_be_jobs_that_are_submitted(bench: Bench, tmp_path: Path) -> None:
    """submitit's local jobs are the ones that SLURM would run; they are stopped and resumed as processes are."""
    pytest.importorskip("submitit")
    from forwardtune.paper.sweep.submitted import Submitter

    def submitted(sweep: Sweep) -> Any:
        program = (sys.executable, "-S", str(bench.program))
        submit = Submitter("local", tmp_path / "jobs", ["timeout_min=5"])
        return run_sweep(sweep, bench.folder, bases={}, jobs=2, say=bench.said.append, program=program, submit=submit)

    sweep = bench.sweep("fail", "wait", "score")
    steps = bench.folder.of(sweep.runs[1]) / "steps.jsonl"

    def interrupt() -> None:
        end = time.monotonic() + 60
        while not (steps.exists() and bench.folder.metrics(sweep.runs[2])) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcome = submitted(sweep)
    thread.join()
    assert (outcome.finished, [run.method for run in outcome.failed], outcome.stopped) == (1, ["fail"], True)
    assert [bench.folder.state(run) for run in sweep.runs] == ["failed", "started", "finished"]
    assert "out of memory: lower --batch-size" in bench.folder.log_file(sweep.runs[0]).read_text()
    outcome = submitted(bench.sweep("score", "wait", "score"))
    assert (outcome.finished, outcome.stopped) == (3, False)
    metrics = bench.folder.metrics(sweep.runs[1])
    assert metrics is not None
    assert metrics["resumed"]


def test_what_submitit_does_not_know_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    from forwardtune.paper.sweep.submitted import Submitter

    with pytest.raises(InputError, match=r"--launcher-option fast: write it as NAME=VALUE"):
        Submitter("local", tmp_path, ["fast"])
    with pytest.raises(InputError, match=r"--launcher local: .*wrong"):
        Submitter("local", tmp_path, ["wrong=1"])


def test_jobs_run_at_once_and_share_the_cores(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    sweep = bench.sweep("meet", "meet")
    assert bench.run(sweep, jobs=2).finished == 2

    cores = len(os.sched_getaffinity(0))
    assert thread_limits(1) == {}
    assert thread_limits(2)["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert thread_limits(10 * cores)["NUMBA_NUM_THREADS"] == "1"
    scored = bench.sweep("score")
    bench.run(scored, jobs=10 * cores)
    metrics = bench.folder.metrics(scored.runs[0])
    assert metrics is not None
    assert metrics["threads"] == "1"


@pytest.mark.parametrize("keep", [False, True])
def test_weights_that_a_log_rebuilds_are_not_kept_unless_asked(bench: Bench, keep: bool) -> None:
    sweep = bench.sweep("score", keep_models=keep)
    bench.run(sweep)
    names = {path.name for path in bench.folder.of(sweep.runs[0]).iterdir()}
    weights = {"model-00001.safetensors", "checkpoint-3"} if keep else set()
    assert names == {"metrics.json", "adapter_model.safetensors", *weights}


def test_runs_with_other_options_are_not_mixed(bench: Bench) -> None:
    bench.run(bench.sweep("score", "fail", lr=1e-5))
    finished, failed = bench.sweep("score", "fail", lr=2e-5).runs
    bench.folder.require_same_runs(bench.sweep("score", "fail", **{"data-dir": "elsewhere"}, lr=1e-5).runs)
    bench.folder.require_same_runs([failed])  # what failed may be tried with other options
    with pytest.raises(InputError, match=r"lr 1e-5, and the sweep file now asks for 2e-5: choose another --output-dir"):
        bench.folder.require_same_runs([finished])
    bench.folder.beside(finished, "json").unlink()
    with pytest.raises(InputError, match="no record of its options"):
        bench.folder.require_same_runs([finished])


def test_a_changed_run_does_not_resume_from_the_steps_of_another(bench: Bench) -> None:
    sweep = bench.sweep("score", lr=1e-5)
    bench.folder.begin(sweep.runs[0])
    steps = bench.folder.of(sweep.runs[0]) / "steps.jsonl"
    steps.parent.mkdir()
    steps.write_text("a step")
    bench.folder.fail(sweep.runs[0], "it diverged")
    assert bench.run(bench.sweep("score", lr=2e-5)).finished == 1
    assert not steps.exists()


def test_two_sweeps_do_not_share_a_folder(bench: Bench) -> None:
    with bench.folder.locked() as lock:
        with pytest.raises(InputError, match="another sweep"), bench.folder.locked():
            pass
        orphan = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:  # a run that a killed sweep left behind
        with pytest.raises(InputError, match="left behind"), bench.folder.locked():
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with bench.folder.locked():
        pass


SWEEPER = """
import sys
from pathlib import Path
from forwardtune.paper.sweep import SweepFolder, run_sweep

folder = SweepFolder(Path(sys.argv[1]))
with folder.locked() as lock:
    program = (sys.executable, "-S", sys.argv[2])
    run_sweep(folder.read_plan(), folder, bases={}, jobs=1, say=print, lock=lock, program=program)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_sweep_that_is_ended_from_outside(bench: Bench, number: int) -> None:
    """Ctrl-C reaches a run once, though a terminal sends it to all. A run that outlives its sweep keeps others away."""
    sweep = bench.sweep("wait")
    bench.folder.path.mkdir()
    bench.folder.write_plan(sweep)
    arguments = [sys.executable, "-c", SWEEPER, str(bench.folder.path), str(bench.program)]
    sweeper = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
    steps = bench.folder.of(sweep.runs[0]) / "steps.jsonl"
    while not (steps.exists() and steps.read_text()):
        assert sweeper.poll() is None
        time.sleep(0.02)
    run = int(steps.read_text())
    os.killpg(sweeper.pid, number)
    sweeper.wait()
    if number == signal.SIGINT:
        assert not (steps.parent / "twice").exists()
        with pytest.raises(ProcessLookupError):
            os.kill(run, 0)
    else:
        with pytest.raises(InputError, match="left behind"), bench.folder.locked():
            pass
        os.kill(run, signal.SIGKILL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(InputError), bench.folder.locked():
            break
        time.sleep(0.02)
    with bench.folder.locked():
        pass


def test_time_left_is_judged_by_the_nearest_relatives(bench: Bench) -> None:
    def run(task: str, method: str, seed: int) -> Run:
        return Run(f"{task}/{method}/{seed}", "train", "m", task, method, seed)

    runs = [run(task, method, seed) for task in ("a", "b") for method in ("fast", "slow") for seed in (0, 1)]
    for ended, seconds in ((runs[0], 10.0), (runs[2], 100.0)):
        bench.folder.begin(ended)
        bench.folder.of(ended).mkdir()
        (bench.folder.of(ended) / "metrics.json").write_text('{"test": {}}')
        bench.folder.end(ended, seconds, keep_model=True)
    left = [each for each in runs if each not in (runs[0], runs[2])]
    assert time_left(runs, left, bench.folder, jobs=1) == 3 * 10 + 3 * 100
    assert time_left(runs, left, bench.folder, jobs=2) == (3 * 10 + 3 * 100) / 2


def test_a_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDTUNE_CACHE", "off")
    file = tmp_path / "tiny.gguf"
    support.write_gguf(file)
    runs = [Run(str(dtype), "eval", str(file), "sst2", "Z", 0, {}, dtype) for dtype in ({}, {"dtype": "bfloat16"})]
    runs += [Run("float32", "eval", str(file), "sst2", "Z", 0, {}, {"dtype": "float32"})]
    runs += [Run("hub", "eval", "some/model", "sst2", "Z", 0)]
    (tmp_path / "base-tiny-float32.partial").mkdir()  # of a sweep that was killed while it saved
    said: list[str] = []
    bases = prepare_bases(tmp_path, runs, said.append)
    assert bases.keys() == {(str(file), "float32"), (str(file), "bfloat16")}
    for (name, dtype), base in bases.items():
        direct, _ = load_model(name, dtype=dtype)
        saved, _ = load_model(base)
        support.assert_same_bits(saved, support.snapshot(direct))
        assert str(saved.dtype) == f"torch.{dtype}"
    assert len(said) == 2
    file.unlink()
    assert prepare_bases(tmp_path, runs, said.append) == bases
    assert len(said) == 2
    assert not list(tmp_path.glob("*.partial"))


# --- from end to end -------------------------------------------------------------------------------------------------

SMALL = """
model: {model}
tasks: [sst2]
options: {{batch-size: 4, train-examples: 12, dev-examples: 6, test-examples: 8, device: cpu, no-before: true}}
methods:
  Zero-shot: {{command: eval}}
  MeZO: {{command: train, steps: 4, eval-steps: 2, eps: 1e-3, lr: [1e-4]}}
"""
FAILING = "  Adam: {command: train, method: adam, steps: 4, eps: 1e-3}\n"


def test_a_sweep_of_a_trained_model(tmp_path: Path, models_dir: Path, data_dir: Path, monkeypatch: Any) -> None:
    """One run fails and the others go on; a second sweep leaves what is finished, and resumes what was killed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    text = SMALL.format(model=models_dir / "stories260k")
    file.write_text(text + FAILING)
    sweep = ("sweep", file, "--output-dir", out, "--data-dir", data_dir)
    told = done(*sweep, "--dry-run").err
    assert told.count("new ") == 3
    assert not out.exists()

    told = cli(*sweep)
    assert told.code == 1
    assert (
        "sst2, Adam, seed 0: failed: --eps belongs to --method feedback or --method forward or --method mezo: leave it out"
        in told.err
    )
    good = out / "sst2/mezo/lr-1e-4/seed-0"
    metrics = json.loads((good / "metrics.json").read_text())
    assert metrics["steps"] == 4
    assert not list(good.glob("model*.safetensors"))

    # As a kill after the second step leaves it. The method that fails is taken out.
    lines = (good / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (good / "steps.jsonl").write_bytes(b"".join(lines[:3]))
    (good / "metrics.json").unlink()
    zero_shot = (out / "sst2/zero-shot/seed-0/metrics.json").stat().st_mtime_ns
    file.write_text(text)
    told = done(*sweep).err
    assert "[2/2] sst2, MeZO, lr 1e-4, seed 0" in told
    assert "2 of them done" in (out / "sst2/mezo/lr-1e-4/seed-0.log").read_text()
    assert (good / "steps.jsonl").read_bytes().splitlines(keepends=True)[:3] == lines[:3]
    again = json.loads((good / "metrics.json").read_text())
    assert (again["test"], again["dev"]) == (metrics["test"], metrics["dev"])
    assert (out / "sst2/zero-shot/seed-0/metrics.json").stat().st_mtime_ns == zero_shot

    done("report", out, "--no-plots")
    table = (out / "results.md").read_text()
    assert f"{100 * metrics['test']['accuracy']:.1f}" in table
    assert "1e-4" in table
