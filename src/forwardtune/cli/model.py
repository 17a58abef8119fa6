"""The model that a command's options name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import read_json
from ..models import KEPT_QUANTISED, checkpoint_format, is_quantised, load_model, weights_of
from ..run_folder import METRICS, RunFolder, is_run
from ..storage import Offloaded, home_of, storage_named
from . import say
from .results import resume_command


def open_model(options: Any, folder: str | Path | None = None) -> tuple[Any, Any]:
    """Load the model and its tokenizer; where the options leave device and dtype open, they are settled in them.

    Args:
        folder: where weights may be kept on disk; by default where temporary files are.
    """
    _require_finished(Path(options.model).expanduser())
    _refuse_integers(options)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    _take_settings_of_run(options)
    storage = storage_named(getattr(options, "offload", None), folder or tempfile.gettempdir(), options.device)
    say(f"loading {options.model}")
    model, tokenizer = load_described(options, storage)
    dtype = str(model.dtype).removeprefix("torch.")
    quantised = f", quantised ({options.quantize or checkpoint_format(options.model) or 'below an adapter'})"
    say(
        f"  {weights_of(model) / 1e6:.1f}M weights, {dtype}{quantised if is_quantised(model) else ''}, on {options.device}"
        + ("" if storage is None else f", kept {_KEPT[storage.name].format(folder=getattr(storage, 'folder', ''))}")
    )
    if model.dtype == torch.float16 and options.device == "cpu":
        say("  float16 is slow on a processor: --dtype float32 or bfloat16 may be several times as fast")
    return model, tokenizer


def load_described(options: Any, storage: Offloaded | None) -> tuple[Any, Any]:
    """The model and its tokenizer, as the options of a command say."""
    return load_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        quantize=options.quantize,
        storage=storage,
        announce=say,
    )


_KEPT = {
    "cpu": "in the memory of the host",
    "disk": "in a file without a name in {folder}, which is gone when this command has ended",
}


def keep_offloaded(model: Any) -> None:
    """An adapter that was put on an offloaded model lives where the model does."""
    homes = {home for parameter in model.parameters() if isinstance(home := home_of(parameter), Offloaded)}
    for home in homes:
        home.place(model)


def _require_finished(folder: Path) -> None:
    """Raise InputError for the folder of a run that saved no model yet; the message names what there is in its place."""
    if not is_run(folder) or (run := RunFolder(folder)).has_model:
        return
    resume = resume_command(folder, str(run.settings.get("objective")))
    there = f"its last checkpoint is {run.checkpoint}: give that" if run.checkpoint else "it left no checkpoint"
    steps = run.log.steps if run.log is not None else 0
    rebuild = f", rebuild its weights with forwardtune replay {folder} --steps {steps}" if steps else ""
    raise InputError(f"the run in {folder} is not finished, and {there}{rebuild}, or go on with it: {resume}")


def _take_settings_of_run(options: Any) -> None:
    """An adapter does not say in which dtype its base model was when it was tuned, or how it was quantised; our runs do."""
    folder = Path(options.model)
    if (folder / "adapter_config.json").is_file():
        recorded = read_json(folder / METRICS).get("settings", {})
        if options.dtype == "auto":
            options.dtype = str(recorded.get("dtype", "auto"))
        if options.quantize is None:
            options.quantize = recorded.get("quantize")


def _refuse_integers(options: Any) -> None:
    """Raise InputError, before the model is loaded, if weights are to be tuned that are stored as integers."""
    stored = checkpoint_format(options.model)
    tune = getattr(options, "tune", None)
    if tune in ("all", "late-mlp") and stored and stored.split()[0] in KEPT_QUANTISED:
        raise InputError(
            f"{options.model} is quantised ({stored}): integers stand in the place of most weights, and --tune {tune} would have to move them. "
            "Give --tune lora, prefix, or a pattern of names, such as 'norm|bias'"
        )
