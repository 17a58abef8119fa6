"""Packed rows and shared prompts: every token once, hardly any padding, and the scores of the plain layout."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import support
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare
from forwardtune.objectives import option_scores
from forwardtune.tasks.batching import Layout, collate
from forwardtune.tasks.encoding import Encoded
from support.examples import (
    CHOICE,
    CLOSE,
    LAYOUTS,
    TOKENIZER,
    encoded,
    every_layout,
    naive_scores,
    sharp_model,
    sharpened,
    tokens,
)


def masked(prompt: int, mask: int, words: int = 2, label: int = 0) -> Encoded:
    return Encoded(tokens(prompt, prompt), [[7 + i] for i in range(words)], (label,), mask=mask)


def drawn_examples(seed: int, count: int = 12) -> list[Encoded]:
    """Prompts, options and common beginnings of any length."""
    draw = random.Random(seed)
    examples = []
    for i in range(count):
        prompt = draw.choice([1, 2, 3, 5, 8, 13, 21, 34])
        options = [draw.randint(1, 6) for _ in range(draw.choice([1, 2, 2, 2, 3, 5]))]
        scored = draw.randint(0, prompt - 1) if draw.random() < 0.3 else 0
        texts = [tokens(n, 1000 * seed + 100 * i + j) for j, n in enumerate(options)]
        right = (draw.randrange(len(options)),)
        examples.append(Encoded(tokens(prompt, 1000 * seed + i), texts, right, scored=scored))
    return examples


def drawn_masks(seed: int, count: int = 12) -> list[Encoded]:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 2, 3, 5, 8, 13, 21, 34]) for _ in range(count)]
    return [masked(n, draw.randrange(n), 3, draw.randrange(3)) for n in lengths]


def tokenizer_padding_with(token: str) -> Any:
    tokenizer = support.tokenizer()
    tokenizer.pad_token = token
    return tokenizer


def row_fills(inputs: dict[str, torch.Tensor], pad: int) -> list[int]:
    return (inputs["input_ids"] != pad).sum(dim=1).tolist()


# --- where tokens stand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_every_token_of_every_example_appears_exactly_once(
    layout: Layout, seed: int, random_state_untouched: None
) -> None:
    """Numbered apart, the tokens of all prompts and options, without each option's last, are those of the input.

    No row is longer than the longest example, and the layout is a function of the batch.
    """
    number = itertools.count(1)
    batch = [
        Encoded([next(number) for _ in e.prompt], [[next(number) for _ in option] for option in e.options], e.right)
        for e in drawn_examples(seed)
    ]
    expected: Counter[int] = Counter()
    for example in batch:
        for option in example.options:
            expected.update(option[:-1])
        expected.update(example.prompt * (1 if layout.shared else len(example.options)))
    inputs = collate(batch, layout)
    texts = [e.length for e in batch] if layout.shared else [len(e.prompt + o) - 1 for e in batch for o in e.options]
    assert inputs["input_ids"].shape[1] == max(texts)
    again = collate(batch, layout)
    assert all(support.same_bits(tensor, again[name]) for name, tensor in inputs.items())
    found = Counter(inputs["input_ids"].flatten().tolist())
    del found[layout.pad]
    assert found == expected
    # What is predicted: every token of every option, once, for the option that it belongs to.
    slots = [option for example in batch for option in example.options]
    predicted: list[list[int]] = [[] for _ in slots]
    for slot, token in zip(inputs["slots"].tolist(), inputs["tokens"].tolist(), strict=True):
        predicted[slot].append(token)
    assert predicted == slots


@pytest.mark.parametrize("seed", range(8))
def test_every_masked_example_appears_exactly_once(seed: int) -> None:
    number = itertools.count(10)
    batch = [replace(e, prompt=[next(number) for _ in e.prompt]) for e in drawn_masks(seed)]
    inputs = collate(batch, Layout(0, causal=False))
    flat = inputs["input_ids"].flatten().tolist()
    assert sorted(token for token in flat if token) == list(range(10, next(number)))
    places = [flat[place] for place in inputs["positions"].tolist()]
    assert set(places) == {e.prompt[e.mask] for e in batch if e.mask is not None}
    for row, token, slot in zip(*(inputs[name].tolist() for name in ("logit_rows", "tokens", "slots")), strict=True):
        example = batch[slot // 3]
        assert example.mask is not None
        assert places[row] == example.prompt[example.mask]
        assert [token] == example.options[slot % 3]


@pytest.mark.parametrize("seed", range(20))
def test_two_rows_together_hold_more_than_one_would(seed: int) -> None:
    """The bound of first fit: what opened a row did not fit into any other. So all rows but one are more than half full, and less than half is padding."""
    batch = drawn_examples(seed, 16) if seed % 2 else drawn_masks(seed, 16)
    inputs = collate(batch, Layout(0, causal=bool(seed % 2)))
    rows, length = inputs["input_ids"].shape
    fills = row_fills(inputs, 0)
    assert sum(fills) == sum(e.length for e in batch)
    assert 1 < rows < len(batch)
    for one, other in itertools.combinations(fills, 2):
        assert one + other > length
    assert sum(fill <= length / 2 for fill in fills) <= 1
    assert sum(fills) > rows * length / 2


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_at_most_eleven_ninths_of_the_fewest_possible(seed: int) -> None:
    """The bound of first-fit decreasing (Dosa, 2007): 11/9 of the optimum and 6/9. The optimum is found by trying all."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 12) for _ in range(7)] + [12]
    capacity = 12

    def fewest(left: tuple[int, ...], room: tuple[int, ...]) -> int:
        if not left:
            return len(room)
        length, *rest = left
        ways = [fewest(tuple(rest), (*room, capacity - length))]
        for i, free in enumerate(room):
            if length <= free and free not in room[:i]:
                ways.append(fewest(tuple(rest), (*room[:i], free - length, *room[i + 1 :])))
        return min(ways)

    inputs = collate([encoded(n, 1, 1) for n in lengths], Layout(0))
    assert len(inputs["input_ids"]) <= 11 / 9 * fewest(tuple(lengths), ()) + 6 / 9


def test_long_examples_are_placed_first_so_that_short_ones_fill_them_up() -> None:
    """In their own order the six short ones would fill a row, and each long one would need padding."""
    inputs = collate([encoded(n, 1, 1) for n in [2] * 6 + [10] * 6 + [12]], Layout(0))
    assert inputs["input_ids"].shape == (7, 12)
    assert row_fills(inputs, 0) == [12] * 7


def test_inputs_need_no_mask_where_rows_hold_one_text_each() -> None:
    for batch, layout, masked in (
        ([encoded(5, 1, 1), encoded(9, 1, 1)], Layout(0), False),
        ([encoded(4, 5)], Layout(0), False),
        ([encoded(9, 1, 1), encoded(9, 1), encoded(9, 1, 1)], Layout(0), False),
        ([encoded(7, 3, 3)] * 2, Layout(0), True),
        ([encoded(7, 3, 3)] * 2, Layout(0, shared=False), False),
    ):
        inputs = collate(batch, layout)
        assert ("attention_mask" in inputs) == masked
        assert ("position_ids" in inputs) == masked
        assert masked or len(inputs["input_ids"]) == len(batch) * (1 if layout.shared else 2)


def test_masked_inputs_in_rows_apart_mask_their_padding_alone() -> None:
    batch = [Encoded(tokens(n, n), [[7], [8]], mask=1) for n in (2, 4)]
    inputs = collate(batch, Layout(0, shared=False, packed=False, causal=False))
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert "position_ids" not in inputs
    assert inputs["positions"].tolist() == [1, 5]


@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("context", [0, 7])
def test_positions_and_mask_by_hand(offset: int, context: int) -> None:
    """A prompt of 2 with options of 3 and 2 tokens, and a prompt of 1, in a row of 5."""
    batch = [Encoded([11, 12], [[21, 22, 23], [31, 32]], (1,)), Encoded([41, 42], [[51], [61]])]
    layout = Layout(9, first_position=offset, context=context)
    inputs = collate([*batch, encoded(7, 1, 1)], layout)
    row = inputs["input_ids"].tolist().index([11, 12, 21, 22, 31, 41, 42])
    positions = [0, 1, 2, 3, 2, 0, 1]
    assert inputs["position_ids"][row].tolist() == [p + offset + context for p in positions]
    seen = ["1......", "11.....", "111....", "1111...", "11..1..", ".....1.", ".....11"]
    mask = inputs["attention_mask"]
    assert mask.shape == (2, 1, 7, context + 7)
    lowest = torch.finfo(torch.float32).min
    expected = [[0.0] * context + [0.0 if c == "1" else lowest for c in line] for line in seen]
    assert mask[row, 0].tolist() == expected


def test_masked_tokens_see_their_own_text_both_ways() -> None:
    inputs = collate([masked(3, 1), masked(2, 0), masked(6, 3)], Layout(0, causal=False))
    assert inputs["input_ids"].shape == (2, 6)
    row = 1 - inputs["input_ids"].tolist().index(masked(6, 3).prompt)
    visible = (inputs["attention_mask"][row, 0] == 0).int().tolist()
    assert visible[:5] == [[1, 1, 1, 0, 0, 0]] * 3 + [[0, 0, 0, 1, 1, 0]] * 2


def test_padding_sees_something() -> None:
    """A row of the mask without any 0 makes a softmax of nothing, NaN in some kernels."""
    for batch, layout in (
        (drawn_examples(3), Layout(0)),
        (drawn_masks(3), Layout(0, causal=False)),
        (drawn_examples(4), Layout(0, context=5)),
    ):
        assert (collate(batch, layout)["attention_mask"] == 0).any(dim=-1).all()


# --- scores ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("seed", range(3))
def test_filled_masks_score_as_in_the_plain_layout(family: str, seed: int) -> None:
    model = sharp_model(family)
    tokenizer = tokenizer_padding_with("<pad>" if family == "bert" else "<bos>")
    batch = drawn_masks(seed)
    alone = torch.cat([option_scores(model, prepare(model, tokenizer, [example])) for example in batch])
    layout = find_layout(model, tokenizer, batch)
    assert layout.packed
    # RoBERTa counts positions from behind the padding's, which is 1.
    assert layout.first_position == (0 if family == "bert" else 2)
    inputs = prepare(model, tokenizer, batch, layout)
    assert len(inputs["input_ids"]) < len(batch)
    torch.testing.assert_close(option_scores(model, inputs), alone, **CLOSE)
    torch.testing.assert_close(option_scores(model, prepare(model, tokenizer, batch)), alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", support.HALF, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "bert"])
def test_scores_in_half_precision_are_equal_within_rounding(family: str, dtype: torch.dtype) -> None:
    model = sharp_model(family, dtype)
    batch = drawn_masks(2) if family == "bert" else drawn_examples(2)
    layout = find_layout(model, TOKENIZER, batch)
    assert layout.packed
    assert layout.dtype == dtype
    packed, plain = (option_scores(model, prepare(model, TOKENIZER, batch, which)) for which in (layout, None))
    # Logits are of size 1 to 4, and each of some ten roundings on the way is up to 2**-9 of that in bfloat16.
    torch.testing.assert_close(packed, plain, rtol=0, atol=2**-5 if dtype == torch.bfloat16 else 2**-8)
    assert (plain[:, 0] < 0).all()


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_options_that_begin_alike_share_their_beginning(family: str) -> None:
    model = sharp_model(family)
    prompt, alike, ends = tokens(6, 1), tokens(9, 2), [tokens(n, 3 + n) for n in (1, 2, 4)]
    apart = Encoded(prompt, [alike + end for end in ends], (1,))
    together = Encoded(prompt + alike, ends, (1,), scored=len(alike))
    assert together.length == 6 + 9 + 0 + 1 + 3 < apart.length
    neighbours = [encoded(4, 2, 2), encoded(30, 1, 1)]
    expected = option_scores(model, prepare(model, TOKENIZER, [apart, *neighbours]))
    assert (expected[0].diff().abs() > 1e-3).all()
    for layout in LAYOUTS[1:]:
        inputs = prepare(model, TOKENIZER, [together, *neighbours], layout)
        torch.testing.assert_close(option_scores(model, inputs), expected, **CLOSE)
    # A place predicts its token for all options that share it.
    inputs = collate([together], Layout(0))
    assert len(inputs["positions"]) == 9 + 1 + 0 + 1 + 3
    assert len(inputs["tokens"]) == 3 * 9 + 1 + 2 + 4


# --- which layout a model can take -------------------------------------------------------------------------------

MIXED = [encoded(3, 1, 5, label=1), encoded(11, 4, 2), encoded(1, 1, 1), encoded(20, 3, 3), encoded(5, 1)]


@pytest.mark.parametrize("pad", [0, 7, support.VOCABULARY - 1])
@every_layout
@torch.no_grad()
def test_neighbours_and_padding_do_not_matter(layout: Layout | None, pad: int) -> None:
    model, example, batch = sharp_model(), encoded(6, 2, 3), drawn_examples(0)
    expected = naive_scores(model, [*batch, example])
    for first in (0, 7, len(batch)):
        some = [*batch[first:], example]
        inputs = collate(some, replace(layout, pad=pad)) if layout else prepare(model, TOKENIZER, some)
        scores = option_scores(model, inputs)
        torch.testing.assert_close(scores, expected[first:, : scores.shape[1]], **CLOSE)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3", "mistral", "mixtral", "qwen3_moe", "opt", "gpt2", "gpt_neox"]
)
def test_causal_models_take_packed_rows(family: str, random_state_untouched: None) -> None:
    model = sharp_model(family)
    for batch in (MIXED, MIXED[:2], [encoded(5, 2, 2)], [encoded(5, 1, 1)]):
        assert find_layout(model, TOKENIZER, batch) == Layout(TOKENIZER.pad_token_id)


def test_recurrent_model_gets_the_plain_layout() -> None:
    model = sharp_model("mamba")
    assert find_layout(model, TOKENIZER, MIXED) == plain_layout(model, TOKENIZER)
    assert not plain_layout(model, TOKENIZER).shared
    assert find_layout(model, TOKENIZER, [encoded(5, 1, 1), encoded(9, 1, 1)]).shared  # nothing to keep apart


@torch.no_grad()
def test_roberta_without_its_offset_is_found_out() -> None:
    """With a padding token that the model does not take for one, the offset is unknown, and texts stay in rows apart."""
    model = sharp_model("roberta")
    assert model.config.pad_token_id != TOKENIZER.pad_token_id
    batch = drawn_masks(4)
    wrong = option_scores(model, prepare(model, TOKENIZER, batch, Layout(0, causal=False)))
    plain = option_scores(model, prepare(model, TOKENIZER, batch))
    assert (wrong - plain).abs().max() > 0.1
    layout = find_layout(model, TOKENIZER, batch)
    assert not layout.packed
    torch.testing.assert_close(option_scores(model, prepare(model, TOKENIZER, batch, layout)), plain, **CLOSE)


class Wrapped(torch.nn.Module):
    """A causal language model with a forward pass of its own."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device


class MasklessForCausalLM(Wrapped):
    """Ignores the block mask."""

    def forward(self, input_ids: Any, position_ids: Any = None, **rest: Any) -> Any:
        return self.inner(input_ids=input_ids, position_ids=position_ids)


class PositionlessForCausalLM(Wrapped):
    """Ignores position ids."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **rest: Any) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class BareForCausalLM(Wrapped):
    """Takes tokens and nothing else."""

    def forward(self, input_ids: Any, use_cache: bool = False) -> Any:
        return self.inner(input_ids=input_ids)


class MasklessForMaskedLM(Wrapped):
    """Takes masks of shape (rows, length) alone for what they are."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **rest: Any) -> Any:
        seen = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
        return self.inner(input_ids=input_ids, attention_mask=seen, position_ids=position_ids)


@pytest.mark.parametrize("wrap", [MasklessForCausalLM, PositionlessForCausalLM, BareForCausalLM])
def test_models_that_cannot_keep_texts_apart_get_the_plain_layout(wrap: type[Wrapped]) -> None:
    # GPT-2's positions are absolute. Those of rotary models matter as differences alone, inside one text.
    model = wrap(sharp_model("gpt2")).eval()
    assert find_layout(model, TOKENIZER, MIXED) == plain_layout(model, TOKENIZER)
    outcomes: list[float] = []
    found = evaluate(model, TOKENIZER, CHOICE, [e for e in MIXED if len(e.options) == 2], outcomes=outcomes)
    plain = evaluate(
        model.inner, TOKENIZER, CHOICE, [e for e in MIXED if len(e.options) == 2], layout=plain_layout(model, TOKENIZER)
    )
    assert found == pytest.approx(plain, abs=CLOSE["atol"])


def test_masked_model_that_takes_plain_masks_alone_is_not_packed() -> None:
    model = MasklessForMaskedLM(sharp_model("bert")).eval()
    assert not find_layout(model, TOKENIZER, drawn_masks(5)).packed


@torch.no_grad()
@pytest.mark.parametrize("window", [4, 8, 16])
def test_sliding_window_of_attention_is_honoured(window: int) -> None:
    """A block mask stands in place of the model's own, which ends at the window."""
    settings = {**support.SIZES, "sliding_window": window}
    model = sharpened(transformers.MistralForCausalLM(transformers.MistralConfig(**settings)).eval())
    batch = [encoded(n, 1, 1) for n in (1, 2, 3, 5, 13, 14, 30, 31)] + [encoded(4, 2, 2), encoded(12, 2, 3)]
    plain = option_scores(model, prepare(model, TOKENIZER, batch))
    blind = option_scores(model, prepare(model, TOKENIZER, batch, Layout(0)))
    assert (blind - plain).abs().max() > 0.1
    layout = find_layout(model, TOKENIZER, batch)
    torch.testing.assert_close(option_scores(model, prepare(model, TOKENIZER, batch, layout)), plain, **CLOSE)
