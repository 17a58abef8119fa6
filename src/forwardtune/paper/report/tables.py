"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..sweep.plan import Run, label, show
from .results import Cell, Results

_NONE = "\N{EN DASH}"
_TIMES = "\N{MULTIPLICATION SIGN}"
_MIB = 2**20


def markdown(title: str, all_results: Sequence[Results], pictures: dict[str, dict[Path, str]]) -> str:
    """The whole of ``results.md``."""
    blocks = [f"# {title}"]
    for results in all_results:
        if len(all_results) > 1:
            blocks.append(f"## {results.model}")
        blocks += _sections(results, "##" if len(all_results) == 1 else "###")
        blocks += [f"![{caption}]({path.name})" for path, caption in pictures.get(results.model, {}).items()]
    return "\n\n".join(blocks) + "\n"


def _sections(results: Results, mark: str) -> list[str]:
    names = [label(task) for task in results.tasks]
    blocks = [
        f"{mark} Test scores",
        _table(
            ["", *names, "average"],
            [
                [method, *map(_score, results.row(method)), _fixed(results.average(method))]
                for method in results.methods
            ],
        ),
        "\n".join(f"- {line}" for line in _conditions(results)),
    ]
    gaps = list(_gaps(results))
    if gaps:
        blocks += ["Missing:", "\n".join(f"- {line}" for line in gaps)]
    for title, text, words in _SECTIONS:
        rows = [[method, *map(text, results.row(method))] for method in results.methods]
        rows = [row for row in rows if any(cell != _NONE for cell in row[1:])]
        if rows:
            blocks += [f"{mark} {title}", _table(["", *names], rows), words]
    return blocks


def _score(cell: Cell) -> str:
    if cell.mean is None:
        return _NONE
    return f"{cell.mean:.1f}" if cell.std is None else f"{cell.mean:.1f} ± {cell.std:.1f}"


def _point(cell: Cell) -> str:
    """The chosen values of the options that have a grid, or the learning rate."""
    texts = []
    for chosen in cell.chosen:
        point = chosen.run.point or {name: value for name, value in chosen.run.options.items() if name == "lr"}
        if set(point) == {"lr"}:
            texts.append(show(point["lr"]))
        elif point:
            texts.append(" ".join(f"{name} {show(value)}" for name, value in point.items()))
    return (texts[0] if len(set(texts)) == 1 else ", ".join(texts)) if texts else _NONE


def _memory(cell: Cell) -> str:
    peak, ratio = cell.peak_memory, cell.memory_ratio
    if peak is None:
        return _NONE
    return f"{peak / _MIB:,.0f}" + (f" ({ratio:.2f}{_TIMES})" if ratio else "")


def _seconds(cell: Cell) -> str:
    return _NONE if cell.seconds_per_step is None else f"{cell.seconds_per_step:.3g}"


def _fixed(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


# What there is to say of a cell beside its score, and how to read it.
_SECTIONS: tuple[tuple[str, Callable[[Cell], str], str], ...] = (
    (
        "Chosen on the development split",
        _point,
        "One value means the same for all seeds; else one a seed, in the order of the seeds.",
    ),
    (
        "Peak memory, MiB",
        _memory,
        "The largest over seeds; in brackets, how many times that of inference on the same batch size.",
    ),
    ("Seconds per step", _seconds, "Mean over seeds, without evaluations."),
)


def _conditions(results: Results) -> Iterable[str]:
    """What the numbers are, and what they rest on."""
    by_metric = _grouped((results.metrics[task], label(task)) for task in results.tasks)
    names = "; ".join(
        f"{metric.replace('_', ' ')}{f' ({_listed(tasks)})' if len(by_metric) > 1 else ''}"
        for metric, tasks in by_metric.items()
    )
    yield f"Model: {results.model}."
    yield f"Metric: {names}, {_TIMES} 100; mean ± standard deviation (divisor n - 1) over seeds, a lone number is one seed."
    cells = [(method, task, cell) for (method, task), cell in results.cells.items() if cell.chosen]
    by_method = _grouped((method, chosen.run.seed) for method, _, cell in cells for chosen in cell.chosen)
    seeds = _grouped((_listed(sorted(numbers)), method) for method, numbers in by_method.items())
    yield "Seeds: " + _spread(seeds) + "."
    examples = _grouped(
        (f"{chosen.metrics['test'].get('examples')}", label(task)) for _, task, cell in cells for chosen in cell.chosen
    )
    yield "Test examples: " + _spread(examples) + "."
    steps = _grouped(
        (f"{chosen.metrics['steps']:,}", method)
        for method, _, cell in cells
        for chosen in cell.chosen
        if chosen.metrics.get("steps")
    )
    if steps:
        yield "Steps: " + "; ".join(f"{number} ({_listed(methods)})" for number, methods in steps.items()) + "."


def _gaps(results: Results) -> Iterable[str]:
    """What the table lacks, a line for each reason."""
    for (method, task), cell in results.cells.items():
        where = f"{method}, {label(task)}"
        if not cell.planned:
            yield f"{where}: not in the sweep."
        if cell.unfinished:
            total = sum(map(len, cell.planned.values()))
            yield f"{where}: {len(cell.unfinished)} of {total} runs are not finished ({_runs(cell.unfinished)})."
        for reason, runs in _grouped((reason, run) for run, reason in cell.failed).items():
            yield f"{where}: {len(runs)} failed ({_runs(runs)}): {reason}"


def _runs(runs: list[Run]) -> str:
    """Runs of one cell in a few words."""
    texts = [
        "".join(f"{name} {show(value)}, " for name, value in run.point.items()) + f"seed {run.seed}" for run in runs
    ]
    return "; ".join(texts) if len(texts) <= 3 else f"{texts[0]}; ...; {texts[-1]}"


def _grouped(pairs: Iterable[tuple[str, object]]) -> dict[str, list]:
    groups: dict[str, list] = {}
    for key, value in pairs:
        if value not in groups.setdefault(key, []):
            groups[key].append(value)
    return groups


def _spread(groups: dict[str, list]) -> str:
    """``300``, or ``300 (sst2, rte); 56 (cb)`` when they differ."""
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{key} ({_listed(values)})" for key, values in groups.items()) or "none yet"


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
