"""Every way to tune, as a user meets it: what moves, what is kept, what comes back, and what is refused."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import support
from forwardtune.evaluation import sign_test
from forwardtune.models import load_model, tune
from forwardtune.trajectory import read_log
from support.command import REVIEWS, STEPS, Ran, Setting, cli, done, files, flags, refused, write_task
from support.ranks import forked

EVERY = 2  # steps between two looks at the development examples
PART = {"causal": "norm", "masked": "bias"}  # of the parameters' names
# Large enough that the tiny models are past their best step before the last one.
SCALES = {"lora": 1e-2, "prefix": 1e-1}
RATES = {
    "mezo": {"all": 1e-2, "lora": 1e-1, "prefix": 1.0, "part": 1.0},
    "adam": {"all": 1e-1, "lora": 1e-2, "prefix": 1.0, "part": 1e-2},
}
MODES = tuple(RATES["mezo"])

Runs = Callable[[str, str, str], Path]


@pytest.fixture(scope="module")
def settings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    """A causal and a masked model, each with a task that is worded for it."""
    folder = tmp_path_factory.mktemp("methods")
    encoder, tokenizer = folder / "bert", support.tokenizer()
    tokenizer.mask_token = "<eos>"
    support.tiny_model("bert").save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    masked = write_task(folder / "masked", prompt="'{text} It was [MASK].'", answers="{0: the, 1: it}")
    return {"causal": Setting(tiny_folder, write_task(folder / "causal")), "masked": Setting(encoder, masked)}


def options(kind: str, method: str, mode: str) -> dict[str, object]:
    own = {} if method == "adam" else {"eps": SCALES.get(mode, 1e-3)}
    return {"method": method, "tune": PART[kind] if mode == "part" else mode, "lr": RATES[method][mode], **own}


@pytest.fixture(scope="module")
def run_of(settings: dict[str, Setting], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder of a run that nothing happened to, by kind of model, method and mode. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs")

    def run(kind: str, method: str, mode: str) -> Path:
        path = folder / f"{kind}-{method}-{mode}"
        if not path.exists():
            done(*settings[kind].train(path, eval_steps=EVERY, **options(kind, method, mode)))
        return path

    return run


def read(path: Path) -> Any:
    """A JSON or JSON Lines file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def tuned(folder: Path) -> bytes:
    """The file with the tuned weights: an adapter's or a whole model's."""
    adapter = folder / "adapter_model.safetensors"
    return (adapter if adapter.exists() else folder / "model.safetensors").read_bytes()


def best_of(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of the measurements with the highest accuracy, among those the one with the lowest loss."""
    highest = max(line["dev"]["accuracy"] for line in measured)
    return min((line for line in measured if line["dev"]["accuracy"] == highest), key=lambda line: line["dev"]["loss"])


def measure(run: Path, setting: Setting, *more: object) -> dict[str, float]:
    """What ``eval`` says of a run's folder."""
    ran = done("eval", "--model", run, "--task", setting.task, "--batch-size", 4, "--device", "cpu", *more)
    return json.loads(ran.out)["test"]


def replayed(log: Path, setting: Setting, folder: Path, *more: object) -> Ran:
    return done("replay", log, "--model", setting.model, "--output-dir", folder, *more)


EVERYTHING = list(product(("causal", "masked"), RATES, MODES))
WITH_LOG = list(product(("causal", "masked"), MODES))


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method", "mode"), EVERYTHING)
def test_saved_model_measures_as_the_run_says(settings, run_of, kind, method, mode):
    run = run_of(kind, method, mode)
    metrics = read(run / "metrics.json")
    assert (metrics["command"], metrics["method"], metrics["metric"]) == ("train", method, "accuracy")
    assert (metrics["steps"], metrics["skipped_steps"], metrics["truncated_prompts"]) == (STEPS, 0, 0)
    assert metrics["splits"] == {"train": 11, "dev": 3, "test": 6}
    assert metrics["settings"].items() >= options(kind, method, mode).items()
    assert metrics["peak_memory_bytes"] > 2**20 < metrics["inference_peak_memory_bytes"]
    assert measure(run, settings[kind]) == metrics["test"]
    if mode != "prefix":  # the first weights of a prefix are not those of no prefix
        assert measure(settings[kind].model, settings[kind]) == metrics["before"]
    unwanted = ["checkpoint-*", "*.partial", "*.pt"] + (["steps.jsonl"] if method == "adam" else [])
    assert not [path for pattern in unwanted for path in run.glob(pattern)]


@pytest.mark.parametrize(("kind", "method", "mode"), EVERYTHING)
def test_only_what_is_named_moves(settings, run_of, kind, method, mode):
    base = support.snapshot(_fresh(settings[kind], kind, mode))
    run = run_of(kind, method, mode)
    model = load_model(str(run))[0]
    after = model.state_dict()
    assert after.keys() == base.keys()
    moved = {name for name in base if not support.same_bits(after[name], base[name])}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    part = {"all": "", "lora": "lora_", "prefix": "prompt_encoder", "part": PART[kind]}[mode]
    tied = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    assert moved == {name for name in parameters if part in name} - (tied if mode == "part" else set())
    assert (run / "initial.safetensors").exists() == (mode in ("lora", "prefix"))


def _fresh(setting: Setting, kind: str, mode: str) -> Any:
    """The model as its tuning begins."""
    model, tokenizer = load_model(str(setting.model))
    return tune(model, tokenizer, mode if mode != "part" else PART[kind])


@pytest.mark.parametrize(("kind", "method", "mode"), EVERYTHING)
def test_history_outcomes_and_metrics_are_one_story(run_of, kind, method, mode):
    run = run_of(kind, method, mode)
    metrics, history, outcomes = read(run / "metrics.json"), read(run / "history.jsonl"), read(run / "outcomes.json")
    steps, measured = history[:STEPS], history[STEPS:]
    assert [line["step"] for line in steps] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert [{"step": line["step"], "dev": line["dev"]} for line in measured] == read(run / "dev.jsonl")
    seconds = {line["step"]: line["seconds"] for line in steps}
    assert [line["seconds"] for line in measured] == [seconds[line["step"]] for line in measured]
    assert 0 < seconds[1] < seconds[STEPS] == pytest.approx(metrics["seconds"])
    assert metrics["seconds_per_step"] == pytest.approx(metrics["seconds"] / STEPS)
    if method == "mezo":
        records = read_log(run / "steps.jsonl").records
        assert [line["loss"] for line in steps] == [record.loss for record in records]
        assert metrics["seconds"] == pytest.approx(sum(record.seconds for record in records))
    best = best_of(measured)
    assert (metrics["best_step"], metrics["dev"]) == (best["step"], best["dev"])
    assert best["step"] < STEPS  # so that there was something to go back to
    assert outcomes.keys() == {"before", "after"}
    for when, by_example in (("before", outcomes["before"]), ("test", outcomes["after"])):
        assert len(by_example) == metrics[when]["examples"] == 6
        assert statistics.fmean(by_example) == pytest.approx(metrics[when]["accuracy"])
    assert metrics["sign_test"] == sign_test(outcomes["before"], outcomes["after"])


@pytest.mark.parametrize(("method", "mode"), list(product(RATES, MODES)))
def test_best_step_is_what_a_run_of_so_many_steps_ends_with(settings, run_of, tmp_path, method, mode):
    run = run_of("causal", method, mode)
    steps = read(run / "metrics.json")["best_step"]
    done(*settings["causal"].train(tmp_path / "short", **{**options("causal", method, mode), "steps": steps}))
    assert tuned(tmp_path / "short") == tuned(run)
    short, long = read(tmp_path / "short" / "metrics.json"), read(run / "metrics.json")
    for key in ("test", "dev", "best_step", "before", "sign_test"):
        assert short[key] == long[key]


@pytest.mark.parametrize(("kind", "mode"), WITH_LOG)
def test_replay_rebuilds_the_best_step_and_the_last(settings, run_of, tmp_path, kind, mode):
    run, setting = run_of(kind, "mezo", mode), settings[kind]
    best, last = tmp_path / "best", tmp_path / "last"
    ran = replayed(run / "steps.jsonl", setting, best, "--steps", read(run / "metrics.json")["best_step"])
    assert tuned(best) == tuned(run)
    assert measure(best, setting) == measure(run, setting)
    ran = replayed(run / "steps.jsonl", setting, last)
    assert "verified" in ran.err
    assert tuned(last) != tuned(run)


@pytest.mark.parametrize("mode", ["all", "lora", "prefix"])
def test_last_step_is_kept_where_it_is_best_or_nobody_looked(settings, run_of, tmp_path, mode):
    done(*settings["causal"].train(tmp_path / "run", dev_examples=0, **options("causal", "mezo", mode)))
    metrics = read(tmp_path / "run" / "metrics.json")
    assert not {"dev", "best_step"} & metrics.keys()
    assert metrics["splits"].keys() == {"train", "test"}
    assert [line for line in read(tmp_path / "run" / "history.jsonl") if "dev" in line] == []
    assert not (tmp_path / "run" / "dev.jsonl").exists()
    replayed(tmp_path / "run" / "steps.jsonl", settings["causal"], tmp_path / "again")
    assert tuned(tmp_path / "again") == tuned(tmp_path / "run")


@pytest.mark.parametrize("method", list(RATES))
def test_without_a_first_measurement(settings, tmp_path, method):
    run = tmp_path / "run"
    done(*settings["causal"].train(run, method=method, no_before=True, json=True))
    metrics = read(run / "metrics.json")
    assert not {"before", "sign_test"} & metrics.keys()
    assert {"test", "dev", "best_step"} <= metrics.keys()
    assert read(run / "outcomes.json").keys() == {"after"}


def test_adam_takes_five_epochs_of_small_batches(settings, tmp_path):
    arguments = settings["causal"].train(tmp_path / "run", method="adam", steps=None, batch_size=None, lr=None)
    done(*arguments)
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["settings"].items() >= {"batch_size": 8, "lr": 1e-5, "steps": 5 * 11 // 8}.items()
    assert metrics["steps"] == 6


@pytest.mark.parametrize(("mode", "eps"), [("all", 1e-3), ("lora", 1e-2), ("prefix", 1e-1)])
def test_eps_begins_where_the_papers_is_for_what_is_tuned(settings, tmp_path, mode, eps):
    """One step leaves no forward passes for a search: eps stays, and the rate is the first guess."""
    done(*settings["causal"].train(tmp_path / "run", tune=mode, lr=None, eps=None, steps=1))
    log = read_log(tmp_path / "run" / "steps.jsonl")
    assert (log.header["run"]["lr"], log.header["eps"], log.header["run"]["tune"]) == ("auto", eps, mode)
    record = log.records[0]
    assert record.lr[0] * abs(record.coefficients[0]) == pytest.approx(0.3 * eps)


def test_settings_of_adapters_reach_them(settings, tmp_path):
    lora = {"tune": "lora", "lora_rank": 3, "lora_alpha": 6, "lora_targets": "k_proj,o_proj"}
    for name, changes in (("lora", lora), ("prefix", {"tune": "prefix", "prefix_length": 7})):
        done(*settings["causal"].train(tmp_path / name, steps=1, **changes))
    config = read(tmp_path / "lora" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (3, 6, {"k_proj", "o_proj"})
    assert read(tmp_path / "prefix" / "adapter_config.json")["num_virtual_tokens"] == 7
    for name in ("lora", "prefix"):
        replayed(tmp_path / name / "steps.jsonl", settings["causal"], tmp_path / f"{name}-again")
        assert tuned(tmp_path / f"{name}-again") == tuned(tmp_path / name)


def test_an_adapter_over_half_precision(settings, tmp_path):
    """The adapter is float32 whatever the model is; the log knows the dtype of the model."""
    run, setting = tmp_path / "run", settings["causal"]
    done(*setting.train(run, eval_steps=EVERY, dtype="bfloat16", **options("causal", "mezo", "lora")))
    assert {tensor["dtype"] for tensor in read_log(run / "steps.jsonl").header["tensors"]} == {"float32"}
    assert measure(run, setting, "--dtype", "bfloat16") == read(run / "metrics.json")["test"]
    best = read(run / "metrics.json")["best_step"]
    replayed(run / "steps.jsonl", setting, tmp_path / "again", "--steps", best)
    assert tuned(tmp_path / "again") == tuned(run)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_leaves_less_room_for_long_prompts(tmp_path, family):
    """Prompts are cut to the same length when the run measures and when its result is measured again."""
    task = write_task(tmp_path / "task")
    rows = [json.dumps({"text": f"{text} " * 80, "label": label}) for text, label in REVIEWS]
    (task.parent / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
    shutil.copy(task.parent / "train.jsonl", task.parent / "test.jsonl")
    task.write_text(task.read_text(encoding="utf-8").replace("test.csv", "test.jsonl"), encoding="utf-8")
    setting = Setting(support.save_tiny_model(tmp_path / "model", family), task)
    done(*setting.train(tmp_path / "run", tune="prefix", lr=1.0, steps=2))
    metrics = read(tmp_path / "run" / "metrics.json")
    assert metrics["truncated_prompts"] == sum(metrics["splits"].values()) > 0
    assert measure(tmp_path / "run", setting) == metrics["test"]


# --- killed and resumed ------------------------------------------------------------------------------------------


def killed(run: Path, folder: Path, steps: int, measured: int) -> Path:
    """The folder as a kill leaves it: a log without end, some lines about the development examples, and what is written
    before the first step."""
    folder.mkdir()
    for name in ("metrics.json", "outcomes.json"):
        (folder / name).write_text(json.dumps({"before": read(run / name)["before"]}), encoding="utf-8")
    if (run / "initial.safetensors").exists():
        shutil.copy(run / "initial.safetensors", folder)
    for name, count in (("steps.jsonl", 1 + steps), ("dev.jsonl", measured)):
        lines = (run / name).read_bytes().splitlines(keepends=True)[:count]
        if lines:
            (folder / name).write_bytes(b"".join(lines))
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    """Whatever is no clock is the same."""
    assert tuned(one) == tuned(other)
    logs = [read_log(folder / "steps.jsonl") for folder in (one, other)]
    assert [record.losses for record in logs[0].records] == [record.losses for record in logs[1].records]
    assert logs[0].end == logs[1].end
    for name in ("dev.jsonl", "outcomes.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    metrics = [read(folder / "metrics.json") for folder in (one, other)]
    for key in ("before", "test", "dev", "best_step", "sign_test", "splits", "steps", "skipped_steps"):
        assert metrics[0][key] == metrics[1][key], key
    histories = [[line.get("loss", line.get("dev")) for line in read(f / "history.jsonl")] for f in (one, other)]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("mode", "steps", "measured"),
    [
        *product(MODES, [3], [1]),
        ("all", 0, 0),
        ("all", 1, 0),
        ("all", 2, 1),
        ("all", 6, 3),
        # The kill came while the development examples were measured after a step.
        ("all", 2, 0),
        ("lora", 4, 1),
        ("prefix", 6, 2),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_best_step(settings, run_of, tmp_path, mode, steps, measured):
    whole = run_of("causal", "mezo", mode)
    run = killed(whole, tmp_path / "run", steps, measured)
    done(*settings["causal"].resume(run))
    assert_same_run(run, whole)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_killed_while_the_result_was_measured_or_saved(settings, run_of, tmp_path, kind):
    whole = run_of(kind, "mezo", "lora")
    run = killed(whole, tmp_path / "run", STEPS, STEPS // EVERY)
    shutil.copy(whole / "steps.jsonl", run)
    (run / "adapter_model.safetensors").write_bytes(tuned(whole)[:100])
    (run / "metrics.json.partial").write_text("{")
    done(*settings[kind].resume(run))
    assert_same_run(run, whole)


def test_finished_run_goes_on(settings, run_of, tmp_path):
    """It kept the weights of an earlier step, and goes on from the last."""
    setting = settings["causal"]
    for mode in ("all", "prefix"):
        run, whole = tmp_path / mode, tmp_path / f"{mode}-whole"
        shutil.copytree(run_of("causal", "mezo", mode), run)
        done(*setting.resume(run, steps=STEPS + EVERY))
        changes = {**options("causal", "mezo", mode), "steps": STEPS + EVERY}
        done(*setting.train(whole, eval_steps=EVERY, **changes))
        assert_same_run(run, whole)


def test_run_without_a_first_measurement_is_resumed_without(settings, run_of, tmp_path):
    setting, run = settings["causal"], tmp_path / "run"
    changes = {**options("causal", "mezo", "all"), "no_before": True}
    done(*setting.train(run, **{**changes, "steps": 2}, eval_steps=EVERY))
    done(*setting.resume(run, steps=STEPS, no_before=True))
    assert "before" not in read(run / "metrics.json")
    assert tuned(run) == tuned(run_of("causal", "mezo", "all"))


@pytest.mark.parametrize("leftover", ["of another seed", "torn"])
def test_run_that_begins_again_begins_with_its_own_adapter(settings, run_of, tmp_path, leftover):
    """Killed before its first step, a run leaves the first weights of its adapter behind, perhaps in part."""
    setting, whole = settings["causal"], run_of("causal", "mezo", "lora")
    run = tmp_path / "run"
    done(*setting.train(tmp_path / "other", tune="lora", seed=1, steps=1))
    kept = {"of another seed": tmp_path / "other", "torn": whole}[leftover] / "initial.safetensors"
    run.mkdir()
    (run / "initial.safetensors").write_bytes(kept.read_bytes()[: None if leftover != "torn" else -100])
    done(*setting.train(run, eval_steps=EVERY, **options("causal", "mezo", "lora")))
    assert_same_run(run, whole)


def killed_until_it_ends(rng: random.Random, train: list[object], run: Path, whole: Path) -> int:
    """Kill a run at random moments, measured by what it has written, and resume it each time. How many kills it took."""

    def size(folder: Path) -> int:
        names = ("metrics.json", "outcomes.json", "initial.safetensors", "steps.jsonl", "dev.jsonl")
        return sum((folder / name).stat().st_size for name in names if (folder / name).exists())

    for kills in itertools.count():
        begun = (run / "steps.jsonl").exists()
        arguments = [*(["train", "--resume"] if begun else train), "--output-dir", run]
        attempt = forked(lambda arguments=arguments: cli(*arguments).code)
        target = size(run) + rng.uniform(0.1, 0.9) * size(whole)
        while (grown := size(run)) < target and attempt.is_alive():
            time.sleep(0.0005)
        if grown >= target:
            attempt.kill()
        attempt.join()
        if attempt.exitcode != -signal.SIGKILL:  # it had just ended
            assert attempt.exitcode == 0
            return kills
    raise AssertionError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_every_mode_survives_kill_9(settings, tmp_path):
    """Killed again and again in whatever it does, a run ends as one that was left alone."""
    rng, kills, modes = (
        random.Random(0),
        0,
        (("causal", "all"), ("causal", "lora"), ("causal", "prefix"), ("masked", "part")),
    )
    for kind, mode in modes:
        changes = {**options(kind, "mezo", mode), "eval_steps": 4, "steps": 22}
        train = settings[kind].train(tmp_path, **changes, output_dir=None)
        run, whole = tmp_path / mode, tmp_path / f"{mode}-whole"
        done(*train, "--output-dir", whole)
        kills += killed_until_it_ends(rng, train, run, whole)
        assert_same_run(run, whole)
    assert kills >= len(modes)


@pytest.mark.parametrize("method", list(RATES))
def test_ctrl_c_leaves_no_weights_behind_that_nobody_reads(settings, tmp_path, method):
    run = tmp_path / "run"
    over = threading.Event()

    def interrupt() -> None:
        while not (run / "dev.jsonl").exists():
            if over.wait(0.005):
                return
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt, daemon=True)
    waiting.start()
    ran = cli(*settings["causal"].train(run, method=method, steps=10**6, eval_steps=1))
    over.set()
    waiting.join()
    assert (ran.code, ran.out) == (130, "")
    if method == "adam":
        assert "nothing was saved" in ran.err
        assert not [path.name for path in run.rglob("*") if path.suffix in (".pt", ".safetensors", ".bin")]
    else:
        assert f"forwardtune train --output-dir {run} --resume" in ran.err


# --- logs of adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_exported_adapter_run_replays_beside_its_first_weights(settings, run_of, tmp_path, mode):
    run, small = run_of("causal", "mezo", mode), tmp_path / "small"
    small.mkdir()
    shutil.copy(run / "initial.safetensors", small)
    done("export", run / "steps.jsonl", "--output", small / "trajectory.safetensors")
    best = read(run / "metrics.json")["best_step"]
    replayed(small / "trajectory.safetensors", settings["causal"], tmp_path / "again", "--steps", best)
    assert tuned(tmp_path / "again") == tuned(run)


def test_replay_writes_nothing_but_its_result(settings, run_of, tmp_path):
    """Not even where the log lies without the first weights of its adapter."""
    run, alone = run_of("causal", "mezo", "lora"), tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "steps.jsonl", alone)
    before = files(alone)
    ran = replayed(alone / "steps.jsonl", settings["causal"], tmp_path / "again")
    assert "verified" in ran.err
    assert files(alone) == before


@pytest.mark.parametrize("damage", ["torn", "another adapter", "another seed"])
def test_first_weights_that_are_not_those_of_the_run(settings, run_of, tmp_path, damage):
    run = Path(shutil.copytree(run_of("causal", "mezo", "lora"), tmp_path / "run"))
    initial = run / "initial.safetensors"
    if damage == "torn":
        initial.write_bytes(initial.read_bytes()[:-50])
    else:
        tensors = load_file(initial)
        if damage == "another adapter":
            tensors.popitem()
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, initial)
    for arguments in (
        ["replay", run / "steps.jsonl", "--model", settings["causal"].model, "--output-dir", tmp_path / "new"],
        settings["causal"].resume(run, steps=STEPS + 1),
    ):
        with refused(tmp_path, "restore|not the weights") as ran:
            ran(cli(*arguments))


# --- eval and probe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "probe"])
def test_measurements_are_printed_and_kept(settings, tmp_path, command):
    setting, kept = settings["causal"], tmp_path / "kept"
    arguments = [command, "--model", setting.model, "--task", setting.task, "--device", "cpu", "--output-dir", kept]
    ran = cli(*arguments)
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    metrics = json.loads(ran.out)
    assert metrics == read(kept / "metrics.json")
    assert (metrics["command"], metrics["method"]) == (command, {"eval": "zero-shot", "probe": "probe"}[command])
    assert {"model", "task", "metric", "settings", "splits", "test"} <= metrics.keys()
    assert {"peak_memory_bytes", "inference_peak_memory_bytes"} <= metrics.keys()
    # Neither they themselves nor a run writes over them.
    for again in (arguments, setting.train(kept), setting.train(kept, method="adam")):
        with refused(tmp_path, "not empty.*another --output-dir.*nothing was overwritten") as ran_again:
            ran_again(cli(*again))


def test_measuring_into_the_folder_of_a_run(settings, run_of, tmp_path):
    for method in RATES:
        run = Path(shutil.copytree(run_of("causal", method, "all"), tmp_path / method))
        for command in ("eval", "probe"):
            arguments = ["--model", run, "--task", settings["causal"].task, "--device", "cpu", "--output-dir", run]
            with refused(tmp_path, "another --output-dir.*nothing was overwritten") as ran:
                result = cli(command, *arguments)
                ran(result)
            assert "--resume" not in result.err  # which only train has


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("calibrate", [None, True])
def test_shots_and_calibration(settings, shots, calibrate):
    setting = settings["causal"]
    arguments = ["eval", "--model", setting.model, "--task", setting.task, "--device", "cpu", "--shots", shots]
    ran = done(*arguments, *(["--calibrate"] if calibrate else []))
    metrics = json.loads(ran.out)
    name = "icl" if shots else "zero-shot"
    assert metrics["method"] == (f"{name}-calibrated" if calibrate else name)
    assert metrics.get("demonstrations", 0) == shots
    plain = json.loads(cli("eval", "--model", setting.model, "--task", setting.task, "--device", "cpu").out)
    assert (metrics["test"]["loss"] == plain["test"]["loss"]) == (not shots and not calibrate)


def test_numbers_that_are_not_finite_are_written_as_json(settings, tmp_path):
    """JSON has no NaN: a reader other than Python's stops at it."""
    run = tmp_path / "run"
    ran = done(*settings["causal"].train(run, lr=1e30, dtype="float16", steps=3, eval_steps=1, json=True))
    assert 0 < read(run / "metrics.json")["skipped_steps"] < 3

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    whole = [ran.out, *(path.read_text(encoding="utf-8") for path in run.glob("*.json"))]
    lines = [line for path in run.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    for text in whole + lines:
        json.loads(text, parse_constant=refuse)
    again = cli(*settings["causal"].resume(run, json=True))
    assert (again.code, again.out) == (0, ran.out), again.err


# --- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"tune": "loraa"},
            "no parameter has 'loraa' in its name; did you mean lora.*choose all, late-mlp, lora, prefix",
        ),
        ({"tune": "LoRA"}, "no parameter has 'LoRA' in its name.*choose all, late-mlp, lora, prefix"),
        ({"tune": "("}, "is no regular expression.*choose all, late-mlp, lora, prefix"),
        ({"tune": "lora", "lora_alpha": "nan"}, "--lora-alpha must be positive"),
        ({"tune": "lora", "lora_targets": "q_prj"}, "no linear layer is called 'q_prj'; did you mean q_proj"),
        ({"tune": "prefix", "prefix_length": 300}, "prefix"),
        ({"per_class": 5}, "holds 7 examples of class 0 .*5 for training and 5 for development.*--per-class to 3"),
        ({"method": "sgd"}, "invalid choice.*mezo.*adam"),
        ({"rule": "momentum", "momentum": "nan"}, "--momentum must be a number from 0 up to 1"),
        ({"rule": "sign", "rule_state": "window"}, "--rule-state belongs to --rule momentum or --rule adam"),
        ({"normalize": "rank", "estimator": "one_sided"}, "--normalize rank .*: give --probes 2 or more"),
        ({"method": "adam", "resume": True}, "--method adam keeps no step log.*new folder"),
        ({"method": "adam", "lr": 0}, "--lr: .* is neither a positive"),
        ({"method": "adam", "dtype": "float16"}, "Adam cannot tune float16 weights.*float32 or bfloat16"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_option(settings, tmp_path, changes, words):
    """What no row of the table of refusals says by its example (test_refusals.py)."""
    with refused(tmp_path, words) as ran:
        ran(cli(*settings["causal"].train(tmp_path / "run", **changes)))


def test_adapter_is_not_tuned_again(settings, run_of, tmp_path):
    adapted = Setting(run_of("causal", "mezo", "lora"), settings["causal"].task)
    for mode in ("all", "lora", "prefix", "norm"):
        with refused(tmp_path, "has an adapter already: give the base model, or merge") as ran:
            ran(cli(*adapted.train(tmp_path / "run", tune=mode)))


def test_model_of_the_wrong_kind_for_a_task(settings, tmp_path):
    causal, masked = settings["causal"], settings["masked"]
    for model, task, words in (
        (causal.model, masked.task, "for masked models alone, and this model is causal: choose a masked model"),
        (masked.model, causal.task, r"for causal models alone, and this model is masked: choose a causal.*\[MASK\]"),
    ):
        measure_it = ["--model", model, "--task", task, "--device", "cpu", "--output-dir", tmp_path / "new"]
        for arguments in (
            Setting(model, task).train(tmp_path / "new"),
            Setting(model, task).train(tmp_path / "new", method="adam", tune="lora"),
            ["eval", *measure_it],
            ["probe", *measure_it],
        ):
            with refused(tmp_path, words) as ran:
                ran(cli(*arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("causal", ["--shots", 1000], "--shots 1000 asks for more than the 1. training examples: lower it"),
        ("causal", ["--shots", "many"], "invalid int value: 'many'"),
        ("masked", ["--shots", 2], "demonstrations are for causal models: leave --shots out"),
        ("masked", ["--calibrate"], "cannot be calibrated.*--calibrate"),
        ("causal", ["--max-length", 6], "leaves no room for its context.*raise --max-length"),
        ("masked", ["--max-length", 4], "leaves no room for its context.*raise --max-length"),
    ],
)
def test_wrong_options_of_eval(settings, tmp_path, kind, arguments, words):
    setting = settings[kind]
    with refused(tmp_path, words) as ran:
        ran(cli("eval", "--model", setting.model, "--task", setting.task, "--output-dir", tmp_path / "new", *arguments))


def test_missing_columns_are_named_by_every_command(settings, tmp_path):
    task = write_task(tmp_path / "task", prompt="'{review} It was'")
    setting = Setting(settings["causal"].model, task)
    measure_it = ["--model", setting.model, "--task", task, "--output-dir", tmp_path / "new"]
    for arguments in (setting.train(tmp_path / "new", method="adam"), ["eval", *measure_it], ["probe", *measure_it]):
        with refused(tmp_path, "no column 'review'.*it has text, label, reply") as ran:
            ran(cli(*arguments))


# --- trained models and real data --------------------------------------------------------------------------------


def real(model: Path, task: str, data: Path, folder: Path, **changes: object) -> tuple[list[object], list[object]]:
    """Arguments of ``train``, and of the ``eval`` of its result."""
    common = ["--task", task, "--data-dir", data, "--batch-size", 4, "--test-examples", 8, "--device", "cpu"]
    sizes = ["--train-examples", 16, "--dev-examples", 6, "--steps", 4, "--eval-steps", 2]
    train = ["train", "--model", model, "--output-dir", folder, *common, *sizes, *flags(changes)]
    return train, ["eval", "--model", folder, *common]


FAMOUS = [  # model, task, method, what is tuned, learning rate, more
    *(
        ("stories260k", "sst2", method, mode, RATES[method].get(mode, 1e-3), {})
        for method, mode in product(RATES, ["all", "lora", "prefix", "mlp.*weight"])
    ),
    ("minilm-l6-mlm", "sst5", "mezo", "lora", 1e-1, {"steps": 2, "dtype": "float32"}),
    ("minilm-l6-mlm", "trec", "mezo", "all", 1e-4, {"steps": 2, "dtype": "float32"}),
    ("minilm-l6-mlm", "mnli", "adam", r"bias$", 1e-3, {"steps": 2, "dtype": "float32"}),
]


@pytest.mark.parametrize(("name", "task", "method", "mode", "lr", "more"), FAMOUS)
def test_trained_models_on_real_data(models_dir, data_dir, tmp_path, name, task, method, mode, lr, more):
    model, run, before = models_dir / name, tmp_path / "run", ["--no-before"] if more else []
    train, again = real(model, task, data_dir, run, method=method, tune=mode, lr=lr, **more)
    done(*train, *before)
    metrics = read(run / "metrics.json")
    dtype = ["--dtype", more["dtype"]] if more else []
    assert json.loads(done(*again, *dtype).out)["test"] == metrics["test"]
    if method == "mezo":
        best = ["--steps", metrics["best_step"]]
        replayed(run / "steps.jsonl", Setting(model, Path()), tmp_path / "again", *best)
        assert tuned(tmp_path / "again") == tuned(run)


def test_classes_are_drawn_evenly(models_dir, data_dir, tmp_path):
    common = ["--model", models_dir / "stories260k", "--data-dir", data_dir, "--test-examples", 4, "--device", "cpu"]
    method = ["--method", "mezo", "--lr", 1e-3, "--eps", 1e-3]
    train = ["train", *common, *method, "--steps", 1, "--no-before", "--per-class", 3]
    for task in ("sst2", "copa"):  # of which the answers differ by example: there the classes are their places
        done(*train, "--task", task, "--output-dir", tmp_path / task)
        assert read(tmp_path / task / "metrics.json")["splits"] == {"train": 6, "dev": 6, "test": 4}
    for task, k, words in (
        ("squad", 3, "no classes to draw examples of: leave --per-class out"),
        ("sst2", 10**6, r"holds \d+ examples of class 0 \(terrible\).*lower --per-class to \d+"),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli(*train[:-1], k, "--task", task, "--output-dir", tmp_path / "new"))


def test_careless_use_on_real_data(models_dir, data_dir, tmp_path):
    causal, masked = (["--model", models_dir / name] for name in ("stories260k", "minilm-l6-mlm"))
    common = ["--data-dir", data_dir, "--test-examples", 4, "--device", "cpu", "--output-dir", tmp_path / "new"]
    for arguments, words in (
        ([*causal, "--task", "squad", "--calibrate"], "task squad cannot be calibrated.*--calibrate"),
        ([*masked, "--task", "squad"], "prompt for causal models alone, and this model is masked"),
        ([*causal, "--task", "sst-2"], "unknown task 'sst-2'.*did you mean sst2"),
        ([*causal, "--task", "boolQ"], "unknown task 'boolQ'.*did you mean boolq"),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli("eval", *arguments, *common))
