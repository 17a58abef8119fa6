"""One HTML page that shows a run, or several beside each other, with everything that it needs inside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from ...errors import InputError
from ...files import write_text
from ...run_folder import RunFolder
from ..extra import PLOTS, require
from .course import Course

PAGE = "report.html"


def write_page(folders: Sequence[Path], output: Path, *, plots: bool = True) -> list[Path]:
    """Write ``report.html`` and, with ``plots``, the pictures in it as PNG files. Returns their paths.

    What users and models wrote is escaped in the page, which runs no script and loads nothing.

    Raises:
        InputError: a folder is not a run's, or what draws the plots is missing.
        LogError: a step log is damaged.
    """
    courses = [Course(RunFolder(folder), name) for folder, name in zip(folders, _names(folders), strict=True)]
    if not any(course.steps or course.run.metrics for course in courses):
        raise InputError(f"{folders[0]} has neither steps nor measurements yet: report it later")
    pictures: dict[Path, str] = {}
    if plots:
        require("plots", PLOTS)
        from .course_plots import draw_course

        output.mkdir(parents=True, exist_ok=True)
        pictures = draw_course(courses, output)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    columns, measures = _measures(courses)
    text = environment.get_template("page.html").render(
        title=f"Run {courses[0].name}" if len(courses) == 1 else f"{len(courses)} runs",
        courses=courses,
        columns=columns,
        measures=measures,
        pictures=[(caption, base64.b64encode(path.read_bytes()).decode()) for path, caption in pictures.items()],
    )
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / PAGE, text)
    return [output / PAGE, *pictures]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each folder's path, or all of it where that names two of them."""
    last = [folder.resolve().name for folder in folders]
    return last if len(set(last)) == len(last) else [str(folder) for folder in folders]


def _measures(courses: Sequence[Course]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """A column for every measurement of the test split, and the values of each metric in them."""
    alone = len(courses) == 1
    found: list[tuple[str, dict[str, Any]]] = []
    for course in courses:
        for key, name in (("before", "before"), ("test", "after")):
            if key in course.run.metrics:
                found.append((name if alone else f"{course.name} {name}", course.run.metrics[key]))
    names = dict.fromkeys(name for _, measured in found for name in measured)
    return [name for name, _ in found], [
        (name.replace("_", " "), [_shown(measured.get(name)) for _, measured in found]) for name in names
    ]


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
