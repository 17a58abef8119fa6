"""L5: GGUF files: parsed once, converted by transformers, and kept as ordinary checkpoints."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..storage import RESIDENT, home_of
from .converted import through_cache
from .reading import How, read

_converting = threading.RLock()
_PURE = ("GGUFReader", "get_tensor_name_map")


def read_gguf(name: str, file: Path, how: How) -> tuple[Any, Any]:
    """The model and tokenizer of a GGUF file, from the cache or converted; to be quantised, it is read as an ordinary checkpoint first."""
    how = replace(how, dtype="float32" if how.dtype == "auto" else how.dtype)
    storage = how.storage

    def convert() -> tuple[Any, Any]:
        with parsed_once():
            dense = replace(how, quantize=None, storage=None)
            return _as_ordinary(*read(name, file.parent, dense, gguf_file=file.name))

    if how.quantize is not None:
        model, tokenizer = through_cache(file, how.dtype, convert, lambda entry: (entry, None), how.announce)
        how = replace(how, storage=None)
        if isinstance(model, Path):
            return read(name, model, how)
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            del model
            return read(name, folder, how)
    if how.device == "auto":
        return convert()
    model, tokenizer = through_cache(file, how.dtype, convert, lambda entry: read(name, entry, how), how.announce)
    if storage is not None:
        storage.place(model)  # what was converted just now
    # Tensors go where torch would put them: NumPy and mapped files align them otherwise, and kernels may choose by that.
    for tensor in (*model.parameters(), *model.buffers()):
        if home_of(tensor) is RESIDENT:
            tensor.data = tensor.data.clone()
    return model, tokenizer


def _as_ordinary(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """The weights are ordinary ones now. Neither Trainer nor a saved checkpoint should take them for quantised."""
    model.hf_quantizer.remove_quantization_config(model)
    model.__dict__.pop("is_quantized", None)  # which ordinary models do not have
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            module.config._is_quantized = False
    return model, tokenizer


@contextmanager
def parsed_once() -> Iterator[None]:
    """``transformers`` parses a GGUF file for the configuration, the tokenizer and the weights, and makes the table of tensor
    names anew for every module: inside, once is enough, which halves the time."""
    try:
        import gguf
    except ImportError:  # transformers says what to install
        yield
        return
    with _converting:
        kept = {name: getattr(gguf, name) for name in _PURE}
        for name, function in kept.items():
            setattr(gguf, name, functools.cache(function))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(gguf, name, function)
