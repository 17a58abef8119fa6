"""Encoding, scoring and evaluation: the fast batch layout means what the plain one means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import support
from forwardtune.errors import InputError
from forwardtune.evaluation import can_share_prompts, evaluate, generate, prepare, training_objective
from forwardtune.objectives import logits_at, option_cross_entropy, option_scores, target_likelihood
from forwardtune.tasks import Example, Task, metrics
from forwardtune.tasks.encoding import Encoded, Encoder, collate

CHOICE = Task("choice", "{text}", "label", {"0": "a", "1": "b"}, "accuracy")
FREE = Task("free", "{text}", "answer", None, "f1", stop="", max_new_tokens=6)
TOKENIZER = support.tokenizer()

PLAIN = [i for i in range(3, support.VOCABULARY) if (text := TOKENIZER.decode([i])).isascii() and text.isprintable()]

# Both layouts compute the same sums in float32, but batched matrix products and attention over longer rows add in
# another order: a few hundred additions of numbers up to 10 err by at most 1e-5.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}


def sharp_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model whose attention matters: a freshly initialised one looks at nothing in particular."""
    model = support.tiny_model(family, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def talking_model(family: str = "llama") -> Any:
    """A model that produces printable text, and not the same token for ever."""
    model = sharp_model(family)
    head = torch.zeros(support.VOCABULARY, 32)
    head[PLAIN] = torch.randn(len(PLAIN), 32, generator=torch.Generator().manual_seed(3))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    return model


def tokens(count: int, seed: int) -> list[int]:
    return support.token_batch(1, count, seed)[0].tolist()


def encoded(prompt: int, *options: int, label: int = 0) -> Encoded:
    """An example with so many tokens in its prompt and options."""
    return Encoded(tokens(prompt, prompt), [tokens(n, 100 * i + n) for i, n in enumerate(options)], label)


BATCHES = {
    "single-token": [encoded(5, 1, 1), encoded(9, 1, 1, label=1)],
    "multi-token": [encoded(7, 3, 3), encoded(7, 3, 3, label=1)],
    "mixed-length": [encoded(3, 1, 5, label=1), encoded(11, 4, 2), encoded(1, 1, 1)],
    "options-differ-in-number": [encoded(4, 2, 1, 3, label=2), encoded(8, 1, 2), encoded(6, 5)],
}


def naive_scores(model: Any, batch: Sequence[Encoded]) -> torch.Tensor:
    """The definition: one option at a time, all logits, the mean over the option's tokens."""
    scores = torch.full((len(batch), max(len(e.options) for e in batch)), -math.inf)
    for i, example in enumerate(batch):
        for j, option in enumerate(example.options):
            logits = model(input_ids=torch.tensor([example.prompt + option])).logits[0].float()
            log_p = logits.log_softmax(dim=-1)
            begin = len(example.prompt) - 1
            scores[i, j] = torch.stack([log_p[begin + t, token] for t, token in enumerate(option)]).mean()
    return scores


@pytest.fixture(scope="module")
def llama() -> Any:
    return sharp_model("llama")


# --- scores ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_scores_equal_the_naive_transcription_in_both_layouts(family: str, batch: list[Encoded]) -> None:
    model = sharp_model(family)
    expected = naive_scores(model, batch)
    for shared in (True, False):
        scores = option_scores(model, prepare(model, TOKENIZER, batch, shared=shared))
        torch.testing.assert_close(scores, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
def test_shared_layout_agrees_in_bfloat16(family: str) -> None:
    model = sharp_model(family, torch.bfloat16)
    batch = BATCHES["mixed-length"]
    plain, shared = (option_scores(model, prepare(model, TOKENIZER, batch, shared=s)) for s in (False, True))
    # Logits are of size 1 and bfloat16 keeps 8 bits, so each rounding is up to 2**-8; a score is the mean of several.
    torch.testing.assert_close(shared, plain, rtol=0, atol=2**-6)
    assert (plain.isfinite() & (plain < 0)).all()


@torch.no_grad()
def test_objectives_by_hand(llama: Any) -> None:
    batch = BATCHES["options-differ-in-number"]
    inputs = prepare(llama, TOKENIZER, batch)
    scores = naive_scores(llama, batch)
    cross_entropy = torch.stack(
        [-(row[e.label] - row[: len(e.options)].logsumexp(0)) for row, e in zip(scores, batch, strict=True)]
    )
    torch.testing.assert_close(option_cross_entropy(llama, inputs), cross_entropy, **CLOSE)
    assert cross_entropy[2] == 0  # one option alone is certain
    likelihood = torch.stack([-row[e.label] for row, e in zip(scores, batch, strict=True)])
    torch.testing.assert_close(target_likelihood(llama, inputs), likelihood, **CLOSE)


def test_training_objective_follows_the_kind_of_task() -> None:
    assert training_objective(CHOICE) is option_cross_entropy
    assert training_objective(FREE) is target_likelihood


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_head_computes_answer_positions_alone(llama: Any, batch: list[Encoded], shared: bool) -> None:
    """One position predicts the first token of all options of a row; every further token has one of its own."""
    inputs = prepare(llama, TOKENIZER, batch, shared=shared)
    firsts = len(batch) if shared else sum(len(e.options) for e in batch)
    needed = firsts + sum(len(option) - 1 for e in batch for option in e.options)
    shapes = []
    hook = llama.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    try:
        logits = logits_at(llama, inputs)
    finally:
        hook.remove()
    assert shapes == [(1, needed, support.VOCABULARY)]
    assert (tuple(logits.shape), logits.dtype) == ((needed, support.VOCABULARY), torch.float32)
    assert not llama.get_output_embeddings()._forward_pre_hooks


@torch.no_grad()
def test_model_without_a_known_head_gives_the_same_logits(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = prepare(llama, TOKENIZER, BATCHES["mixed-length"])
    selected = logits_at(llama, inputs)
    monkeypatch.setattr(type(llama), "get_output_embeddings", lambda self: None)
    torch.testing.assert_close(logits_at(llama, inputs), selected, **CLOSE)


def test_head_is_freed_of_its_hook_when_the_model_fails(llama: Any) -> None:
    inputs = prepare(llama, TOKENIZER, BATCHES["single-token"])
    with pytest.raises(IndexError):
        logits_at(llama, {**inputs, "input_ids": inputs["input_ids"] + support.VOCABULARY})
    assert not llama.get_output_embeddings()._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_neither_padding_nor_neighbours_change_scores(llama: Any, shared: bool) -> None:
    example = BATCHES["mixed-length"][0]
    long = encoded(40, 2, 2)
    alone = option_scores(llama, prepare(llama, TOKENIZER, [example], shared=shared))
    for pad in (0, 7, support.VOCABULARY - 1):
        inputs = collate([long, example], pad, shared=shared, dtype=llama.dtype)
        torch.testing.assert_close(option_scores(llama, inputs)[1:], alone, **CLOSE)


def test_inputs_need_no_mask_where_no_option_has_a_second_token() -> None:
    assert "attention_mask" not in collate(BATCHES["single-token"], 0)
    assert "attention_mask" not in collate([encoded(4, 5)], 0)
    assert "attention_mask" in collate(BATCHES["multi-token"], 0)
    assert collate(BATCHES["single-token"], 0)["input_ids"].shape == (2, 9)


# --- sharing prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", True), ("gpt2", True), ("opt", True), ("qwen3", True), ("gemma3", True), ("mamba", False)],
)
def test_sharing_is_found_out_by_trying(family: str, expected: bool) -> None:
    model = sharp_model(family)
    assert can_share_prompts(model, TOKENIZER, BATCHES["mixed-length"] + BATCHES["multi-token"]) is expected
    assert can_share_prompts(model, TOKENIZER, BATCHES["single-token"]) is True  # nothing to keep apart


def test_model_that_lets_options_see_each_other_does_not_share(llama: Any) -> None:
    class Leaky(torch.nn.Module):
        """Ignores the block mask."""

        config, dtype, device = llama.config, llama.dtype, llama.device

        def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            return llama(input_ids=input_ids, **rest)

    assert not can_share_prompts(Leaky(), TOKENIZER, BATCHES["multi-token"])


# --- encoding ----------------------------------------------------------------------------------------------------


class Words:
    """One token a word, the way a tokenizer with sentence marks does it."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __init__(self, *, bos: bool = False, eos: bool = False) -> None:
        self.bos, self.eos = bos, eos
        self.known: dict[str, int] = {}

    def __call__(self, text: str) -> dict[str, list[int]]:
        words = [self.known.setdefault(word, len(self.known) + 5) for word in text.split()]
        return {"input_ids": [1] * self.bos + words + [2] * self.eos}


EXAMPLE = Example("one two three four", (" yes", " no way"), 1)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_prompt_and_options_are_cut_where_the_tokens_part(bos: bool, eos: bool) -> None:
    encoder = Encoder(Words(bos=bos, eos=eos), 100)
    (found,) = encoder(CHOICE, [EXAMPLE])
    assert found == Encoded([1] * bos + [5, 6, 7, 8], [[9], [10, 11]], 1)
    assert found.length == bos + 4 + 1
    assert encoder.truncated == 0


def test_token_across_the_border_belongs_to_the_answers() -> None:
    """``wa`` is a token before ``x``, but part of the token ``was`` before ``s``."""
    prompt, texts = "the film wa", ("s fun", "x")
    (found,) = Encoder(TOKENIZER, 100)(CHOICE, [Example(prompt, texts, 0)])
    assert TOKENIZER.decode(found.prompt) == "the film"
    assert [TOKENIZER.decode(option) for option in found.options] == [" was fun", " wax"]
    for option, text in zip(found.options, texts, strict=True):
        assert found.prompt + option == TOKENIZER(prompt + text)["input_ids"]


def test_prompt_without_a_border_is_refused() -> None:
    with pytest.raises(InputError, match=r"example 2.*end of the prompt"):
        Encoder(TOKENIZER, 100)(CHOICE, [EXAMPLE, Example("", (" a", " b"), 0)])


def test_free_text_is_learnt_with_its_stop_string() -> None:
    task = Task("free", "{text}", "answer", None, "f1", stop="\n")
    (found,) = Encoder(TOKENIZER, 100)(task, [Example("the film was", target=" fun")])
    assert TOKENIZER.decode(found.options[0]) == " fun\n"
    assert (len(found.options), found.label, found.text) == (1, 0, "fun")


@pytest.mark.parametrize(
    ("bos", "max_length", "prompt"),
    [
        (True, 100, [1, 5, 6, 7, 8]),
        (True, 7, [1, 5, 6, 7, 8]),  # the longest option has two tokens, so 7 is what fits exactly
        (True, 6, [1, 6, 7, 8]),
        (True, 4, [1, 8]),
        (True, 3, [8]),  # no room for both: the last word says more than the mark
        (False, 5, [6, 7, 8]),
        (False, 3, [8]),
    ],
)
def test_prompts_are_cut_on_the_left_and_counted_answers_never(bos: bool, max_length: int, prompt: list[int]) -> None:
    encoder = Encoder(Words(bos=bos), max_length)
    found = encoder(CHOICE, [EXAMPLE, EXAMPLE])
    assert [e.prompt for e in found] == [prompt, prompt]
    assert [e.options for e in found] == [[[9], [10, 11]]] * 2
    assert encoder.truncated == (0 if len(prompt) == 4 + bos else 2)
    for e in found:
        assert e.length <= max_length
        assert all(len(e.prompt) + len(option) <= max_length for option in e.options)


def test_answer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"example 1.*answers take 2 tokens.*--max-length"):
        Encoder(Words(), 2)(CHOICE, [EXAMPLE])


# --- generation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker() -> Any:
    return talking_model()


def free_task(stop: str = "", max_new_tokens: int = 12) -> Task:
    return Task("free", "{text}", "answer", None, "f1", stop=stop, max_new_tokens=max_new_tokens)


@torch.no_grad()
def test_generation_is_greedy(speaker: Any) -> None:
    prompt = tokens(6, 1)
    row = list(prompt)
    for _ in range(12):
        row.append(int(speaker(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
    assert generate(speaker, TOKENIZER, free_task(), [prompt]) == [TOKENIZER.decode(row[6:]).strip()]


def test_generation_ends_at_the_stop_string(speaker: Any) -> None:
    prompt = tokens(6, 1)
    (whole,) = generate(speaker, TOKENIZER, free_task(), [prompt])
    stop = whole[4]
    calls: list[int] = []
    hook = speaker.register_forward_hook(lambda *_: calls.append(1))
    try:
        stopped = generate(speaker, TOKENIZER, free_task(stop), [prompt])
    finally:
        hook.remove()
    assert stopped == [whole.split(stop)[0].strip()]
    assert 0 < len(calls) < 12


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_left_padding_does_not_change_what_is_generated(family: str) -> None:
    model = talking_model(family)
    prompts = [tokens(n, n) for n in (2, 9, 5)]
    together = generate(model, TOKENIZER, free_task(), prompts)
    assert together == [generate(model, TOKENIZER, free_task(), [prompt])[0] for prompt in prompts]
    assert len(set(together)) == 3


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_evaluation_of_answers_is_the_mean_over_examples(llama: Any, batch_size: int, shared: bool) -> None:
    examples = [encoded(3 + i % 4, 1 + i % 3, 2, label=i % 2) for i in range(7)]
    scores = naive_scores(llama, examples).detach()
    right = [int(row.argmax()) == e.label for row, e in zip(scores, examples, strict=True)]
    losses = [-float(row.log_softmax(0)[e.label]) for row, e in zip(scores, examples, strict=True)]
    seen: list[tuple[int, int]] = []
    result = evaluate(
        llama,
        TOKENIZER,
        CHOICE,
        examples,
        batch_size=batch_size,
        shared=shared,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result == {
        "accuracy": sum(right) / 7,
        "loss": pytest.approx(sum(losses) / 7, abs=CLOSE["atol"]),
        "examples": 7,
    }
    assert 0 < sum(right) < 7
    assert seen[-1] == (7, 7)
    assert len(seen) == math.ceil(7 / batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_of_free_text_is_the_mean_over_examples(speaker: Any, batch_size: int) -> None:
    prompts = [tokens(n, n) for n in (4, 7, 5)]
    predicted = [generate(speaker, TOKENIZER, FREE, [prompt])[0] for prompt in prompts]
    texts = [predicted[0], predicted[1] + " other", "none of it"]
    examples = [Encoded(prompt, [tokens(3, 9)], 0, text) for prompt, text in zip(prompts, texts, strict=True)]
    result = evaluate(speaker, TOKENIZER, FREE, examples, batch_size=batch_size)
    pairs = list(zip(predicted, texts, strict=True))
    assert result == {
        "f1": pytest.approx(sum(metrics.f1(*pair) for pair in pairs) / 3),
        "exact_match": pytest.approx(sum(metrics.exact_match(*pair) for pair in pairs) / 3),
        "loss": pytest.approx(-float(naive_scores(speaker, examples).detach().mean()), abs=CLOSE["atol"]),
        "examples": 3,
    }
    assert result["exact_match"] == pytest.approx(1 / 3)
    assert 1 / 3 < result["f1"] < 1


def test_evaluation_leaves_model_and_random_state_alone(llama: Any, random_state_untouched: None) -> None:
    before = support.snapshot(llama)
    llama.train()
    evaluate(llama, TOKENIZER, CHOICE, BATCHES["mixed-length"])
    support.assert_same_bits(llama, before)
    assert all(p.grad is None for p in llama.parameters())
