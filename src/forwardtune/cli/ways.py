"""Other ways to tune the same model on the same task, in one table: what fits, what it takes, and its command."""

from __future__ import annotations

import gc
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..config import STEPS, Train, options
from ..durations import duration
from ..errors import InputError
from ..evaluation import prepare
from ..models import blank_model, context_length, require_device
from ..noise import load_kernels
from ..optimizer import MeZO
from . import say, tuned
from .costs import Cost, steps_within
from .estimates import Estimate, estimate, speed
from .options import Asked, flag
from .session import Session, open_session

#: Title -> what of a run's settings makes it.
WAYS: dict[str, dict[str, Any]] = {
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
_OWN = ("tune", "prefix_length", "quantize", "assignment", "rank", "refresh", "perturbation", "offload")
_LENGTHS = ("steps", "epochs", "time_budget")
# A step from a file whose pages are in memory, over a resident one.
_OFFLOADED = 1.3
# A row is not tried that would take more than this share of the memory.
_SAFE = 0.95
_INPUTS = ("input_ids", "attention_mask", "position_ids", "positions")


@dataclass
class Row:
    """A way to tune.

    Attributes:
        settings: those that are given on its command line.
        peak: bytes; None where nothing is known.
        seconds: of a step.
        steps: that fit the time.
        measured: whether it ran; else it is estimated.
        why: it was not measured.
    """

    title: str
    settings: dict[str, Any]
    peak: int | None = None
    seconds: float | None = None
    steps: int | None = None
    measured: bool = False
    why: str = ""

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
        if all(getattr(own, name, None) == value for name, value in changes.items()) and all(
            getattr(own, name, None) in (None, one.default)
            for name, one in options(Train).items()
            if name in _OWN and name not in changes
        ):
            rows[0].title = title
            continue
        kept = {
            name: value
            for name, value in asked.settings.items()
            if name not in _OWN and (changes["tune"] == "lora" or not name.startswith("lora_"))
        }
        with suppress(InputError):  # the objective or another setting has no meaning with it
            _described(asked, settings := kept | changes)
            rows.append(Row(title, settings))
    return rows


def _described(asked: Asked, settings: dict[str, Any]) -> Any:
    """The description of a row's run."""
    known = {name: value for name, value in settings.items() if name in options(Train)}
    described = asked.describe(known)
    for name in settings.keys() - known.keys():
        setattr(described, name, settings[name])
    return described


class Outlook:
    """What every row would take, by shapes alone.

    Args:
        asked: the command line.
        rows: take what is estimated.
        room: bytes of memory; None: what is free here.
        timed: estimate seconds too, for this machine.

    Attributes:
        session: task and examples, with a model without weights; None where there is no tokenizer.
        tokens: of the longest minibatch.
    """

    def __init__(self, asked: Asked, rows: list[Row], room: int | None, *, timed: bool) -> None:
        own = asked.describe()
        self.session, blank, inputs = _inputs(own)
        self.tokens = int(inputs["input_ids"].numel())
        device = _device(own.device) if timed else torch.device("cpu")
        _warm_up(device, blank.dtype)
        base = 0 if str(own.device).startswith("cuda") and not timed else memory.now(device)
        self.room = room if room is not None else memory.free(device) + base
        found: dict[int, Estimate] = {}
        for number, row in enumerate(rows):
            described = _described(asked, row.settings)
            model = deepcopy(blank)
            tokenizer = None if self.session is None else self.session.tokenizer
            dtype, width = model.dtype, model.config.get_text_config().hidden_size
            try:
                with redirect_stderr(io.StringIO()):
                    model = tuned.prepare_model(model, tokenizer, options=described, first=None)
                    found[number] = estimate(model, inputs, described)
                row.peak = base + found[number].bytes
            except InputError as error:
                if number == 0:
                    raise
                row.why = str(error)
            except Exception as error:  # a model of an unusual kind may ask for values, which are not there
                row.why = f"its shapes alone do not tell ({type(error).__name__})"
        if timed and found:
            pace = speed(device, dtype, self.tokens, width)
            for number, one in found.items():
                offloaded = _OFFLOADED if rows[number].settings.get("offload") else 1.0
                step = offloaded * pace.seconds(one)
                evaluation = one.products * pace.product / own.batch_size / 2
                self.take(rows[number], Cost(step, one.updated * pace.update, evaluation, 0, 0, 0), measured=False)

    def take(self, row: Row, cost: Cost, *, measured: bool) -> None:
        """Note what a row costs."""
        row.seconds, row.measured = cost.step, measured
        if self.session is not None:
            row.steps = steps_within(self.session.options.time_budget or 3600.0, cost, self.session)


def _device(name: str | None) -> torch.device:
    require_device(name or "auto")
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(str(name))


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Load what every run loads, of libraries and of their kernels, on a model of a few weights: it is in the memory that a run begins with."""
    import transformers.quantizers.auto  # noqa: F401  # by which checkpoints are read

    from ..hf.trainer import MeZOTrainer  # noqa: F401

    load_kernels(device)
    tiny = nn.Sequential(nn.Embedding(8, 64), nn.Linear(64, 8)).to(device, dtype)
    numbers = torch.arange(8, device=device)
    MeZO(tiny, lr=1e-9).step(lambda: tiny(numbers).float().logsumexp(dim=-1).sum())


def _inputs(own: Any) -> tuple[Session | None, Any, dict[str, Tensor]]:
    """A model without weights, and the longest minibatch of the task; without a tokenizer rows of ``--max-length`` tokens."""
    if own.task != NO_TASK and _has_tokenizer(own.model):
        blank = replace(own, device="meta", quantize=None)
        with redirect_stderr(io.StringIO()):
            session = open_session(blank, "train", "dev", "test")
        found = prepare(session.model, session.tokenizer, session.longest, session.layout)
        return session, session.model, {name: found[name] for name in _INPUTS if name in found}
    model = blank_model(own.model, dtype=own.dtype, attn_implementation=own.attn_implementation)
    length = min(own.max_length, context_length(model))
    say(f"no task with a tokenizer: every example is taken to be {length:,} tokens long (--max-length)")
    shapes = {"input_ids": (own.batch_size, length), "positions": (own.batch_size,)}
    return None, model, {n: torch.zeros(shape, dtype=torch.int64, device="meta") for n, shape in shapes.items()}


def _has_tokenizer(name: str) -> bool:
    folder = Path(name).expanduser()
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return not folder.is_dir() or any((folder / file).exists() for file in files)


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


def _measure(row: Row, outlook: Outlook) -> None:
    command = [sys.executable, "-m", "forwardtune", "plan", *shlex.split(words(row.settings)), "--alone", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        facts = json.loads(done.stdout)
        if not row.settings.get("offload"):
            row.peak = facts["peak_memory_bytes"]
        step, update, example = (
            float(facts[f"seconds_per_{what}"]) for what in ("step", "update", "evaluated_example")
        )
        outlook.take(row, Cost(step, update, example, 0, 0, 0), measured=True)
        row.why = ""
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
