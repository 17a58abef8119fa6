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

from forwardtune.cli import predict
from forwardtune.predictions import by_class, calibration_error
from support.command import FREE_TEXT, Setting, cli, done, read, refused, write_jsonl, write_task


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


# --- predict --------------------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def unlabelled(setting: Setting, path: Path) -> Path:
    """The test rows without their labels."""
    rows = rows_of(setting.task.parent / "test.csv")
    path.write_text("\n".join(["id,text", *(f"{i},{row['text']}" for i, row in enumerate(rows))]) + "\n")
    return path


def test_predict_answers_as_the_run_did(setting: Setting, finished: Path, tmp_path: Path) -> None:
    """Without a label, and without being told the task."""
    source = unlabelled(setting, tmp_path / "new.csv")
    common = ["--model", finished, "--input", source, "--batch-size", 4]
    ran = done("predict", *common, "--output", tmp_path / "out.csv", "--json")
    found, expected = rows_of(tmp_path / "out.csv"), read(finished / "predictions.jsonl")
    assert [list(row) for row in found] == [["id", "text", "prediction", "confidence"]] * 6
    assert [row["prediction"] for row in found] == [line["answer"] for line in expected]
    assert [row["id"] for row in found] == list("012345")
    for row, line in zip(found, expected, strict=True):
        assert float(row["confidence"]) == pytest.approx(line["confidence"], abs=1e-5)
    facts = json.loads(ran.out)
    assert (facts["rows"], facts["predicted"], sum(facts["answers"].values())) == (6, 6, 6)
    assert not list(tmp_path.glob("*.begun"))
    done("predict", *common, "--output", tmp_path / "out.jsonl")
    lines = read(tmp_path / "out.jsonl")
    assert [line["prediction"] for line in lines] == [row["prediction"] for row in found]
    assert all(line["prediction_scores"].keys() == {"0", "1"} for line in lines)


def test_predict_writes_text(setting: Setting, tmp_path: Path) -> None:
    task = write_task(tmp_path / "task", **FREE_TEXT)
    done(*Setting(setting.model, task).eval(output_dir=tmp_path / "eval"))
    source = unlabelled(setting, tmp_path / "new.csv")
    done("predict", "--model", setting.model, "--task", task, "--input", source, "--output", tmp_path / "out.tsv")
    with open(tmp_path / "out.tsv", newline="", encoding="utf-8") as file:
        found = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    assert found == [line["completion"] for line in read(tmp_path / "eval" / "predictions.jsonl")]


def test_predict_goes_on_over_the_same_input_alone(
    setting: Setting, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = unlabelled(setting, tmp_path / "new.csv"), tmp_path / "out.csv"
    command = ["predict", "--model", finished, "--input", source, "--output", output, "--batch-size", 2]
    monkeypatch.setattr("forwardtune.cli.predict._CHUNK", 1)
    done(*command)
    whole = output.read_bytes()
    output.unlink()

    real, calls = predict.evaluate, []

    def interrupted(*arguments: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **how)

    monkeypatch.setattr(predict, "evaluate", interrupted)
    assert cli(*command).code == 130
    assert not output.exists()
    text = source.read_text()
    source.write_text(text.replace("film", "movie"))
    with refused(tmp_path, "out.csv.begun was begun with another input: delete it") as ran:
        ran(cli(*command))
    source.write_text(text)
    with refused(tmp_path, "begun with another model, weights") as ran:
        ran(cli(*command, "--model", setting.model, "--task", setting.task))
    with (tmp_path / "out.csv.begun").open("a") as torn:
        torn.write('{"answer": "0", "conf')
    ran = done(*command)
    assert "2 rows were answered before" in ran.err
    assert len(calls) == 4  # two of three chunks were left
    assert output.read_bytes() == whole
    with refused(tmp_path, "exists: choose another --output") as ran:
        ran(cli(*command))


def test_rows_that_cannot_be_asked(setting: Setting, finished: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "new.csv", tmp_path / "out.csv"
    command = ["predict", "--model", finished, "--input", source, "--output", output]
    source.write_text("text,id\na film,1\n,2\n")
    with refused(tmp_path, r"row 2: column 'text' is empty.*1 of 2 rows.*--on-bad-row skip") as ran:
        ran(cli(*command))
    done(*command, "--on-bad-row", "skip")
    assert [bool(row["prediction"]) for row in rows_of(output)] == [True, False]
    output.unlink()
    for text, words in (
        ("body\na film\n", "no column 'text'"),
        ("text,prediction\na film,x\n", "has a column 'prediction'.*rename"),
        ("text\n", "holds no row"),
    ):
        source.write_text(text)
        with refused(tmp_path, words) as ran:
            ran(cli(*command))
    with refused(tmp_path, r"one of \.csv, \.tsv, \.jsonl") as ran:
        ran(cli(*command[:-1], tmp_path / "out.xlsx"))


def test_a_run_knows_its_task_when_the_file_is_gone(finished: Path, setting: Setting, tmp_path: Path) -> None:
    """As on another machine: the run keeps a copy of its task file."""
    moved = shutil.copytree(finished, tmp_path / "moved")
    metrics = read(moved)
    metrics["settings"]["task"] = str(tmp_path / "gone.yaml")
    (moved / "metrics.json").write_text(json.dumps(metrics))
    source = unlabelled(setting, tmp_path / "new.csv")
    done("predict", "--model", moved, "--input", source, "--output", tmp_path / "out.csv", "--batch-size", 4)
    expected = [line["answer"] for line in read(finished / "predictions.jsonl")]
    assert [row["prediction"] for row in rows_of(tmp_path / "out.csv")] == expected


# --- compare --------------------------------------------------------------------------------------------------------


def write_run(folder: Path, answers: str, inputs: str = "abcdefgh", **more: Any) -> Path:
    """The folder of a run that answered ``1`` or ``0`` where ``1`` is right."""
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"metric": "accuracy"}))
    lines = [
        {"example": i, "input": one, "gold": "1", "answer": answer, "right": answer == "1", **more}
        for i, (one, answer) in enumerate(zip(inputs, answers, strict=True))
    ]
    write_jsonl(folder / "predictions.jsonl", lines)
    return folder


def test_compare_finds_what_flipped(tmp_path: Path) -> None:
    """Five came out better and none worse: p is 2 / 2**5. The order of the lines does not matter."""
    one = write_run(tmp_path / "one", "00000010")
    other = write_run(tmp_path / "other", "01111110", "hgfedcba")  # a and h are wrong in both, g is right
    facts = json.loads(done("compare", one, other, "--json").out)
    assert [flip["input"] for flip in facts["flipped"]] == list("bcdef")
    assert all(flip["answers"] == ["0", "1"] and flip["outcomes"] == [0.0, 1.0] for flip in facts["flipped"])
    assert facts["sign_test"] == {"better": 5, "worse": 0, "p_value": pytest.approx(2 / 2**5)}
    assert facts["means"] == [1 / 8, 6 / 8]
    told = done("compare", one, other).out
    assert "5 examples came out better in the second, 0 worse: p = 0.062 by the sign test" in told
    assert re.search(rf"\nb\n  right answer: 1\n  0  0  \({one}\)\n  1  1  \({other}\)\n", told)


def test_compare_takes_what_both_were_asked(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one", "0101", "abcd"), write_run(tmp_path / "other", "111", "bcd")
    facts = json.loads(done("compare", one, other, "--json").out)
    assert (facts["examples"], facts["not_shared"]) == (3, 1)
    assert "1 that only one of them has are left out" in done("compare", one, other).out
    write_run(tmp_path / "elsewhere", "11", "xy")
    with refused(tmp_path, "measured on other test examples") as ran:
        ran(cli("compare", one, tmp_path / "elsewhere"))
    write_run(tmp_path / "scored", "0101", "abcd", score=0.5)
    with refused(tmp_path, "answer in other ways") as ran:
        ran(cli("compare", one, tmp_path / "scored"))


def test_compare_wants_finished_runs(finished: Path, setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with refused(tmp_path, "holds no run") as ran:
        ran(cli("compare", finished, tmp_path / "none"))
    begun = write_run(tmp_path / "begun", "1", "a")
    write_jsonl(begun / "predictions.jsonl", [{"example": 1, "input": "a", "before": {"answer": "0"}}])
    with refused(tmp_path, "no predictions.jsonl of a finished run") as ran:
        ran(cli("compare", finished, begun))
    done(*setting.eval(output_dir=tmp_path / "untuned", batch_size=4))
    facts = json.loads(done("compare", tmp_path / "untuned", finished, "--json").out)
    assert facts["sign_test"] == read(finished)["sign_test"]


def test_predict_needs_no_data_of_the_task(setting: Setting, tmp_path: Path) -> None:
    """A run whose data were named beside a task that has none."""
    task = tmp_path / "bare.yaml"
    task.write_text('prompt: "{text}\\nIt was"\nlabel: label\nanswers: {good: great, bad: terrible}\n')
    rows = [f"it was {word} {i},{label}" for i in range(10) for word, label in (("fun", "good"), ("slow", "bad"))]
    (tmp_path / "all.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    run = Setting(setting.model, task)
    done(*run.train(tmp_path / "run", data=tmp_path / "all.csv", steps=2))
    (tmp_path / "new.csv").write_text("text\nfun\nslow\n")
    done("predict", "--model", tmp_path / "run", "--input", tmp_path / "new.csv", "--output", tmp_path / "out.csv")
    assert [row["text"] for row in rows_of(tmp_path / "out.csv")] == ["fun", "slow"]
