"""What a model answered to every example: kept after train and eval, summed up by class, and given for new rows."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from forwardtune.predictions import by_class, calibration_error
from support.command import FREE_TEXT, Setting, cli, done, read, refused, write_jsonl, write_task

pytestmark = pytest.mark.usefixtures("short_collections")


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    done(*setting.train(folder, lr=3e-3, steps=12))
    return folder


# --- by class -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_classes_are_measured_as_scikit_learn_does(seed: int) -> None:
    """The last class is never right, the one before it neither right nor answered."""
    random, names = np.random.default_rng(seed), list("abcde")
    gold, answers = [list(random.choice(list(some), 40)) for some in ("abc", "abe")]
    found = by_class(names, gold, answers)
    expected = precision_recall_fscore_support(gold, answers, labels=names, zero_division=0)
    for name, numbers in zip(("precision", "recall", "f1", "examples"), expected, strict=True):
        assert [found["classes"][one][name] for one in names] == pytest.approx(list(numbers)), name
    assert found["confusion"] == confusion_matrix(gold, answers, labels=names).tolist()
    macro = precision_recall_fscore_support(gold, answers, average="macro", zero_division=0)[2]
    assert found["macro_f1"] == pytest.approx(macro)


def test_calibration_error_by_hand() -> None:
    """Two bins: (0.9, 0.9, one of two right) and (0.35, wrong)."""
    assert calibration_error([0.9, 0.9, 0.35], [True, False, False]) == pytest.approx((2 * 0.4 + 0.35) / 3)
    assert calibration_error([1.0, 1.0], [True, True]) == 0
    assert math.isnan(calibration_error([math.nan], [True]))


# --- predictions.jsonl ----------------------------------------------------------------------------------------------


def test_train_keeps_what_was_answered_before_and_after(setting: Setting, finished: Path) -> None:
    lines, metrics, outcomes = read(finished / "predictions.jsonl"), read(finished), read(finished / "outcomes.json")
    assert [line["example"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["input"].endswith(" It was")
    assert {line["gold"] for line in lines} == {"0", "1"}
    for when, said in (("before", [line["before"] for line in lines]), ("after", lines)):
        assert [float(one["right"]) for one in said] == outcomes[when]
        for one, line in zip(said, lines, strict=True):
            assert one["right"] == (one["answer"] == line["gold"])
            assert one["answer"] == max(one["scores"], key=one["scores"].get)
            shares = np.exp(list(one["scores"].values()))
            assert one["confidence"] == pytest.approx(max(shares) / sum(shares))
    assert any(line["scores"] != line["before"]["scores"] for line in lines)
    for when, said in (("before", [line["before"] for line in lines]), ("test", lines)):
        classes = by_class(["0", "1"], [line["gold"] for line in lines], [one["answer"] for one in said])
        assert metrics["by_class"][when] == classes
        assert metrics[when]["macro_f1"] == classes["macro_f1"]
        error = calibration_error([one["confidence"] for one in said], [one["right"] for one in said])
        assert metrics[when]["calibration_error"] == pytest.approx(error)


def test_people_see_the_classes(setting: Setting, tmp_path: Path) -> None:
    told = done(*setting.eval(output_dir=tmp_path / "eval")).err
    assert re.search(r"class +precision +recall +F1 +examples\n0 .*\n1 ", told)
    facts = read(tmp_path / "eval")["by_class"]["test"]
    wrong = facts["confusion"][0][1] + facts["confusion"][1][0]
    assert ("most often confused" in told) == (wrong > 0)
    lines = read(tmp_path / "eval" / "predictions.jsonl")
    assert len(lines) == 6
    assert not any("before" in line for line in lines)


def test_free_text_keeps_completions(setting: Setting, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", **FREE_TEXT)
    done(*Setting(setting.model, task).eval(output_dir=tmp_path / "eval"))
    lines, metrics = read(tmp_path / "eval" / "predictions.jsonl"), read(tmp_path / "eval")
    assert all(isinstance(line["completion"], str) and line["gold"] for line in lines)
    assert np.mean([line["score"] for line in lines]) == pytest.approx(metrics["test"]["f1"])
    assert np.mean([line["right"] for line in lines]) == metrics["test"]["exact_match"]
    assert "macro_f1" not in metrics["test"]


def test_options_and_preferences(setting: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "task"
    task = write_task(folder, answers=None, options="{each: entries, text: '{option}'}", label="reply")
    rows = [{"text": f"the film {i}", "reply": ["good"], "entries": ["bad", "good", "slow"]} for i in range(8)]
    write_jsonl(folder / "train.jsonl", rows)
    task.write_text(task.read_text().replace("test.csv", "train.jsonl"))
    done(*Setting(setting.model, task).eval(output_dir=tmp_path / "options"))
    line = read(tmp_path / "options" / "predictions.jsonl")[0]
    assert (line["gold"], list(line["scores"])) == ("good", ["bad", "good", "slow"])
    assert "calibration_error" in read(tmp_path / "options")["test"]

    task = write_task(folder, answers=None, preference="{chosen: good, rejected: bad}")
    write_jsonl(folder / "train.jsonl", [{"text": f"film {i}", "good": "fine", "bad": "slow"} for i in range(8)])
    task.write_text(task.read_text().replace("test.csv", "train.jsonl"))
    done(*Setting(setting.model, task).eval(output_dir=tmp_path / "preference"))
    lines = read(tmp_path / "preference" / "predictions.jsonl")
    assert all(line["right"] == (line["answer"] == "chosen") == (line["margin"] > 0) for line in lines)
