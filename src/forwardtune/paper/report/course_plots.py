"""The course of runs as pictures, a line for each run. With ``plots`` the only file that knows matplotlib and pandas."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FormatStrFormatter, MaxNLocator, NullFormatter, PercentFormatter

from .course import Course
from .plots import COLOURS, DPI, STYLE, new_figure

# A smoothed line is a mean over so much of the run, and its steps are drawn as pale dots, at most so many.
_WINDOW_SHARE = 0.05
_DOTS = 2000
_SIZE = (6.4, 3.4)
# More ways back than these are lines without a name.
_NAMED = 8


def draw_course(courses: Sequence[Course], folder: Path) -> dict[Path, str]:
    """Draw what the runs have recorded; a picture that would be empty is left out. Returns the files, with captions."""
    metric = courses[0].metric.replace("_", " ")
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for name, caption, figure in (
            ("loss-steps", "Loss against steps", _over(courses, "training loss", _loss, "steps")),
            ("loss-seconds", "Loss against seconds of training", _over(courses, "training loss", _loss, "seconds")),
            ("dev-steps", f"Development {metric} against steps", _dev(courses, "steps")),
            ("dev-seconds", f"Development {metric} against seconds", _dev(courses, "seconds")),
            ("projected-gradient", "Projected gradient", _over(courses, "|projected gradient|", _projected, "steps")),
            ("learning-rate", "Learning rate, with its ways back", _rates(courses)),
            ("unchanged", "Weights that an update left at the same stored value", _unchanged(courses)),
            ("memory", "Peak memory, tuning beside inference", _memory(courses)),
        ):
            if figure is not None:
                path = folder / f"{name}.png"
                figure.savefig(path, dpi=DPI)
                pictures[path] = caption
    return pictures


def _loss(course: Course) -> list[float]:
    return course.loss


def _projected(course: Course) -> list[float]:
    return course.projected


def _over(courses: Sequence[Course], label: str, values: Callable[[Course], list[float]], axis: str) -> Figure | None:
    """A quantity of every step, smoothed, over its own dots."""
    figure, panel = _panel()
    drawn = 0
    for course, colour in zip(courses, _colours(courses), strict=True):
        ys = pd.Series(values(course), index=getattr(course, axis)[: len(values(course))], dtype=float)
        ys = ys.replace([math.inf, -math.inf], math.nan).dropna()
        if not len(ys):
            continue
        drawn += 1
        every = max(1, len(ys) // _DOTS)
        panel.plot(ys.index[::every], ys.iloc[::every], ".", color=colour, alpha=0.25, markersize=2.5, zorder=1)
        smooth = ys.rolling(max(1, round(_WINDOW_SHARE * len(ys))), min_periods=1).mean()
        panel.plot(smooth.index, smooth, color=colour, linewidth=1.6, label=course.name)
    return _finished(figure, panel, courses, label, axis) if drawn else None


def _dev(courses: Sequence[Course], axis: str) -> Figure | None:
    """The metric of the development split, and its loss on an axis of its own where there is one run."""
    figure, panel = _panel()
    drawn = 0
    for course, colour in zip(courses, _colours(courses), strict=True):
        at = "step" if axis == "steps" else "seconds"
        points = [(line[at], line["dev"].get(course.metric)) for line in course.measured]
        points = [(x, y) for x, y in points if y is not None]
        if points:
            drawn += 1
            panel.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, label=course.name)
        losses = [(line[at], line["dev"].get("loss")) for line in course.measured]
        if len(courses) == 1 and any(y is not None for _, y in losses):
            drawn = 1
            beside = panel.twinx()
            beside.plot(*zip(*losses, strict=True), "s--", color=COLOURS[1], markersize=3, linewidth=1)
            beside.set_ylabel("loss on the dev split (dashed)", color=COLOURS[1])
            beside.grid(visible=False)
            beside.spines["right"].set_visible(True)
    return (
        _finished(figure, panel, courses, f"{courses[0].metric.replace('_', ' ')} on the dev split", axis)
        if drawn
        else None
    )


def _rates(courses: Sequence[Course]) -> Figure | None:
    figure, panel = _panel()
    drawn = False
    for course, colour in zip(courses, _colours(courses), strict=True):
        if not course.rates:
            continue
        drawn = True
        panel.plot(course.steps, course.rates, color=colour, linewidth=1.6, drawstyle="steps-post", label=course.name)
        for at, to in course.rollbacks:
            panel.axvline(at, color=colour, linewidth=1, linestyle=":")
            if len(course.rollbacks) > _NAMED:
                continue
            panel.annotate(
                f"back to {to}", (at, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                fontsize=7, va="top", rotation=90, color=colour,
            )  # fmt: skip
    if not drawn:
        return None
    rates = [rate for course in courses for rate in course.rates if rate > 0]
    if rates and max(rates) > 20 * min(rates):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    return _finished(figure, panel, courses, "learning rate", "steps")


def _unchanged(courses: Sequence[Course]) -> Figure | None:
    figure = _over(courses, "share of the tuned weights", lambda course: course.unchanged, "steps")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def _memory(courses: Sequence[Course]) -> Figure | None:
    """Two bars for each run."""
    known = [course for course in courses if course.run.metrics.get("peak_memory_bytes")]
    if not known:
        return None
    figure, panels = new_figure(_SIZE[0], 0.9 + 0.6 * len(known), 1, 1)
    (panel,) = panels
    for row, course in enumerate(known):
        for offset, key, colour in (
            (-0.2, "peak_memory_bytes", COLOURS[0]),
            (0.2, "inference_peak_memory_bytes", COLOURS[5]),
        ):
            size = (course.run.metrics.get(key) or 0) / 2**20
            what = "tuning" if offset < 0 else "inference on the same batch"
            panel.barh(row + offset, size, height=0.36, color=colour)
            panel.annotate(
                f"{size:,.0f} MiB {what}", (size, row + offset), (5, 0), textcoords="offset points", va="center"
            )
    panel.set_yticks(range(len(known)), [course.name for course in known])
    panel.invert_yaxis()
    panel.grid(visible=False)
    panel.set_xlim(0, 1.6 * panel.get_xlim()[1])
    panel.set_xlabel("peak memory, MiB")
    return figure


# --- shared ---------------------------------------------------------------------------------------------------------


def _panel() -> tuple[Figure, Axes]:
    figure, panels = new_figure(*_SIZE, 1, 1)
    return figure, panels[0]


def _colours(courses: Sequence[Course]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(courses))]


def _finished(figure: Figure, panel: Axes, courses: Sequence[Course], label: str, axis: str) -> Figure:
    panel.set_xlabel("step" if axis == "steps" else "seconds of training")
    panel.set_ylabel(label)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=axis == "steps", steps=[1, 2, 2.5, 5, 10]))
    panel.xaxis.set_major_formatter(EngFormatter(sep="") if axis == "steps" else FormatStrFormatter("%g"))
    panel.set_xlim(left=0)
    if len(courses) > 1:
        panel.legend(frameon=False, fontsize=8)
    return figure
