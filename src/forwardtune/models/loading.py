"""L5: loading and saving: models of the hub or a local folder, GGUF files, the embedded one, and adapters over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import memory
from ..errors import InputError
from ..storage import Offloaded
from .attention import use_fastest
from .gguf import parsed_once, read_gguf
from .kinds import base_model, is_adapted, loader_of
from .places import locate, reason
from .prefix import prefix_length
from .quantised import with_weights
from .reading import DTYPES, How, read
from .tuning import matching, untie

_ADAPTER = "adapter_config.json"


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attn_implementation: str | None = None,
    quantize: str | None = None,
    storage: Offloaded | None = None,
    announce: Callable[[str], object] = lambda text: None,
) -> tuple[Any, Any]:
    """Load a causal or masked language model and its tokenizer, in evaluation mode.

    A folder with an adapter gives the base model that it names, with the adapter on it, all of it frozen. What a GGUF file was
    converted to is kept in the user's cache (:mod:`forwardtune.models.converted`), and gives the same bits.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``smollm2-135m``, the embedded model.
        dtype: of the base model: ``auto`` (as stored; float32 for GGUF), ``float32``, ``bfloat16`` or ``float16``.
        device: a torch device, such as ``cpu`` or ``cuda``, ``auto``, which spreads the layers over all GPUs, or ``meta``, for which no
            weights are read (:func:`blank_model`).
        attn_implementation: as in ``from_pretrained``: ``eager``, ``sdpa``, ``flash_attention_2`` ...; by default FlashAttention where it is
            installed and the model computes the same with it (on a GPU, in half precision), else torch's own fused attention (sdpa) where
            the model has it, else eager.
        quantize: ``nf4``, ``int8`` or ``int4`` (:mod:`forwardtune.models.quantised`): quantise the base model as it is loaded. A checkpoint
            that is quantised already is loaded as it is stored.
        storage: where the weights are to live (:mod:`forwardtune.storage`). They are read one after the other, and are never all in memory,
            but for a GGUF file that is converted for the first time, and what is not in safetensors is written to disk a second time.
        announce: told what takes long, and of a quantised checkpoint that transformers makes dense on this device.

    Raises:
        InputError: no such model, one that is not a causal or masked language model or lacks weights, a device that is
            not there, a model that is too large for ``device="auto"``, or a quantised one that cannot run here or is to be quantised again.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    require_device(device)
    if attn_implementation == "flex_attention" and device == "cpu":
        raise InputError(
            "flex_attention is compiled for GPUs, and ends the process on a CPU: leave attn_implementation out, or choose sdpa",
            "attn_implementation",
        )
    how = How(dtype, device, attn_implementation, quantize, storage, announce)
    folder = Path(name).expanduser()
    if (folder / _ADAPTER).is_file() and device != "meta":
        model, tokenizer = _load_adapted(folder, how)
        if storage is not None:
            storage.place(model)  # the adapter
    else:
        model, tokenizer = _load_base(name, how)
    memory.trim()  # what reading, converting and quantising left behind
    return model, tokenizer


def blank_model(name: str, *, dtype: str = "auto", attn_implementation: str | None = None) -> Any:
    """The base model that a configuration describes, on torch's meta device: shapes and dtypes without weights, in evaluation mode.

    ``config.json`` is all that is read, of a GGUF file its head. Arguments as those of :func:`load_model`.

    Raises:
        InputError: as :func:`load_model`; or the folder holds an adapter.
    """
    from transformers import AutoConfig

    if (Path(name).expanduser() / _ADAPTER).is_file():
        raise InputError(f"{name} holds an adapter, whose weights say what it is: give the base model")
    where, gguf = locate(name)
    try:
        with parsed_once():
            config = AutoConfig.from_pretrained(where, **{} if gguf is None else {"gguf_file": gguf})
        computes = DTYPES.get(dtype) or (None if gguf else config.get_text_config().dtype) or torch.float32
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("meta"):
            model = loader_of(config).from_config(config, dtype=computes, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {reason(error)}") from None
    return model.eval()


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as a Hugging Face folder: an ordinary one, or ``peft``'s if the model has an adapter.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors import SafetensorError

    # Left to itself, peft asks the hub whether the vocabulary grew.
    options = {"save_embedding_layers": False} if is_adapted(model) else {}
    try:
        try:
            model.save_pretrained(folder, **options)
        except NotImplementedError:
            # transformers converts what it loaded back to what it read, which some quantisations cannot; what it holds will do.
            model.save_pretrained(folder, **options, save_original_format=False)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: the model could not be written ({error})") from None


def require_device(device: str) -> None:
    """Raise InputError unless torch has the device; ``auto`` always is there."""
    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: use cpu, cuda, cuda:1, mps, auto ...") from None
    if (kind == "cuda" and not torch.cuda.is_available()) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise InputError(
            f"this torch sees no {kind} device: install a torch build for {kind}, or use device='cpu'", "device"
        )


def context_length(model: Any) -> int:
    """The longest input that the model's configuration and its prefix allow."""
    base = base_model(model)
    config = base.config.get_text_config()
    length = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 0)
    length = length if length > 0 else 1 << 20  # XLNet's is -1
    for module in base.modules():
        is_positions = isinstance(module, nn.Embedding) and module.num_embeddings == length
        if is_positions and module is not base.get_input_embeddings() and module.padding_idx is not None:
            length -= int(module.padding_idx) + 1  # RoBERTa and its like count from behind the padding's position
            break
    return length - prefix_length(model)


def _load_base(name: str, how: How) -> tuple[Any, Any]:
    where, gguf = locate(name)
    if how.storage is not None:
        how = replace(how, device="cpu")
    if how.device == "meta":
        with parsed_once():
            model = blank_model(name, dtype=how.dtype, attn_implementation=how.attention)
            tokenizer = _tokenizer(name, where, gguf)
    elif gguf is None:
        model, tokenizer = read(name, where, how)
    else:
        model, tokenizer = read_gguf(name, Path(where, gguf), how)
        model.config._name_or_path = name
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = where
    model.name_or_path = name  # what an adapter remembers as its base
    if tokenizer.pad_token_id is None:
        # Collators take padding out of the labels: with the end of text in its place nothing would be taught to end.
        unknown = tokenizer.unk_token if tokenizer.unk_token != tokenizer.bos_token else None
        tokenizer.pad_token = tokenizer.eos_token if unknown is None else unknown
    if how.device == "meta":
        return model, tokenizer
    model = (model if how.device == "auto" or how.storage is not None else model.to(how.device)).eval()
    if how.attention is None:
        use_fastest(model)
    return model, tokenizer


def _tokenizer(name: str, where: str, gguf: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, **{} if gguf is None else {"gguf_file": gguf})
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"the tokenizer of model {name!r} could not be loaded: {reason(error)}") from None


def _load_adapted(folder: Path, how: How) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from peft.utils import PeftType
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _ADAPTER} cannot be read ({reason(error)}): restore the file") from None
    if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
        raise InputError(f"{folder} holds an adapter of type {config.peft_type.value}: use LoRA or prefix tuning")
    if not config.base_model_name_or_path:
        raise InputError(f"{folder} does not say which model it adapts: set base_model_name_or_path in {_ADAPTER}")
    try:
        base, tokenizer = _load_base(config.base_model_name_or_path, how)
    except InputError as error:
        raise InputError(
            f"{folder} adapts another model. {error}. If that model moved, set base_model_name_or_path in {_ADAPTER}",
            error.argument,
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("error", "Found missing adapter keys")
            if config.peft_type == PeftType.LORA and config.target_modules:
                untie(base, matching(base, config.target_modules))  # so that it can be merged
            # torch_device is where the file is read; the weights go where the base model's are.
            with with_weights(base):
                model = PeftModel.from_pretrained(base, str(folder), is_trainable=False, torch_device="cpu")
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise InputError(
            f"the adapter in {folder} does not load on {config.base_model_name_or_path} ({reason(error)}): "
            "give the folder that it was saved to, with its own base model"
        ) from None
    return model.requires_grad_(False).eval(), tokenizer
