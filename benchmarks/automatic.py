"""How much of what the best learning rate of a grid gains do automatic settings gain?

    python benchmarks/automatic.py runs/automatic-minilm runs/automatic-smollm2-135m --output docs/results/automatic
    python benchmarks/automatic.py runs/automatic-feedback --output docs/results/automatic-feedback

The folders are those of ``sweeps/automatic-*.yaml``, finished or not: a seed counts where all its runs of a task are done. A run gains
the development loss of the untuned model less the lowest that it measured, or nothing where none was lower: the weights that it keeps
are those. The best point of the grid is the rate whose gain, averaged over seeds, is largest; so it is chosen with hindsight.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median
from typing import Any

from machine import parser
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from forwardtune.files import write_json
from forwardtune.paper.sweep import SweepFolder
from forwardtune.paper.sweep.plan import Run, label, show

UNTUNED, AUTO = "Untuned", "auto"
# Gains below this share of the untuned loss are noise of a few examples: their ratio means nothing.
SLIGHT = 0.01
GREY, BLUE, RED = "#4D4D4D", "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Outcome:
    """What a run came to: ``dev`` the losses that it measured; ``kept`` and ``test`` those of the weights that it kept.

    ``passes`` are the examples that had gone through the model by each of those measurements: of two sides of a step, of the
    search, and of the measurements themselves.
    """

    dev: list[float]
    passes: list[int]
    kept: float
    test: float
    metrics: dict[str, Any]

    def gain(self, untuned: float, passes: float = math.inf) -> float:
        """By how much the lowest development loss within so many passes is below the untuned one; 0 where it is not."""
        within = [loss for loss, so_far in zip(self.dev, self.passes, strict=True) if so_far <= passes]
        return max(0.0, untuned - min((loss for loss in within if math.isfinite(loss)), default=math.inf))


@dataclass(frozen=True)
class Cell:
    """A task with a model and a way to tune: outcomes by seed, then by learning rate or ``auto``."""

    model: str
    task: str
    mode: str
    untuned: dict[int, Outcome]
    runs: dict[int, dict[str, Outcome]]

    @property
    def seeds(self) -> list[int]:
        return sorted(self.runs)

    @property
    def rates(self) -> list[str]:
        return sorted((rate for rate in next(iter(self.runs.values())) if rate != AUTO), key=float)

    def base(self, seed: int) -> float:
        return self.untuned[seed].dev[-1]

    def gains(self, rate: str, passes: float = math.inf) -> list[float]:
        return [self.runs[seed][rate].gain(self.base(seed), passes) for seed in self.seeds]

    def passes(self, rate: str) -> float:
        return mean(self.runs[seed][rate].passes[-1] for seed in self.seeds)

    @property
    def best(self) -> str:
        return max(self.rates, key=lambda rate: mean(self.gains(rate)))

    def test_gain(self, rate: str) -> float:
        """Mean fall of the test loss, by examples that nothing else looked at."""
        return mean(self.untuned[seed].test - self.runs[seed][rate].test for seed in self.seeds)


def outcome(folder: SweepFolder, run: Run) -> Outcome | None:
    metrics = folder.metrics(run)
    if metrics is None:
        return None
    lines = [json.loads(line) for line in (folder.of(run) / "dev.jsonl").read_text().splitlines()]
    kept, test = float(metrics["dev"]["loss"]), float(metrics["test"]["loss"])
    batch, searched = metrics["settings"]["batch_size"], metrics.get("search_forwards", 0)
    measured = accumulate(line["dev"]["examples"] for line in lines)
    passes = [
        batch * (2 * line["step"] + (searched if line["step"] else 0)) + so_far
        for line, so_far in zip(lines, measured, strict=True)
    ]
    return Outcome([line["dev"]["loss"] for line in lines], passes, kept, test, metrics)


def cells(path: Path) -> list[Cell]:
    """The cells of a sweep of which at least one seed is complete."""
    folder = SweepFolder(path)
    sweep = folder.read_plan()
    found: dict[tuple[str, str], dict[int, dict[str, Outcome | None]]] = {}
    untuned: dict[str, dict[int, Outcome | None]] = {}
    for run in sweep.runs:
        if run.method == UNTUNED:
            untuned.setdefault(run.task, {})[run.seed] = outcome(folder, run)
            continue
        mode = run.method.split(",")[0]
        rate = AUTO if run.method.endswith(AUTO) else show(run.point["lr"])
        found.setdefault((run.task, mode), {}).setdefault(run.seed, {})[rate] = outcome(folder, run)
    result = []
    for (task, mode), by_seed in sorted(found.items(), key=lambda item: (sweep.tasks.index(item[0][0]), item[0][1])):
        complete = {
            seed: {rate: o for rate, o in runs.items() if o is not None}
            for seed, runs in by_seed.items()
            if untuned[task].get(seed) is not None and None not in runs.values()
        }
        base = {seed: o for seed, o in untuned[task].items() if o is not None}
        if complete:
            result.append(Cell(label(sweep.models[0]), label(task), mode, base, complete))
    return result


def row(cell: Cell) -> dict[str, Any]:
    """One line of the table, and what the file of numbers holds."""
    base = mean(cell.base(seed) for seed in cell.seeds)
    best, auto = mean(cell.gains(cell.best)), mean(cell.gains(AUTO))
    runs = [cell.runs[seed][AUTO] for seed in cell.seeds]
    early = mean(cell.gains(AUTO, cell.passes(cell.best)))
    return {
        "model": cell.model,
        "task": cell.task,
        "tuned": cell.mode,
        "seeds": cell.seeds,
        "untuned": base,
        "best_rate": cell.best,
        "grid_gain": best,
        "auto_gain": auto,
        "share": auto / best if best > SLIGHT * base else None,
        "early_share": early / best if best > SLIGHT * base else None,
        "passes": cell.passes(AUTO) / cell.passes(cell.best),
        "gains": {rate: cell.gains(rate) for rate in [*cell.rates, AUTO]},
        "auto_rates": [run.metrics["learning_rate"] for run in runs],
        "search_share": max(run.metrics["search_forwards"] / (2 * run.metrics["steps"]) for run in runs),
        "forwards": max(run.metrics["search_forwards"] + 2 * run.metrics["steps"] for run in runs),
        "grid_forwards": 2 * cell.runs[cell.seeds[0]][cell.best].metrics["steps"],
        "grid_test_gain": cell.test_gain(cell.best),
        "auto_test_gain": cell.test_gain(AUTO),
        "rollbacks": mean(run.metrics["rollbacks"] for run in runs),
        "kept_worse": sum(run.kept > run.dev[0] for run in runs),
        "grid_worse": sum(
            not cell.runs[seed][rate].gain(cell.base(seed)) > 0 for seed in cell.seeds for rate in cell.rates
        )
        / (len(cell.seeds) * len(cell.rates)),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | task | tuned | seeds | untuned | best rate of the grid | its gain | automatic | share | test: grid | test: automatic |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = "-" if r["share"] is None else f"{r['share']:.0%}"
        lines.append(
            f"| {r['model']} | {r['task']} | {r['tuned']} | {len(r['seeds'])} | {r['untuned']:.3f} | {r['best_rate']} | "
            f"{r['grid_gain']:.3f} | {r['auto_gain']:.3f} | {share} | {r['grid_test_gain']:+.3f} | {r['auto_test_gain']:+.3f} |"
        )
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    judged = [r for r in rows if r["share"] is not None]
    good = sum(r["share"] >= 0.95 for r in judged)
    slight = [r for r in rows if r["share"] is None]
    total = sum(r["auto_gain"] / r["untuned"] for r in rows) / sum(r["grid_gain"] / r["untuned"] for r in rows)
    text = (
        f"Of {len(judged)} cells in which the best rate gains more than {SLIGHT:.0%} of the untuned loss, automatic settings gain at "
        f"least 95% as much in {good}; the median share is {median(r['share'] for r in judged):.0%}, the smallest "
        f"{min(r['share'] for r in judged):.0%}. Gains relative to the untuned loss, summed over all {len(rows)} cells: {total:.0%} "
        "of the grid's. "
    )
    if slight:
        names = ", ".join(f"{r['task']} ({r['tuned']}, {r['model']})" for r in slight)
        text += f"Nothing gains more than that in {names}. "
    missed = [r for r in judged if r["share"] < 0.95]
    if missed:
        text += (
            f"Of the {len(missed)} cells with less, the best rate left the test loss worse than the untuned one in "
            f"{sum(r['grid_test_gain'] < 0 for r in missed)}. "
        )
    better = sum(r["auto_test_gain"] >= r["grid_test_gain"] for r in rows)
    text += (
        f"On the test split, which chooses nothing, the kept weights of automatic runs have a loss as low as those of the best rate, "
        f"or lower, in {better} of {len(rows)} cells. "
    )
    text += (
        "Automatic runs measure the development split about twice as often as the grid's. With those measurements counted they "
        f"take {mean(r['passes'] for r in rows):.2f} times the forward passes; stopped at equal ones, they gain at least 95% as much "
        f"in {sum(r['early_share'] >= 0.95 for r in judged)} cells, at the median {median(r['early_share'] for r in judged):.0%}. "
    )
    longer = sum(r["forwards"] > r["grid_forwards"] for r in rows)
    return text + (
        f"The search takes at most {max(r['search_share'] for r in rows):.1%} of a run's forward passes; cells in which an automatic "
        f"run with its search takes more of them than the grid's runs: {longer}. Automatic runs that keep weights worse on the "
        f"development split than the untuned ones: {sum(r['kept_worse'] for r in rows)}; of the grid's runs "
        f"{mean(r['grid_worse'] for r in rows):.0%} never measured a lower loss than that."
    )


def draw(found: list[Cell], path: Path) -> None:
    """Gain over learning rate, a panel for each cell; the automatic runs as a level."""
    modes = list(dict.fromkeys(cell.mode for cell in found))
    columns = len(modes)
    tasks = list(dict.fromkeys(cell.task for cell in found))
    figure = Figure(figsize=(4.2 * columns, 1.9 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    for cell in found:
        panel = axes[tasks.index(cell.task)][modes.index(cell.mode)]
        xs = [float(rate) for rate in cell.rates]
        for seed_index in range(len(cell.seeds)):
            panel.plot(xs, [cell.gains(rate)[seed_index] for rate in cell.rates], ".", color=GREY, alpha=0.5, ms=4)
        panel.plot(xs, [mean(cell.gains(rate)) for rate in cell.rates], "-", color=BLUE, label="grid, mean")
        panel.axhline(mean(cell.gains(AUTO)), color=RED, label="automatic, mean")
        for seed, gain in zip(cell.seeds, cell.gains(AUTO), strict=True):
            first = cell.runs[seed][AUTO].metrics["learning_rate"]["first"]
            panel.plot([first], [gain], "x", color=RED, ms=5)
        panel.set_xscale("log")
        panel.set_title(f"{cell.task}, {cell.mode}", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.supxlabel("learning rate (crosses: the rate that an automatic run begins with)", fontsize=9)
    figure.supylabel("fall of the development loss", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("folders", nargs="+", type=Path, help="folders of the sweeps")
    asked.add_argument("--output", type=Path, default=Path("docs/results/automatic"))
    options = asked.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    for folder in options.folders:
        found = cells(folder)
        if not found:
            print(f"{folder}: no seed of any task is complete")
            continue
        rows += [row(cell) for cell in found]
        pictures.append(f"gains-{found[0].model}.png")
        draw(found, options.output / pictures[-1])
    if not rows:
        raise SystemExit("nothing to compare yet: go on with the sweeps")
    text = summary(rows) + "\n\n" + table(rows) + "\n\n" + "\n".join(f"![]({name})" for name in pictures) + "\n"
    (options.output / "results.md").write_text("# Automatic settings against a grid\n\n" + text, encoding="utf-8")
    write_json(options.output / "results.json", {"cells": rows})
    print(text)


if __name__ == "__main__":
    main()
