"""Models of many families: what kind they are, which weights are tuned, and that saved ones come back as they were."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from transformers import DynamicCache

import support
from forwardtune import MeZO, MeZOConfig, MeZOTrainer, StepLog, replay
from forwardtune.errors import InputError
from forwardtune.models import context_length, forward, load_model, model_kind, save_model, tune
from forwardtune.models.prefix import _draw_tokens
from forwardtune.models.reading import _require_no_offloading
from support.examples import CLOSE, sharp_model
from support.trainers import QUIET

CAUSAL = ("opt", "gpt2", "llama", "mistral", "qwen3", "gemma3")
MASKED = ("bert", "roberta")
MODES = ("all", "lora", "prefix", "attn|attention")

BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 48}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The folder of a tiny model of a family, with a tokenizer, made when first asked for."""
    folders: dict[str, Path] = {}

    def of(family: str) -> str:
        if family not in folders:
            folders[family] = support.save_tiny_model(tmp_path_factory.mktemp(family), family)
        return str(folders[family])

    return of


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return forward(model, **({"input_ids": support.token_batch()} | inputs)).logits


def steps(model: Any, count: int = 2, optimizer: MeZO | None = None, **options: Any) -> MeZO:
    """Tune for a few steps."""
    optimizer = optimizer or MeZO(model, lr=1e-2, eps=1e-2, **options)
    for _ in range(count):
        optimizer.step(lambda: forward(model, input_ids=support.token_batch()).logits.float().pow(2).mean())
    return optimizer


def trainable(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# --- kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_kind_is_that_of_the_checkpoint(saved: Callable[[str], str], family: str) -> None:
    model, tokenizer = load_model(saved(family))
    assert type(model) is type(support.tiny_model(family))
    assert model_kind(model) == ("masked" if family in MASKED else "causal")
    assert not model.training
    assert model_kind(tune(model, tokenizer, "lora")) == ("masked" if family in MASKED else "causal")


@pytest.mark.parametrize(
    ("family", "changes", "kind"),
    [
        ("bert", {"architectures": None}, "masked"),
        ("roberta", {"architectures": None}, "masked"),
        ("bert", {"architectures": ["BertForPreTraining"]}, "masked"),
        ("bert", {"architectures": ["BertLMHeadModel"], "is_decoder": True}, "causal"),
        ("bert", {"architectures": None, "is_decoder": True}, "causal"),
        ("llama", {"architectures": None}, "causal"),
        ("gpt2", {"architectures": None}, "causal"),
    ],
    ids=str,
)
def test_without_an_architecture_the_type_of_the_model_decides(
    tmp_path: Path, family: str, changes: dict[str, Any], kind: str
) -> None:
    folder = support.save_tiny_model(tmp_path / "model", family)
    edit_json(folder / "config.json", **changes)
    model, _ = load_model(str(folder))
    assert model_kind(model) == kind


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: support.tiny_model("t5"), "T5ForConditionalGeneration, an encoder-decoder: give a causal"),
        (lambda: bart(), "BartForConditionalGeneration, an encoder-decoder: give a causal"),
        (lambda: classifier("bert"), "BertForSequenceClassification, which is not a causal or masked"),
        # Its head would be tied to the embedding, so no weight would be missing.
        (lambda: classifier("llama"), "LlamaForSequenceClassification, which is not a causal or masked"),
        (lambda: support.tiny_model("bert").bert, r"lacks 6 weights of BertForMaskedLM .*language modelling head"),
        (lambda: support.tiny_model("llama_untied").model, r"lacks 1 weights of LlamaForCausalLM \(lm_head.weight"),
    ],
    ids=["t5", "bart", "bert classifier", "llama classifier", "bert without a head", "llama without a head"],
)
def test_model_of_another_kind_is_refused(tmp_path: Path, make: Callable[[], Any], words: str) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    support.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=words):
        load_model(str(tmp_path))
    if "lacks" not in words:
        with pytest.raises(InputError, match="give a causal language model"):
            model_kind(model)


def bart() -> Any:
    """An encoder-decoder that is listed among the masked language models."""
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in BART.items()}
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(vocab_size=support.VOCABULARY, d_model=32, max_position_embeddings=64, **sizes)
    )


def classifier(family: str) -> Any:
    config = support.tiny_model(family).config
    config.pad_token_id = 0
    return transformers.AutoModelForSequenceClassification.from_config(config)


# --- devices, dtypes, lengths ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"bos_token": None, "unk_token": "<bos>"}, "<bos>"),
        ({"bos_token": "<eos>", "unk_token": "<eos>"}, "<eos>"),
        ({"unk_token": None}, "<eos>"),
    ],
    ids=str,
)
def test_padding_that_a_tokenizer_lacks_is_the_end_of_text_only_where_nothing_else_is_there(
    tmp_path: Path, special: dict[str, Any], pad: str
) -> None:
    tokenizer = support.tokenizer()
    tokenizer.pad_token = None
    for name, token in special.items():
        setattr(tokenizer, name, token)
    support.tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1].pad_token == pad


def test_automatic_device_gives_the_same_model(saved: Callable[[str], str]) -> None:
    model, _ = load_model(saved("llama"), device="auto")
    expected, _ = load_model(saved("llama"))
    support.assert_same_bits(model.cpu(), support.snapshot(expected))


def test_offloaded_weights_are_refused(tmp_path: Path) -> None:
    model = accelerate.disk_offload(support.tiny_model("llama_untied"), str(tmp_path))
    with pytest.raises(InputError, match=r"'m' does not fit on the devices: 2. of its tensors.*bfloat16"):
        _require_no_offloading("m", model)


def test_unknown_device_and_dtype(saved: Callable[[str], str]) -> None:
    with pytest.raises(InputError, match="unknown device 'gpu': use cpu"):
        load_model(saved("llama"), device="gpu")
    with pytest.raises(InputError, match="unknown dtype 'fp16': choose auto"):
        load_model(saved("llama"), dtype="fp16")


@pytest.mark.parametrize(
    ("family", "length"),
    [("llama", 256), ("opt", 256), ("gpt2", 256), ("bert", 512), ("roberta", 512 - 2)],  # RoBERTa's padding is token 1
)
def test_context_length_is_what_the_model_can_take(saved: Callable[[str], str], family: str, length: int) -> None:
    model, tokenizer = load_model(saved(family))
    assert context_length(model) == length
    tuned = tune(model, tokenizer, "prefix", prefix_length=7)
    assert context_length(tuned) == length - 7


def test_a_model_without_a_longest_text_takes_any() -> None:
    model = support.tiny_model()
    model.config.max_position_embeddings = -1  # as XLNet says it
    assert context_length(model) == 1 << 20


# --- every mode in every family ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "float32") for family in (*CAUSAL, *MASKED)),
        *((family, dtype) for family in ("llama", "bert") for dtype in ("bfloat16", "float16")),
    ],
)
def test_tuned_model_comes_back_as_it_was(
    saved: Callable[[str], str], tmp_path: Path, family: str, dtype: str, mode: str
) -> None:
    """By its folder and by its log. Adapters are in float32."""

    def fresh() -> tuple[Any, Any]:
        model, tokenizer = load_model(saved(family), dtype=dtype)
        return tune(model, tokenizer, mode), tokenizer

    (model, tokenizer), adapts, half = fresh(), mode in ("lora", "prefix"), getattr(torch, dtype)
    assert model.dtype == half
    expected = torch.float32 if adapts else half
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    untuned, before = logits(model), support.snapshot(model)
    optimizer = MeZO(model, lr=1e-2, eps=1e-2)
    with StepLog(tmp_path / "steps.jsonl", optimizer):
        steps(model, optimizer=optimizer)
    assert optimizer.perturbation is not None
    assert optimizer.perturbation.name == "scratch"
    moved = {name for name, p in model.named_parameters() if not support.same_bits(p.data, before[name])}
    assert set() != moved <= trainable(model)
    if dtype == "float32":  # elsewhere an update may round to nothing
        assert moved == trainable(model)
        assert not torch.equal(logits(model), untuned)
    assert logits(model).dtype == half
    again, _ = fresh()
    replay(tmp_path / "steps.jsonl", again)
    support.assert_same_bits(again, support.snapshot(model))

    save_model(model, tokenizer, tmp_path)
    again, its_tokenizer = load_model(str(tmp_path), dtype=dtype)
    assert torch.equal(logits(again), logits(model))
    assert {p.dtype for p in again.parameters()} == {half, expected}
    assert model_kind(again) == model_kind(model)
    assert not again.training
    assert its_tokenizer("the film")["input_ids"] == tokenizer("the film")["input_ids"]
    assert (tmp_path / "adapter_config.json").is_file() == adapts
    assert (tmp_path / "model.safetensors").is_file() == (not adapts)
    if (family, mode) == ("llama", "prefix"):
        assert (tmp_path / "adapter_model.safetensors").stat().st_size < 5 * 64 * 4 + 200


# --- which weights -----------------------------------------------------------------------------------------------


def test_all_and_patterns_choose_by_name(random_state_untouched: None) -> None:
    model, tokenizer = support.tiny_model("bert"), support.tokenizer()
    everything = {name for name, _ in model.named_parameters()}
    assert tune(model, tokenizer, r"\.bias$") is model
    assert trainable(model) == {name for name in everything if name.endswith(".bias")}
    tune(model, tokenizer, "all")
    assert trainable(model) == everything
    tune(model, tokenizer, r"layer\.1\.attention")
    assert trainable(model) == {name for name in everything if "layer.1.attention" in name}


def test_tied_weight_is_found_by_each_of_its_names() -> None:
    model = support.tiny_model("llama")
    for pattern, other in (("lm_head", "model.embed_tokens"), ("embed_tokens", "lm_head")):
        with pytest.warns(UserWarning, match=rf"{pattern}.weight is tied to {other}.weight, .* tuned in both"):
            tune(model, support.tokenizer(), pattern)
        assert trainable(model) == {"model.embed_tokens.weight"}
    tune(model, support.tokenizer(), "embed|head")  # both are named
    assert trainable(model) == {"model.embed_tokens.weight"}


def test_text_that_no_layer_lets_see_the_prefix_is_said() -> None:
    window, x = 16, support.token_batch(2, 40)
    config = transformers.Gemma3TextConfig(
        **{**support.FAMILIES["gemma3"][2], "sliding_window": window, "layer_types": ["sliding_attention"] * 2}
    )
    with torch.random.fork_rng():
        model = tune(transformers.Gemma3ForCausalLM(config).eval(), support.tokenizer(), "prefix")
    said = "texts are longer than what sees the prefix.*sees the last 16 alone"

    def effect(call: Any, length: int) -> float:
        """Of the prefix on the last token's logits."""
        weight = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            before = call(input_ids=x[:, :length]).logits[:, -1]
            weight.mul_(3)
            after = call(input_ids=x[:, :length]).logits[:, -1]
            weight.div_(3)
        return float((before - after).abs().max())

    for call in (partial(forward, model), model):
        assert effect(call, window - 1) > 1e-3
        with pytest.warns(UserWarning, match=said):
            assert effect(call, 40) == 0
    with model.disable_adapter():
        model(input_ids=x)
    with pytest.warns(UserWarning, match=said):
        model.generate(input_ids=x[:, :12], attention_mask=torch.ones(2, 12), max_new_tokens=5, do_sample=False)
    # A layer that sees all brings the prefix everywhere.
    config.layer_types = ["sliding_attention", "full_attention"]
    model = tune(transformers.Gemma3ForCausalLM(config).eval(), support.tokenizer(), "prefix")
    assert effect(model, 40) > 1e-3


def trained(model: Any, folder: Path) -> None:
    """Two steps of MeZOTrainer."""
    rows = [{"input_ids": row, "labels": row} for row in support.token_batch(8).tolist()]
    config = MeZOConfig(str(folder), max_steps=2, learning_rate=1e-2, eps=1e-2, **QUIET)
    MeZOTrainer(model=model, args=config, train_dataset=rows).train()


def test_unquantised_weights_of_a_quantised_model_are_tuned_without_an_adapter(tmp_path: Path) -> None:
    """Trainer refuses such a model for want of gradients, of which there is no need."""
    model = tune(support.tiny_model("llama"), support.tokenizer(), "norm")
    model.is_quantized = True  # all that Trainer looks at
    before = support.snapshot(model)
    trained(model, tmp_path)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == trainable(model)
    assert not model._hf_peft_config_loaded


def test_quantised_weights_are_no_target() -> None:
    model = support.tiny_model("llama_untied")
    model.lm_head.weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    before = trainable(model)
    with pytest.raises(InputError, match=r"lm_head.weight is quantised.*choose lora or prefix"):
        tune(model, support.tokenizer(), "all")
    assert trainable(model) == before


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", {"q_proj", "v_proj"}),
        ("opt", {"q_proj", "v_proj"}),
        ("gpt2", {"c_attn"}),
        ("gpt_neox", {"query_key_value"}),
        ("qwen3_moe", {"q_proj", "v_proj"}),  # peft has no default for it
        ("bert", {"query", "value"}),
    ],
)
def test_lora_is_that_of_the_paper(family: str, targets: set[str], random_state_untouched: None) -> None:
    model = support.tiny_model(family)
    untouched = support.snapshot(model)
    before = logits(model)
    tuned = tune(model, support.tokenizer(), "lora")
    config = tuned.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert set(config.target_modules) == targets
    adapters = {name: p for name, p in tuned.named_parameters() if "lora_" in name}
    assert trainable(tuned) == adapters.keys()
    assert len(adapters) == 2 * 2 * len(targets)  # A and B in two layers
    assert all(p.eq(0).all() == ("lora_B" in name) for name, p in adapters.items())
    assert torch.equal(logits(tuned), before)  # B is zero
    support.assert_same_bits(tuned.unload(), untouched)


@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_adapters_begin_by_their_seed(mode: str, random_state_untouched: None) -> None:
    def adapters(seed: int) -> dict[str, torch.Tensor]:
        model = tune(support.tiny_model(), support.tokenizer(), mode, seed=seed, prefix_length=3)
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    first, again, other = adapters(3), adapters(3), adapters(4)
    assert all(support.same_bits(first[name], again[name]) for name in first)
    assert not any(support.same_bits(first[name], other[name]) for name in first if "lora_B" not in name)
    if mode == "prefix":  # two layers, keys and values, two heads of eight
        assert [tuple(p.shape) for p in first.values()] == [(3, 2 * 2 * 2 * 8)]


@pytest.mark.parametrize(
    ("family", "mode", "options", "words"),
    [
        ("llama", "loar", {}, r"in its name; did you mean lora\? Names are model.embed_tokens.weight.*choose all"),
        ("llama", "q_porj", {}, r"did you mean q_proj\?"),
        ("llama", "(", {}, r"'\(' is no regular expression"),
        ("llama", "lora", {"lora_targets": ["q_porj"]}, r"no linear layer is called 'q_porj'; did you mean q_proj\?"),
        ("llama", "lora", {"lora_targets": ["q_proj", "norm"]}, r"no linear layer is called 'norm'. Layers are model"),
        ("llama", "lora", {"lora_rank": 0}, "positive rank and alpha, got 0 and 16.0: 8 and 16 are usual"),
        ("llama", "lora", {"lora_alpha": float("nan")}, "positive rank and alpha"),
        ("mamba", "lora", {}, "no query and value projections.*mixer.in_proj.*as LoRA targets"),
        ("llama", "prefix", {"prefix_length": 0}, "positive length, got 0: 5 is usual"),
        ("mamba", "prefix", {}, "MambaForCausalLM cannot be tuned by a prefix.*Choose lora"),
    ],
    ids=str,
)
def test_what_cannot_be_tuned_is_refused(family: str, mode: str, options: dict[str, Any], words: str) -> None:
    model = support.tiny_model(family)
    before = support.snapshot(model)
    with pytest.raises(InputError, match=words):
        tune(model, support.tokenizer(), mode, **options)
    support.assert_same_bits(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_encoder_without_a_cache_takes_no_prefix() -> None:
    """DistilBERT accepts past keys and values and does nothing with them."""
    config = transformers.DistilBertConfig(vocab_size=support.VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    with pytest.raises(InputError, match="DistilBertForMaskedLM cannot be tuned by a prefix"):
        tune(transformers.DistilBertForMaskedLM(config).eval(), support.tokenizer(), "prefix")


@pytest.mark.parametrize("mode", MODES)
def test_second_adapter_is_refused(mode: str) -> None:
    model = tune(support.tiny_model(), support.tokenizer(), "lora")
    with pytest.raises(InputError, match="has an adapter already: give the base model"):
        tune(model, support.tokenizer(), mode)


# --- prefixes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED, "gpt_neox", "mixtral"])
def test_prefix_starts_as_real_tokens(family: str, random_state_untouched: None) -> None:
    model = sharp_model(family)
    tokens, x = _draw_tokens(model, support.tokenizer(), 5, seed=0)[None], support.token_batch()
    cache = DynamicCache()
    with torch.no_grad():
        before = model(input_ids=x).logits
        model(input_ids=tokens.expand(len(x), -1), past_key_values=cache)
        seen = torch.ones(len(x), 5 + x.shape[1])
        given_cache = model(input_ids=x, past_key_values=cache, attention_mask=seen).logits
        beside = model(input_ids=torch.cat([tokens.expand(len(x), -1), x], dim=1)).logits[:, 5:]
    tuned = tune(model, support.tokenizer(), "prefix")
    assert trainable(tuned) == {"prompt_encoder.default.embedding.weight"}
    after = logits(tuned)
    assert not torch.allclose(after, before, atol=1e-3, rtol=0)
    torch.testing.assert_close(after, given_cache, **CLOSE)
    if family not in MASKED:  # there the prefix would have seen the text, too
        torch.testing.assert_close(after, beside, **CLOSE)


def test_prefix_tokens_are_words_that_model_and_tokenizer_know() -> None:
    model, tokenizer = support.tiny_model(), support.tokenizer()
    chat = tokenizer.convert_ids_to_tokens(300)
    tokenizer.add_special_tokens({"additional_special_tokens": [chat]})
    words = {*range(3, support.VOCABULARY)} - {300}  # <pad>, <bos> and <eos> are the first

    def drawn(seed: int = 0) -> list[int]:
        return _draw_tokens(model, tokenizer, 20_000, seed).tolist()

    assert set(drawn()) == words
    assert drawn() == drawn(0) != drawn(1)
    tokenizer.add_tokens(["unknown to the model"])
    assert set(drawn()) == words
    model.resize_token_embeddings(400)  # more rows than tokens, as many models have
    assert set(drawn()) == words | {support.VOCABULARY}


@pytest.mark.parametrize("family", [*CAUSAL, *MASKED])
def test_forward_is_that_of_peft(family: str) -> None:
    model = tune(sharp_model(family), support.tokenizer(), "prefix")
    x = support.token_batch()
    padding = torch.ones_like(x)
    padding[0, -3:] = 0
    with torch.no_grad():
        for inputs in ({}, {"attention_mask": torch.ones_like(x)}, {"attention_mask": padding}):
            assert torch.equal(logits(model, **inputs), model(input_ids=x, **inputs).logits)
        if family in CAUSAL:  # peft cannot switch an encoder's prefix off
            plain = model.base_model(input_ids=x).logits
            with model.disable_adapter():
                assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("boolean", [False, True], ids=["additive", "boolean"])
@pytest.mark.parametrize("family", [*CAUSAL, "bert"])
def test_packed_rows_give_what_rows_by_themselves_give(family: str, boolean: bool) -> None:
    """Two continuations behind one beginning, each of which sees the beginning and itself."""
    model = tune(sharp_model(family), support.tokenizer(), "prefix")
    start, first, second = (support.token_batch(1, n, seed) for seed, n in enumerate((6, 3, 4)))
    begin, a, b = slice(0, 6), slice(6, 9), slice(9, 13)
    seen = torch.zeros(13, 13, dtype=torch.bool)
    for part in (a, b):
        seen[part, begin] = seen[part, part] = True
    seen[begin, begin] = True
    if family != "bert":
        seen &= torch.ones(13, 13, dtype=torch.bool).tril()
    mask = seen if boolean else torch.zeros(13, 13).masked_fill(~seen, torch.finfo(torch.float32).min)
    packed = logits(
        model,
        input_ids=torch.cat([start, first, second], dim=1),
        attention_mask=mask[None, None],
        position_ids=torch.tensor([[*range(6), *range(6, 9), *range(6, 10)]]),
    )
    if family == "bert":  # the beginning sees only itself here, so by themselves the rows differ; masks are honoured
        alone = logits(model, input_ids=start)
        torch.testing.assert_close(packed[:, begin], alone, **CLOSE)
        return
    for part, tokens in ((a, first), (b, second)):
        alone = logits(model, input_ids=torch.cat([start, tokens], dim=1))
        torch.testing.assert_close(packed[:, begin], alone[:, :6], **CLOSE)
        torch.testing.assert_close(packed[:, part], alone[:, 6:], **CLOSE)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_prefix_and_lora_are_perturbed_alike_by_every_way(family: str) -> None:
    for mode in ("prefix", "lora"):
        digests = set()
        for perturbation in ("scratch", "copy"):
            model = tune(support.tiny_model(family), support.tokenizer(), mode)
            digests.add(steps(model, 3, perturbation=perturbation).tuned.digest())
        assert len(digests) == 1


# --- saved adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["lora", "prefix"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_saved_adapter_is_an_ordinary_one(saved: Callable[[str], str], tmp_path: Path, family: str, mode: str) -> None:
    model, tokenizer = load_model(saved(family))
    model = tune(model, tokenizer, mode)
    steps(model)
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == saved(family)
    base = type(model.get_base_model()).from_pretrained(saved(family)).eval()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=support.token_batch()).logits, logits(model))
    assert not trainable(load_model(str(tmp_path))[0])


def test_adapter_names_its_base_as_the_user_did(
    saved: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(saved("llama"))
    monkeypatch.chdir(folder.parent)
    model, tokenizer = load_model(f"./{folder.name}")
    monkeypatch.chdir(tmp_path)  # a base that cannot be found while saving is neither asked for nor warned of
    save_model(tune(model, tokenizer, "lora"), tokenizer, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"./{folder.name}"


@pytest.fixture
def adapter(saved: Callable[[str], str], tmp_path: Path) -> Path:
    """The folder of a LoRA adapter for the tiny Llama."""
    model, tokenizer = load_model(saved("llama"))
    save_model(tune(model, tokenizer, "lora"), tokenizer, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read.*restore the file"),
        (lambda f: edit_json(f / "adapter_config.json", peft_type="OTHER"), "adapter_config.json cannot be read"),
        (lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path=None), "set base_model_name_or_path"),
        (
            lambda f: edit_json(f / "adapter_config.json", base_model_name_or_path="./gone"),
            "adapts another model. gone: there is no such model folder. If that model moved, set base_model",
        ),
        (
            lambda f: edit_json(
                f / "adapter_config.json", base_model_name_or_path=str(support.save_tiny_model(f / "other", "gpt2"))
            ),
            r"adapter in .* does not load on .*with its own base model",
        ),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter in .* does not load on"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no tensors"), "adapter in .* does not load on"),
        (
            lambda f: (f / "adapter_config.json").write_text(
                '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "x", "num_virtual_tokens": 2}'
            ),
            "holds an adapter of type PROMPT_TUNING: use LoRA or prefix tuning",
        ),
    ],
    ids=["torn", "unknown type", "no base", "base gone", "other base", "no weights", "no tensors", "prompt tuning"],
)
def test_broken_adapter_is_refused(adapter: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(adapter)
    with pytest.raises(InputError, match=words):
        load_model(str(adapter))


# --- trained weights ---------------------------------------------------------------------------------------------


@pytest.mark.real_model
@pytest.mark.parametrize("mode", ["lora", "prefix"])
def test_adapter_of_the_story_model_learns(models_dir: Path, tmp_path: Path, mode: str) -> None:
    model, tokenizer = load_model(str(models_dir / "stories260k"))
    story = tokenizer("The blue dog sang to the moon about cheese.", return_tensors="pt")["input_ids"]
    model = tune(model, tokenizer, mode)

    @torch.no_grad()
    def loss() -> torch.Tensor:
        scores = forward(model, input_ids=story).logits[0, :-1]
        return torch.nn.functional.cross_entropy(scores, story[0, 1:])

    before = loss()
    lr, eps = {"lora": (1e-3, 1e-2), "prefix": (5e-2, 1e-1)}[mode]
    optimizer = MeZO(model, lr=lr, eps=eps)
    for _ in range(60):
        optimizer.step(loss)
    assert loss() < before - 0.1
    save_model(model, tokenizer, tmp_path)
    again, _ = load_model(str(tmp_path))
    assert torch.equal(forward(again, input_ids=story).logits, forward(model, input_ids=story).logits)


@pytest.mark.real_model
@pytest.mark.parametrize("mode", MODES)
def test_trained_masked_model(models_dir: Path, tmp_path: Path, mode: str) -> None:
    model, tokenizer = load_model(str(models_dir / "minilm-l6-mlm"), dtype="float32")
    assert model_kind(model) == "masked"
    text = tokenizer("The capital of France is [MASK].", return_tensors="pt")
    place = text["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    paris = tokenizer.convert_tokens_to_ids("paris")
    with torch.no_grad():
        # Chance is one in 30,522.
        assert float(model(**text).logits[0, place].softmax(-1)[paris]) > 0.01
    model = tune(model, tokenizer, mode)
    optimizer = MeZO(model, lr=1e-4)
    for _ in range(2):
        optimizer.step(lambda: -forward(model, **text).logits[0, place].log_softmax(-1)[paris])
    assert optimizer.perturbation is not None
    assert optimizer.perturbation.name == "scratch"
    save_model(model, tokenizer, tmp_path)
    again, _ = load_model(str(tmp_path))
    if mode in ("lora", "prefix"):
        again, _ = load_model(str(tmp_path), dtype="float32")
    with torch.no_grad():
        assert torch.equal(forward(again, **text).logits, forward(model, **text).logits)
