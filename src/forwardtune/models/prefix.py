"""L5: prefix tuning: keys and values before the text, in every attention layer (Li and Liang, ACL 2021)."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..storage import device_of
from .kinds import is_adapted, model_kind


def add_prefix(model: Any, tokenizer: Any, length: int, seed: int) -> Any:
    """Wrap the model with a tunable prefix that starts as the keys and values of real tokens, in float32.

    The tokens are drawn from the vocabulary without its special tokens, and go through the model once. There is no
    reparametrisation: the keys and values are the weights (MeZO, appendix E.5). Where all layers have a sliding window, a text beyond it does not see the prefix. The model then warns of such a text.

    Raises:
        InputError: the model's attention takes no keys and values from outside.
    """
    import peft

    tokens = _draw_tokens(model, tokenizer, length, seed)
    activations = _keys_and_values(model, tokens)
    layers, _, heads, _, width = activations.shape
    config = peft.PrefixTuningConfig(
        # For encoders peft knows prefixes under this name alone; the model below keeps its head.
        task_type="CAUSAL_LM" if model_kind(model) == "causal" else "FEATURE_EXTRACTION",
        num_virtual_tokens=length,
        num_transformer_submodules=1,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * width,
        prefix_projection=False,
    )
    model.requires_grad_(False)
    wrapped: Any = peft.get_peft_model(model, config)
    # peft's layout: a row for each token; in it layer by layer, keys before values, head by head.
    rows = activations.permute(3, 0, 1, 2, 4).reshape(length, -1).float()
    weight = wrapped.prompt_encoder[wrapped.active_adapter].embedding.weight
    if weight.shape != rows.shape:
        raise InputError(
            f"peft takes the keys and values of {type(model).__name__} for {weight.shape[1]} numbers a token, but they "
            f"are {rows.shape[1]}. If num_key_value_heads or head_dim in its config.json is wrong, correct it; if it keeps something else "
            "than keys and values (a latent of them, for instance), choose lora, all, or a pattern of parameter names"
        )
    weight.data.copy_(rows)
    if (window := _window(model)) is not None:
        # The model below is what everyone calls in the end: peft, forward() and generation.
        model.register_forward_pre_hook(partial(_warn_beyond, window=window, prefix=length), with_kwargs=True)
    return wrapped


def forward(model: Any, **inputs: Any) -> Any:
    """``model(**inputs)``; a prefix-tuned model also takes the masks and positions of packed rows.

    ``peft`` itself puts the prefix before masks of shape (rows, length) only. Here the base model is called with the
    prefix as its cache, as ``peft`` does, and every token sees all of the prefix.

    Args:
        inputs: ``input_ids`` (rows, length); optionally ``attention_mask``, (rows, length) or (rows, 1, length, length),
            the latter boolean or additive, ``position_ids`` (rows, length), counted as if there were no prefix, and
            whatever else the model takes.
    """
    count = prefix_length(model)
    if not count or not model.has_active_enabled_adapter:
        return model(**inputs)
    rows, length = inputs["input_ids"].shape
    cache = model.get_prompt(batch_size=1)
    cache.batch_repeat_interleave(rows)
    # Encoders learn the length of the prefix from the mask alone.
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.int64, device=inputs["input_ids"].device)
    additive = mask.dim() == 4 and mask.dtype != torch.bool
    visible = mask.new_full((*mask.shape[:-1], count), 0 if additive else 1)
    inputs["attention_mask"] = torch.cat([visible, mask], dim=-1)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = inputs["position_ids"] + count
    return model.base_model(**inputs, past_key_values=cache)


def prefix_length(model: Any) -> int:
    """How many positions the model's prefix takes; 0 without a prefix."""
    if not is_adapted(model) or model.peft_type != "PREFIX_TUNING":
        return 0
    return int(model.active_peft_config.num_virtual_tokens)


def _window(model: Any) -> int | None:
    """How many tokens a token sees, itself among them, if that holds in every layer."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    return None if window is None or kinds != {"sliding_attention"} else int(window)


def _warn_beyond(model: Any, args: Any, inputs: dict[str, Any], *, window: int, prefix: int) -> None:
    """Before a forward pass: say that a text is longer than what sees the prefix."""
    cache, mask, tokens = (inputs.get(name) for name in ("past_key_values", "attention_mask", "input_ids"))
    if cache is None or tokens is None or (isinstance(mask, Tensor) and mask.dim() == 4):
        return  # without the prefix, or with a mask that takes the window's place
    length = int(cache.get_seq_length()) - prefix + tokens.shape[1]
    if length >= window:
        warnings.warn(
            f"texts are longer than what sees the prefix: in every layer of {type(model).__name__} a token sees the last "
            f"{window} alone, so that what stands behind the first {window - 1} learns of the prefix "
            f"through earlier tokens at best. Cut texts to {window - 1} tokens (max_length), or choose lora",
            UserWarning,
            stacklevel=1,  # one place, so that it is said once
        )


def _draw_tokens(model: Any, tokenizer: Any, count: int, seed: int) -> Tensor:
    """Token ids, shape (count,), uniform over the vocabulary without special tokens."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    size = min(len(tokenizer), model.get_input_embeddings().num_embeddings)
    words = [i for i in range(size) if i not in special]
    picked = torch.randint(len(words), (count,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(words)[picked]


def stateful_layers(model: Any) -> int:
    """How many layers of a hybrid model keep something else than keys and values of tokens alone."""
    from transformers import DynamicCache

    try:
        layers = DynamicCache(config=model.config).layers
    except (TypeError, ValueError, AttributeError):
        return 0
    return sum("LinearAttention" in type(layer).__name__ for layer in layers)


@torch.no_grad()
def _keys_and_values(model: Any, tokens: Tensor) -> Tensor:
    """What the model's attention layers keep of the tokens, shape (layers, 2, heads, tokens, head width)."""
    from transformers import DynamicCache

    # A cache that is given is filled by encoders too. Models without use for it leave it empty or cannot go on.
    cache: Any = DynamicCache()
    reason = ""
    try:
        model(input_ids=tokens[None].to(device_of(model)), past_key_values=cache)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = f" ({type(error).__name__}: {error})"
    kept: list[Any] = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    shapes = {getattr(tensor, "shape", None) for tensor in kept}
    if stateful := stateful_layers(model):
        raise InputError(
            f"{type(model).__name__} cannot be tuned by a prefix: {stateful} of its layers keep a state and not keys and values of "
            "tokens (linear attention, convolutions, state spaces), and a prefix is keys and values. Choose lora, all, or a pattern "
            "of parameter names"
        )
    if reason or len(shapes) != 1 or None in shapes or kept[0].shape[2] != len(tokens):
        raise InputError(
            f"{type(model).__name__} cannot be tuned by a prefix: its layers do not all take keys and values of one "
            f"shape from outside{reason}. Choose lora, all, or a pattern of parameter names"
        )
    return torch.cat([tensor.to(device_of(model)) for tensor in kept]).unflatten(0, (-1, 2))
