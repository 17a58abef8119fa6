"""``forwardtune predict``: a tuned model's answers to the rows of a file."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..config import settings
from ..errors import InputError
from ..evaluation import evaluate, find_layout
from ..models import context_length, model_kind
from ..predictions import question
from ..run_folder import RunFolder, is_run, read_lines
from ..tasks import Task, get_task
from ..tasks.encoding import Encoded, Encoder
from ..tasks.rows import Row, read_rows
from ..tasks.template import RowError
from . import say
from .model import open_model
from .options import ask
from .predicted import answers_of
from .progress import bar
from .results import add_lines, plain, write_lines

_SUFFIXES = (".csv", ".tsv", ".jsonl")
_PREDICTION, _CONFIDENCE, _SCORES = "prediction", "confidence", "prediction_scores"
# Rows are answered, and kept, by so many minibatches at once: sorted by length, they need less padding.
_CHUNK = 16
# Answers whose number is shown.
_SHOWN = 8


def run(parsed: argparse.Namespace) -> None:
    """Answer every row, and write the input's columns with what was answered."""
    asked = ask(parsed, "predict")
    options = asked.describe(_with_run(asked.settings))
    source, output = Path(parsed.input), _new_file(Path(parsed.output))
    task, rows = get_task(options.task, str(source)), read_rows(source)  # whose own data, if any, are not asked for
    if not rows:
        raise InputError(f"{source} holds no row")
    if taken := {_PREDICTION, _CONFIDENCE, _SCORES} & {name for row in rows for name in row}:
        raise InputError(f"{source} has a column {min(taken)!r}, as predictions would have: rename it in the input")
    for wording in task.wordings:  # what cannot be used is refused before a model is loaded
        usable = _usable(wording, rows, source, options.on_bad_row)
    begun = output.with_name(f"{output.name}.begun")
    identity = {
        **settings(options),
        "input": files.digest_of(source),
        "weights": files.digest_of(*_weights(Path(options.model))),
    }
    lines = _begun(begun, identity)
    model, tokenizer = open_model(options)
    task = task.worded_for(model_kind(model))
    encoder = Encoder(tokenizer, min(options.max_length, context_length(model)))
    examples = encoder(
        replace(task, label="") if task.free_text else task, [_question(task, rows, i, source) for i in usable]
    )
    if not lines:
        write_lines(begun, [identity])
    with bar(len(usable), "predicting", "row", len(lines)) as progress:
        for chunk in _answers(model, tokenizer, task, examples, len(lines), options.batch_size):
            add_lines(begun, chunk)
            lines += chunk
            progress.update(len(chunk))
    answers = dict(zip(usable, lines, strict=True))
    files.write_text(output, _table([{**row, **_columns(answers.get(i))} for i, row in enumerate(rows)], output))
    begun.unlink()
    counts = Counter(line["answer"] for line in lines if "answer" in line)
    say(f"{len(lines)} of {len(rows)} rows answered: {output}")
    for name, count in counts.most_common(_SHOWN):
        say(f"  {name}: {count}")
    if parsed.json:
        print(json.dumps({"output": str(output), "rows": len(rows), "predicted": len(lines), "answers": counts}))


def _new_file(output: Path) -> Path:
    """The path, unless nothing can be written there. Raises InputError."""
    if output.suffix.lower() not in _SUFFIXES:
        raise InputError(f"--output {output}: its end says what is written, one of {', '.join(_SUFFIXES)}")
    if output.exists():
        raise InputError(f"{output} exists: choose another --output (nothing was overwritten)")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder: make it, or choose another --output")
    return output


def _with_run(given: dict[str, Any]) -> dict[str, Any]:
    """The settings, with task and longest input of the run whose folder is the model, where they were not given."""
    folder = Path(given.get("model") or "").expanduser()
    if not given.get("model") or not is_run(folder):
        return given
    run = RunFolder(folder)
    own = {"task": run.task, "max_length": run.settings.get("max_length")}
    return {name: value for name, value in own.items() if value is not None} | given


def _usable(task: Task, rows: Sequence[Row], source: Path, on_bad_row: str) -> list[int]:
    """Which rows the task can use. Raises InputError for the others unless they are to be skipped."""
    usable, wrong = [], []
    for i in range(len(rows)):
        try:
            _question(task, rows, i, source)
            usable.append(i)
        except RowError as error:
            wrong.append(str(error))
    if wrong and (on_bad_row != "skip" or not usable):
        remedy = ": --on-bad-row skip leaves them without a prediction" if usable else ""
        raise InputError(f"{wrong[0]} ({len(wrong)} of {len(rows)} rows cannot be used){remedy}")
    if wrong:
        say(f"{len(wrong)} rows get no prediction, the first because of: {wrong[0]}")
    return usable


def _question(task: Task, rows: Sequence[Row], number: int, source: Path) -> Any:
    return question(task, rows[number], f"{source}, row {number + 1}")


def _answers(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Encoded], done: int, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """What the model answers to the examples from the one on that was not done, some minibatches at once."""
    unlabelled = replace(task, label="", metric="reward") if task.free_text else task
    layout = find_layout(model, tokenizer, examples)
    size = batch_size * _CHUNK
    for lo in range(done, len(examples), size):
        chunk = examples[lo : lo + size]
        scores: list[list[float]] = []
        texts: list[str] = []
        evaluate(
            model, tokenizer, unlabelled, chunk, batch_size=batch_size, layout=layout, scores=scores, completions=texts
        )
        said = answers_of(task, chunk, [0.0] * len(chunk), scores, texts)
        yield [{name: value for name, value in line.items() if name not in ("right", "score")} for line in said]


def _columns(line: dict[str, Any] | None) -> dict[str, Any]:
    """What is added to a row; nothing is known of one that could not be used."""
    if line is None:
        return {_PREDICTION: None}
    if "completion" in line:
        return {_PREDICTION: line["completion"]}
    return {_PREDICTION: line["answer"], _CONFIDENCE: round(line["confidence"], 6), _SCORES: line["scores"]}


def _table(rows: Sequence[dict[str, Any]], output: Path) -> str:
    """The rows as text of the file's kind; a table has the scores in JSON Lines alone."""
    if output.suffix.lower() == ".jsonl":
        return "".join(json.dumps(plain(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    names = list(dict.fromkeys(name for row in rows for name in row if name != _SCORES))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if output.suffix.lower() == ".tsv" else ",", lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (dict, list)) else value


# --- going on -------------------------------------------------------------------------------------------------------


def _begun(begun: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """What was answered before the command was interrupted, if it was the same one.

    Raises:
        InputError: the file is of another input, model or setting.
    """
    first, *lines = read_lines(begun) or [identity]
    if other := [name for name in identity if first.get(name) != identity[name]]:
        raise InputError(
            f"{begun} was begun with another {', '.join(other)}: delete it to begin anew, or choose another --output "
            "(nothing was overwritten)"
        )
    if lines:
        say(f"{len(lines)} rows were answered before: going on behind them")
        write_lines(begun, [first, *lines])  # without a line that a kill tore
    return lines


def _weights(folder: Path) -> list[Path]:
    """The files of a local model that hold weights."""
    folder = folder.expanduser()
    return [folder] if folder.is_file() else sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
