"""L5: what a model computes its attention with: the fastest that is installed, and whether it takes lengths in place of masks."""

from __future__ import annotations

from typing import Any

import torch

from .kinds import model_kind
from .prefix import prefix_length

# Far above the rounding of half precision, below what another text does.
_CLOSE = 0.05


def takes_lengths(model: Any) -> bool:
    """Whether sequences that stand one after the other in a row are kept apart by their lengths (variable-length attention).

    So it is with FlashAttention, and with what is registered in transformers with FlashAttention's masks. A prefix would have to stand
    before each of the sequences.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    known = name in ALL_MASK_ATTENTION_FUNCTIONS and ALL_MASK_ATTENTION_FUNCTIONS[name] is flash_attention_mask
    return known and model_kind(model) == "causal" and not prefix_length(model)


@torch.no_grad()
def use_fastest(model: Any) -> str | None:
    """Let a model in half precision on a GPU compute with FlashAttention, where a package of it is installed and the model works with it.

    Whether it does is found by trying: scores of a short text are compared with those of the attention that it was loaded with.

    Returns:
        The name of the attention; None if it stays as it was.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa" or model.dtype not in (torch.bfloat16, torch.float16):
        return None
    ids = torch.arange(8, device=model.device)[None]
    for name in _installed(model.device):
        try:
            expected = model(input_ids=ids).logits.float()
            model.set_attn_implementation(name)
            if torch.allclose(expected, model(input_ids=ids).logits.float(), rtol=_CLOSE, atol=_CLOSE):
                return name
        except Exception:  # it knows no such attention, or the kernel takes no such heads
            pass
        model.set_attn_implementation(before)
    return None


def _installed(device: torch.device) -> list[str]:
    """The packages of FlashAttention that run on a device, the fastest first."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if device.type != "cuda":
        return []
    found = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    return [name for name, is_there in found.items() if is_there]
