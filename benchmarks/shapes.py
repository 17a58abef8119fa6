"""Models of known shapes with cheap weights, and a minibatch for them: time and memory do not depend on the values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Lfm2Config, LlamaConfig, MambaConfig, OPTConfig

from forwardtune.objectives import logits_at

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
#: Sequences in a minibatch.
BATCH = 16
#: name -> (layers, heads, width)
OPT = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
}
#: name -> (vocabulary, width, inner width, layers, heads, heads of keys and values); the second is TinyLlama's
LLAMA = {"smollm2-135m": (49152, 576, 1536, 30, 9, 3), "1.1b": (32000, 2048, 5632, 22, 32, 4)}
#: Hybrids, whose parents read weights of a child: LFM2-350M's shape, and Mamba-130M's.
HYBRIDS: dict[str, Callable[[], Any]] = {
    "lfm2-350m": lambda: Lfm2Config(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=6656,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
    ),
    "mamba-130m": lambda: MambaConfig(vocab_size=50280, hidden_size=768, num_hidden_layers=24, use_mambapy=False),
}
#: All shapes: that of SmolLM2-135M, and OPT's by their sizes.
SHAPES = ("smollm2-135m", *OPT)


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model of that shape in evaluation mode. Weights are uniform noise, so no operation meets special values."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name)).to(dtype)
    buffers = {key: buffer for key, buffer in model.named_buffers() if buffer.is_meta}
    model = model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
        for key in buffers:  # rotary frequencies: made up, too
            model.get_buffer(key).uniform_(0, 1, generator=generator)
    return model.eval()


def config_of(name: str) -> Any:
    """The configuration of a model of that shape."""
    return HYBRIDS[name]() if name in HYBRIDS else _llama(name) if name in LLAMA else _opt(name)


def bytes_of(name: str, dtype: torch.dtype) -> int:
    """Bytes of all weights of a model of that shape, which is not made."""
    with torch.device("meta"):
        return size_of(AutoModelForCausalLM.from_config(config_of(name)).to(dtype))


def largest_layer(model: Any) -> int:
    """Bytes of the largest module's own weights, embeddings and vocabulary head left out."""
    head = model.get_output_embeddings()
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and module is not head
    )


def size_of(model: Any) -> int:
    """Bytes of all weights."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def minibatch(model: Any, length: int, device: str = "cpu") -> dict[str, Tensor]:
    """Random tokens, and the place of the last one of each sequence."""
    shape, generator = (BATCH, length), torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(device)
    return {"input_ids": input_ids, "positions": torch.arange(BATCH, device=device) * length + length - 1}


def losses_of(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The losses of the sequences: one logit row each, as for a task with one-token answers."""
    return lambda: logits_at(model, batch).logsumexp(dim=-1)


def loss_of(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Their mean."""
    losses = losses_of(model, batch)
    return lambda: losses().mean()


def _llama(name: str) -> LlamaConfig:
    vocabulary, width, inner, layers, heads, pairs = LLAMA[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        tie_word_embeddings=name == "smollm2-135m",
    )


def _opt(size: str) -> OPTConfig:
    layers, heads, width = OPT[size]
    return OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        dropout=0.0,
    )
