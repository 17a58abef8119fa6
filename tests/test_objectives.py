"""Encoding, scoring and evaluation: the fast batch layout means what the plain one means."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

import support
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, plain_layout, prepare, sign_test, training_objective
from forwardtune.objectives import generate, logits_at, option_cross_entropy, option_scores, target_likelihood
from forwardtune.tasks import Example, Task, metrics
from forwardtune.tasks.batching import Layout
from forwardtune.tasks.encoding import SEPARATOR, Encoded, Encoder
from support.examples import (
    CHOICE,
    CLOSE,
    LAYOUTS,
    TOKENIZER,
    encoded,
    every_layout,
    inputs_of,
    naive_scores,
    sharp_model,
    talking_model,
    tokens,
)

MASKED = Task("masked", "{text} It was [MASK].", "label", {"0": "a", "1": "b"}, "accuracy")
FREE = Task("free", "{text}", "answer", None, "f1", loss="likelihood", stop="", max_new_tokens=6)


BATCHES = {
    "single-token": [encoded(5, 1, 1), encoded(9, 1, 1, label=1)],
    "multi-token": [encoded(7, 3, 3), encoded(7, 3, 3, label=1)],
    "mixed-length": [encoded(3, 1, 5, label=1), encoded(11, 4, 2), encoded(1, 1, 1)],
    "options-differ-in-number": [encoded(4, 2, 1, 3, label=2), encoded(8, 1, 2), encoded(6, 5)],
}


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
def test_objectives_by_hand(llama: Any) -> None:
    """The kind of the task says which of the two is lowered."""
    batch = BATCHES["options-differ-in-number"]
    inputs = prepare(llama, TOKENIZER, batch)
    scores = list(zip(naive_scores(llama, batch), batch, strict=True))
    cross_entropy = torch.stack([-(row[e.label] - row[: len(e.options)].logsumexp(0)) for row, e in scores])
    assert cross_entropy[2] == 0  # one option alone is certain
    likelihood = torch.stack([-row[e.label] for row, e in scores])
    for objective, task, expected in (
        (option_cross_entropy, CHOICE, cross_entropy),
        (target_likelihood, FREE, likelihood),
        (target_likelihood, replace(CHOICE, loss="likelihood"), likelihood),
    ):
        found = objective(llama, inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert torch.equal(training_objective(task)(llama, inputs), found)


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
    with hook:
        logits = logits_at(llama, inputs)
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
    ("bos", "eos", "max_length", "prompt"),
    [
        (True, False, 100, [1, 5, 6, 7, 8]),
        (True, True, 100, [1, 5, 6, 7, 8]),
        (False, True, 100, [5, 6, 7, 8]),
        (True, False, 7, [1, 5, 6, 7, 8]),  # the longest option has two tokens, so 7 is what fits exactly
        (True, True, 6, [1, 6, 7, 8]),
        (True, False, 4, [1, 8]),
        (False, False, 5, [6, 7, 8]),
        (False, False, 3, [8]),
        (False, False, 2, None),
        (True, False, 3, None),
        (True, False, 1, None),
    ],
)
def test_prompts_are_cut_on_the_left_and_counted_answers_and_marks_never(
    bos: bool, eos: bool, max_length: int, prompt: list[int] | None
) -> None:
    tokenizer = Words(bos=bos, eos=eos)
    tokenizer(EXAMPLE.prompt + " yes no way")
    encoder = Encoder(tokenizer, max_length)
    if prompt is None:
        with pytest.raises(InputError, match=r"task choice, example 1.*answers of 2 tokens.*raise max_length"):
            encoder(CHOICE, [EXAMPLE])
        return
    assert encoder(CHOICE, [EXAMPLE] * 2) == [Encoded(prompt, [[9], [10, 11]], (1,), example=EXAMPLE)] * 2
    cut = len(prompt) < 4 + bos
    assert encoder.truncated == 2 * cut
    short = Example("four", EXAMPLE.options, (1,), context=(0, 4))
    assert [len(found.prompt) for found in encoder(CHOICE, [short, EXAMPLE])] == [1 + bos, len(prompt)]
    assert encoder.truncated == 3 * cut


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


# --- in-context learning -------------------------------------------------------------------------------------------


def shown(i: int, text: str = "the film was slow") -> Example:
    return worded("", f"{text} {i}", " It was", (" terrible", " great"), calibration="It was")


DEMONSTRATIONS = [shown(i) for i in range(6)]
ASKED = [
    shown(9, "I would buy it again"),
    shown(8, "this product broke after one day and it was slow"),
    shown(7, "a fox"),
]


def test_demonstration_shows_the_right_option_and_free_text_the_first_target() -> None:
    demonstration = worded("", "a", " It was", (" terrible", " great"))
    demonstration = Example(demonstration.prompt, demonstration.options, (1, 0), context=demonstration.context)
    (found,) = Encoder(TOKENIZER, 1000, [demonstration])(CHOICE, ASKED[:1])
    assert unscored(found).startswith("a It was great\n\nI would")
    free = [Example(f"Q{i}:", targets=(f" {i}", " x"), context=(0, 1)) for i in range(2)]
    (found,) = Encoder(TOKENIZER, 1000, free)(FREE, [Example("Q:", targets=(" y",), context=(0, 1))])
    assert unscored(found) == "Q0: 0\n\nQ1: 1\n\nQ:"


def test_as_many_demonstrations_as_fit_before_the_longest_stand_before_all() -> None:
    """With their answers; and no example loses a word to a demonstration."""
    assert SEPARATOR == "\n\n"
    alone = Encoder(TOKENIZER, 1000)(CHOICE, ASKED)
    longest = max(input_length(example) for example in alone)
    counts: list[int] = []
    for max_length in [*range(longest, longest + 120), 1000]:
        encoder = Encoder(TOKENIZER, max_length, DEMONSTRATIONS)
        found = encoder(CHOICE, ASKED)
        assert encoder.truncated == 0
        assert max(input_length(example) for example in found) <= max_length
        n = encoder.demonstrated
        before = "".join(f"the film was slow {i} It was terrible\n\n" for i in range(6 - n, 6))
        for example, asked in zip(found, ASKED, strict=True):
            assert unscored(example) == before + asked.prompt
            assert answers(example) == list(asked.options)
        if n not in counts:
            assert {unscored(example) for example in encoder.calibrations(CHOICE, ASKED)} == {before + "It was"}
        counts.append(n)
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


# --- evaluation --------------------------------------------------------------------------------------------------


def measured(scores: torch.Tensor, examples: list[Encoded]) -> tuple[list[bool], dict[str, Any]]:
    """Which of the examples are right by their scores, and what an evaluation of them gives."""
    pairs = list(zip(scores, examples, strict=True))
    right = [int(row.argmax()) == e.label for row, e in pairs]
    loss = sum(-float(row.log_softmax(0)[e.label]) for row, e in pairs) / len(pairs)
    accuracy = pytest.approx(sum(right) / len(pairs))
    return right, {"accuracy": accuracy, "loss": pytest.approx(loss, abs=CLOSE["atol"]), "examples": len(pairs)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@every_layout
def test_evaluation_of_answers_is_the_mean_over_examples(llama: Any, batch_size: int, layout: Layout | None) -> None:
    examples = [encoded(3 + i % 4, 1 + i % 3, 2, label=i % 2) for i in range(7)]
    right, expected = measured(naive_scores(llama, examples), examples)
    seen: list[tuple[int, int]] = []
    how: dict[str, Any] = {"batch_size": batch_size, "layout": layout, "outcomes": (outcomes := [])}
    how["progress"] = lambda done, total: seen.append((done, total))
    assert evaluate(llama, TOKENIZER, CHOICE, examples, **how) == expected
    assert 0 < sum(right) < 7
    assert outcomes == right
    assert seen[-1] == (7, 7)
    assert len(seen) == math.ceil(7 / batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_of_free_text_is_the_mean_over_examples(batch_size: int) -> None:
    speaker = talking_model()
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
        "loss": pytest.approx(-float(naive_scores(speaker, examples).mean()), abs=CLOSE["atol"]),
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


def tokens_of(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


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
    with inputs_of(model) as seen:
        found = evaluate(model, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=batch_size)
    assert found == pytest.approx(plain, abs=CLOSE["atol"])
    assert apart == pytest.approx(plain, abs=CLOSE["atol"])
    demonstrations = len(TOKENIZER("".join(shown(i).prompt + " terrible\n\n" for i in range(6)))["input_ids"])
    rest = sum(example.length - demonstrations for example in examples)
    # Once the demonstrations, once the rest with its padding, and a trial on a few tokens.
    assert demonstrations + rest <= tokens_of(seen) <= demonstrations + 2 * rest + 200
    assert tokens_of(seen) < sum(example.length for example in examples) / 2


def test_short_common_beginning_is_not_worth_a_trial(llama: Any) -> None:
    examples = in_context(shots=0)
    with inputs_of(llama) as seen:
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
    with inputs_of(model) as seen:
        found = evaluate(model, TOKENIZER, FREE, examples, layout=Layout(0), batch_size=3)
    assert found == pytest.approx(plain, abs=CLOSE["atol"])
    assert found["exact_match"] == 1
    assert tokens_of(seen) < sum(
        len(example.prompt) for example in examples
    )  # once for text and once for loss it was twice that


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
    scores = naive_scores(llama, examples) - naive_scores(llama, bare).nan_to_num(neginf=0.0)
    right, expected = measured(scores, examples)
    how: dict[str, Any] = {"batch_size": batch_size, "layout": layout}
    found = evaluate(llama, TOKENIZER, CHOICE, examples, **how, calibrations=bare, outcomes=(outcomes := []))
    assert found == expected
    assert outcomes == right
    without = evaluate(llama, TOKENIZER, CHOICE, examples, **how)
    assert abs(without["loss"] - found["loss"]) > 1e-3


def test_prompt_without_content_is_scored_once(llama: Any) -> None:
    asked = [shown(i) for i in range(12)]
    encoder = Encoder(TOKENIZER, 250)
    examples, bare = encoder(CHOICE, asked), encoder.calibrations(CHOICE, asked)
    with inputs_of(llama) as without:
        evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=3)
    with inputs_of(llama) as calibrated:
        evaluate(llama, TOKENIZER, CHOICE, examples, layout=Layout(0), batch_size=3, calibrations=bare)
    assert tokens_of(calibrated) == tokens_of(without) + bare[0].length


def test_sign_test_is_the_sum_over_both_tails() -> None:
    """2 P(at most the smaller number of n fair coins), 1 at most; what is equal does not count."""
    for better, worse in itertools.product((0, 1, 2, 7, 30, 31, 400), repeat=2):
        n = better + worse
        tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
        before, after = [0.0] * better + [1.0] * (worse + 1), [1.0] * better + [0.5] * worse + [1.0]
        p_value = pytest.approx(min(1.0, 2 * tail), rel=1e-12)
        assert sign_test(before, after) == {"better": better, "worse": worse, "p_value": p_value}
