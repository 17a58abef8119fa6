"""What the scripts of this folder share: how a figure looks, and where a figure and its numbers go."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files alone: no display is needed

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from machine import describe  # noqa: E402

# Okabe and Ito's palette, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, RED, SKY, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
GREY = "#666666"
COLOURS = (BLUE, RED, GREEN, PURPLE, SKY, ORANGE)

plt.rcParams.update(
    {
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#e4e4e4",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.6,
    }
)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    options = argparse.ArgumentParser(
        allow_abbrev=False,
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--quick", action="store_true", help="a run of seconds, with coarser numbers")
    options.add_argument("--output-dir", type=Path, default=ROOT / "docs/theory", help="folder of the figure")
    return options


def panels(count: int, width: float = 4.6, height: float = 3.5) -> tuple[Any, Any]:
    """A figure with panels side by side."""
    return plt.subplots(1, count, figsize=(width * count, height))


def save(name: str, result: dict[str, Any], figure: Any, folder: Path) -> dict[str, Any]:
    """Write ``NAME.png`` and the numbers behind it, with the machine, as ``NAME.json``; returns the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png")
    plt.close(figure)
    (folder / f"{name}.json").write_text(json.dumps({"machine": describe(), **result}, indent=2) + "\n")
    print(f"wrote {folder / name}.png and .json", file=sys.stderr)
    return result
