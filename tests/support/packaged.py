"""Tiny models as they are packaged today: hybrids, mixtures of experts, language models inside vision-language ones."""

from __future__ import annotations

from typing import Any

import torch

from .models import SIZES, VOCABULARY

_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "chunk_size": 8}
# A layer of attention beside one of another kind.
_TWO = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
_DELTA = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

# family -> (configuration class, model class, configuration)
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", {**SIZES, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**SIZES, **_TWO, **_DELTA}),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**SIZES, **_TWO, **_DELTA, **_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", {**SIZES, **_SSM, "mamba_d_ssm": 64, "head_dim": 8}),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            **SIZES, "layers_block_type": ["mamba", "attention", "moe"], "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
            "ssm_state_size": 4, "n_groups": 1, "chunk_size": 8, "n_routed_experts": 4, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**SIZES, **_SSM, "attn_layer_indices": [1]}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **SIZES, **_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            **SIZES, "layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 4, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8,
            "num_key_value_heads": 4, "adapter_rank": 4, "use_mamba_kernels": False,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {**SIZES, **_SSM, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "shared_intermediate_size": 16},
    ),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**_MAMBA, "state_size": 4}),
    "mamba2": (
        "Mamba2Config", "Mamba2ForCausalLM", {**_MAMBA, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    ),
}  # fmt: skip


def build(table: dict[str, tuple[str, str, dict[str, Any]]], family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A randomly initialised model of a table, in evaluation mode; the global random state is kept."""
    import transformers

    config_class, model_class, settings = table[family]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    return model.to(dtype).eval()


_TEXT = {**SIZES, "head_dim": 8, "pad_token_id": 0}
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32, "num_position_embeddings": 16,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOKENS = {"image_token_id": 318, "video_token_id": 317, "vision_start_token_id": 316, "vision_end_token_id": 315}
_QWEN_TEXT = {**_TEXT, **_TWO, **_DELTA}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}


def _package(name: str, text: dict[str, Any], vision: dict[str, Any], **tokens: Any) -> tuple[str, str, dict[str, Any]]:
    return f"{name}Config", f"{name}ForConditionalGeneration", {"text_config": text, "vision_config": vision, **tokens}


# Vision-language models, whole.
PACKAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": _package("Gemma3", _TEXT, _VISION, image_token_index=319, mm_tokens_per_image=4),
    "qwen3_5": _package("Qwen3_5", _QWEN_TEXT, _QWEN_VISION, **_QWEN_TOKENS),
    "qwen3_5_moe": _package(
        "Qwen3_5Moe",
        {**_QWEN_TEXT, **_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        _QWEN_VISION,
        **_QWEN_TOKENS,
    ),
    "llama4": _package(
        "Llama4",
        {**_TEXT, "intermediate_size_mlp": 48, "num_local_experts": 4},
        {**_VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        image_token_index=319,
    ),
    "mllama": _package(
        "Mllama",
        {**_TEXT, "cross_attention_layers": [1]},
        {
            **_VISION, "num_global_layers": 1, "attention_heads": 4, "max_num_tiles": 1, "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 64,
        },
        image_token_index=319,
    ),
    "qwen2_5_vl": _package("Qwen2_5_VL", {**_TEXT, **_SECTIONS}, _QWEN_VISION, **_QWEN_TOKENS),
    "qwen3_vl": _package(
        "Qwen3VL", {**_TEXT, **_SECTIONS}, {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, **_QWEN_TOKENS
    ),
    "llava": _package(
        "Llava", {**_TEXT, "model_type": "llama"}, {**_VISION, "model_type": "clip_vision_model"}, image_token_index=319
    ),
    "mistral3": _package(
        "Mistral3", {**_TEXT, "model_type": "mistral"}, {**_VISION, "model_type": "pixtral"}, image_token_index=319
    ),
}  # fmt: skip


_MANY = {**SIZES, "head_dim": 8, "num_experts": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Mixtures whose experts are slices of one tensor.
EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**_MANY, "tie_word_embeddings": False}),
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM", {**SIZES, "num_local_experts": 64, "tie_word_embeddings": False},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**SIZES, "head_dim": 8, "num_local_experts": 64, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    ),
}  # fmt: skip


_WINDOW = {**SIZES, "sliding_window": 16}

# A token sees the last 16 alone, in every layer or in every other.
WINDOWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("MistralConfig", "MistralForCausalLM", _WINDOW),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_WINDOW, "head_dim": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_WINDOW, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**EXPERTS["gpt_oss"][2], "sliding_window": 16}),
}  # fmt: skip
