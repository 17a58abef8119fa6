"""What became of a run with --log-completions: a plot of its rewards, samples before and after, and the numbers.

python examples/reward/report.py RUN --output-dir docs/results/reward
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files alone: no display is needed

import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from machine import describe

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
SHOWN = 8
KEPT = (
    "task", "metric", "settings", "splits", "before", "test", "sign_test", "steps", "seconds", "seconds_per_step",
    "zero_coefficient_steps", "skipped_steps", "peak_memory_bytes", "inference_peak_memory_bytes",
)  # fmt: skip


def main() -> None:
    """Read a run's folder and write reward.png, samples.md and results.json."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    metrics = json.loads((options.run / "metrics.json").read_text())
    course, completions = (read(options.run / f"{name}.jsonl") for name in ("objective", "completions"))
    options.output_dir.mkdir(parents=True, exist_ok=True)
    plot(course, metrics, options.output_dir / "reward.png")
    (options.output_dir / "samples.md").write_text(samples(completions, metrics), encoding="utf-8")
    kept = {"machine": describe(), **{key: metrics[key] for key in KEPT}, "course": course}
    (options.output_dir / "results.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plot(course: list[dict[str, Any]], metrics: dict[str, Any], path: Path) -> None:
    """Every reward's mean in every step, its running mean, and the test examples' before and after."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.color": "#e4e4e4", "legend.frameon": False})  # fmt: skip
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    steps = [line["step"] for line in course]
    for colour, name in zip(COLOURS, course[0]["objective"], strict=False):
        means = [line["objective"][name]["mean"] for line in course]
        window = max(2, len(means) // 4)
        sums = [0.0, *accumulate(means)]
        smooth = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
        axes.plot(steps, means, "o", ms=2.5, alpha=0.4, color=colour)
        axes.plot(steps, smooth, color=colour, label=f"{name}, minibatches (line: mean of {window} steps)")
        held_out = [metrics[when].get(name, metrics[when]["reward"]) for when in ("before", "test")]
        axes.plot([0, steps[-1]], held_out, "D", ms=6, color=colour, mec="black", clip_on=False)
    axes.plot([], [], "D", ms=6, color="white", mec="black", label="test examples, before and after")
    axes.set(xlabel="step", ylabel="mean reward", xlim=(0, steps[-1]), ylim=(0, 1.05))
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=130)


def samples(completions: list[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """The first test examples with what was written before and after."""
    before = [line for line in completions if line["split"] == "test" and line["step"] == 0]
    after = [line for line in completions if line["split"] == "test" and line["step"] == metrics["steps"]]
    text = "# Samples\n\nThe first test examples, as they come; written greedily, with the reward of each.\n"
    for old, new in list(zip(before, after, strict=True))[:SHOWN]:
        text += f"\n```\n{old['prompt']}\n```\n"
        for when, line in (("Before", old), ("After", new)):
            text += f"\n{when}, reward {line['objective']['reward']:.2f}:\n\n```\n{line['completion']}\n```\n"
    return text


if __name__ == "__main__":
    main()
