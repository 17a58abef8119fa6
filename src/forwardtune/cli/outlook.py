"""What ways to tune would take, by shapes alone, and what of it measurements mend."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .. import memory
from ..errors import InputError
from ..evaluation import prepare
from ..forgetting import TOKENS
from ..models import blank_model, context_length, require_device
from ..noise import load_kernels
from ..optimizer import MeZO
from . import say, tuned
from .costs import Cost, passes_of_walk, steps_within
from .estimates import Estimate, estimate, speed
from .options import Asked
from .session import Session, open_session
from .ways import NO_TASK, Row, described, rename_first

# A step from a file whose pages are in memory, over a resident one.
_OFFLOADED = 1.3
# Forward passes that measure the gradient of a layer, where directions are modified by it.
_PASSES_A_LAYER = 8
_INPUTS = ("input_ids", "attention_mask", "position_ids", "positions")


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
        self._over_estimate: list[float] = []
        self.session, blank, inputs = _inputs(own)
        self.tokens = int(inputs["input_ids"].numel())
        device = _device(own.device) if timed else torch.device("cpu")
        _warm_up(device, blank.dtype)
        base = 0 if str(own.device).startswith("cuda") and not timed else memory.now(device)
        self.room = room if room is not None else memory.free(device) + base
        found: dict[int, Estimate] = {}
        runs = [described(asked, row.settings) for row in rows]
        task = None if self.session is None else self.session.task
        for number, (row, run) in enumerate(zip(rows, runs, strict=True)):
            model = deepcopy(blank)
            tokenizer = None if self.session is None else self.session.tokenizer
            config = model.config.get_text_config()
            dtype, width, count = model.dtype, config.hidden_size, config.num_hidden_layers
            try:
                with redirect_stderr(io.StringIO()):
                    model = tuned.prepare_model(model, tokenizer, task, options=run, first=None, given=row.settings)
                    found[number] = estimate(model, inputs, run)
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
                forward = one.products * pace.product / one.passes
                general = forward * TOKENS / self.tokens if own.general_text else 0.0
                layers = _PASSES_A_LAYER * count * forward if own.modify_by == "gradients" else 0.0
                evaluation = forward / own.batch_size
                update, start = one.updated * pace.update, forward * passes_of_walk(runs[number])
                rows[number].cost = Cost(step, update, evaluation, 0, 0, 0, general, layers, None, start)
        if runs[0].method != own.method:
            rename_first(rows, asked, runs[0])

    def take(self, row: Row, cost: Cost) -> None:
        """Note what was measured of a row."""
        if row.seconds:
            self._over_estimate.append(cost.step / row.seconds)
        row.cost, row.measured, row.why = cost, True, ""

    def settle(self, rows: list[Row]) -> None:
        """Count steps, when all is measured that can be. What was estimated is off as much as it was where both are known."""
        factor = median(self._over_estimate) if self._over_estimate else 1.0
        for row in rows:
            if row.cost is not None and not row.measured:
                own = row.cost
                seconds = ("step", "update", "evaluation", "general", "layers", "start")
                row.cost = replace(own, **{name: factor * getattr(own, name) for name in seconds})
            if row.cost is not None and self.session is not None:
                row.steps = steps_within(self.session.options.time_budget or 3600.0, row.cost, self.session)


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
