"""L5: have transformers read a base model, as it is stored or quantised, into memory or where its weights are to live."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import InputError
from ..storage import Offloaded
from .kinds import is_package, loader_of
from .places import reason
from .quantised import cannot_run, is_quantised, keep_as_stored, let_go_of_file, quantisation, require_known_format

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CONVERTED = "offload-"


@dataclass(frozen=True)
class How:
    """How a model is loaded: the arguments of :func:`~.loading.load_model`."""

    dtype: str
    device: str
    attention: str | None
    quantize: str | None
    storage: Offloaded | None
    announce: Callable[[str], object]


def read(name: str, where: str | Path, how: How, **gguf: str) -> tuple[Any, Any]:
    """Have ``transformers`` load a base model; ``gguf`` names the GGUF file if it is one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # The configuration comes first: one file, where a tokenizer or a model would look for many.
    config, stored = None, None
    options: dict[str, Any] = {"device_map": "auto"} if how.device == "auto" else {}
    options |= {"attn_implementation": how.attention} if how.attention else {}
    try:
        if not gguf:
            config = AutoConfig.from_pretrained(where)
        loader = AutoModelForCausalLM if config is None else loader_of(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {reason(error)}") from None
    if config is not None:
        stored = require_known_format(name, config)
        options |= _how_quantised(name, config, stored, how)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        with _unread(how.storage) as unread:
            model, info = loader.from_pretrained(
                where, dtype=DTYPES.get(how.dtype, "auto"), output_loading_info=True, **options, **unread, **gguf
            )
            if how.storage is not None:
                how.storage.place(model)
    except InputError:  # the storage's own
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        if stored is not None:
            raise InputError(cannot_run(name, stored, reason(error)), "quantize") from None
        if how.attention and "ttention" in str(error):
            raise InputError(
                f"model {name!r} does not load with {how.attention}: {reason(error).rstrip('.')}. Leave attn_implementation out for the fastest "
                "that is here, or choose sdpa or eager",
                "attn_implementation",
            ) from None
        raise InputError(f"model {name!r} could not be loaded: {reason(error)}") from None
    except (RuntimeError, AttributeError, TypeError) as error:  # packages of quantisation raise what they like
        if stored is None:
            raise
        raise InputError(cannot_run(name, stored, reason(error)), "quantize") from None
    if stored is not None and not is_quantised(model):
        how.announce(
            f"  the checkpoint is quantised ({stored}), and this device has nothing that computes with it: transformers made it dense, so "
            f"that it takes the memory of {str(model.dtype).removeprefix('torch.')}, and any of its weights can be tuned"
        )
    keep_as_stored(model)
    if how.quantize is not None:
        let_go_of_file(model)
    # Weights that the checkpoint lacks, such as a head, were made up at random.
    needed = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    if is_quantised(model):
        needed |= {key for key, _ in model.named_buffers()}  # GPTQ and AWQ keep their integers in buffers
    random = sorted(needed & set(info["missing_keys"]))
    if random:
        raise InputError(
            f"model {name!r} lacks {len(random)} weights of {type(model).__name__} ({', '.join(random[:3])} ...): "
            "give a checkpoint that was saved with its language modelling head"
        )
    _require_no_offloading(name, model)
    packages = [] if config is None else [name for name in config.architectures or () if is_package(name)]
    if packages and type(model).__name__ not in packages:
        how.announce(
            f"  the language model inside {packages[0]} alone: what takes images is left out, also of what is saved"
        )
    return model, tokenizer


def _how_quantised(name: str, config: Any, stored: str | None, how: How) -> dict[str, Any]:
    """What ``from_pretrained`` is told of quantisation."""
    if how.quantize is None:
        return {}
    if stored is not None:
        raise InputError(
            f"model {name!r} is quantised already ({stored}): leave quantize={how.quantize!r} out, or give its dense checkpoint",
            "quantize",
        )
    computes = DTYPES.get(how.dtype) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    options: dict[str, Any] = {"quantization_config": quantisation(how.quantize, computes, how.device)}
    # Each tensor is quantised where it is to stay, so that the dense model is never there as a whole.
    return options if how.device == "auto" else options | {"device_map": {"": how.device}}


@contextmanager
def _unread(storage: Offloaded | None) -> Iterator[dict[str, Any]]:
    """What ``from_pretrained`` is told to leave weights in their files, until a storage takes them one after the other. Those that it
    converts lie in a folder meanwhile."""
    if storage is None:
        yield {}
        return
    where = getattr(storage, "folder", None)
    if where is not None:
        where.mkdir(parents=True, exist_ok=True)
        for left in where.glob(f"{_CONVERTED}*"):  # by a run that was killed here
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=where, prefix=_CONVERTED) as folder:
        yield {"device_map": {"": "disk"}, "offload_folder": folder}


def _require_no_offloading(name: str, model: Any) -> None:
    """Raise InputError if weights were left on disk or in memory that no layer can reach by itself."""
    count = sum(parameter.is_meta for parameter in model.parameters())
    if count:
        raise InputError(
            f"model {name!r} does not fit on the devices: {count} of its tensors were left outside. Give offload='cpu' and device='cuda', "
            "or use a smaller dtype (bfloat16), more or larger GPUs, or a smaller model",
            "offload",
        )
