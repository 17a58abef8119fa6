"""L7: the command line. ``forwardtune train | plan | eval | probe | sweep | report | replay | inspect | export``.

stdout carries JSON alone; everything for people goes to stderr. Exit codes: 0 done, 1 the run failed, 2 the input was
wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from .. import __version__
from ..errors import InputError
from ..optimizer import NonFiniteLossError
from ..tasks import ON_BAD_ROW
from ..trajectory.format import LogError, LogWriteError
from .parser import Parser

_DESCRIPTION = "Fine-tune language models with forward passes only (MeZO)."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        return int(options.run(options) or 0)
    except (NonFiniteLossError, LogWriteError) as error:
        return _fail(error, 1)
    except (InputError, LogError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        return _fail(f"out of memory: lower --batch-size, or use --dtype bfloat16 {error}", 1)
    except BrokenPipeError:  # the reader of stdout has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}. Nothing that was saved before is lost", 1)


def say(text: str = "") -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)


def _fail(error: object, code: int) -> int:
    say(f"forwardtune: error: {error}")
    return code


def _quiet_libraries() -> None:
    """Libraries report errors alone, and our warnings are one line without the source code around them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if "forwardtune" in filename or issubclass(category, UserWarning):
            say(f"forwardtune: warning: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|huggingface_hub)\b")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="forwardtune", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"forwardtune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    from . import evaluate, logs, plan, sweeps, train

    for module in (train, plan, evaluate, sweeps, logs):
        module.add_commands(commands)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is evaluated on what."""
    parser.add_argument("--model", help="hub id, local folder, .gguf file, or smollm2-135m (embedded)")
    parser.add_argument("--task", help="a task of the package, such as sst2 or reviews, or a task file (.yaml)")
    parser.add_argument(
        "--data-dir", help="folder with the task's data (.jsonl, .csv, .json, .tsv), instead of the hub"
    )
    parser.add_argument("--dtype", help="auto (as stored), float32, bfloat16 or float16 [auto]")
    parser.add_argument("--device", help="cpu, cuda, mps, or auto to spread over devices [cuda if there is one]")
    parser.add_argument("--batch-size", type=int, help="examples in a minibatch [16]")
    parser.add_argument("--max-length", type=int, help="longest input in tokens; contexts are cut on the left [2048]")
    parser.add_argument("--train-examples", type=int, help="training examples, drawn by --seed [1000]")
    parser.add_argument("--dev-examples", type=int, help="development examples, drawn from the same data [task's own]")
    parser.add_argument("--test-examples", type=int, help="test examples, the same for every seed [1000]")
    parser.add_argument("--per-class", type=int, help="so many training and development examples of each class instead")
    parser.add_argument(
        "--on-bad-row", choices=ON_BAD_ROW, help="rows that the task cannot use: refuse or skip [refuse]"
    )
    parser.add_argument("--seed", type=int, help="seed of directions, minibatches and splits [0]")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def positive(options: argparse.Namespace, *names: str) -> None:
    """Raise InputError unless those options are positive numbers."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {value}")
