"""Tiny models of real architectures, and a tokenizer, made on the spot. A test that wants one where a package is missing is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    import transformers

VOCABULARY = 320

_SMALLEST = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
_ENCODER = {**_SMALLEST, "intermediate_size": 48, "num_attention_heads": 4}
_POSITIONS = {"max_position_embeddings": 256}
SIZES = {**_ENCODER, **_POSITIONS, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# family -> (configuration class, model class, configuration)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "tie_word_embeddings": True}),
    "llama_untied": ("LlamaConfig", "LlamaForCausalLM", {**SIZES, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SIZES, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**SIZES, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**SIZES, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**SIZES, **_EXPERTS, "head_dim": 8}),
    "opt": ("OPTConfig", "OPTForCausalLM", {**_ENCODER, **_POSITIONS, "word_embed_proj_dim": 32, "ffn_dim": 48}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**_ENCODER, **_POSITIONS, "bos_token_id": 0, "eos_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_ENCODER, **_POSITIONS}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_SMALLEST, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**_SMALLEST, "state_size": 4}),
}


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: int) -> Any:
    """A randomly initialised model of a real architecture, in evaluation mode; the global random state is kept. Changes are those of
    its configuration."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config_class, model_class, settings = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings | changes))
    return model.to(dtype).eval()


def token_batch(rows: int = 3, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random token ids, shape (rows, length)."""
    return torch.randint(5, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def closure_for(model: Any, input_ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A loss of the model that depends on all of its logits."""
    extra = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    return lambda: model(input_ids=input_ids, **extra).logits.float().pow(2).mean()


TEXT = [
    "the film was great and it was fun", "the film was terrible and it was slow", "a quick brown fox likes the dog",
    "yes no maybe true false", "positive negative neutral", "this product broke after one day", "I would buy it again",
]  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def save_tiny_model(folder: Path, family: str = "llama") -> Path:
    """A model and its tokenizer in a local folder."""
    tiny_model(family).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, seed: int = 0) -> None:
    """A tiny Llama with its tokenizer as one GGUF file."""
    import gguf

    vocabulary = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(VOCABULARY)
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in tiny_model("llama_untied", seed=seed).state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
