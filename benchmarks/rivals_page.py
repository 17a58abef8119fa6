"""Tables and picture of docs/memory.md, from results/rivals.json.

    python benchmarks/rivals_page.py      # writes between the marks in docs/memory.md, and docs/results/memory/peak.png

Sizes that were not run are extrapolated, and marked ``~``. What a method holds is arithmetic: weights as they are stored, gradients, states of the
optimizer, the input of every layer where the others are recomputed. What was measured beyond that, at 1.1B once all methods were run there and at 135M until then, grows with layers times width where
activations are kept for a backward pass, and with the width alone where one layer's are there at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from machine import HERE, parser
from rival_methods import METHODS, Method
from rivals import SHARES, TASKS, WORKLOADS, medians
from shapes import LLAMA

PAGE = HERE.parent / "docs" / "memory.md"
PICTURE = HERE.parent / "docs" / "results" / "memory" / "peak.png"
#: name -> as in :data:`shapes.LLAMA`; LLaMA's (Touvron et al., 2023)
SHAPES = {
    **LLAMA,
    "7b": (32000, 4096, 11008, 32, 32, 32),
    "13b": (32000, 5120, 13824, 40, 40, 40),
    "33b": (32000, 6656, 17920, 60, 52, 52),
    "65b": (32000, 8192, 22016, 80, 64, 64),
}
LARGER, ROOMS = ("1.1b", "7b", "13b", "33b", "65b"), (8, 16, 24, 80)
MIB, GIB = 2**20, 2**30
# Bytes of a weight in 4 bits, with the scales of its group.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


def counts(shape: str) -> tuple[int, int, int]:
    """Weights of the linear layers, of embedding and head, and of a LoRA adapter of rank 8."""
    vocabulary, width, inner, layers, heads, pairs = SHAPES[shape]
    shared = width * pairs // heads
    linear = layers * (2 * width**2 + 2 * width * shared + 3 * width * inner)
    tables = vocabulary * width * (1 if shape == "smollm2-135m" else 2)
    return linear, tables, layers * 8 * (2 * width + width + shared)


def held(method: Method, shape: str, tokens: int) -> float:
    """Bytes that the method holds all the while, by arithmetic."""
    linear, tables, adapter = counts(shape)
    _, width, _, layers, *_ = SHAPES[shape]
    weights = linear * (NF4 if method.nf4 else 2) + tables * 2
    own = {"mezo": 0, "adam": 3, "adam8bit": 1.5}[method.optimizer]  # gradients and states, in weights
    tuned = (
        adapter * 4 if method.tune == "lora" else (linear + tables) * 2
    )  # of late-mlp fewer, but MeZO keeps nothing of them
    inputs = 2 * tokens * width * layers if method.recompute else 0
    return (0 if method.mapped else weights) + tuned * (own + (method.tune == "lora")) + inputs


def base_of(result: dict[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """The shape that others are extrapolated from, with what was measured of it: 1.1B, once all methods were run there."""
    large = medians(result["measured"], "1.1b")
    return ("1.1b", large) if large.keys() == METHODS.keys() else ("smollm2-135m", medians(result["measured"], "sst2"))


def peak(name: str, shape: str, base: str, measured: dict[str, dict[str, float]]) -> float:
    """Bytes at a size that was not run."""
    method, row = METHODS[name], measured[name]
    if shape == base:
        return row["bytes"]
    rest = row["bytes"] - held(method, base, int(row["tokens"]))
    (_, width, _, layers, *_), (_, old_width, _, old_layers, *_) = SHAPES[shape], SHAPES[base]
    keeps = method.optimizer != "mezo" and not method.recompute
    return held(method, shape, int(row["tokens"])) + rest * width / old_width * (layers / old_layers if keeps else 1)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of Markdown."""
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def measured_table(result: dict[str, Any]) -> str:
    """Memory, seconds and forward passes of a step, by workload."""
    found = {w: medians(result["measured"], w) for w in WORKLOADS}
    found = {w: rows for w, rows in found.items() if rows}
    head = ["", *(f"{w}: MiB | seconds | over a forward pass" for w in found)]

    def cells(name: str) -> Iterable[str]:
        yield METHODS[name].title
        for rows in found.values():
            row = rows.get(name)
            yield "| | " if row is None else f"{row['bytes'] / MIB:,.0f} | {row['seconds']:.1f} | {row['forwards']:.1f}"

    return table(" | ".join(head).split(" | "), (" | ".join(cells(name)).split(" | ") for name in METHODS))


def size_table(result: dict[str, Any]) -> str:
    """GiB by size, extrapolated, and the largest size that memory of so many GiB takes."""
    base, measured = base_of(result)
    rows = []
    for name in measured:
        sizes = {shape: peak(name, shape, base, measured) / GIB for shape in (base, *LARGER)}
        largest = [next((s for s in reversed(LARGER) if sizes[s] <= room), "none") for room in ROOMS]
        marks = {s: "" if s == base else "~" for s in sizes}
        rows.append([METHODS[name].title, *(f"{marks[s]}{_number(gib)}" for s, gib in sizes.items()), *largest])
    return (
        table(["GiB", *dict.fromkeys((base, *LARGER)), *(f"{room} GiB take" for room in ROOMS)], rows) if rows else ""
    )


def _number(gib: float) -> str:
    return f"{gib:,.0f}" if gib >= 10 else f"{gib:.2g}"


def equal_table(result: dict[str, Any]) -> str:
    """Test loss after equal seconds."""
    rows = {(row["workload"], row["method"]): row for row in result["equal"]}
    tasks = [task for task in TASKS if any(workload == task for workload, _ in rows)]
    if not tasks:
        return ""
    some = {task: next(row for (workload, _), row in rows.items() if workload == task) for task in tasks}
    head = [""]
    for task in tasks:
        head += [f"{task} at once", *(f"{seconds:.0f} s" for seconds in some[task]["seconds"]), "steps"]
    body = []
    for name in METHODS:
        line = [METHODS[name].title]
        for task in tasks:
            row = rows.get((task, name))
            losses = ["", *[""] * len(SHARES)] if row is None else [row["before"], *row["losses"]]
            line += [f"{x:.3f}" if isinstance(x, float) else "" for x in losses]
            line += ["" if row is None else str(row["steps"][-1])]
        body.append(line)
    return table(head, body)


def draw(result: dict[str, Any]) -> None:
    """Peak memory over size; what is extrapolated is dashed and hollow."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    from forwardtune.paper.report.plots import COLOURS, DPI, STYLE

    base, measured = base_of(result)
    ran = {"smollm2-135m": medians(result["measured"], "sst2"), "1.1b": medians(result["measured"], "1.1b")}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        panel = figure.add_subplot()
        for number, name in enumerate(measured):
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "os^"[number // len(COLOURS)], "markersize": 4}
            shapes = [shape for shape in ran if name in ran[shape] and (shape == base or base == "1.1b")]
            run = [(sum(counts(shape)[:2]), ran[shape][name]["bytes"]) for shape in shapes]
            larger = [shape for shape in LARGER if shape != base]
            more = [run[-1], *((sum(counts(s)[:2]), peak(name, s, base, measured)) for s in larger)]
            panel.plot(*zip(*((n, b / GIB) for n, b in run), strict=True), label=METHODS[name].title, **style)
            panel.plot(*zip(*((n, b / GIB) for n, b in more), strict=True), ls="--", mfc="none", lw=1, **style)
        for room in ROOMS:
            panel.axhline(room, color="#4D4D4D", lw=0.6, ls=":")
        panel.set(xscale="log", yscale="log", xlabel="weights (hollow: extrapolated)", ylabel="peak memory, GiB")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        PICTURE.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PICTURE, dpi=DPI)


def main() -> None:
    """Write the page anew between its marks."""
    asked = parser(__doc__)
    asked.add_argument("--results", type=Path, default=HERE / "results" / "rivals.json")
    result = json.loads(asked.parse_args().results.read_text())
    text = PAGE.read_text()
    for name, content in (
        ("measured", measured_table(result)),
        ("sizes", size_table(result)),
        ("equal", equal_table(result)),
    ):
        between = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        body = content or "Not run yet: the command is above."
        text = re.sub(between, lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text)
    if base_of(result)[1]:
        draw(result)


if __name__ == "__main__":
    main()
