"""The tasks of the package on real rows: what the tables of the paper say, character by character."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
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

# Worded as in the MeZO paper; then as we word them.
CAUSAL = [
    "sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa", "record", "squad", "drop",
    "sst5", "snli", "mnli", "trec",
]  # fmt: skip
MASKED = ["sst2", "sst5", "snli", "mnli", "rte", "trec", "cb", "boolq", "wic", "wsc", "multirc"]
PAPER = {(name, "causal") for name in CAUSAL[:11]} | {(name, "masked") for name in MASKED[:6]}
LIKELIHOOD = ["copa", "record", "squad", "drop"]
NLI = {0: "entailment", 1: "neutral", 2: "contradiction"}


# --- an independent transcription ------------------------------------------------------------------------------------
# Each takes a row, and gives the prompt, the continuations, those of them that are right, and the prompt without content.

Transcribed = tuple[str, list[str], list[str], str]


def sst2(row: Row) -> Transcribed:
    sentiment = {0: "negative", 1: "positive"}[row["label"]]
    right = {"negative": " terrible", "positive": " great"}[sentiment]
    return f"{row['sentence'].strip()} It was", [" terrible", " great"], [right], "It was"


def rte(row: Row) -> Transcribed:
    prompt = f'{row["premise"].strip()}\nDoes this mean that "{row["hypothesis"].strip()}" is true? Yes or No?\n'
    meaning = {0: "entailment", 1: "not_entailment"}[row["label"]]
    return prompt, ["Yes", "No"], ["Yes" if meaning == "entailment" else "No"], "Yes or No?\n"


def cb(row: Row) -> Transcribed:
    prompt = f'Suppose {row["premise"].strip()} Can we infer that "{row["hypothesis"].strip()}"? Yes, No, or Maybe?\n'
    meaning = {0: "entailment", 1: "contradiction", 2: "neutral"}[row["label"]]
    right = {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"}[meaning]
    return prompt, ["Yes", "No", "Maybe"], [right], "Yes, No, or Maybe?\n"


def boolq(row: Row) -> Transcribed:
    question = row["question"].strip()
    prompt = f"{row['passage'].strip()} {question[0].upper()}{question[1:]}?\n"
    return prompt, ["Yes", "No"], ["Yes" if row["label"] == 1 else "No"], "Yes or No?\n"


def wsc(row: Row) -> Transcribed:
    text, span1, span2 = (row[column].strip() for column in ("text", "span1_text", "span2_text"))
    prompt = f'{text}\nIn the previous sentence, does the pronoun "{span2.lower()}" refer to {span1}? Yes or No?\n'
    return prompt, ["No", "Yes"], ["Yes" if row["label"] == 1 else "No"], "Yes or No?\n"


def wic(row: Row) -> Transcribed:
    word, sentence1, sentence2 = (row[column].strip() for column in ("word", "sentence1", "sentence2"))
    prompt = (
        f'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        + f"{sentence1}\n{sentence2}\n"
    )
    return prompt, ["No", "Yes"], ["Yes" if row["label"] == 1 else "No"], "Yes, No?\n"


def multirc(row: Row) -> Transcribed:
    paragraph, question, answer = (row[column].strip() for column in ("paragraph", "question", "answer"))
    asked = "Is that correct? Yes or No?\n"
    prompt = f'{paragraph}\nQuestion: {question}\nI found this answer "{answer}". {asked}'
    return prompt, ["No", "Yes"], ["Yes" if row["label"] == 1 else "No"], asked


def copa(row: Row) -> Transcribed:
    premise = row["premise"].strip()
    premise = premise[:-1] if premise[-1] == "." else premise
    conjunction = {"effect": "so", "cause": "because"}[row["question"]]
    choices = [row["choice1"].strip(), row["choice2"].strip()]
    firsts = [choice.split(" ")[0] for choice in choices]
    choices = [
        choice if first == "I" else first.lower() + choice[len(first) :]
        for first, choice in zip(firsts, choices, strict=True)
    ]
    return f"{premise} {conjunction} ", choices, [choices[row["label"]]], f"{conjunction} "


def record(row: Row) -> Transcribed:
    before, after = row["query"].strip().split("@placeholder")
    passage = "- ".join(row["passage"].strip().split("@highlight\n"))
    options = [f"{before}{entity.strip()}{after}" for entity in row["entities"]]
    right = [f"{before}{entity.strip()}{after}" for entity in row["entities"] if entity in row["answers"]]
    return f"{passage}\n- ", options, right, "- "


def squad(row: Row) -> Transcribed:
    title, context, question = (row[column].strip() for column in ("title", "context", "question"))
    prompt = f"Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"
    return prompt, [], [" " + text.strip() for text in row["answers"]["text"]], "Answer:"


def drop(row: Row) -> Transcribed:
    prompt = f"Passage: {row['passage'].strip()}\nQuestion: {row['question'].strip()}\nAnswer:"
    return prompt, [], [" " + text.strip() for text in row["answers_spans"]["spans"]], "Answer:"


def sst5(row: Row) -> Transcribed:
    words_by_stars = [" terrible", " bad", " okay", " good", " great"]
    return f"{row['text'].strip()} It was", words_by_stars, [words_by_stars[row["label"]]], "It was"


def nli(row: Row) -> Transcribed:
    prompt = f'Suppose {row["premise"].strip()} Can we infer that "{row["hypothesis"].strip()}"? Yes, No, or Maybe?\n'
    right = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}[NLI[row["label"]]]
    return prompt, ["Yes", "Maybe", "No"], [right], "Yes, No, or Maybe?\n"


snli = mnli = nli


def trec(row: Row) -> Transcribed:
    asked = f"Question: {row['text'].strip()}\nAsks for:"
    kinds = [" Expression", " Entity", " Description", " Human", " Location", " Number"]
    listed = "Expression, Entity, Description, Human, Location or Number?"
    return f"{listed}\n{asked}", kinds, [kinds[row["coarse_label"]]], "Asks for:"


def masked_sst2(row: Row) -> Transcribed:
    return (
        f"{row['sentence'].strip()} It was [MASK].",
        words("terrible great"),
        [["terrible", "great"][row["label"]]],
        "",
    )


def masked_sst5(row: Row) -> Transcribed:
    by_sentiment = {0: "terrible", 1: "bad", 2: "okay", 3: "good", 4: "great"}
    return (
        f"{row['text'].strip()} It was [MASK].",
        words("terrible bad okay good great"),
        [by_sentiment[row["label"]]],
        "",
    )


def masked_pair(row: Row) -> str:
    premise, hypothesis = row["premise"].strip(), row["hypothesis"].strip()
    return f"{premise[:-1]}?[MASK], {hypothesis[0].lower()}{hypothesis[1:]}"


def masked_nli(row: Row) -> Transcribed:
    prompt = masked_pair(row)
    right = {"entailment": "Yes", "neutral": "Maybe", "contradiction": "No"}[NLI[row["label"]]]
    return prompt, words("Yes Maybe No"), [right], ""


def masked_rte(row: Row) -> Transcribed:
    prompt = masked_pair(row)
    return prompt, words("Yes No"), ["Yes" if row["label"] == 0 else "No"], ""


def masked_cb(row: Row) -> Transcribed:
    premise = row["premise"].strip()
    premise = premise[:-1] if premise.endswith(".") else premise
    prompt = f"{premise}? [MASK], {row['hypothesis'].strip()}"
    return prompt, words("Yes No Maybe"), [words("Yes No Maybe")[row["label"]]], ""


def masked_boolq(row: Row) -> Transcribed:
    question = row["question"].strip()
    prompt = f"{row['passage'].strip()} {question[0].upper()}{question[1:]}? [MASK]."
    return prompt, words("Yes No"), ["Yes" if row["label"] == 1 else "No"], ""


def masked_wic(row: Row) -> Transcribed:
    word, sentence1, sentence2 = (row[column].strip() for column in ("word", "sentence1", "sentence2"))
    prompt = f'{sentence1} {sentence2} Does "{word}" have the same meaning in both? [MASK].'
    return prompt, words("No Yes"), ["Yes" if row["label"] == 1 else "No"], ""


def masked_trec(row: Row) -> Transcribed:
    kinds = ["abbreviation", "entity", "description", "human", "location", "number"]
    label_words = {kind: kind.capitalize() for kind in kinds} | {"abbreviation": "Expression"}
    return f"[MASK]: {row['text'].strip()}", list(label_words.values()), [label_words[kinds[row["coarse_label"]]]], ""


def masked_wsc(row: Row) -> Transcribed:
    text, span1, span2 = (row[column].strip() for column in ("text", "span1_text", "span2_text"))
    prompt = f'{text} Does "{span2.lower()}" mean {span1}? [MASK].'
    return prompt, words("No Yes"), ["Yes" if row["label"] == 1 else "No"], ""


def masked_multirc(row: Row) -> Transcribed:
    prompt = " ".join(row[column].strip() for column in ("paragraph", "question", "answer")) + "? [MASK]."
    return prompt, words("No Yes"), ["Yes" if row["label"] == 1 else "No"], ""


def words(text: str) -> list[str]:
    return text.split()


TRANSCRIBED: dict[tuple[str, str], Callable[[Row], Transcribed]] = {
    **{(name, "causal"): globals()[name] for name in CAUSAL},
    ("sst2", "masked"): masked_sst2,
    ("sst5", "masked"): masked_sst5,
    ("snli", "masked"): masked_nli,
    ("mnli", "masked"): masked_nli,
    ("rte", "masked"): masked_rte,
    ("trec", "masked"): masked_trec,
    ("cb", "masked"): masked_cb,
    ("boolq", "masked"): masked_boolq,
    ("wic", "masked"): masked_wic,
    ("wsc", "masked"): masked_wsc,
    ("multirc", "masked"): masked_multirc,
}
# What may be cut, and what may not: the longest text that the question is about.
CONTEXT = {
    ("sst2", "causal"): "sentence", ("rte", "causal"): "premise", ("cb", "causal"): "premise", ("boolq", "causal"): "passage",
    ("wsc", "causal"): "text", ("wic", "causal"): "sentence1", ("multirc", "causal"): "paragraph", ("copa", "causal"): "premise",
    ("record", "causal"): "passage", ("squad", "causal"): "context", ("drop", "causal"): "passage",
    ("sst2", "masked"): "sentence", ("sst5", "masked"): "text", ("snli", "masked"): "premise", ("mnli", "masked"): "premise",
    ("rte", "masked"): "premise", ("trec", "masked"): "text",
    ("cb", "masked"): "premise", ("boolq", "masked"): "passage", ("wic", "masked"): "sentence1",
    ("wsc", "masked"): "text", ("multirc", "masked"): "paragraph",
    ("sst5", "causal"): "text", ("snli", "causal"): "premise", ("mnli", "causal"): "premise", ("trec", "causal"): "text",
}  # fmt: skip

every_wording = pytest.mark.parametrize(("name", "kind"), TRANSCRIBED, ids=lambda part: part)


def rows_of(data_dir: Path, name: str, file: str) -> list[Row]:
    lines = (data_dir / name / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def some(
    name: str, kind: str, data_dir: Path, limit: int | None = None, split: str = "test"
) -> tuple[Task, list[Example]]:
    loaded = load_split(
        get_task(name), split, data_dir=None if name == "reviews" else data_dir, limit=limit
    ).worded_for(kind)
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
        prompt, options, right, calibration = TRANSCRIBED[name, kind](row)
        assert example.prompt == prompt
        assert example.options == tuple(options)
        if task.free_text:
            assert example.targets == tuple(dict.fromkeys(right))
            assert (example.right, example.label) == ((), -1)
            assert example.target == right[0]
        else:
            assert [options[i] for i in example.right] == right
            assert example.targets == ()
        if kind == "causal":
            assert example.calibration == calibration
        begin, end = example.context
        content = str(row[CONTEXT[name, kind]]).strip().replace("@highlight\n", "- ")
        dropped = 0
        if name == "copa" or (name, kind) == ("cb", "masked"):
            dropped = int(content.endswith("."))
        elif (name, kind) in [("snli", "masked"), ("mnli", "masked"), ("rte", "masked")]:
            dropped = 1
        assert example.prompt[begin:end] == content[: len(content) - dropped]


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


def test_several_entities_of_a_record_row_are_right(data_dir: Path) -> None:
    _, examples = some("record", "causal", data_dir)
    rows = rows_of(data_dir, "record", "validation")
    assert sum(len(example.right) > 1 for example in examples) > 3
    for row, example in zip(rows, examples, strict=True):
        assert {row["entities"][i] for i in example.right} == set(row["answers"])


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
    assert encoder.truncated == encoder.demonstrated == 0


@pytest.mark.real_model
@pytest.mark.parametrize("name", [*CAUSAL, "reviews"])
def test_scored_tokens_are_the_answer_with_the_embedded_model(name: str, smollm: Any, data_dir: Path) -> None:
    task, examples = some(name, "causal", data_dir, limit=60)
    for example, encoded in zip(examples, Encoder(smollm[1], 1 << 20)(task, examples), strict=True):
        assert_scores_the_answer(smollm[1], task, example, encoded)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("squad", "drop")])
def test_scored_tokens_are_the_answer_without_content_too(name: str, stories: tuple[Any, Any], data_dir: Path) -> None:
    task, examples = some(name, "causal", data_dir, limit=20)
    encoder = Encoder(stories[1], 1 << 20)
    for example, encoded in zip(examples, encoder.calibrations(task, examples), strict=True):
        assert_scores_the_answer(stories[1], task, replace(example, prompt=example.calibration), encoded)
    assert encoder.truncated == 0


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


@pytest.mark.parametrize("name", [*CAUSAL, "reviews"])
def test_causal_task_is_evaluated(name: str, stories: tuple[Any, Any], data_dir: Path) -> None:
    task, examples = some(name, "causal", data_dir, limit=5)
    encoder = Encoder(stories[1], 200)
    assert_evaluates(*stories, task, encoder(task, examples))
    assert (encoder.truncated > 0) == (name in ("rte", "cb", "boolq", "multirc", "record", "squad", "drop", "mnli"))


@pytest.mark.parametrize("name", [*MASKED, "reviews"])
def test_masked_task_is_evaluated(name: str, minilm: tuple[Any, Any], data_dir: Path) -> None:
    task, examples = some(name, "masked", data_dir, limit=6)
    assert_evaluates(*minilm, task, Encoder(minilm[1], 64)(task, examples))


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
