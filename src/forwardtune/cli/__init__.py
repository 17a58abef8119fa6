"""L7: the command line: the commands of ``forwardtune`` (:mod:`.commands`).

stdout carries what a command is asked for (JSON, text of a model, what ``inspect`` and ``compare`` found); everything else that
people are told goes to stderr, without colours, and without carriage returns where nobody watches. Exit codes: 0 done, 1 the run
failed, 2 the input was wrong, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module, metadata
from typing import Any

from .. import __version__
from ..errors import InputError, LogError, LogWriteError, NonFiniteLossError, UnreachableError, WorkerError
from ..processes import is_first
from .commands import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Of several processes of a launch, rank 0 alone is heard."""
    with _first_is_heard():
        return _run(arguments)


@contextmanager
def _first_is_heard() -> Iterator[None]:
    if is_first():
        yield
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    with open(os.devnull, "w", encoding="utf-8") as nobody, redirect_stdout(nobody), redirect_stderr(nobody):
        yield


def _run(arguments: Sequence[str] | None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.version:
        print("\n".join(versions() if options.verbose else versions()[:1]))
        parser.exit()
    if not hasattr(options, "run"):
        parser.error("the following arguments are required: COMMAND")
    module, function = options.run.split(".")
    _quiet_libraries()
    _bound_kept_products()
    try:
        run = getattr(import_module(f".{module}", __name__), function)
        return int(run(options) or 0)
    except UnreachableError as error:
        with redirect_stderr(sys.__stderr__):
            return _fail(error, 2)
    except (NonFiniteLossError, LogWriteError, WorkerError) as error:
        return _fail(error, 1)
    except InputError as error:
        return _fail(InputError(_with_option(error)), 2)
    except LogError as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except MemoryError as error:
        return _fail(MemoryError(f"out of memory: lower --batch-size, or use --dtype bfloat16 {error}"), 1)
    except BrokenPipeError:  # the reader of stdout has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(OSError(f"{where}{error.strerror or error}. Nothing that was saved before is lost"), 1)


# What a report of a fault should name.
_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub", "numpy", "numba", "triton",
    "scipy", "gguf", "scikit-learn", "matplotlib", "pandas",
)  # fmt: skip


def versions() -> list[str]:
    """The version of this package, and below it those of Python, the machine and the packages that it works with."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return [
        f"forwardtune {__version__}",
        f"python {platform.python_version()}",
        f"platform {platform.platform()}",
        *found,
    ]


def say(text: str = "") -> None:
    """A line for people, above a progress bar if there is one."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(text, file=sys.stderr, flush=True)


# Arguments of Python whose option is called otherwise.
_OPTIONS = {"demonstrations": "shots", "calibrations": "calibrate"}


def _with_option(error: InputError) -> str:
    """The message with the option in the place of the argument that its remedy names: ``x=2`` becomes ``--x 2``."""
    before, name, after = str(error).rpartition(error.argument or "\0")
    if not name:
        return str(error)
    option = _OPTIONS.get(name, name).replace("_", "-")
    return f"{before}--{option}" + re.sub(r"^=('?)(\w+)\1", r" \2", after)


def _fail(error: object, code: int) -> int:
    say(f"forwardtune: error: {error}")
    if isinstance(error, Exception) and "forwardtune.workers" in sys.modules:
        sys.modules["forwardtune.workers"].launched().tell(error)
    return code


def _bound_kept_products() -> None:
    """Have oneDNN keep fewer prepared products: a third of a mebibyte for every shape of every layer, of a thousand unless it is told.

    Minibatches mostly have shapes of their own, so what is kept serves the layers of one pass, of which a handful differ.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def _quiet_libraries() -> None:
    """Libraries report errors alone, and our warnings are one line without the source code around them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):  # which kernels they miss, at every import
        logging.getLogger(name).setLevel(logging.ERROR)

    def show(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
        if "forwardtune" in filename or issubclass(category, UserWarning):
            say(f"forwardtune: warning: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.filterwarnings("ignore", module=r"(torch|transformers|accelerate|datasets|huggingface_hub)\b")
