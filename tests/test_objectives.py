"""Encoding, scoring and evaluation: the fast batch layout means what the plain one means."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

import support
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare, sign_test, training_objective
from forwardtune.objectives import generate, logits_at, option_cross_entropy, option_scores, target_likelihood
from forwardtune.tasks import Example, Task, metrics
from forwardtune.tasks.batching import Layout, collate
from forwardtune.tasks.encoding import SEPARATOR, Encoded, Encoder

CHOICE = Task("choice", "{text}", "label", {"0": "a", "1": "b"}, "accuracy")
MASKED = Task("masked", "{text} It was [MASK].", "label", {"0": "a", "1": "b"}, "accuracy")
FREE = Task("free", "{text}", "answer", None, "f1", loss="likelihood", stop="", max_new_tokens=6)
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
    return Encoded(tokens(prompt, prompt), [tokens(n, 100 * i + n) for i, n in enumerate(options)], (label,))


BATCHES = {
    "single-token": [encoded(5, 1, 1), encoded(9, 1, 1, label=1)],
    "multi-token": [encoded(7, 3, 3), encoded(7, 3, 3, label=1)],
    "mixed-length": [encoded(3, 1, 5, label=1), encoded(11, 4, 2), encoded(1, 1, 1)],
    "options-differ-in-number": [encoded(4, 2, 1, 3, label=2), encoded(8, 1, 2), encoded(6, 5)],
}


LAYOUTS = [None, *(Layout(0, shared=shared, packed=packed) for shared in (True, False) for packed in (True, False))]
every_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda found: f"shared={found.shared},packed={found.packed}" if found else "default"
)


def naive_scores(model: Any, batch: Sequence[Encoded]) -> torch.Tensor:
    """The definition: one option at a time, all logits, the mean over the tokens of the answer."""
    scores = torch.full((len(batch), max(len(e.options) for e in batch)), -math.inf)
    for i, example in enumerate(batch):
        for j, option in enumerate(example.options):
            logits = model(input_ids=torch.tensor([example.prompt + option])).logits[0].float()
            log_p = logits.log_softmax(dim=-1)
            begin = len(example.prompt) - example.scored
            scored = (example.prompt + option)[begin:]
            scores[i, j] = torch.stack([log_p[begin - 1 + t, token] for t, token in enumerate(scored)]).mean()
    return scores


@pytest.fixture(scope="module")
def llama() -> Any:
    return sharp_model("llama")


# --- scores ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_scores_equal_the_naive_transcription_in_every_layout(family: str, batch: list[Encoded]) -> None:
    model = sharp_model(family)
    expected = naive_scores(model, batch)
    for layout in LAYOUTS:
        scores = option_scores(model, prepare(model, TOKENIZER, batch, layout))
        torch.testing.assert_close(scores, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3"])
def test_shared_layout_agrees_in_bfloat16(family: str) -> None:
    model = sharp_model(family, torch.bfloat16)
    batch = BATCHES["mixed-length"]
    plain, shared = (
        option_scores(model, prepare(model, TOKENIZER, batch, layout))
        for layout in (None, Layout(TOKENIZER.pad_token_id, torch.bfloat16))
    )
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


@torch.no_grad()
def test_training_objective_follows_the_kind_of_task(llama: Any) -> None:
    batch = prepare(llama, TOKENIZER, BATCHES["multi-token"])
    cross_entropy, likelihood = option_cross_entropy(llama, batch), target_likelihood(llama, batch)
    assert torch.equal(training_objective(CHOICE)(llama, batch), cross_entropy)
    assert torch.equal(training_objective(FREE)(llama, batch), likelihood)
    assert not torch.equal(cross_entropy, likelihood)


@torch.no_grad()
@every_layout
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_head_computes_answer_positions_alone(llama: Any, batch: list[Encoded], layout: Layout | None) -> None:
    """One position predicts the first token of all options of a row; every further token has one of its own."""
    inputs = prepare(llama, TOKENIZER, batch, layout)
    firsts = len(batch) if layout and layout.shared else sum(len(e.options) for e in batch)
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
@pytest.mark.parametrize("packed", [True, False])
def test_neither_padding_nor_neighbours_change_scores(llama: Any, shared: bool, packed: bool) -> None:
    example = BATCHES["mixed-length"][0]
    long = encoded(40, 2, 2)
    alone = option_scores(llama, prepare(llama, TOKENIZER, [example]))
    for pad in (0, 7, support.VOCABULARY - 1):
        inputs = collate([long, example], Layout(pad, llama.dtype, shared, packed))
        torch.testing.assert_close(option_scores(llama, inputs)[1:], alone, **CLOSE)


def test_inputs_need_no_mask_where_rows_hold_one_text_each() -> None:
    assert "attention_mask" not in collate(BATCHES["single-token"], Layout(0))
    assert "attention_mask" not in collate([encoded(4, 5)], Layout(0))
    assert "attention_mask" in collate(BATCHES["multi-token"], Layout(0))
    assert "attention_mask" not in collate(BATCHES["multi-token"], Layout(0, shared=False))
    assert collate(BATCHES["single-token"], Layout(0))["input_ids"].shape == (2, 9)


def test_masked_inputs_in_rows_apart_mask_their_padding_alone() -> None:
    batch = [Encoded(tokens(n, n), [[7], [8]], mask=1) for n in (2, 4)]
    inputs = collate(batch, Layout(0, shared=False, packed=False, causal=False))
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert "position_ids" not in inputs
    assert inputs["positions"].tolist() == [1, 5]


# --- sharing prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", True), ("gpt2", True), ("opt", True), ("qwen3", True), ("gemma3", True), ("mamba", False)],
)
def test_sharing_is_found_out_by_trying(family: str, expected: bool) -> None:
    model = sharp_model(family)
    for batch in (BATCHES["mixed-length"] + BATCHES["multi-token"], BATCHES["mixed-length"]):
        assert find_layout(model, TOKENIZER, batch).shared is expected
    assert find_layout(model, TOKENIZER, BATCHES["single-token"]).shared  # nothing to keep apart
    assert not plain_layout(model, TOKENIZER).shared


def test_model_that_lets_options_see_each_other_does_not_share(llama: Any) -> None:
    class LeakyForCausalLM(torch.nn.Module):
        """Ignores the block mask."""

        config, dtype, device = llama.config, llama.dtype, llama.device

        def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
            return llama(input_ids=input_ids, **rest)

    leaky = LeakyForCausalLM()
    assert find_layout(leaky, TOKENIZER, BATCHES["multi-token"]) == plain_layout(leaky, TOKENIZER)


# --- encoding ----------------------------------------------------------------------------------------------------


class Words:
    """One token a word, the way a tokenizer with sentence marks does it."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0
    all_special_tokens: ClassVar[list[str]] = []
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, *, bos: bool = False, eos: bool = False) -> None:
        self.bos, self.eos = bos, eos
        self.known: dict[str, int] = {"a": 4}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        words = [self.known.setdefault(word, len(self.known) + 4) for word in text.split()]
        marks = add_special_tokens
        return {"input_ids": [1] * (marks and self.bos) + words + [2] * (marks and self.eos)}


EXAMPLE = Example("one two three four", (" yes", " no way"), (1,), context=(0, len("one two three four")))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_prompt_and_options_are_cut_where_the_tokens_part(bos: bool, eos: bool) -> None:
    encoder = Encoder(Words(bos=bos, eos=eos), 100)
    (found,) = encoder(CHOICE, [EXAMPLE])
    assert found == Encoded([1] * bos + [5, 6, 7, 8], [[9], [10, 11]], (1,), example=EXAMPLE)
    assert found.length == bos + 4 + 1
    assert encoder.truncated == 0


def test_token_across_the_border_belongs_to_the_answers() -> None:
    """``wa`` is a token before ``x``, but part of the token ``was`` before ``s``."""
    prompt, texts = "the film wa", ("s fun", "x")
    (found,) = Encoder(TOKENIZER, 100)(CHOICE, [Example(prompt, texts, (0,))])
    assert TOKENIZER.decode(found.prompt) == "the film"
    assert [TOKENIZER.decode(option) for option in found.options] == [" was fun", " wax"]
    for option, text in zip(found.options, texts, strict=True):
        assert found.prompt + option == TOKENIZER(prompt + text)["input_ids"]


def test_prompt_without_a_border_is_refused() -> None:
    with pytest.raises(InputError, match=r"example 2.*end of the prompt"):
        Encoder(TOKENIZER, 100)(CHOICE, [EXAMPLE, Example("", (" a", " b"), (0,))])


def test_free_text_is_learnt_with_its_stop_string() -> None:
    task = Task("free", "{text}", "answer", None, "f1", stop="\n")
    (found,) = Encoder(TOKENIZER, 100)(task, [Example("the film was", targets=(" fun", " good"))])
    assert TOKENIZER.decode(found.options[0]) == " fun\n"
    assert (len(found.options), found.label, found.texts) == (1, 0, ("fun", "good"))


@pytest.mark.parametrize(
    ("bos", "max_length", "prompt"),
    [
        (True, 100, [1, 5, 6, 7, 8]),
        (True, 7, [1, 5, 6, 7, 8]),  # the longest option has two tokens, so 7 is what fits exactly
        (True, 6, [1, 6, 7, 8]),
        (True, 4, [1, 8]),
        (False, 5, [6, 7, 8]),
        (False, 3, [8]),
    ],
)
def test_prompts_are_cut_on_the_left_and_counted_answers_and_marks_never(
    bos: bool, max_length: int, prompt: list[int]
) -> None:
    tokenizer = Words(bos=bos)
    tokenizer(EXAMPLE.prompt + " yes no way")
    encoder = Encoder(tokenizer, max_length)
    found = encoder(CHOICE, [EXAMPLE, EXAMPLE])
    assert [e.prompt for e in found] == [prompt, prompt]
    assert [e.options for e in found] == [[[9], [10, 11]]] * 2
    assert encoder.truncated == (0 if len(prompt) == 4 + bos else 2)
    for e in found:
        assert e.length <= max_length
        assert all(len(e.prompt) + len(option) <= max_length for option in e.options)


@pytest.mark.parametrize(("bos", "max_length"), [(False, 2), (True, 3), (True, 1)])
def test_context_that_would_vanish_is_refused(bos: bool, max_length: int) -> None:
    with pytest.raises(InputError, match=r"task choice, example 1.*answers of 2 tokens.*raise max_length"):
        Encoder(Words(bos=bos), max_length)(CHOICE, [EXAMPLE])


def test_only_what_is_too_long_is_cut_and_counted() -> None:
    short = Example("six", EXAMPLE.options, (0,), context=(0, 3))
    encoder = Encoder(Words(), 5)
    found = encoder(CHOICE, [short, EXAMPLE, short, EXAMPLE])
    assert [len(e.prompt) for e in found] == [1, 3, 1, 3]
    assert encoder.truncated == 2
    encoder(CHOICE, [EXAMPLE])
    assert encoder.truncated == 3


# --- cutting what is too long ------------------------------------------------------------------------------------

LONG = "the film was slow, and a quick  brown\nfox likes it; was it great?"


def worded(before: str, context: str, after: str, options: tuple[str, ...] = (" yes", " no"), **more: Any) -> Example:
    return Example(before + context + after, options, (0,), context=(len(before), len(before + context)), **more)


def read(example: Encoded, tokenizer: Any = TOKENIZER) -> str:
    """The text of a prompt, with what options share behind it."""
    return str(tokenizer.decode(example.prompt))


def unscored(example: Encoded) -> str:
    """The text of a prompt alone."""
    return str(TOKENIZER.decode(example.prompt[: len(example.prompt) - example.scored]))


def answers(example: Encoded) -> list[str]:
    """The texts that are scored."""
    begin = len(example.prompt) - example.scored
    return [str(TOKENIZER.decode((example.prompt + option)[begin:])) for option in example.options]


def input_length(example: Encoded) -> int:
    return len(example.prompt) + (0 if example.mask is not None else max(map(len, example.options)))


@pytest.mark.parametrize("before", ["", "Title: a the film\nText: "])
@pytest.mark.parametrize("after", ["", " It was", "\nQuestion: was it the film?\nAnswer:"])
@pytest.mark.parametrize(
    ("options", "room"), [((" yes", " no"), 0), ((" it was great fun", " it was terrible"), 0), ((), 1), ((), 6)]
)
def test_context_is_cut_on_the_left_by_whole_words(
    before: str, after: str, options: tuple[str, ...], room: int
) -> None:
    """At every length: the longest end of the context that fits, beside all of the rest, or a refusal."""
    targets = () if options else (" a fox",)
    example = worded(before, LONG, after, options, targets=targets)
    # What is generated needs room too: more than the target, or less.
    task = CHOICE if options else replace(FREE, max_new_tokens=room)
    (whole,) = Encoder(TOKENIZER, 1000)(task, [example])
    starts = [i for i in range(1, len(LONG)) if LONG[i - 1].isspace() and not LONG[i].isspace()]
    ends = [LONG, *(LONG[i:] for i in starts)]

    def needed(end: str) -> int:
        texts = options or targets
        written = 0 if options else room + len(TOKENIZER(before + end + after)["input_ids"])
        return max(written, *(len(TOKENIZER(before + end + after + text)["input_ids"]) for text in texts))

    assert needed(LONG) == max(input_length(whole), 0 if options else len(whole.prompt) + room)
    refused = 0
    for max_length in range(1, needed(LONG) + 2):
        fits = [needed(end) <= max_length for end in ends]
        encoder = Encoder(TOKENIZER, max_length)
        if not any(fits):
            refused += 1
            with pytest.raises(InputError, match=r"leaves no room for its context.*raise max_length"):
                encoder(task, [example])
            continue
        (found,) = encoder(task, [example])
        assert input_length(found) <= max_length
        assert encoder.truncated == (not fits[0])
        kept = next(end for end in ends if read(found).startswith(before + end + after))
        # A word more would not have fitted. (Tokens need not become fewer with every word: a first word has others.)
        place = ends.index(kept)
        assert fits[place]
        assert place == 0 or not fits[place - 1]
        for option, text in zip(found.options, options or targets, strict=True):
            assert TOKENIZER.decode(found.prompt + option) == before + kept + after + text
    assert 0 < refused < needed(LONG)


def test_text_of_one_long_word_is_cut_anywhere() -> None:
    example = worded("Text: ", "x1" * 40, "\nIt was")
    (whole,) = Encoder(TOKENIZER, 1000)(CHOICE, [example])
    for max_length in range(input_length(whole) - 20, input_length(whole)):
        encoder = Encoder(TOKENIZER, max_length)
        (found,) = encoder(CHOICE, [example])
        text = unscored(found)
        assert text.startswith("Text: ")
        assert text.endswith("x1x1\nIt was")
        assert max_length - 2 <= input_length(found) <= max_length
        assert encoder.truncated == 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", ["the film was great ", "x1"])
def test_long_rows_are_not_tokenised_again_and_again(text: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even once in whole, and the end that is kept is the longest that fits."""
    tokenizer, after = (mask_tokenizer(), " It was [MASK].") if masked else (TOKENIZER, " It was")
    task, context = (MASKED if masked else CHOICE), text * (100_000 // len(text))
    example = worded("Text: ", context, after, ("a", "b") if masked else (" yes", " no"))
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    read, call = [0], transformers.PreTrainedTokenizerFast.__call__

    def counted(self: Any, given: str, **options: Any) -> Any:
        read[0] += len(given)
        return call(self, given, **options)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", counted)
    (found,) = Encoder(tokenizer, 40)(task, [example])
    assert read[0] < 20_000
    monkeypatch.undo()
    # The same row, but so short that it is looked at in whole.
    (short,) = Encoder(tokenizer, 40)(task, [worded("Text: ", context[-400:].lstrip(), after, example.options)])
    assert (found.prompt, found.options) == (short.prompt, short.options)
    assert 35 <= input_length(found) <= 40


def marked_tokenizer(single: str = "<bos> $A") -> Any:
    """A tokenizer that opens every text, as Llama's, or closes it too."""
    from tokenizers.processors import TemplateProcessing

    found = support.tokenizer()
    marks = [(token, found.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    found.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=marks)
    return found


CHAT = "{% for m in messages %}{{ bos_token if loop.first }}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("single", ["$A", "<bos> $A", "<bos> $A <eos>", "$A <eos>"])
def test_a_conversation_that_was_written_out_keeps_its_marks_and_gets_no_second_ones(single: str) -> None:
    tokenizer = marked_tokenizer(single)
    messages = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": "was great"}]
    text = tokenizer.apply_chat_template(messages, chat_template=CHAT, tokenize=False)
    expected = tokenizer.apply_chat_template(messages, chat_template=CHAT, return_dict=False)
    assert tokenizer.decode(expected) == text == "<bos>[user] the film<eos>[assistant] was great<eos>"
    (found,) = Encoder(tokenizer, 100)(CHOICE, [worded("", text, "", ("yes", "no"))])
    assert found.prompt == expected
    (alone,) = Encoder(tokenizer, 100)(replace(FREE, label=""), [worded("", text, "", ())])
    assert alone.prompt == expected
    opened = [tokenizer.bos_token_id] * single.startswith("<bos>")
    (plain,) = Encoder(tokenizer, 100)(CHOICE, [worded("", "the film", "", ("\nyes", "\nno"))])
    assert (
        plain.prompt[: len(plain.prompt) - plain.scored]
        == opened + tokenizer("the film", add_special_tokens=False)["input_ids"]
    )


def test_a_masked_text_is_opened_once() -> None:
    (found,) = Encoder(mask_tokenizer(), 100)(MASKED, [worded("", "<bos>the film", " was [MASK].", ("a", "b"))])
    assert mask_tokenizer().decode(found.prompt) == "<bos>the film was <mask>.<eos>"


@pytest.mark.parametrize(
    ("prompt", "data", "options", "warned"),
    [
        ("{text} It was", "the film", ("a", "b"), 0),
        ("{text} It was", "see <eos> here", ("a", "b"), 1),
        ("{text} It was", "the end<eos>", ("a", "b"), 1),
        ("{text} It was", "<bos>[user] the film<eos>", ("a", "b"), 0),  # a conversation that was written out
        ("<bos>[user] {text}<eos>", "the film", ("a", "b"), 0),  # marks of the task
        ("<bos>[user] {text}<eos>", "see <eos> here", ("a", "b"), 1),
        ("<bos>[user] {text}<eos>", "<bos>the film", ("a", "b"), 1),
        ("{text} It was", "the film", ("see <pad>", "b"), 1),
    ],
)
def test_control_tokens_in_the_data_are_counted_and_said(
    prompt: str, data: str, options: tuple[str, ...], warned: int
) -> None:
    task = Task("choice", prompt, "label", {"0": "{a}", "1": "{b}"}, "accuracy")
    rows = [{"text": "the film", "a": "a", "b": "b", "label": 0}] * 2
    rows.append({"text": data, "a": options[0], "b": options[1], "label": 0})
    examples = [task.example(row, "the row") for row in rows]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Encoder(marked_tokenizer(), 100)(task, examples)
    assert len(caught) == warned
    for warning in caught:
        token = "<pad>" if "<pad>" in options[0] else "<bos>" if data.startswith("<bos>") else "<eos>"
        assert re.search(rf"the text of 1 of 3 examples holds .* control tokens \({token} in 1\)", str(warning.message))
        assert warning.filename == __file__


def test_neither_question_nor_answers_are_cut_for_a_short_context() -> None:
    """What is too long is the question; cutting the context away would not help, nor would the model know the text."""
    example = worded("", "a fox", " " + "was it great? " * 20 + "It was")
    for max_length in (10, 60, input_length(Encoder(TOKENIZER, 1000)(CHOICE, [example])[0]) - 3):
        with pytest.raises(InputError, match="leaves no room for its context"):
            Encoder(TOKENIZER, max_length)(CHOICE, [example])


def mask_tokenizer() -> Any:
    """A tokenizer with sentence marks and a mask, as BERT's."""
    from tokenizers.processors import TemplateProcessing

    found = support.tokenizer()
    found.add_special_tokens({"mask_token": "<mask>"})
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", found.bos_token_id), ("<eos>", found.eos_token_id)]
    )
    return found


def test_context_before_a_mask_is_cut_and_the_mask_stays() -> None:
    tokenizer = mask_tokenizer()
    example = worded("", LONG, " It was [MASK].", ("a", "b"))
    (whole,) = Encoder(tokenizer, 1000)(MASKED, [example])
    assert tokenizer.decode(whole.prompt) == f"<bos>{LONG} It was<mask>.<eos>".replace("was<", "was <")
    (least_one,) = Encoder(tokenizer, 1000)(MASKED, [worded("", LONG.split()[-1], " It was [MASK].", ("a", "b"))])
    cut, least = 0, len(least_one.prompt)
    for max_length in range(1, len(whole.prompt) + 2):
        encoder = Encoder(tokenizer, max_length)
        if max_length < least:
            with pytest.raises(InputError, match="leaves no room for its context"):
                encoder(MASKED, [example])
            continue
        (found,) = encoder(MASKED, [example])
        assert len(found.prompt) <= max_length
        assert encoder.truncated == (max_length < len(whole.prompt))
        cut += encoder.truncated
        text = tokenizer.decode(found.prompt)
        assert text.startswith("<bos>")
        assert text.endswith(" It was <mask>.<eos>")
        kept = text.removeprefix("<bos>").removesuffix(" It was <mask>.<eos>")
        assert kept
        assert LONG.endswith(kept)
        assert kept == LONG or LONG[-len(kept) - 1].isspace()
        assert found.mask is not None
        assert found.prompt[found.mask] == tokenizer.mask_token_id
        assert found.options == whole.options
    assert cut > 3
    assert least > 3


def test_masks_that_cannot_be_filled_are_refused() -> None:
    tokenizer = mask_tokenizer()
    example = worded("", "a", " It was [MASK].", ("a", "b"))
    with pytest.raises(InputError, match=r"example 2: its text has a mask token of its own.*drop the row"):
        Encoder(tokenizer, 100)(MASKED, [example, worded("", "a [MASK]", " It was [MASK].", ("a", "b"))])
    rare = Task(**{**vars(MASKED), "answers": {"0": "a", "1": "zzyzx"}})
    with pytest.raises(InputError, match=r"'zzyzx' is not one token of this model.*another word"):
        Encoder(tokenizer, 100)(rare, [example])
    with pytest.raises(InputError, match=r"needs a mask token.*masked model"):
        Encoder(TOKENIZER, 100)(MASKED, [example])
    with pytest.raises(InputError, match=r"demonstrations are for causal models: leave demonstrations out"):
        Encoder(tokenizer, 100, [example])(MASKED, [example])
    with pytest.raises(InputError, match="cannot be calibrated"):
        Encoder(tokenizer, 100).calibrations(MASKED, [example])


# --- options that begin alike --------------------------------------------------------------------------------------


def test_beginning_that_all_options_share_is_kept_once_and_scored() -> None:
    texts = (" the film was great", " the film was terrible and slow", " the film was")
    for options in (texts[:2], texts):
        (found,) = Encoder(TOKENIZER, 100)(CHOICE, [Example("I would say:", options, (1,))])
        scored = found.prompt[len(found.prompt) - found.scored :]
        assert TOKENIZER.decode(scored) == (" the film was " if options == texts[:2] else " the film")
        for option, text in zip(found.options, options, strict=True):
            assert option
            assert TOKENIZER.decode(scored + option) == text
            assert found.prompt + option == TOKENIZER("I would say:" + text)["input_ids"]


@torch.no_grad()
def test_options_that_begin_alike_are_scored_whole(llama: Any) -> None:
    texts = (" the film was great", " the film was terrible and slow")
    (found,) = Encoder(TOKENIZER, 100)(CHOICE, [Example("I would say:", texts, (1,))])
    begin = len(found.prompt) - found.scored
    apart = Encoded(found.prompt[:begin], [found.prompt[begin:] + option for option in found.options], (1,))
    expected = naive_scores(llama, [apart])
    for layout in LAYOUTS:
        torch.testing.assert_close(option_scores(llama, prepare(llama, TOKENIZER, [found], layout)), expected, **CLOSE)


# --- in-context learning -------------------------------------------------------------------------------------------


def shown(i: int, text: str = "the film was slow") -> Example:
    return worded("", f"{text} {i}", " It was", (" terrible", " great"), calibration="It was")


DEMONSTRATIONS = [shown(i) for i in range(6)]
ASKED = [
    shown(9, "I would buy it again"),
    shown(8, "this product broke after one day and it was slow"),
    shown(7, "a fox"),
]


@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_demonstrations_with_their_answers_stand_before_every_prompt(count: int) -> None:
    encoder = Encoder(TOKENIZER, 1000, DEMONSTRATIONS[:count])
    found = encoder(CHOICE, ASKED)
    before = "".join(f"the film was slow {i} It was terrible\n\n" for i in range(count))
    assert SEPARATOR == "\n\n"
    for example, asked in zip(found, ASKED, strict=True):
        assert unscored(example) == before + asked.prompt
        assert answers(example) == list(asked.options)
    assert (encoder.demonstrated, encoder.truncated) == (count, 0)
    for example in encoder.calibrations(CHOICE, ASKED):
        assert unscored(example) == before + "It was"


def test_demonstration_shows_the_right_option_and_free_text_the_first_target() -> None:
    demonstration = worded("", "a", " It was", (" terrible", " great"))
    demonstration = Example(demonstration.prompt, demonstration.options, (1, 0), context=demonstration.context)
    (found,) = Encoder(TOKENIZER, 1000, [demonstration])(CHOICE, ASKED[:1])
    assert unscored(found).startswith("a It was great\n\nI would")
    free = [Example(f"Q{i}:", targets=(f" {i}", " x"), context=(0, 1)) for i in range(2)]
    (found,) = Encoder(TOKENIZER, 1000, free)(FREE, [Example("Q:", targets=(" y",), context=(0, 1))])
    assert unscored(found) == "Q0: 0\n\nQ1: 1\n\nQ:"


def test_as_many_demonstrations_as_fit_before_the_longest_stand_before_all() -> None:
    """And no example loses a word to a demonstration."""
    alone = Encoder(TOKENIZER, 1000)(CHOICE, ASKED)
    longest = max(input_length(example) for example in alone)
    counts = []
    for max_length in range(longest, longest + 120):
        encoder = Encoder(TOKENIZER, max_length, DEMONSTRATIONS)
        found = encoder(CHOICE, ASKED)
        assert encoder.truncated == 0
        assert max(input_length(example) for example in found) <= max_length
        n = encoder.demonstrated
        counts.append(n)
        before = "".join(f"the film was slow {i} It was terrible\n\n" for i in range(6 - n, 6))
        for example, asked in zip(found, ASKED, strict=True):
            assert unscored(example) == before + asked.prompt
        # One more would not have fitted.
        if n < 6:
            more = Encoder(TOKENIZER, 1000, DEMONSTRATIONS[5 - n :])(CHOICE, ASKED)
            assert max(input_length(example) for example in more) > max_length
    assert counts == sorted(counts)
    assert set(counts) == set(range(7))


def test_demonstrations_that_tokenize_otherwise_before_a_prompt_cut_nothing(models_dir: Path) -> None:
    """A vocabulary that knows a word at the beginning of a text needs more tokens for it behind a line break."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models_dir / "stories260k")
    demonstrations = [shown(i, "happy was they") for i in range(3)]
    asked = [shown(7, "happy")]
    apart, behind = (len(tokenizer(text)["input_ids"]) for text in ("happy", "\n\nhappy"))
    assert behind - len(tokenizer("\n\n")["input_ids"]) > apart
    (alone,) = Encoder(tokenizer, 1000)(CHOICE, asked)
    for max_length in range(input_length(alone), input_length(alone) + 120):
        encoder = Encoder(tokenizer, max_length, demonstrations)
        (found,) = encoder(CHOICE, asked)
        assert encoder.truncated == 0
        assert input_length(found) <= max_length
        encoder.calibrations(CHOICE, asked)


def test_calibrations_leave_the_content_out() -> None:
    encoder = Encoder(TOKENIZER, 1000)
    for asked, found in zip(ASKED, encoder.calibrations(CHOICE, ASKED), strict=True):
        assert unscored(found) == "It was"
        assert answers(found) == list(asked.options)
        assert found.right == asked.right
    with pytest.raises(InputError, match="task choice has no prompt without content: add 'calibration: TEXT'"):
        encoder.calibrations(CHOICE, [worded("", "a", "")])
    with pytest.raises(InputError, match="task free cannot be calibrated"):
        encoder.calibrations(FREE, [Example("a", targets=("b",), calibration="c")])


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
@every_layout
def test_evaluation_of_answers_is_the_mean_over_examples(llama: Any, batch_size: int, layout: Layout | None) -> None:
    examples = [encoded(3 + i % 4, 1 + i % 3, 2, label=i % 2) for i in range(7)]
    scores = naive_scores(llama, examples).detach()
    right = [int(row.argmax()) == e.label for row, e in zip(scores, examples, strict=True)]
    losses = [-float(row.log_softmax(0)[e.label]) for row, e in zip(scores, examples, strict=True)]
    seen: list[tuple[int, int]] = []
    outcomes: list[float] = []
    result = evaluate(
        llama,
        TOKENIZER,
        CHOICE,
        examples,
        batch_size=batch_size,
        layout=layout,
        outcomes=outcomes,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result == {
        "accuracy": sum(right) / 7,
        "loss": pytest.approx(sum(losses) / 7, abs=CLOSE["atol"]),
        "examples": 7,
    }
    assert 0 < sum(right) < 7
    assert outcomes == right
    assert seen[-1] == (7, 7)
    assert len(seen) == math.ceil(7 / batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_of_free_text_is_the_mean_over_examples(speaker: Any, batch_size: int) -> None:
    prompts = [tokens(n, n) for n in (4, 7, 5)]
    predicted = [generate(speaker, TOKENIZER, FREE, [prompt])[0] for prompt in prompts]
    texts = [predicted[0], predicted[1] + " other", "none of it"]
    examples = [
        Encoded(prompt, [tokens(3, 9)], texts=("unsaid", text)) for prompt, text in zip(prompts, texts, strict=True)
    ]
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


# --- evaluation in context -----------------------------------------------------------------------------------------


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """How many tokens the model embeds, call by call."""
    seen: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))
    try:
        yield seen
    finally:
        hook.remove()


def in_context(count: int = 10, shots: int = 6) -> list[Encoded]:
    asked = [shown(i, TEXTS[i % len(TEXTS)]) for i in range(count)]
    found = Encoder(TOKENIZER, 250, [shown(i) for i in range(shots)])(CHOICE, asked)
    long = [
        Encoded(e.prompt, [o + tokens(2, i) for i, o in enumerate(e.options)], (i % 2,)) for i, e in enumerate(found)
    ]
    return found[: count // 2] + long[count // 2 :]


TEXTS = ["a fox", "the film was great and it was fun", "yes no maybe", "this product broke after one day"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("batch_size", [3, 16])
def test_demonstrations_are_processed_once(family: str, batch_size: int) -> None:
    model = sharp_model(family)
    examples = in_context()
    plain = evaluate(model, TOKENIZER, CHOICE, examples, layout=plain_layout(model, TOKENIZER), batch_size=batch_size)
    apart = evaluate(model, TOKENIZER, CHOICE, examples, layout=None, batch_size=1)
    with counted_tokens(model) as seen:
        found = evaluate(model, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=batch_size)
    assert found == pytest.approx(plain, abs=CLOSE["atol"])
    assert apart == pytest.approx(plain, abs=CLOSE["atol"])
    demonstrations = len(TOKENIZER("".join(shown(i).prompt + " terrible\n\n" for i in range(6)))["input_ids"])
    rest = sum(example.length - demonstrations for example in examples)
    # Once the demonstrations, once the rest with its padding, and a trial on a few tokens.
    assert demonstrations + rest <= sum(seen) <= demonstrations + 2 * rest + 200
    assert sum(seen) < sum(example.length for example in examples) / 2


def test_short_common_beginning_is_not_worth_a_trial(llama: Any) -> None:
    examples = in_context(shots=0)
    with counted_tokens(llama) as seen:
        evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=16)
    assert len(seen) == 1


def test_model_without_a_cache_is_evaluated_in_context_too() -> None:
    model = sharp_model("mamba")
    examples = in_context(4)
    plain = evaluate(model, TOKENIZER, CHOICE, examples, layout=plain_layout(model, TOKENIZER))
    assert evaluate(model, TOKENIZER, CHOICE, examples) == pytest.approx(plain, abs=CLOSE["atol"])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3"])
def test_text_in_context_is_generated_as_without_sharing(family: str) -> None:
    model = talking_model(family)
    demonstrations = [Example(f"the film {i} was", targets=(" fun",), context=(0, 8)) for i in range(6)]
    asked = [Example(text, targets=(" great",), context=(0, len(text))) for text in TEXTS * 2]
    examples = Encoder(TOKENIZER, 250, demonstrations)(FREE, asked)
    said = [generate(model, TOKENIZER, FREE, [example.prompt])[0] for example in examples]
    assert len(set(said)) > 2
    # What was said is the truth, and must be said again.
    examples = [Encoded(e.prompt, e.options, texts=(text,)) for e, text in zip(examples, said, strict=True)]
    plain = evaluate(model, TOKENIZER, FREE, examples, layout=plain_layout(model, TOKENIZER), batch_size=3)
    with counted_tokens(model) as seen:
        found = evaluate(model, TOKENIZER, FREE, examples, layout=Layout(0), batch_size=3)
    assert found == pytest.approx(plain, abs=CLOSE["atol"])
    assert found["exact_match"] == 1
    assert sum(seen) < sum(
        len(example.prompt) for example in examples
    )  # once for text and once for loss it was twice that


def test_evaluation_in_context_leaves_the_cache_as_it_was(llama: Any) -> None:
    examples = in_context()
    first = evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=2)
    assert evaluate(llama, TOKENIZER, CHOICE, examples[::-1], layout=Layout(0), batch_size=2) == pytest.approx(first)


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 6])
@pytest.mark.parametrize("batch_size", [2, 16])
@every_layout
def test_calibration_by_hand(llama: Any, shots: int, batch_size: int, layout: Layout | None) -> None:
    """log p(option | prompt) - log p(option | prompt without content), each a mean over the option's tokens."""
    asked = [shown(i, TEXTS[i % len(TEXTS)]) for i in range(6)]
    asked = [Example(e.prompt, e.options, (i % 2,), calibration=e.calibration) for i, e in enumerate(asked)]
    asked[3] = Example("maybe", (" true", " false", " it was"), (2,), calibration="no")
    encoder = Encoder(TOKENIZER, 250, [shown(i) for i in range(shots)])
    examples, bare = encoder(CHOICE, asked), encoder.calibrations(CHOICE, asked)
    scores = naive_scores(llama, examples).detach() - naive_scores(llama, bare).detach().nan_to_num(neginf=0.0)
    right = [int(row.argmax()) == e.label for row, e in zip(scores, examples, strict=True)]
    losses = [-float(row.log_softmax(0)[e.label]) for row, e in zip(scores, examples, strict=True)]
    outcomes: list[float] = []
    found = evaluate(
        llama, TOKENIZER, CHOICE, examples, batch_size=batch_size, layout=layout, calibrations=bare, outcomes=outcomes
    )
    assert found == {
        "accuracy": pytest.approx(sum(right) / 6),
        "loss": pytest.approx(sum(losses) / 6, abs=CLOSE["atol"]),
        "examples": 6,
    }
    assert outcomes == right
    without = evaluate(llama, TOKENIZER, CHOICE, examples, batch_size=batch_size, layout=layout)
    assert abs(without["loss"] - found["loss"]) > 1e-3


def test_prompt_without_content_is_scored_once(llama: Any) -> None:
    asked = [shown(i) for i in range(12)]
    encoder = Encoder(TOKENIZER, 250)
    examples, bare = encoder(CHOICE, asked), encoder.calibrations(CHOICE, asked)
    with counted_tokens(llama) as without:
        evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=3)
    with counted_tokens(llama) as calibrated:
        evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=3, calibrations=bare)
    assert sum(calibrated) == sum(without) + bare[0].length


def test_sign_test_by_hand() -> None:
    before, after = [0.0] * 6 + [1.0, 1.0, 0.5], [1.0] * 5 + [0.0, 0.0, 1.0, 0.5]
    # Five better, one worse: P(at most one of six) = 7 / 64, on both sides.
    assert sign_test(before, after) == {"better": 5, "worse": 1, "p_value": 14 / 64}
    assert sign_test([1.0], [1.0]) == {"better": 0, "worse": 0, "p_value": 1.0}
    assert sign_test([0.0, 1.0], [1.0, 0.0])["p_value"] == 1.0


def test_sign_test_is_the_sum_over_both_tails() -> None:
    """2 P(at most the smaller number of n fair coins), 1 at most."""
    for better, worse in itertools.product((0, 1, 2, 7, 30, 31, 400), repeat=2):
        n = better + worse
        tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
        p_value = sign_test([0.0] * better + [1.0] * worse, [1.0] * better + [0.0] * worse)["p_value"]
        assert p_value == pytest.approx(min(1.0, 2 * tail), rel=1e-12), (better, worse)
