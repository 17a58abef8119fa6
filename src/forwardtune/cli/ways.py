"""Other ways to tune the same model on the same task, in one table: what fits, what it takes, and its command."""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..config import STEPS, Train, options
from ..durations import duration
from ..errors import InputError
from . import say
from .costs import Cost
from .options import Asked, flag

if TYPE_CHECKING:
    from .outlook import Outlook

#: Title -> what of a run's settings makes it.
WAYS: dict[str, dict[str, Any]] = {
    "LoRA that starts from the errors": {"tune": "lora", "method": "feedback"},
    "late feed-forward matrices": {"tune": "late-mlp"},
    "all weights": {"tune": "all"},
    "all weights, a direction for every example": {"tune": "all", "assignment": "example"},
    "all weights, offloaded to a file": {"tune": "all", "offload": "disk"},
    "LoRA": {"tune": "lora"},
    "LoRA over int8": {"tune": "lora", "quantize": "int8"},
    "LoRA over nf4": {"tune": "lora", "quantize": "nf4"},
}
ASKED = "as it is asked for"
#: In the place of a task that is not named.
NO_TASK = "TASK"
# Settings that a way has of its own.
_OWN = (
    "method",
    "tune",
    "quantize",
    "assignment",
    "group_size",
    "rank",
    "refresh",
    "fold",
    "perturbation",
    "probes_per_pass",
    "offload",
)
_LENGTHS = ("steps", "epochs", "time_budget")
# A row is not tried that would take more than this share of the memory.
_SAFE = 0.95


@dataclass
class Row:
    """A way to tune.

    Attributes:
        settings: those that are given on its command line.
        peak: bytes; None where nothing is known.
        cost: in seconds.
        steps: that fit the time.
        measured: whether it ran; else it is estimated.
        why: it was not measured.
    """

    title: str
    settings: dict[str, Any]
    peak: int | None = None
    cost: Cost | None = None
    steps: int | None = None
    measured: bool = False
    why: str = ""

    @property
    def seconds(self) -> float | None:
        """Of a step."""
        return None if self.cost is None else self.cost.step

    @property
    def is_peak_measured(self) -> bool:
        """Whether the peak was measured. In resident memory the pages of a file that weights live in would count, which are cache."""
        return self.measured and not self.settings.get("offload")

    def fits(self, room: int) -> bool | None:
        """Whether it fits so many bytes."""
        return None if self.peak is None else self.peak <= room

    @property
    def command(self) -> str:
        """What runs it, but for its length and the folder."""
        return f"forwardtune train {words(self.settings)}"


def words(settings: Mapping[str, Any]) -> str:
    """Settings as options of the command line, without those that say how long."""
    given = {name: value for name, value in settings.items() if name not in _LENGTHS}
    return " ".join(
        flag(name) if value is True else f"{flag(name)} {shlex.quote(str(value))}" for name, value in given.items()
    )


def rows_of(asked: Asked) -> list[Row]:
    """The run that is asked for, and every other way that its settings allow."""
    rows, own = [Row(ASKED, asked.settings)], asked.describe()
    for title, changes in WAYS.items():
        kept = {
            name: value
            for name, value in asked.settings.items()
            if name not in _OWN and changes["tune"] in options(Train)[name].only.get("tune", (changes["tune"],))
        }
        with suppress(InputError):  # the objective or another setting has no meaning with it
            run = described(asked, settings := kept | changes)
            if _is_same(run, own):
                rows[0].title = title
            else:
                rows.append(Row(title, settings))
    return rows


def rename_first(rows: list[Row], asked: Asked, own: Any) -> None:
    """Give the first row the title of the way that the model and the task have decided on."""
    rows[0].title = ASKED
    for row in rows[1:]:
        if _is_same(described(asked, row.settings), own):
            rows[0].title = row.title
            rows.remove(row)
            break


def _is_same(run: Any, own: Any) -> bool:
    return all(getattr(run, name, None) == getattr(own, name, None) for name in _OWN)


def described(asked: Asked, settings: dict[str, Any]) -> Any:
    """The description of a row's run."""
    known = {name: value for name, value in settings.items() if name in options(Train)}
    run = asked.describe(known)
    for name in settings.keys() - known.keys():
        setattr(run, name, settings[name])
    return run


def measure_others(rows: list[Row], outlook: Outlook) -> None:
    """Run three steps of every other row that fits, each in a process of its own, whose memory is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for row in rows[1:]:
        if "offload" in row.settings and "offload" not in options(Train):
            row.why = "not in this version"
        elif row.peak is not None and row.peak > _SAFE * outlook.room:
            row.why = "it would not fit"
        else:
            say(f"measuring: {row.title}")
            _measure(row, outlook)
    outlook.settle(rows)


def _measure(row: Row, outlook: Outlook) -> None:
    command = [sys.executable, "-m", "forwardtune", "plan", *shlex.split(words(row.settings)), "--alone", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        facts = json.loads(done.stdout)
        if not row.settings.get("offload"):
            row.peak = facts["peak_memory_bytes"]
        step, update, example, general, layers, start = (
            float(facts[f"seconds_{what}"])
            for what in ("per_step", "per_update", "per_evaluated_example", "of_general_text", "of_layers", "of_start")
        )
        watched = facts["seconds_per_watched_example"]
        outlook.take(row, Cost(step, update, example, 0, 0, 0, general, layers, watched, start))
    else:  # the kernel ends what takes too much without a word
        row.why = (done.stderr.strip().splitlines() or ["it was killed, as happens where memory runs out"])[-1]
        row.why = row.why.removeprefix("forwardtune: error: ")


def tell(rows: list[Row], outlook: Outlook, budget: float | None) -> None:
    """The table, with the command of each row below it."""
    span = budget or 3600.0
    say()
    say(f"{'':44}{'fits':>6}{'peak MiB':>11}{'s a step':>10}{'steps in ' + duration(span):>16}")
    for row in rows:
        fits = {None: "?", True: "yes", False: "no"}[row.fits(outlook.room)]
        mark, about = "" if row.measured else "~", "" if row.is_peak_measured else "~"
        peak = "?" if row.peak is None else f"{about}{row.peak / 2**20:,.0f}"
        seconds = "" if row.seconds is None else f"{mark}{row.seconds:.2f}"
        steps = "" if row.steps is None else f"{mark}{row.steps:,}"
        say(f"{row.title:44}{fits:>6}{peak:>11}{seconds:>10}{steps:>16}" + (f"  {row.why}" if row.why else ""))
        say(f"  {row.command} --output-dir DIR")
    say(
        f"~ is estimated from shapes, what has none was measured on three steps; {outlook.room / 2**20:,.0f} MiB are there, and "
        f"the longest minibatch has {outlook.tokens:,} tokens. How long: --time-budget {duration(span).replace(' ', '')}, or "
        f"--steps {STEPS}"
    )


def facts_of(rows: list[Row], outlook: Outlook) -> list[dict[str, Any]]:
    """The table for programs."""
    return [
        {
            "way": row.title,
            "settings": row.settings,
            "fits": row.fits(outlook.room),
            "measured": row.measured,
            "peak_measured": row.is_peak_measured,
            "peak_memory_bytes": row.peak,
            "seconds_per_step": row.seconds,
            "steps": row.steps,
            "why_not_measured": row.why,
            "command": row.command,
        }
        for row in rows
    ]
