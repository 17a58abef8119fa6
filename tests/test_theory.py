"""The scripts of examples/theory find what docs/theory.md says, and the page quotes what they found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forwardtune import MeZO
from forwardtune.tasks import get_task, load_split

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples/theory"))

import dimension  # noqa: E402
import effective_rank  # noqa: E402
import prompt  # noqa: E402
import unbiased  # noqa: E402

SCRIPTS = {"unbiased": unbiased, "dimension": dimension, "prompt": prompt, "effective_rank": effective_rank}


def run(script: Any, folder: Path, *arguments: object) -> dict[str, Any]:
    """A quick run; its numbers, as the file beside the figure holds them."""
    script.main(["--quick", "--output-dir", str(folder), *map(str, arguments)])
    name = script.__name__
    assert (folder / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads((folder / f"{name}.json").read_text())
    assert {"processor", "torch", "commit"} <= result["machine"].keys()
    return result


# --- the estimate is unbiased ------------------------------------------------------------------------------------


def test_error_of_the_estimate_falls_as_one_over_sqrt_n_down_to_a_floor_of_eps_squared(tmp_path):
    result = run(unbiased, tmp_path)
    small, _, large = result["errors"].values()
    for n, error in small.items():
        # E |g^ - g|^2 = (d + 1) |g|^2 / n; the 256 estimates behind each n tell it to within some percent.
        assert error == pytest.approx(((result["weights"] + 1) / int(n)) ** 0.5, rel=0.15), n
    assert result["slope"] == pytest.approx(-0.5, abs=0.05)
    assert large["256"] > 1.1 * large["1"] / 16  # the floor: a sixteenth is what chance alone would leave
    assert result["bias_slope"] == pytest.approx(2, abs=0.05)
    assert result["bias_on_quadratic"] < 1e-13


def test_a_step_of_mezo_moves_the_weights_by_that_estimate():
    model = unbiased.tiny_gpt2(torch.float32)
    loss = unbiased.loss_of(model)
    truth = unbiased.gradient(model, loss)
    (expected,) = (e for n, e in unbiased.errors(model, loss, truth, 1e-3, 16).items() if n == 16)
    optimizer = MeZO(model, lr=1.0, eps=1e-3, probes=16)
    before = [tensor.parameter.detach().clone() for tensor in optimizer.tuned]
    optimizer.step(loss)
    moved = [b - tensor.parameter.detach() for b, tensor in zip(before, optimizer.tuned, strict=True)]
    assert unbiased.distance(moved, truth) == pytest.approx(expected, rel=1e-4)


# --- the dimension does not matter, the effective rank does ------------------------------------------------------


def test_dimension_alone_does_not_slow_mezo_down(tmp_path):
    result = run(dimension, tmp_path)
    curves = result["curves"]
    decaying, isotropic = ([c for c in curves if c["spectrum"] == name] for name in ("decaying", "isotropic"))
    assert [c["dimension"] for c in decaying] == [c["dimension"] for c in isotropic] == [128, 1024, 8192]
    for c in curves:
        # Lemma 2: the estimate is d + 2 times as long, squared, as the gradient. 960 samples of chi-squared spread.
        assert c["growth"] == pytest.approx(c["dimension"] + 2, rel=0.25)
        for step, mean, exact, error in zip(
            result["steps"][1:], c["mean"][1:], c["expected"][1:], c["standard_error"][1:], strict=True
        ):
            assert abs(mean - exact) < 5 * error, (c["spectrum"], c["dimension"], step)
    assert {round(c["effective_rank"], 4) for c in decaying} == {8.0}
    ends = [c["expected"][-1] for c in decaying]
    assert max(ends) / min(ends) < 1.001
    ends = [c["mean"][-1] for c in decaying]
    assert max(ends) < 0.12
    assert max(ends) / min(ends) < 1.5
    assert [c["effective_rank"] for c in isotropic] == [128, 1024, 8192]
    left = [1 - c["mean"][-1] for c in isotropic]  # what was gained: eight times less in eight times the dimension
    assert left[0] > 4 * left[1] > 16 * left[2]


# --- the prompt --------------------------------------------------------------------------------------------------


def test_text_alone_is_the_same_task_without_the_words_of_the_prompt(tmp_path):
    for name in ("reviews", "sst2"):
        task = get_task(name)
        alone = prompt.text_alone(task, tmp_path)
        assert (alone.name, alone.label, alone.answers, alone.hub) == (task.name, task.label, task.answers, task.hub)
    task, alone = get_task("reviews"), prompt.text_alone(get_task("reviews"), tmp_path)
    for split in ("train", "test"):
        pairs = zip(load_split(task, split).examples, load_split(alone, split).examples, strict=True)
        for with_prompt, without in pairs:
            whole = f"Sentiment of reviews, positive or negative.\nReview: {without.prompt}\nSentiment:"
            assert with_prompt.prompt == whole
            assert (with_prompt.options, with_prompt.label) == (without.options, without.label)


def test_both_wordings_are_tuned_from_the_same_seeds(tmp_path, tiny_folder):
    result = run(prompt, tmp_path, "--model", tiny_folder, "--dtype", "float32", "--lr", 1e-3)
    assert result["prompts"] == {"with the prompt": get_task("reviews").prompt, "text alone": "{text}"}
    for (arm,) in result["runs"].values():
        assert len(arm["losses"]) == 6
        assert [m["step"] for m in arm["held_out"]] == [0, 3, 6]
        assert len({m["loss"] for m in arm["held_out"]}) == 3  # the weights moved
        assert {m["examples"] for m in arm["held_out"]} == {32}
    one, other = (arm["losses"] for (arm,) in result["runs"].values())
    assert one != other


def test_without_the_prompt_the_embedded_model_learns_less():
    """The committed run, which is too long for a test."""
    runs = json.loads((ROOT / "docs/theory/prompt.json").read_text())["runs"]
    accuracies = {name: [arm["held_out"][-1]["accuracy"] for arm in arms] for name, arms in runs.items()}
    assert min(accuracies["with the prompt"]) > max(accuracies["text alone"])


# --- the effective rank ------------------------------------------------------------------------------------------


def test_curvature_by_forward_passes_drowns_in_rounding_when_eps_is_small(tmp_path, tiny_folder):
    check_effective_rank(run(effective_rank, tmp_path, "--model", tiny_folder))


@pytest.mark.real_model
def test_curvature_of_a_trained_model(tmp_path, models_dir):
    result = run(effective_rank, tmp_path, "--model", models_dir / "stories260k", "--batch-size", 2)
    check_effective_rank(result)
    assert result["stable_rank"][2] < 20  # of 260,032


def check_effective_rank(result: dict[str, Any]) -> None:
    backward, sweep = result["backward"], result["sweep"]
    spread = torch.tensor(backward["curvatures"]).std().item()
    found = {dtype: {eps: effective_rank.error(v, backward["curvatures"]) for eps, v in by_eps.items()}
             for dtype, by_eps in sweep.items()}  # fmt: skip
    assert found["float32"]["0.001"] < 0.05 * spread  # usable
    assert found["bfloat16"]["0.0001"] > 20 * spread  # noise alone
    assert found["bfloat16"]["0.0001"] > 20 * found["bfloat16"]["0.001"]  # by eps^-2, a factor of 100
    assert found["float32"]["0.01"] > 5 * found["float32"]["0.001"]  # the bias of a large eps
    _, low, high = result["frobenius"]
    by_backward_passes = (sum(backward["squares"]) / len(backward["squares"])) ** 0.5
    assert 0.7 * low < by_backward_passes < 1.3 * high
    assert abs(backward["power_iteration"][-1] / backward["power_iteration"][-2] - 1) < 0.1
    assert result["effective_rank"][2] < 0.01 * result["weights"]
    assert result["stable_rank"][2] < 0.01 * result["weights"]


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_quotes_the_committed_numbers(name):
    page = (ROOT / "docs/theory.md").read_text()
    result = json.loads((ROOT / f"docs/theory/{name}.json").read_text())
    assert SCRIPTS[name].table(result) in page
    assert f"theory/{name}.png" in page
    assert (ROOT / f"docs/theory/{name}.png").is_file()
