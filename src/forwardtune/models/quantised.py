"""L5: quantised models: made at load or recognised, kept as small as they are stored, and made dense again on request.

===========  ==================  =================================================================================
``nf4``      bitsandbytes        4 bits a weight, by quantiles of a normal distribution, in blocks of 64 whose scales are
                                 quantised too (QLoRA, Dettmers et al., 2023)
``int8``     torchao             8 bits, one scale a row; activations are left alone
``int4``     torchao             4 bits, a scale and a zero for every 32 weights
===========  ==================  =================================================================================

``int8`` is not that of bitsandbytes, which rounds activations, too: a perturbation smaller than their spacing would move no loss.
Vocabulary head, embeddings, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files import read_json
from ..names import QUANTISATIONS
from ..parameters import is_plain

_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
#: Formats of checkpoints that stay quantised on every device; transformers may make those of others dense.
KEPT_QUANTISED = ("bitsandbytes", "torchao", "compressed-tensors", "gptq", "awq")
_GROUP = 32  # of int4: every width of a real model is a multiple of it


def quantisation(kind: str, dtype: torch.dtype, device: str) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config`` to load a dense checkpoint as ``nf4``, ``int8`` or ``int4``.

    Args:
        dtype: of the activations.
        device: where the model goes.

    Raises:
        InputError: there is no such kind, or the package that does it is missing.
    """
    if kind not in QUANTISATIONS:
        raise InputError(f"unknown quantisation {kind!r}: choose {', '.join(QUANTISATIONS)}", "quantize")
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise InputError(f"{kind} is made by {package}, which is not installed: pip install 'forwardtune[quantized]'")
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    import torchao.quantization as ao

    if kind == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    if device != "cpu":
        return TorchAoConfig(
            ao.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")  # torch's own kernel
        )
    # On a processor the other formats of torchao take a byte a weight; this is the one of torch's own kernel there.
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False))


def stored_format(config: Any) -> str | None:
    """How a checkpoint is quantised, by its configuration: ``bitsandbytes nf4``, ``compressed-tensors``; None: it is not."""
    found = getattr(config, "quantization_config", None)
    found = found if found is None or isinstance(found, dict) else found.to_dict()
    if not found:
        return None
    kind = found.get("bnb_4bit_quant_type") if found.get("load_in_4bit") else None
    kind = "int8" if found.get("load_in_8bit") else kind
    return " ".join(filter(None, (str(getattr(found.get("quant_method"), "value", found.get("quant_method"))), kind)))


def checkpoint_format(name: str) -> str | None:
    """:func:`stored_format` of a local folder, before anything is loaded; None of all else."""
    folder = Path(name).expanduser()
    content = read_json(folder / "config.json") if folder.is_dir() else {}
    return stored_format(SimpleNamespace(quantization_config=content.get("quantization_config")))


def require_known_format(name: str, config: Any) -> str | None:
    """:func:`stored_format`. Raises InputError for one of which transformers knows nothing: it would load the checkpoint as a dense one."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found, stored = getattr(config, "quantization_config", None), stored_format(config)
    by_flags = isinstance(found, dict) and (found.get("load_in_4bit") or found.get("load_in_8bit"))
    if isinstance(found, dict) and not by_flags and found.get("quant_method") not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(cannot_run(name, str(stored), "transformers does not know this format"), "quantize")
    return stored


def cannot_run(name: str, stored: str, reason: str) -> str:
    """What to say of a quantised checkpoint that does not load here, and what to do."""
    return (
        f"model {name!r} is quantised ({stored}) and does not load here: {reason.rstrip('.')}. Install what that names, use a device that "
        "the format is for, or give the model's dense checkpoint, with quantize='nf4', 'int8' or 'int4'"
    )


def is_quantised(model: Any) -> bool:
    """Whether transformers loaded the model quantised, and it still is."""
    return bool(getattr(model, "is_quantized", False))


def storage_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that hold quantised weights, by name: integers, their scales, and whatever else a format keeps beside them.

    They are those of every module that has a parameter which is no ordinary tensor of floats, but for its bias.
    """
    for prefix, module in model.named_modules():
        own = module._parameters
        if all(p is None or is_plain(p) for p in own.values()):
            continue
        for name, parameter in own.items():
            if parameter is not None and (name != "bias" or not is_plain(parameter)):
                yield f"{prefix}.{name}" if prefix else name, parameter


def weights_of(model: nn.Module) -> int:
    """How many weights a model has, however many are packed into one element."""
    stored = {id(parameter) for _, parameter in storage_of(model)}
    count = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    layers: list[Any] = [m for m in model.modules() if is_quantised_layer(m) and hasattr(m, "in_features")]
    return count + sum(int(layer.in_features) * int(layer.out_features) for layer in layers)


def is_quantised_layer(module: nn.Module) -> bool:
    """Whether the module itself holds quantised weights: in parameters, or as GPTQ and AWQ in buffers."""
    return "qweight" in module._buffers or any(p is not None and not is_plain(p) for p in module._parameters.values())


# --- as small, and in the same bits, as stored ------------------------------------------------------------------------


def keep_as_stored(model: Any) -> None:
    """Let a quantised model compute with what it is stored as, and nothing else, for as long as it lives.

    compressed-tensors makes the whole model dense at its first forward pass, and leaves it so: here a module has a dense weight only while
    it runs. bitsandbytes packs 4-bit weights anew at the first pass on processors with bfloat16 arithmetic, with scales rounded to it, and
    goes back, with scales rounded once more, whenever the model's state is asked for: a checkpoint would change the model. Here it does not.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    base = getattr(model, "get_base_model", lambda: model)()
    if compressor is None or not hasattr(base, "ct_decompress_hook"):
        return
    compressor.remove_decompression_hook(base)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and is_quantised_layer(module):
            for name, parameter in module._parameters.items():
                if parameter is not None and name != "bias":
                    parameter.requires_grad_(False)
            _lend_dense_weight(module)


def let_go_of_file(model: nn.Module) -> None:
    """Copy what was not quantised as it was loaded: one tensor that lies in a mapped checkpoint keeps all of it in memory, dense."""
    for tensor in (*model.parameters(), *model.buffers()):
        if is_plain(tensor):
            tensor.data = tensor.data.clone()


def _lend_dense_weight(module: nn.Module) -> None:
    """Let the module find a dense weight while it runs, made just before."""
    stored = module._parameters.get("weight")

    def lend(module: nn.Module, args: Any) -> None:
        module._parameters["weight"] = nn.Parameter(_decompressed(module), requires_grad=False)

    def take_back(module: nn.Module, args: Any, output: Any) -> None:
        del module._parameters["weight"]
        if stored is not None:
            module._parameters["weight"] = stored

    module.register_forward_pre_hook(lend)
    module.register_forward_hook(take_back, always_call=True)


@contextmanager
def with_weights(model: nn.Module) -> Iterator[None]:
    """Inside, layers whose weights are packed under another name have one called ``weight``, of the right shape, without memory: peft asks
    it for shape and device when it puts an adapter beside a layer."""
    packed: list[Any] = [
        m for m in model.modules() if "weight_packed" in m._parameters and "weight" not in m._parameters
    ]
    for module in packed:
        scale = module.weight_scale
        shape = (int(module.out_features), int(module.in_features))
        module._parameters["weight"] = nn.Parameter(scale.new_zeros(()).expand(shape), requires_grad=False)
    try:
        yield
    finally:
        for module in packed:
            del module._parameters["weight"]


def _decompressed(module: Any) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor

    scheme = module.quantization_scheme
    stored = {**module._parameters, **module._buffers}
    stored = {name: tensor.data for name, tensor in stored.items() if tensor is not None and name != "bias"}
    dense: Tensor = BaseCompressor.get_value_from_registry(scheme.format.value).decompress(stored, scheme)["weight"]
    return dense


# --- back to dense ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def make_dense(model: Any, dtype: torch.dtype) -> Any:
    """Put an ordinary linear layer in the place of every quantised one, in place: the model computes as before, up to rounding.

    Args:
        model: without an adapter.
        dtype: of the result.

    Raises:
        InputError: a module is quantised and no linear layer.
    """
    for prefix, module in list(model.named_modules()):
        if not is_quantised_layer(module):
            continue
        if not hasattr(module, "in_features"):
            raise InputError(
                f"{prefix} is a quantised {type(module).__name__}, of which no dense form is known here: merge over the dense model"
            )
        weight = dense_weight(module)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if module.bias is not None:
            dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        parent, _, name = prefix.rpartition(".")
        setattr(model.get_submodule(parent), name, dense)
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_is_quantized"):
            module.config._is_quantized = False
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)
    return nn.Module.to(model, dtype)


def dense_weight(module: Any) -> Tensor:
    """The weight that a quantised linear layer computes with, shape (out, in)."""
    if getattr(module, "quantization_scheme", None) is not None:
        return _decompressed(module)
    if hasattr(module, "weight") and type(module.weight).__name__ in ("Params4bit", "Int8Params"):
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module).detach()
    if hasattr(module, "weight"):
        try:
            return module.weight.dequantize()
        except NotImplementedError:
            pass
    # What the layer makes of the unit vectors are the columns of its weight.
    bias = module.bias
    like = module.weight if hasattr(module, "weight") else next(module.buffers())
    dtype = like.dtype if like.is_floating_point() else torch.float16
    unit = torch.eye(int(module.in_features), dtype=dtype, device=like.device)
    product = module(unit)
    return (product if bias is None else product - bias).T.contiguous()
