"""Tiny checkpoints that are stored quantised, by the packages that do so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .models import SIZES, tokenizer

#: What ``load_model`` quantises to -> the package that does it.
AT_LOAD = {"nf4": "bitsandbytes", "int8": "torchao", "int4": "torchao"}
#: Checkpoints -> the package that reads them.
STORED = {
    "bitsandbytes-nf4": "bitsandbytes",
    "bitsandbytes-int8": "bitsandbytes",
    "torchao-int8": "torchao",
    "compressed-w4": "compressed_tensors",
    "compressed-w8a8": "compressed_tensors",
    "compressed-fp8": "compressed_tensors",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
}
_GROUP = 32


def dense_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tiny Llama whose widths every format can take; the global random state is kept."""
    import transformers

    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 128})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).to(dtype).eval()


def save_dense(folder: Path) -> Path:
    dense_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_quantised(folder: Path, dense: Path, kind: str) -> Path:
    """The dense checkpoint, quantised. Skips the test where the package is missing."""
    pytest.importorskip(STORED[kind], reason=f"needs {STORED[kind]}")
    tokenizer().save_pretrained(folder)
    if kind.startswith("compressed"):
        _save_compressed(folder, kind)
    elif kind in ("gptq", "awq"):
        _save_packed(folder, kind)
    else:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=_config(kind))
        model.save_pretrained(folder)
    return folder


def _config(kind: str) -> Any:
    import transformers

    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes-int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def _save_compressed(folder: Path, kind: str) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization import apply_quantization_config as apply

    bits = 4 if kind.endswith("w4") else 8
    shape: dict[str, Any] = {"strategy": "group", "group_size": _GROUP} if bits == 4 else {"strategy": "channel"}
    what = "float" if kind.endswith("fp8") else "int"
    scheme: dict[str, Any] = {"weights": QuantizationArgs(num_bits=bits, type=what, symmetric=True, **shape)}
    if kind.endswith(("a8", "fp8")):
        scheme["input_activations"] = QuantizationArgs(
            num_bits=8, type=what, symmetric=True, strategy="token", dynamic=True
        )
    model = dense_model()
    groups = {"group_0": QuantizationScheme(targets=["Linear"], **scheme)}
    apply(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    largest = 448 if what == "float" else 2 ** (bits - 1) - 1
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight = module.weight.detach().float()
            groups_of_rows = weight.reshape(weight.shape[0], -1, _GROUP if bits == 4 else weight.shape[1])
            scale = groups_of_rows.abs().amax(-1) / largest
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def _save_packed(folder: Path, kind: str) -> None:
    from safetensors.torch import save_file

    model, tensors = dense_model(torch.float16), {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            tensors |= {name.removesuffix("weight") + key: value for key, value in _packed(tensor, kind).items()}
        else:
            tensors[name] = tensor.contiguous().clone()
    layout = {
        "gptq": {"desc_act": False, "sym": True, "checkpoint_format": "gptq"},
        "awq": {"zero_point": True, "version": "gemm"},
    }
    write_config(folder, model, {"quant_method": kind, "bits": 4, "group_size": _GROUP, **layout[kind]})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _packed(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """Eight numbers of 4 bits in an integer: GPTQ's along the inputs, with a zero of 8 stored as 7; AWQ's along the outputs, those with even
    numbers before those with odd ones."""
    out, inner = weight.shape
    grouped = weight.float().reshape(out, inner // _GROUP, _GROUP)
    scales = (grouped.abs().amax(-1) / 7).clamp(min=1e-8)
    numbers = (torch.round(grouped / scales[..., None]) + 8).clamp(0, 15).reshape(out, inner).long().T
    eighth = (
        [numbers[i::8] for i in range(8)] if kind == "gptq" else [numbers[:, i::8] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    )
    packed = sum(part << (4 * place) for place, part in enumerate(eighth))
    integers = {
        "qweight": torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32).contiguous(),
        "qzeros": torch.full(
            (inner // _GROUP, out // 8), 0x77777777 if kind == "gptq" else 0x88888888 - 2**32, dtype=torch.int32
        ),
        "scales": scales.T.contiguous().half(),
    }
    return integers | ({"g_idx": (torch.arange(inner) // _GROUP).to(torch.int32)} if kind == "gptq" else {})


def save_fp8(folder: Path, block: int = 32) -> Path:
    """A checkpoint of float8 weights with a scale for every block, as DeepSeek's."""
    from safetensors.torch import save_file

    model, tensors = dense_model(), {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            rows, columns = tensor.shape
            blocks = tensor.float().reshape(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors |= {name: small, f"{name}_scale_inv": scale}
        else:
            tensors[name] = tensor.contiguous().clone()
    write_config(folder, model, {"quant_method": "fp8", "weight_block_size": [block, block]})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def save_mxfp4(folder: Path) -> Path:
    """A tiny GPT-OSS, whose experts are stored as 4-bit floats with a scale for every 32."""
    import transformers
    from safetensors.torch import save_file

    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_local_experts": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**sizes, num_experts_per_tok=2, pad_token_id=0, rope_parameters=rope)
    model, tensors = transformers.GptOssForCausalLM(config).to(torch.bfloat16), {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, out = tensor.shape
            numbers = torch.arange(experts * out * inner // 2, dtype=torch.int64) % 251
            tensors[f"{name}_blocks"] = numbers.to(torch.uint8).reshape(experts, out, inner // 32, 16)
            tensors[f"{name}_scales"] = torch.full((experts, out, inner // 32), 120, dtype=torch.uint8)
        else:
            tensors[name] = tensor.contiguous().clone()
    write_config(folder, model, {"quant_method": "mxfp4"})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def write_config(folder: Path, model: Any, quantised: dict[str, Any]) -> None:
    """The model's config.json, which says how the checkpoint is quantised."""
    folder.mkdir(exist_ok=True)
    content = json.loads(model.config.to_json_string(use_diff=False))
    content |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": quantised}))
