"""OPT-shaped models of the paper's sizes with cheap weights: time and memory do not depend on the values."""

from __future__ import annotations

import torch
from transformers import OPTConfig, OPTForCausalLM

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


def opt(size: str, dtype: torch.dtype, device: str = "cpu") -> OPTForCausalLM:
    """An OPT of that size in evaluation mode. Weights are uniform noise, so no operation meets special values."""
    layers, heads, width = OPT[size]
    config = OPTConfig(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        dropout=0.0,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(dtype)
    model = model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02, generator=generator)
    return model.eval()
