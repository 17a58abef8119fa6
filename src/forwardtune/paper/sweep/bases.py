"""A GGUF file takes long to parse: it is parsed once for all runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ...models import EMBEDDED_MODEL, load_model, save_model
from .plan import Run, label, slug

#: Model name and ``--dtype`` of a run -> folder of the parsed model.
Bases = dict[tuple[str, str], str]


def dtype_of(run: Run) -> str:
    """The run's ``--dtype``. Numbers of a GGUF file that are kept as stored are float32."""
    dtype = str(run.options.get("dtype", "auto"))
    return "float32" if dtype == "auto" else dtype


def prepare_bases(folder: Path, runs: Iterable[Run], say: Callable[[str], None]) -> Bases:
    """Save the models of those runs that come as GGUF as ``base-MODEL-DTYPE``, unless they are there already.

    The weights are those that the run would have parsed itself, bit for bit.

    Raises:
        InputError: a model cannot be loaded.
    """
    bases: Bases = {}
    for run in runs:
        key = run.model, dtype_of(run)
        if key in bases or not (run.model == EMBEDDED_MODEL or run.model.endswith(".gguf")):
            continue
        path = folder / f"base-{slug(label(run.model))}-{key[1]}"
        if not path.is_dir():
            say(f"parsing {run.model} once for all runs, as {key[1]}")
            _save(*key, path)
        bases[key] = str(path.resolve())
    return bases


def _save(model_name: str, dtype: str, path: Path) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(model_name, dtype=dtype)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_model(model, tokenizer, partial)
    os.replace(partial, path)
