"""What a model writes: batches, caches, padding and adapters give the text of one token after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import support
from forwardtune.models import forward, tune
from forwardtune.objectives import Context, Sampling, generate, write
from forwardtune.tasks import Task
from support.examples import TOKENIZER, inputs_of, talking_model, tokens

LENGTH = 8
TASK = Task("free", "{text}", "", None, "reward", loss="none", stop="", max_new_tokens=LENGTH)
FAMILIES = ("llama", "gpt2", "opt", "qwen3", "gemma3")
PROMPTS = [tokens(n, n) for n in (2, 9, 5)]


def speaker(family: str = "llama", mode: str = "all") -> Any:
    """A model that talks; its adapter, if it has one, has a say in what."""
    model = talking_model(family)
    if mode != "all":
        model = tune(model, TOKENIZER, mode, seed=1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


@torch.no_grad()
def likeliest(model: Any, prompt: Sequence[int], count: int = LENGTH) -> list[int]:
    """The definition: the whole text goes through the model for every token, without a cache."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(forward(model, input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    return row[len(prompt) :]


def text_of(written: Sequence[int]) -> str:
    return TOKENIZER.decode(written).strip()


@pytest.fixture(scope="module")
def llama() -> Any:
    return speaker()


@pytest.mark.parametrize("mode", ["all", "lora", "prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_likeliest_token_time_after_time(family: str, mode: str) -> None:
    """Alone and in a batch that is padded on the left."""
    model = speaker(family, mode)
    expected = [text_of(likeliest(model, prompt)) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected)
    assert [generate(model, TOKENIZER, TASK, [prompt])[0] for prompt in PROMPTS] == expected
    assert generate(model, TOKENIZER, TASK, PROMPTS) == expected
    if mode != "all":
        with model.disable_adapter():
            assert [text_of(likeliest(model.get_base_model(), prompt)) for prompt in PROMPTS] != expected


@pytest.mark.parametrize("family", FAMILIES)
def test_context_that_was_processed_before_changes_nothing(family: str) -> None:
    model = speaker(family)
    shared = tokens(21, 77)
    prompts = [shared + prompt for prompt in PROMPTS]
    with torch.no_grad():
        cache = model(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
    context = Context(shared, cache)
    expected = [text_of(likeliest(model, prompt)) for prompt in prompts]
    with inputs_of(model) as shapes:
        assert generate(model, TOKENIZER, TASK, prompts, context) == expected
    assert sum(width for _, width in shapes) == max(map(len, PROMPTS)) + LENGTH - 1
    assert generate(model, TOKENIZER, TASK, prompts[::-1], context) == expected[::-1]  # it was not written to
    assert cache.get_seq_length() == len(shared)


def test_model_reads_every_token_once(llama: Any) -> None:
    with inputs_of(llama) as shapes:
        generate(llama, TOKENIZER, TASK, PROMPTS)
    assert shapes == [(3, 9)] + [(3, 1)] * (LENGTH - 1)


@pytest.mark.parametrize("bare", [False, True], ids=["with-padding-and-end", "with-neither"])
def test_text_ends_at_the_stop_string(bare: bool) -> None:
    """Which may lie across tokens, come in one row before the others, and not at all.

    Rows that are done go on beside the others, or are filled up; nothing of that is theirs.
    """
    model, tokenizer = speaker(), TOKENIZER
    if bare:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=support.tokenizer().backend_tokenizer)
        assert tokenizer.pad_token_id is tokenizer.eos_token_id is None
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    rows = [likeliest(model, prompt) for prompt in PROMPTS]
    whole = [text_of(row) for row in rows]
    assert write(model, tokenizer, TASK, PROMPTS).tokens == rows
    stop = whole[0][2:5]
    assert stop not in whole[1] + whole[2]
    assert not any(TOKENIZER.decode([i]) == stop for i in range(support.VOCABULARY))
    task = replace(TASK, stop=stop)
    found = write(model, tokenizer, task, PROMPTS)
    assert found.texts == [whole[0][: whole[0].index(stop)].strip(), *whole[1:]]
    assert found.tokens == [rows[0][: len(found.tokens[0])], *rows[1:]]
    assert stop in TOKENIZER.decode(found.tokens[0])
    assert stop not in TOKENIZER.decode(found.tokens[0][:-1])
    with inputs_of(model) as shapes:
        assert generate(model, tokenizer, task, PROMPTS[:1]) == found.texts[:1]
    assert len(shapes) < LENGTH


def test_text_ends_where_the_model_ends_it() -> None:
    model = speaker()
    written = likeliest(model, PROMPTS[0])
    late = max(written, key=written.index)
    with torch.no_grad():  # where this token was the likeliest, the end is now
        head = model.get_output_embeddings().weight
        head[TOKENIZER.eos_token_id] = head[late] * 1.01
    written = likeliest(model, PROMPTS[0])
    end = written.index(TOKENIZER.eos_token_id)
    assert 0 < end < LENGTH
    found = write(model, TOKENIZER, TASK, PROMPTS)
    assert (found.texts[0], found.tokens[0]) == (text_of(written[:end]), written[:end])
    assert "<" not in found.texts[0]


HAN = "你好世界的是不了在人有我他这个上们来到时大地为子中说生国年着就那和要她出也得里后自以会家可下"


def chinese() -> tuple[Any, Any]:
    """A model and a tokenizer of one token a character, which reads with spaces between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *HAN])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    model = talking_model("llama")
    model.resize_token_embeddings(len(words))
    return model, tokenizer


def test_stop_string_ends_texts_whose_tokens_read_otherwise_together() -> None:
    model, tokenizer = chinese()
    prompt = tokenizer("你好")["input_ids"]
    written = likeliest(model, prompt)
    whole = tokenizer.decode(written)
    assert whole.count(" ") == LENGTH - 1
    place = next(i for i in range(1, LENGTH) if written[i] not in written[:i])
    for stop in (tokenizer.decode([written[place]]), tokenizer.decode(written[place - 1 : place + 1])):
        found = write(model, tokenizer, replace(TASK, stop=stop), [prompt])
        assert found.tokens == [written[: place + 1]]
        assert found.texts == [whole[: whole.index(stop)].strip()]
    assert write(model, tokenizer, replace(TASK, stop="。"), [prompt]).texts == [whole]


def test_control_token_can_be_the_stop_string(llama: Any) -> None:
    """It is no part of the text, and yet ends it."""
    written = likeliest(llama, PROMPTS[0])
    place = next(i for i in range(2, LENGTH) if written[i] not in written[:i])
    tokenizer = support.tokenizer()
    stop = tokenizer.convert_ids_to_tokens(written[place])
    tokenizer.add_special_tokens({"additional_special_tokens": [stop]})
    found = write(llama, tokenizer, replace(TASK, stop=stop), PROMPTS[:1])
    assert found.tokens == [written[: place + 1]]
    assert found.texts == [text_of(written[:place])]


def test_what_the_models_folder_says_of_decoding_is_left_aside(llama: Any) -> None:
    """Penalties and beams would make another objective of the same weights."""
    expected = generate(llama, TOKENIZER, TASK, PROMPTS)
    sampled = generate(llama, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1.0, 4))
    model = speaker()
    for name, value in {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "num_beams": 3, "top_k": 2}.items():
        setattr(model.generation_config, name, value)
    assert generate(model, TOKENIZER, TASK, PROMPTS) == expected
    assert generate(model, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1.0, 4)) == sampled


def test_seed_decides_what_is_drawn(llama: Any, random_state_untouched: None) -> None:
    drawn = [generate(llama, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1.0, seed)) for seed in (1, 2**62, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    torch.rand(3, generator=torch.Generator())  # nor does the global state have a say
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert generate(llama, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1.0, 1)) == drawn[0]


def test_global_random_state_is_restored_after_an_exception(llama: Any, random_state_untouched: None) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    hook = llama.register_forward_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            generate(llama, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1.0, 1))
    finally:
        hook.remove()


def test_almost_no_temperature_is_none(llama: Any) -> None:
    assert generate(llama, TOKENIZER, TASK, PROMPTS, sampling=Sampling(1e-4, 3)) == generate(
        llama, TOKENIZER, TASK, PROMPTS
    )


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_are_drawn_from_the_whole_softmax(llama: Any, temperature: float) -> None:
    """Counted over many rows; no token is cut off as in ``top_k``."""
    rows, prompt = 6000, PROMPTS[0]
    # Special tokens have no text; their logits of 0 are small beside the others'.
    with torch.no_grad():
        expected = (llama(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(dim=-1)
    drawn = write(llama, TOKENIZER, replace(TASK, max_new_tokens=1), [prompt] * rows, sampling=Sampling(temperature, 5))
    counts = Counter(token for row in drawn.tokens for token in row)
    ends = [TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, llama.generation_config.eos_token_id]
    assert sum(not row for row in drawn.tokens) == rows - counts.total()  # those that ended at once
    counts[ends[0]] = rows - counts.total()
    for end in {*ends} - {ends[0], None}:
        expected[ends[0]] += expected[end]
        expected[end] = 0
    # Each count is binomial; a seed far out at five standard deviations in one of 320 tokens has odds of 2e-4.
    for token, p in enumerate(expected.tolist()):
        spread = (rows * p * (1 - p)) ** 0.5
        assert abs(counts[token] - rows * p) <= 5 * spread + 3, token
    if temperature > 1:
        assert len(counts) > 50


class Copies(TorchDispatchMode):
    """Notes tensors that hold a weight several times."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.smallest, self.found = 2 * weight.numel(), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.smallest:
            self.found.add(f"{func} {tuple(result.shape)}")
        return result


@pytest.mark.parametrize("mode", ["all", "late-mlp", "lora"])
def test_no_row_of_a_batch_copies_the_head(mode: str) -> None:
    """A head that is frozen was copied once for every row, 8 times 54 MB of a model of 135M parameters."""
    model = speaker(mode=mode)
    with Copies(model.get_output_embeddings().weight) as copies:
        write(model, TOKENIZER, TASK, [tokens(3, n) for n in range(4)])
    assert copies.found == set()
