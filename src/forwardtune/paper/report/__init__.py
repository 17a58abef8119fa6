"""L6: the tables and plots of a sweep's folder (``docs/sweeps.md``), and the page of a run.

``results`` chooses the best point of each grid on the development split and collects numbers, ``tables`` writes them as
Markdown, ``plots`` draws them. ``page`` shows one run, or a few, with what ``course`` reads and ``course_plots`` draws.
"""

from __future__ import annotations

from pathlib import Path

from ...files import write_json
from ..extra import PLOTS, require
from ..sweep import SweepFolder
from ..sweep.plan import label, slug
from .page import write_page
from .results import Cell, Chosen, Results, collect
from .tables import markdown

__all__ = ["Cell", "Chosen", "Results", "collect", "write_page", "write_report"]


def write_report(folder: Path, output: Path, *, plots: bool = True) -> list[Path]:
    """Write ``results.md``, ``results.json`` and, with ``plots``, PNG files. Returns their paths.

    Raises:
        InputError: the folder is not a sweep's, or what draws the plots is missing.
    """
    if plots:
        require("plots", PLOTS)
        from .plots import draw

    sweep = SweepFolder(folder).read_plan()
    all_results = [collect(folder, sweep, model) for model in sweep.models]
    output.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, dict[Path, str]] = {}
    if plots:
        for results in all_results:
            prefix = f"{slug(label(results.model))}-" if len(all_results) > 1 else ""
            pictures[results.model] = draw(results, output, prefix)
    tables, numbers = output / "results.md", output / "results.json"
    tables.write_text(markdown(sweep.name, all_results, pictures), encoding="utf-8")
    write_json(numbers, {"sweep": sweep.name, "models": [results.to_json() for results in all_results]})
    return [tables, numbers, *(path for paths in pictures.values() for path in paths)]
