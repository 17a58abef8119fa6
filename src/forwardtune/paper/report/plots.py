"""The results as pictures. The one file that knows matplotlib and pandas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from ..sweep.plan import label
from .results import Cell, Chosen, Results, mean_of

# Okabe and Ito's colours, told apart with any colour vision, without the yellow that is lost on white, grey for black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)))
_LEVEL = (0, (1.5, 2))
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "text.parse_math": False,  # names of tasks and runs are text
}
DPI = 150
# How dense the band of one deviation over seeds is.
_BAND = 0.18
# The smoothed loss is a mean over so much of the run.
_WINDOW_SHARE = 0.05
# Runs that differ by more than this in length share a logarithmic axis, or the short one would be a dot.
_LONG = 8


def draw(results: Results, folder: Path, prefix: str) -> dict[Path, str]:
    """Draw what the runs have recorded; a picture that would be empty is left out. Returns the files, with captions."""
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, figure in (
            ("loss-steps", "training loss against steps", _loss(results, "steps")),
            ("loss-seconds", "training loss against seconds", _loss(results, "seconds")),
            ("dev-steps", "development score against steps", _dev(results, "steps")),
            ("dev-seconds", "development score against seconds", _dev(results, "seconds")),
            ("memory", "peak memory", _memory(results)),
        ):
            if figure is not None:
                path = folder / f"{prefix}{name}.png"
                figure.savefig(path, dpi=DPI)
                pictures[path] = caption
    return pictures


def _loss(results: Results, axis: str) -> Figure | None:
    """Training loss, smoothed, a panel for each task."""

    def curve(chosen: list[Chosen], task: str) -> pd.DataFrame:
        return mean_curve((each.history for each in chosen), lambda record: record.get("loss"), _WINDOW_SHARE)

    return _panels(results, axis, f"training loss, smoothed over {_WINDOW_SHARE:.0%} of the run", curve, marker=None)


def _dev(results: Results, axis: str) -> Figure | None:
    """The metric on the development split, a panel for each task; a method without steps is a level line."""

    def curve(chosen: list[Chosen], task: str) -> pd.DataFrame:
        metric = results.metrics[task]
        points = mean_curve((each.history for each in chosen), lambda record: (record.get("dev") or {}).get(metric))
        return points.assign(mean=100 * points["mean"], std=100 * points["std"])

    names = sorted({metric.replace("_", " ") for metric in results.metrics.values()})
    return _panels(results, axis, f"{' or '.join(names)} on the development split, %", curve, marker="o", levels=True)


def mean_curve(
    histories: Iterable[list[dict[str, Any]]], value: Callable[[dict[str, Any]], Any], smooth: float = 0.0
) -> pd.DataFrame:
    """A quantity over training, at the steps that all seeds have.

    Args:
        histories: the lines of each seed's history; at least one seed.
        value: the quantity in a line, or None.
        smooth: each value is first made the mean of the last ones of its seed, this share of the run.

    Returns:
        By ``step``: the ``seconds`` so far and the quantity's ``mean`` over seeds, and its sample deviation ``std``, NaN for
        one seed.
    """
    seeds = []
    for history in histories:
        rows = [(record["step"], record.get("seconds", 0.0), value(record)) for record in history]
        points = pd.DataFrame(rows, columns=["step", "seconds", "value"], dtype=float)
        points = points[np.isfinite(points["value"])].drop_duplicates("step", keep="last")
        window = max(1, round(smooth * len(points)))
        seeds.append(points.assign(value=points["value"].rolling(window, min_periods=1).mean()))
    by_step = pd.concat(seeds).groupby("step")
    curve = by_step.agg(seconds=("seconds", "mean"), mean=("value", "mean"), std=("value", "std"))
    return curve[by_step.size() == len(seeds)]


def _panels(
    results: Results,
    axis: str,
    y_label: str,
    curve: Callable[[list[Chosen], str], pd.DataFrame],
    *,
    marker: str | None,
    levels: bool = False,
) -> Figure | None:
    """A figure with a panel for each task and a line for each method; None if no run has a curve."""
    curves = {(method, task): curve(cell.chosen, task) for (method, task), cell in results.cells.items() if cell.chosen}
    curves = {key: points for key, points in curves.items() if len(points)}
    if not curves:
        return None
    tasks = [task for task in results.tasks if any(key[1] == task for key in curves)]
    columns = min(len(tasks), 3 if len(tasks) in (3, 5, 6, 9) else 4)
    rows = math.ceil(len(tasks) / columns)
    figure, panels = new_figure(max(5.2, 3.1 * columns), 2.5 * rows + 0.9, rows, columns)
    if axis == "seconds":
        curves = {key: points.set_index("seconds") for key, points in curves.items()}
    ends = [points.index[-1] for points in curves.values()]
    logarithmic = max(ends) > _LONG * min(ends)
    shown: dict[str, Any] = {}
    for task, panel in zip(tasks, panels, strict=False):
        panel.set_title(label(task))
        for method in results.methods:
            colour, dashes = _look(results, method)
            if (method, task) in curves:
                points = curves[method, task]
                if logarithmic:
                    points = points[points.index > 0]
                xs, mean, std = points.index, points["mean"], points["std"]
                (shown[method],) = panel.plot(
                    xs, mean, color=colour, linestyle=dashes, linewidth=1.6, marker=marker, markersize=3.5, label=method
                )
                panel.fill_between(xs, mean - std, mean + std, color=colour, alpha=_BAND, linewidth=0)
            elif levels and (level := _level(results.cells[method, task])) is not None:
                shown[method] = panel.axhline(level, color=colour, linestyle=_LEVEL, linewidth=1.3, label=method)
        if logarithmic:
            panel.set_xscale("log")
            panel.xaxis.set_minor_formatter(NullFormatter())
        else:
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=axis == "steps", steps=[1, 2, 2.5, 5, 10]))
            panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    scale = ", logarithmic" if logarithmic else ""
    figure.supxlabel(("step" if axis == "steps" else "seconds of training") + scale, fontsize=10)
    figure.supylabel(y_label, fontsize=10)
    _legend(figure, [(method, shown[method]) for method in results.methods if method in shown])
    return figure


def _memory(results: Results) -> Figure | None:
    """Peak memory of each method, on the task where it is largest."""
    bars = []
    for method in results.methods:
        cells = [cell for cell in results.row(method) if cell.peak_memory]
        if cells:
            cell = max(cells, key=lambda each: each.peak_memory or 0)
            bars.append((method, cell.peak_memory or 0, cell.memory_ratio))
    if not bars:
        return None
    figure, (panel,) = new_figure(6.4, 0.36 * len(bars) + 1.1, 1, 1)
    unit, name = (2**30, "GiB") if max(peak for _, peak, _ in bars) >= 10 * 2**30 else (2**20, "MiB")
    times = "\N{MULTIPLICATION SIGN}"
    for row, (method, peak, ratio) in enumerate(bars):
        panel.barh(row, peak / unit, height=0.62, color=_look(results, method)[0])
        text = f"{peak / unit:,.0f}" + (f"  ({ratio:.2f}{times} inference)" if ratio else "")
        panel.annotate(text, (peak / unit, row), (5, 0), textcoords="offset points", va="center")
    panel.set_yticks(range(len(bars)), [method for method, _, _ in bars])
    panel.tick_params(axis="y", length=0)
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.set_xlim(0, 1.5 * max(peak for _, peak, _ in bars) / unit)
    panel.xaxis.set_major_locator(MaxNLocator(5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    where = "" if len(results.tasks) == 1 else ", on the task where it is largest"
    panel.set_xlabel(f"peak memory, {name}{where}")
    return figure


def new_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """An empty figure. It belongs to no window system and to no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _legend(figure: Figure, entries: list[tuple[str, Any]]) -> None:
    """One legend for all panels, above them, as wide as the figure allows."""
    per_entry = 0.075 * max(len(name) for name, _ in entries) + 0.7
    columns = max(1, min(len(entries), int(figure.get_figwidth() / per_entry)))
    rows = math.ceil(len(entries) / columns)
    columns = math.ceil(len(entries) / rows)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(
        [handle for _, handle in entries],
        [name for name, _ in entries],
        loc="outside upper center",
        ncols=columns,
        frameon=False,
    )


def _look(results: Results, method: str) -> tuple[str, Any]:
    """Colour and dashes: the same for a method in all pictures."""
    index = results.methods.index(method)
    return COLOURS[index % len(COLOURS)], _DASHES[index // len(COLOURS) % len(_DASHES)]


def _level(cell: Cell) -> float | None:
    return mean_of(chosen.dev for chosen in cell.chosen if math.isfinite(chosen.dev))
