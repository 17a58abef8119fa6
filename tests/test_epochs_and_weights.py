"""How long a run is, in passes over its examples, and how much each class counts in its loss."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from forwardtune.errors import InputError
from forwardtune.objectives import score_loss
from forwardtune.tasks import Task
from forwardtune.tasks.weights import class_weights
from forwardtune.trajectory import read_log
from support.command import FREE_TEXT, Setting, cli, done, message_of, read, weights, write_task

CHOICE = Task("t", "{text}", "label", {"spam": "a", "ham": "b", "1": "c"}, "accuracy")
LABELS = [0, 1, 1, 1, 2, 2, 1, 1]


@pytest.fixture(scope="module")
def setting(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tiny_folder, write_task(tmp_path_factory.mktemp("task")))


# --- epochs ----------------------------------------------------------------------------------------------------------


def examples(folder: Path) -> int:
    return int(read(folder)["splits"]["train"])


@pytest.mark.parametrize(("epochs", "passes"), [(2, 2.0), (1.5, 1.5)])
def test_epochs_are_passes_over_the_training_examples(
    setting: Setting, tmp_path: Path, epochs: float, passes: float
) -> None:
    done(*setting.train(tmp_path / "run", steps=None, epochs=epochs))
    steps_of_pass = -(-examples(tmp_path / "run") // 4)
    assert read_log(tmp_path / "run" / "steps.jsonl").steps == -(-passes * steps_of_pass // 1)
    assert read(tmp_path / "run")["settings"]["epochs"] == epochs


def test_run_is_extended_by_epochs_to_the_bits_of_a_long_one(setting: Setting, tmp_path: Path) -> None:
    done(*setting.train(tmp_path / "long", steps=None, epochs=3, dev_examples=0))
    done(*setting.train(tmp_path / "run", steps=None, epochs=1, dev_examples=0))
    assert "is complete" in done(*setting.resume(tmp_path / "run")).err
    done(*setting.resume(tmp_path / "run", epochs=3))
    assert weights(tmp_path / "run") == weights(tmp_path / "long")
    assert "is complete" in done(*setting.resume(tmp_path / "run", steps=3)).err


def test_adam_takes_epochs_too_and_plan_says_their_steps(setting: Setting, tmp_path: Path) -> None:
    done(*setting.train(tmp_path / "run", method="adam", steps=None, epochs=2))
    steps = 2 * -(-examples(tmp_path / "run") // 4)
    assert read(tmp_path / "run")["steps"] == steps
    planned = setting.train(tmp_path / "plan", steps=None, epochs=2)
    del planned[planned.index("--output-dir") : planned.index("--output-dir") + 2]
    said = done("plan", "--alone", *planned[1:]).err
    assert f"{steps} steps take about" in said
    assert f"--steps {steps} --output-dir DIR" in said
    assert "--epochs" not in said


# --- weights of classes ----------------------------------------------------------------------------------------------


def test_balanced_classes_count_alike_and_losses_keep_their_size() -> None:
    found = class_weights("balanced", CHOICE, LABELS)
    count = Counter(LABELS)
    assert [found[i] * count[i] for i in range(3)] == pytest.approx([len(LABELS) / 3] * 3)
    assert class_weights("balanced", CHOICE, [0, 1, 1, 1]) == pytest.approx(
        (2.0, 2 / 3, 2.0)
    )  # one class has no example


def test_weights_may_be_given_by_label() -> None:
    found = class_weights(" spam = 5, 1.0=2", CHOICE, LABELS)
    assert [weight / found[1] for weight in found] == pytest.approx([5, 1, 2])
    assert sum(found[label] for label in LABELS) / len(LABELS) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["cross_entropy", "likelihood"])
def test_loss_is_weighed_by_the_class_of_the_right_answer(loss: str) -> None:
    scores, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2, 1, 0])
    task = Task(**{**vars(CHOICE), "loss": loss})
    plain = F.cross_entropy(scores, labels, reduction="none") if loss == "cross_entropy" else -scores[range(4), labels]
    torch.testing.assert_close(score_loss(task, scores, labels), plain)
    weighed = Task(**{**vars(task), "class_weights": (0.5, 3.0, 2.0)})
    torch.testing.assert_close(score_loss(weighed, scores, labels), plain * torch.tensor([0.5, 2.0, 3.0, 0.5]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "balance",
            r"'balance' is no label with a weight, such as spam=2 \(labels: spam, ham, 1\); did you mean balanced\?",
        ),
        ("spma=2", "'spma=2' is no label with a weight.*did you mean spam"),
        ("spam", "'spam' is no label with a weight"),
        ("spam=much", "the weight 'much' of spam is not a positive number"),
        ("ham=0", "the weight '0' of ham is not a positive number"),
        ("ham=inf", "the weight 'inf' of ham"),
    ],
)
def test_weights_that_cannot_be_read(given: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        class_weights(given, CHOICE, LABELS)


def test_command_line_weighs_classes_in_training_and_in_what_is_measured(setting: Setting, tmp_path: Path) -> None:
    plain = done(*setting.train(tmp_path / "plain"))
    ran = done(*setting.train(tmp_path / "run", class_weights="0=3,1=1"))
    found = re.search(r"classes weigh 0 (.*), 1 (.*)\n", ran.err)
    assert found is not None
    assert float(found[1]) / float(found[2]) == pytest.approx(3, rel=0.01)
    assert "classes weigh" not in plain.err
    logs = [read_log(tmp_path / name / "steps.jsonl").records for name in ("plain", "run")]
    assert logs[0][0].losses != logs[1][0].losses
    before = [read(tmp_path / name)["before"] for name in ("plain", "run")]
    assert before[0]["accuracy"] == before[1]["accuracy"]
    assert before[0]["loss"] != before[1]["loss"]
    done(*setting.train(tmp_path / "adam", class_weights="balanced", method="adam"))


def test_weights_without_meaning_are_refused(setting: Setting, tmp_path: Path) -> None:
    words = message_of(*setting.train(tmp_path / "run", class_weights="balanced", objective="accuracy"))
    assert words.startswith("--class-weights are of the loss, and --objective accuracy has none")
    free = Setting(setting.model, write_task(tmp_path / "free", **FREE_TEXT))
    words = message_of(*free.train(tmp_path / "run", class_weights="balanced"))
    assert words.startswith("task task has no classes to weigh: leave --class-weights out")
    assert cli(*setting.train(tmp_path / "run", class_weights="3")).code == 2
