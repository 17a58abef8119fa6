"""L5: an adapter merged into the model below it, which becomes an ordinary dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import read_json
from .loading import load_model
from .quantised import is_quantised, make_dense
from .reading import DTYPES


@torch.no_grad()
def merge_adapter(folder: str | Path, dtype: str = "auto", *, quantize: str | None = None) -> tuple[Any, Any]:
    """The model and the tokenizer of an adapter's folder, ``W + (alpha / rank) B A`` in the place of W, without an adapter.

    A base model that is quantised is made dense first: with the weights that it computed with when the adapter was tuned, not those
    that it was quantised from. Sums are in float32, and rounded once.

    Args:
        folder: with a LoRA adapter, such as :func:`~forwardtune.models.save_model` writes.
        dtype: of the result: ``auto`` (the base model's), ``float32``, ``bfloat16`` or ``float16``.
        quantize: how a dense base model was quantised as it was loaded; None: as the run in the folder recorded it.

    Raises:
        InputError: there is no adapter in the folder, or one that cannot be merged, such as a prefix.
    """
    folder = Path(folder).expanduser()
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    if not (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder} holds no adapter (no adapter_config.json): there is nothing to merge")
    recorded = read_json(folder / "metrics.json").get("settings", {})
    adapted, tokenizer = load_model(
        str(folder), dtype=recorded.get("dtype", "auto"), quantize=quantize or recorded.get("quantize")
    )
    if adapted.peft_type != "LORA":
        raise InputError(
            f"{folder} holds {'a prefix' if adapted.peft_type == 'PREFIX_TUNING' else f'an adapter of type {adapted.peft_type.value}'}, which is "
            "no change of weights and cannot be merged: merge a LoRA adapter, or keep the folder as it is"
        )
    result = DTYPES.get(dtype, adapted.get_base_model().dtype)
    if is_quantised(adapted):
        from peft import PeftModel

        base = make_dense(adapted.unload(), torch.float32)
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    merged = adapted.float().merge_and_unload()
    merged.name_or_path = merged.config._name_or_path = ""
    merged = merged.to(result)
    merged.config.dtype = result
    return merged.eval(), tokenizer
