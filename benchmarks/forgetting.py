"""What is learnt and what is lost on the way from the base weights to tuned ones: test loss and general text at theta_0 + a (theta - theta_0).

    python benchmarks/forgetting.py runs/A runs/B [--data-dir FOLDER] [--shares 0.25 0.5 0.75 1]

A run's task is measured on its test split, general text (the packaged one, or ``--general-text FILE``) as ``forwardtune train --general-text`` does:
nats a token over those of the base model, with their standard error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from machine import parser, write

from forwardtune.evaluation import evaluate, find_layout
from forwardtune.forgetting import PACKAGED, compared, read_general, token_losses
from forwardtune.models import load_model
from forwardtune.run_folder import RunFolder
from forwardtune.tasks import get_task, load_splits
from forwardtune.tasks.encoding import Encoder


def main() -> None:
    """Print and save the table."""
    options = parser(__doc__)
    options.add_argument("runs", type=Path, nargs="+")
    options.add_argument("--data-dir")
    options.add_argument("--general-text", default=PACKAGED)
    options.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    given = options.parse_args()
    torch.set_num_threads(1)
    text, rows = read_general(given.general_text), []
    for run in given.runs:
        settings: dict[str, Any] = RunFolder(run).metrics["settings"]
        model, tokenizer = load_model(settings["model"], dtype=settings["dtype"], device="cpu")
        tuned, _ = load_model(str(run), dtype=settings["dtype"], device="cpu")
        moved = {
            name: (weight.data.float(), other.data.float())
            for (name, weight), other in zip(model.named_parameters(), tuned.parameters(), strict=True)
            if not torch.equal(weight, other)
        }
        task = get_task(settings["task"])
        data_dir = None if task.files else given.data_dir  # a packaged task brings its data
        splits = load_splits(task, data_dir=data_dir, dev_examples=1, test_examples=settings["test_examples"])
        examples = Encoder(tokenizer, settings["max_length"])(task, splits["test"].examples)
        layout, base = find_layout(model, tokenizer, examples), token_losses(model, tokenizer, text)
        for share in (0.0, *given.shares):
            for name, weight in model.named_parameters():
                if name in moved:
                    begin, end = moved[name]
                    weight.data.copy_(begin + share * (end - begin))
            scores = evaluate(model, tokenizer, task, examples, batch_size=25, layout=layout)
            lost = compared(base, token_losses(model, tokenizer, text))
            row = {
                "run": run.name,
                "share": share,
                **scores,
                "lost": lost["difference"],
                "error": lost["standard_error"],
            }
            rows.append(row)
            shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
            print(run.name, shown, flush=True)
            write("forgetting", {"general_text": given.general_text, "rows": rows})


if __name__ == "__main__":
    main()
