"""The tasks of the package on real rows: what the tables of the paper say, character by character."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, find_layout, plain_layout, prepare
from forwardtune.models import EMBEDDED_MODEL, load_model
from forwardtune.objectives import generate, option_scores
from forwardtune.tasks import Example, Task, get_task, load_split, load_splits, task_names
from forwardtune.tasks.encoding import Encoded, Encoder

Row = dict[str, Any]

# --- an independent transcription ------------------------------------------------------------------------------------
# Each takes a row whose texts are stripped, and gives the prompt, the continuations, the places of those that are right, the
# prompt without content, and what may be cut of the prompt: the longest text that the question is about.

Transcribed = tuple[str, list[str], list[int], str, str]


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def asked(prompt: str, options: str, right: int, question: str, context: str) -> Transcribed:
    """A prompt that ends in a question, with answers behind its line break."""
    return f"{prompt}{question}\n", options.split(), [right], f"{question}\n", context


def judged(text: str, words: str, right: int) -> Transcribed:
    return f"{text} It was", [f" {word}" for word in words.split()], [right], "It was", text


def inferred(r: Any, order: str, right: int) -> Transcribed:
    prompt = f'Suppose {r.premise} Can we infer that "{r.hypothesis}"? '
    return asked(prompt, order, right, "Yes, No, or Maybe?", r.premise)


def copa(r: Any) -> Transcribed:
    premise, conjunction = r.premise.removesuffix("."), {"effect": "so", "cause": "because"}[r.question]
    firsts = [(choice.split(" ")[0], choice) for choice in (r.choice1, r.choice2)]
    choices = [choice if first == "I" else first.lower() + choice[len(first) :] for first, choice in firsts]
    return f"{premise} {conjunction} ", choices, [r.label], f"{conjunction} ", premise


def record(r: Any) -> Transcribed:
    before, after = r.query.split("@placeholder")
    passage = "- ".join(r.passage.split("@highlight\n"))
    right = [i for i, entity in enumerate(r.entities) if entity in r.answers]
    return f"{passage}\n- ", [f"{before}{entity.strip()}{after}" for entity in r.entities], right, "- ", passage


def answered(prompt: str, answers: list[str], context: str) -> Transcribed:
    """A question for free text: the continuations are the right ones."""
    return f"{prompt}\nAnswer:", [f" {answer.strip()}" for answer in answers], [], "Answer:", context


def trec(r: Any) -> Transcribed:
    prompt = f"Expression, Entity, Description, Human, Location or Number?\nQuestion: {r.text}\nAsks for:"
    return prompt, [f" {kind}" for kind in KINDS.split()], [r.coarse_label], "Asks for:", r.text


def filled(prompt: str, words: str, right: int, context: str) -> Transcribed:
    """A prompt with a mask, which has no prompt without content."""
    return prompt, words.split(), [right], "", context


def paired(r: Any, words: str) -> Transcribed:
    premise = r.premise[:-1]
    prompt = f"{premise}?[MASK], {r.hypothesis[0].lower()}{r.hypothesis[1:]}"
    return filled(prompt, words, r.label, premise)


STARS = "terrible bad okay good great"
KINDS = "Expression Entity Description Human Location Number"
TRANSCRIBED: dict[tuple[str, str], Callable[[Any], Transcribed]] = {
    ("sst2", "causal"): lambda r: judged(r.sentence, "terrible great", r.label),
    ("rte", "causal"): lambda r: (
        f'{r.premise}\nDoes this mean that "{r.hypothesis}" is true? Yes or No?\n',
        ["Yes", "No"],
        [r.label],
        "Yes or No?\n",
        r.premise,
    ),
    ("cb", "causal"): lambda r: inferred(r, "Yes No Maybe", r.label),
    ("boolq", "causal"): lambda r: (
        f"{r.passage} {upper_first(r.question)}?\n",
        ["Yes", "No"],
        [1 - r.label],
        "Yes or No?\n",
        r.passage,
    ),
    ("wsc", "causal"): lambda r: asked(
        f'{r.text}\nIn the previous sentence, does the pronoun "{r.span2_text.lower()}" refer to {r.span1_text}? ',
        "No Yes",
        r.label,
        "Yes or No?",
        r.text,
    ),
    ("wic", "causal"): lambda r: (
        f'Does the word "{r.word}" have the same meaning in these two sentences? Yes, No?\n{r.sentence1}\n{r.sentence2}\n',
        ["No", "Yes"],
        [r.label],
        "Yes, No?\n",
        r.sentence1,
    ),
    ("multirc", "causal"): lambda r: asked(
        f'{r.paragraph}\nQuestion: {r.question}\nI found this answer "{r.answer}". ',
        "No Yes",
        r.label,
        "Is that correct? Yes or No?",
        r.paragraph,
    ),
    ("copa", "causal"): copa,
    ("record", "causal"): record,
    ("squad", "causal"): lambda r: answered(
        f"Title: {r.title}\nContext: {r.context}\nQuestion: {r.question}", r.answers["text"], r.context
    ),
    ("drop", "causal"): lambda r: answered(
        f"Passage: {r.passage}\nQuestion: {r.question}", r.answers_spans["spans"], r.passage
    ),
    ("sst5", "causal"): lambda r: judged(r.text, STARS, r.label),
    ("snli", "causal"): lambda r: inferred(r, "Yes Maybe No", r.label),
    ("mnli", "causal"): lambda r: inferred(r, "Yes Maybe No", r.label),
    ("trec", "causal"): trec,
    ("sst2", "masked"): lambda r: filled(f"{r.sentence} It was [MASK].", "terrible great", r.label, r.sentence),
    ("sst5", "masked"): lambda r: filled(f"{r.text} It was [MASK].", STARS, r.label, r.text),
    ("snli", "masked"): lambda r: paired(r, "Yes Maybe No"),
    ("mnli", "masked"): lambda r: paired(r, "Yes Maybe No"),
    ("rte", "masked"): lambda r: paired(r, "Yes No"),
    ("trec", "masked"): lambda r: filled(f"[MASK]: {r.text}", KINDS, r.coarse_label, r.text),
    ("cb", "masked"): lambda r: filled(
        f"{r.premise.removesuffix('.')}? [MASK], {r.hypothesis}", "Yes No Maybe", r.label, r.premise.removesuffix(".")
    ),
    ("boolq", "masked"): lambda r: filled(
        f"{r.passage} {upper_first(r.question)}? [MASK].", "Yes No", 1 - r.label, r.passage
    ),
    ("wic", "masked"): lambda r: filled(
        f'{r.sentence1} {r.sentence2} Does "{r.word}" have the same meaning in both? [MASK].',
        "No Yes",
        r.label,
        r.sentence1,
    ),
    ("wsc", "masked"): lambda r: filled(
        f'{r.text} Does "{r.span2_text.lower()}" mean {r.span1_text}? [MASK].', "No Yes", r.label, r.text
    ),
    ("multirc", "masked"): lambda r: filled(
        f"{r.paragraph} {r.question} {r.answer}? [MASK].", "No Yes", r.label, r.paragraph
    ),
}
CAUSAL = [name for name, kind in TRANSCRIBED if kind == "causal"]
MASKED = [name for name, kind in TRANSCRIBED if kind == "masked"]
# Worded as in the MeZO paper; the others as we word them.
PAPER = {(name, "causal") for name in CAUSAL[:11]} | {(name, "masked") for name in MASKED[:6]}
LIKELIHOOD = ["copa", "record", "squad", "drop"]

every_wording = pytest.mark.parametrize(("name", "kind"), TRANSCRIBED, ids=lambda part: part)


def rows_of(data_dir: Path, name: str, file: str) -> list[Row]:
    lines = (data_dir / name / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def some(name: str, kind: str, data_dir: Path, limit: int | None = None, split: str = "test") -> tuple[Task, Any]:
    folder = None if name == "reviews" else data_dir
    loaded = load_split(get_task(name), split, data_dir=folder, limit=limit).worded_for(kind)
    return loaded.task, loaded.examples


def test_every_task_of_the_package_is_looked_at_here() -> None:
    assert {name for name, _ in TRANSCRIBED} | {"reviews"} == set(task_names())
    for name in task_names():
        kinds = {wording.kind for wording in get_task(name).wordings}
        found = {kind for found, kind in TRANSCRIBED if found == name}
        assert kinds == (found or {"causal", "masked"})
        assert kinds == {"causal", "masked"} or get_task(name).answers is None or name == "copa"


@every_wording
def test_all_rows_are_worded_as_the_table_says(name: str, kind: str, data_dir: Path) -> None:
    task, examples = some(name, kind, data_dir)
    rows = rows_of(data_dir, name, "validation")
    assert len(examples) == len(rows) > 10
    for row, example in zip(rows, examples, strict=True):
        stripped = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
        prompt, options, right, calibration, context = TRANSCRIBED[name, kind](SimpleNamespace(**stripped))
        assert example.prompt == prompt
        if task.free_text:
            assert example.targets == tuple(dict.fromkeys(options))
            assert (example.options, example.right, example.label) == ((), (), -1)
            assert example.target == options[0]
        else:
            assert (example.options, example.right, example.targets) == (tuple(options), tuple(right), ())
        if kind == "causal":
            assert example.calibration == calibration
        assert example.prompt[slice(*example.context)] == context
    assert name != "record" or sum(len(example.right) > 1 for example in examples) > 3


def test_prompts_are_those_of_the_papers_own_code(data_dir: Path) -> None:
    """Rows that the code of the paper rendered, up to white space around a column; a mask takes the space before it."""
    golden = rows_of(data_dir, ".", "golden_prompts")
    rows = {name: rows_of(data_dir, name, "validation") for name in {line["task"] for line in golden}}
    assert len(golden) > 500
    assert {(line["task"], line["kind"]) for line in golden} == PAPER
    for line in golden:
        assert line["split"] == "validation"
        row = rows[line["task"]][line["row"]]
        example = get_task(line["task"]).worded_for(line["kind"]).example(row, "the row")
        if line["kind"] == "masked":
            assert re.sub(r" (?=\[MASK])", "", example.prompt) == re.sub(r" (?=\[MASK])", "", line["prompt"])
            continue
        assert example.prompt.rstrip(" ") in (line["prompt"].rstrip(" "), trimmed(line["prompt"], row).rstrip(" "))
        texts = [example.prompt + option for option in example.options] or [f"{example.prompt}{example.target}\n"]
        for text, rendered in zip(texts, line["texts"], strict=True):
            assert text in (rendered, trimmed(rendered, row))


def trimmed(text: str, row: Row) -> str:
    """The rendered text, with the white space around the row's columns taken away."""
    columns = [value for value in row.values() if isinstance(value, str)]
    columns += row.get("answers_spans", {}).get("spans", [])
    for column in columns:
        if column != column.strip():
            text = text.replace(column, column.strip())
    return text


def test_label_columns_are_spread_over_all_answers(data_dir: Path) -> None:
    """What is compared above would not be seen if all rows had one label."""
    for name, kind in TRANSCRIBED:
        task, examples = some(name, kind, data_dir)
        if task.answers is not None:
            found = Counter(example.label for example in [*examples, *some(name, kind, data_dir, split="train")[1]])
            assert set(found) == set(range(len(task.answers)))


def test_reviews_are_worded_as_they_say(data_dir: Path) -> None:
    task, examples = some("reviews", "causal", data_dir)
    rows = [json.loads(line) for line in task.files["test"].read_text(encoding="utf-8").splitlines()]
    for row, example in zip(rows, examples, strict=True):
        assert example.prompt == f"Sentiment of reviews, positive or negative.\nReview: {row['text']}\nSentiment:"
        assert example.options == (" Negative", " Positive")
        assert example.options[example.label] == f" {row['label'].capitalize()}"
        assert example.calibration == "Sentiment:"
        assert example.prompt[slice(*example.context)] == row["text"]
    for row, example in zip(rows, some("reviews", "masked", data_dir)[1], strict=True):
        assert example.prompt == f"{row['text']} It was [MASK]."
        assert example.options == ("terrible", "great")
        assert example.options[example.label] == {"negative": "terrible", "positive": "great"}[row["label"]]


@pytest.mark.parametrize("name", sorted({name for name, _ in TRANSCRIBED}))
def test_likelihood_is_lowered_where_options_are_sentences(name: str) -> None:
    task = get_task(name)
    assert task.loss == ("likelihood" if name in LIKELIHOOD else "cross_entropy")
    assert task.metric == {"squad": "f1", "drop": "drop_f1"}.get(name, "accuracy")
    assert (task.stop, task.max_new_tokens) == ("\n", 50)


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(models_dir: Path) -> tuple[Any, Any]:
    return load_model(str(models_dir / "stories260k"))


@pytest.fixture(scope="module")
def minilm(models_dir: Path) -> tuple[Any, Any]:
    return load_model(str(models_dir / "minilm-l6-mlm"), dtype="float32")


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    return load_model(EMBEDDED_MODEL, dtype="bfloat16")


def assert_scores_the_answer(tokenizer: Any, task: Task, example: Example, encoded: Encoded) -> None:
    """The scored tokens are those of the answer; at most the space at the prompt's end went over to its first word."""
    texts = example.options or (example.target + task.stop,)
    assert len(encoded.options) == len(texts)
    before = encoded.prompt[: len(encoded.prompt) - encoded.scored]
    read = tokenizer.decode(before, skip_special_tokens=True)
    assert read == example.prompt or f"{read} " == example.prompt
    for text, option in zip(texts, encoded.options, strict=True):
        assert encoded.prompt + option == tokenizer(example.prompt + text)["input_ids"]
        whole = tokenizer.decode(encoded.prompt + option, skip_special_tokens=True)
        assert whole[: len(read)] == read
        assert whole[len(read) :] == (example.prompt + text)[len(read) :]
        assert whole[len(read) :].lstrip(" ") == text.lstrip(" ")


@pytest.mark.parametrize("name", [*CAUSAL, "reviews"])
def test_scored_tokens_are_the_answer(name: str, stories: tuple[Any, Any], data_dir: Path) -> None:
    task, examples = some(name, "causal", data_dir)
    encoder = Encoder(stories[1], 1 << 20)
    for example, encoded in zip(examples, encoder(task, examples), strict=True):
        assert_scores_the_answer(stories[1], task, example, encoded)
        assert encoded.right == (example.right or (0,))
        assert encoded.texts == tuple(text.strip() for text in example.targets)
        assert encoded.mask is None
    if name not in ("squad", "drop"):  # without content, too
        for example, encoded in zip(examples, encoder.calibrations(task, examples), strict=True):
            assert_scores_the_answer(stories[1], task, replace(example, prompt=example.calibration), encoded)
    assert encoder.truncated == encoder.demonstrated == 0


@pytest.mark.real_model
@pytest.mark.parametrize("name", [*CAUSAL, "reviews"])
def test_scored_tokens_are_the_answer_with_the_embedded_model(name: str, smollm: Any, data_dir: Path) -> None:
    task, examples = some(name, "causal", data_dir, limit=60)
    for example, encoded in zip(examples, Encoder(smollm[1], 1 << 20)(task, examples), strict=True):
        assert_scores_the_answer(smollm[1], task, example, encoded)


@pytest.mark.parametrize("name", [*MASKED, "reviews"])
def test_label_word_fills_the_mask(name: str, minilm: tuple[Any, Any], data_dir: Path) -> None:
    task, examples = some(name, "masked", data_dir)
    _, tokenizer = minilm
    for example, encoded in zip(examples, Encoder(tokenizer, 1 << 20)(task, examples), strict=True):
        assert encoded.mask is not None
        assert encoded.prompt[encoded.mask] == tokenizer.mask_token_id
        assert encoded.prompt.count(tokenizer.mask_token_id) == 1
        assert encoded.scored == 0
        assert encoded.right == example.right
        assert encoded.length == len(encoded.prompt)
        for word, option in zip(example.options, encoded.options, strict=True):
            assert tokenizer.decode(option) == word.lower()  # the model knows no capitals
            filled = [*encoded.prompt[: encoded.mask], *option, *encoded.prompt[encoded.mask + 1 :]]
            assert filled == tokenizer(example.prompt.replace("[MASK]", word))["input_ids"]


# --- splits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({name for name, _ in TRANSCRIBED}))
def test_splits_of_real_data(name: str, data_dir: Path) -> None:
    """What the paper's code takes of the rows, by its own words: slices of numpy's permutations."""
    task = get_task(name)
    assert task.splits == "mezo"
    there = {file: len(rows_of(data_dir, name, file)) for file in ("train", "validation")}
    whole = there["train"] >= 1500 or name in ("cb", "copa")
    sizes = {} if whole else {"train_examples": 20, "dev_examples": 8, "test_examples": 10}
    train, test = sizes.get("train_examples", 1000), sizes.get("test_examples", 1000)
    dev = sizes.get("dev_examples", 100 if name in ("cb", "copa") else 500)
    taken = min(train + dev, there["train"])
    expected = {"train": taken - dev, "dev": dev, "test": min(test, there["validation"])}
    drawn = {seed: load_splits(task, data_dir=data_dir, seed=seed, **sizes) for seed in (13, 21)}
    for seed, splits in drawn.items():
        order = np.random.RandomState(seed).permutation(there["train"])[: train + dev]
        assert list(splits["train"].numbers) == sorted(order[:-dev])
        assert list(splits["dev"].numbers) == sorted(order[-dev:])
        order = np.random.RandomState(seed).permutation(there["validation"])[:test]
        assert list(splits["test"].numbers) == sorted(order)
        assert {split: len(found) for split, found in splits.items()} == expected
        assert {split: len(set(found.numbers)) for split, found in splits.items()} == expected
        assert not set(splits["train"].numbers) & set(splits["dev"].numbers)
        for split, found in splits.items():
            assert Path(found.source).name == ("validation.jsonl" if split == "test" else "train.jsonl")
    for split, same in (("train", False), ("dev", False), ("test", test >= there["validation"])):
        assert (drawn[13][split].numbers == drawn[21][split].numbers) is same
    again = load_splits(task, data_dir=data_dir, seed=13, **sizes)
    assert all(again[split].numbers == drawn[13][split].numbers for split in expected)


@pytest.mark.parametrize("name", ["sst2", "cb", "copa"])
def test_published_numbers_of_examples(name: str, tmp_path: Path) -> None:
    """Where the data are plenty: 1,000 for training, 500 (CB and COPA: 100) for development, 1,000 for testing."""
    row = {
        "sst2": {"sentence": "s", "label": 1},
        "cb": {"premise": "p", "hypothesis": "h", "label": 0},
        "copa": {"premise": "P.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 0},
    }[name]
    for file, count in (("train", 2500), ("validation", 1300)):
        (tmp_path / f"{file}.jsonl").write_text((json.dumps(row) + "\n") * count)
    splits = load_splits(get_task(name), data_dir=tmp_path)
    expected = {"train": 1000, "dev": 500 if name == "sst2" else 100, "test": 1000}
    assert {split: len(found) for split, found in splits.items()} == expected


@pytest.mark.parametrize("name", ["sst2", "sst5", "rte"])
def test_16_examples_of_each_class(name: str, data_dir: Path) -> None:
    """By the words of the paper's code for masked models: rows are shuffled, and each class takes its first ones."""
    task = get_task(name)
    rows = {file: rows_of(data_dir, name, file) for file in ("train", "validation")}
    for file in rows.values():
        for number, row in enumerate(file):
            row["number"] = number
    np.random.RandomState(42).shuffle(rows["validation"])
    drawn = []
    for seed in (13, 21, 42, 87, 100):
        splits = load_splits(task, data_dir=data_dir, per_class=16, seed=seed, test_examples=100)
        shuffled = sorted(rows["train"], key=lambda row: int(row["number"]))
        np.random.RandomState(seed).shuffle(shuffled)
        by_class: dict[int, list[int]] = {}
        for row in shuffled:
            by_class.setdefault(row["label"], []).append(row["number"])
        assert list(splits["train"].numbers) == sorted(n for of in by_class.values() for n in of[:16])
        assert list(splits["dev"].numbers) == sorted(n for of in by_class.values() for n in of[16:32])
        assert list(splits["test"].numbers) == sorted(row["number"] for row in rows["validation"][:100])
        for split in ("train", "dev"):
            count = Counter(example.label for example in splits[split].worded_for("masked").examples)
            assert count == dict.fromkeys(range(len(task.worded_for("masked").answers or {})), 16)
        assert not set(splits["train"].numbers) & set(splits["dev"].numbers)
        drawn.append((tuple(splits["train"].numbers), tuple(splits["dev"].numbers), tuple(splits["test"].numbers)))
    assert [len(set(numbers)) for numbers in zip(*drawn, strict=True)] == [5, 5, 1]


def test_as_many_of_each_class_as_there_are(data_dir: Path) -> None:
    """The paper's code takes what a class has, first for training: TREC has 86 abbreviations where it asks for 1,024."""
    rows = rows_of(data_dir, "cb", "train")
    there = Counter(row["label"] for row in rows)
    assert there[2] < 20 < 2 * 20 < min(there[0], there[1])
    with pytest.warns(UserWarning, match=rf"cb.train\.jsonl has only {there[2]} of Maybe"):
        splits = load_splits(get_task("cb"), data_dir=data_dir, per_class=20)
    assert Counter(example.label for example in splits["train"].examples) == {0: 20, 1: 20, 2: there[2]}
    assert Counter(example.label for example in splits["dev"].examples) == {0: 20, 1: 20}
    with pytest.raises(InputError, match=r"cb.train\.jsonl holds \d+ examples of class 0 .*lower per_class to \d+$"):
        load_splits(get_task("cb"), data_dir=data_dir, per_class=200)  # nothing is left to measure
    with pytest.raises(InputError, match="task record has no classes"):
        load_splits(get_task("record"), data_dir=data_dir, per_class=1)


def test_what_the_papers_rule_leaves_for_training_is_said(data_dir: Path, tmp_path: Path) -> None:
    row = {"text": "t", "span1_text": "a", "span2_text": "b", "label": 1}
    for file, count in (("train", 554), ("validation", 104)):  # as many as WSC has
        (tmp_path / f"{file}.jsonl").write_text((json.dumps(row) + "\n") * count)
    with pytest.warns(UserWarning, match="of the 554 examples .* 54 are for training and 500 for development"):
        splits = load_splits(get_task("wsc"), data_dir=tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 54, "dev": 500, "test": 104}
    with pytest.raises(InputError, match=r"500 .* leaves none of the 60 .*\(dev_examples=15\).*'splits: mezo'$"):
        load_splits(get_task("snli"), data_dir=data_dir)
    with pytest.raises(InputError, match="seed must be from 0 to 4294967295"):
        load_splits(get_task("snli"), data_dir=data_dir, seed=-1)


def test_boolq_is_read_in_either_packaging(tmp_path: Path) -> None:
    """The paper's code takes google/boolq, whose labels are called answer and are true or false."""
    for answer, expected in (({"answer": True}, 0), ({"answer": False}, 1), ({"label": 1}, 0), ({"label": 0}, 1)):
        row = {"passage": "p", "question": "q", **answer}
        (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
        (example,) = load_split(get_task("boolq"), "train", data_dir=tmp_path).examples
        assert example.label == expected


# --- evaluation ------------------------------------------------------------------------------------------------------


def assert_evaluates(model: Any, tokenizer: Any, task: Task, examples: Sequence[Encoded]) -> None:
    layout = find_layout(model, tokenizer, examples)
    assert layout.shared
    assert layout.packed
    outcomes: list[float] = []
    packed = evaluate(model, tokenizer, task, examples, layout=layout, batch_size=4, outcomes=outcomes)
    plain = evaluate(model, tokenizer, task, examples, layout=plain_layout(model, tokenizer), batch_size=3)
    assert packed.pop("examples") == plain.pop("examples") == len(examples) == len(outcomes)
    # Losses of size 1 to 10 in float32, summed in another order over a few hundred tokens.
    assert packed.pop("loss") == pytest.approx(loss := plain.pop("loss"), abs=1e-4)
    assert math.isfinite(loss)
    assert loss > 0
    assert packed == pytest.approx(plain)
    assert task.metric in packed
    assert all(0 <= value <= 1 for value in packed.values())
    assert sum(outcomes) / len(outcomes) == pytest.approx(packed[task.metric])


@pytest.mark.parametrize(
    ("name", "kind"), [*TRANSCRIBED, ("reviews", "causal"), ("reviews", "masked")], ids=lambda part: part
)
def test_task_is_evaluated(name: str, kind: str, stories: Any, minilm: Any, data_dir: Path) -> None:
    model, tokenizer = stories if kind == "causal" else minilm
    task, examples = some(name, kind, data_dir, limit=5)
    encoder = Encoder(tokenizer, 200 if kind == "causal" else 64)
    assert_evaluates(model, tokenizer, task, encoder(task, examples))
    if kind == "causal":
        assert (encoder.truncated > 0) == (name in ("rte", "cb", "boolq", "multirc", "record", "squad", "drop", "mnli"))


def test_any_right_answer_counts_and_the_first_is_trained_on(stories: tuple[Any, Any], data_dir: Path) -> None:
    model, tokenizer = stories
    task, examples = some("record", "causal", data_dir, limit=2)
    for example in Encoder(tokenizer, 200)(task, examples):
        scores = option_scores(model, prepare(model, tokenizer, [example])).detach()[0]
        best, worst = int(scores.argmax()), int(scores.argmin())
        other = next(i for i in range(len(scores)) if i not in (best, worst))
        for right, accuracy in (((worst, best), 1), ((worst, other), 0), ((best, worst), 1), ((other, worst), 0)):
            result = evaluate(model, tokenizer, task, [replace(example, right=right)])
            assert result["accuracy"] == accuracy
            assert result["loss"] == pytest.approx(-float(scores[right[0]]), abs=1e-4)


@pytest.mark.parametrize("name", ["squad", "drop"])
def test_any_of_the_texts_counts(name: str, stories: tuple[Any, Any], data_dir: Path) -> None:
    model, tokenizer = stories
    task, examples = some(name, "causal", data_dir, limit=1)
    (example,) = Encoder(tokenizer, 200)(task, examples)
    (said,) = generate(model, tokenizer, task, [example.prompt])
    assert said
    for texts, expected in (((said,), 1), (("unsaid 7", said), 1), ((said, "unsaid 7"), 1), (("unsaid 7",), 0)):
        result = evaluate(model, tokenizer, task, [replace(example, texts=texts)])
        assert result[task.metric] == result[task.metric.replace("f1", "exact_match")] == expected
