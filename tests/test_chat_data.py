"""Conversations and texts: what is learnt of them, token by token as TRL builds it, in the command line and in MeZOTrainer."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import support
from forwardtune import MeZOConfig, MeZOTrainer, replay
from forwardtune.errors import InputError
from forwardtune.evaluation import evaluate, plain_layout
from forwardtune.tasks import get_task, load_splits
from forwardtune.tasks.chat import TASK, form_of
from forwardtune.tasks.chat_tokens import ChatTokens
from forwardtune.tasks.encoding import Encoder
from support.chat import ANSWER, CASES, GOLDEN, MARKED, MORE, PAIRS, PLAIN, SYSTEM, USER, chat_tokenizer
from support.command import cli, done, read, refused, write_jsonl
from support.examples import CLOSE, sharp_model

CONVERSATIONS = [
    {"messages": [SYSTEM, {**USER, "content": f"Number {i}?"}, {**ANSWER, "content": f"It is {i}."}, *MORE]}
    for i in range(20)
]
TRL: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))


def trainer_for(
    folder: Path, rows: Any, template: str | None = PLAIN, model: Any = None, **settings: Any
) -> MeZOTrainer:
    how = {name: settings.pop(name) for name in ("formatting_func", "eval_dataset") if name in settings}
    config = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "eps": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = MeZOConfig(str(folder / "out"), per_device_train_batch_size=2, **{**config, **settings})
    dataset = datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows
    return MeZOTrainer(
        model=support.tiny_model() if model is None else model, args=args, train_dataset=dataset,
        processing_class=chat_tokenizer(template), **how,
    )  # fmt: skip


# --- token by token --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize("name", CASES)
def test_trainer_builds_what_trl_builds(tmp_path: Path, name: str, template: str) -> None:
    rows, settings = CASES[name]
    with (
        pytest.warns(UserWarning, match="1 of 2 rows have nothing to learn within max_length=60")
        if name == "cut"
        else nullcontext()
    ):
        trainer = trainer_for(tmp_path, rows, template, **{"assistant_only_loss": False, **settings})
    found = list(trainer.train_dataset)
    if name != "packed":
        assert [{key: row[key] for key in ("input_ids", "labels")} for row in found] == TRL[name]
        return
    assert [row["input_ids"] for row in found] == [row["input_ids"] for row in TRL[name]]
    for row, expected in zip(found, TRL[name], strict=True):
        assert row["position_ids"] == [place for size in expected["seq_lengths"] for place in range(size)]
        assert [
            label if place else -100 for label, place in zip(expected["labels"], row["position_ids"], strict=True)
        ] == row["labels"]


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_are_those_that_trl_builds(tmp_path: Path, name: str) -> None:
    trainer = trainer_for(tmp_path, PAIRS[name] * 2)
    expected = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in TRL[name]] * 2
    assert [(one.prompt, *one.options) for one in trainer.train_dataset] == expected


def learnt_text(tokenizer: Any, messages: list[dict[str, Any]]) -> list[str]:
    """The stretches of a conversation that are learnt."""
    tokens, learnt = ChatTokens(tokenizer).conversation(messages, "row 1")
    assert tokens == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    stretches: list[list[int]] = []
    for i, (token, counts) in enumerate(zip(tokens, learnt, strict=True)):
        if counts:
            stretches = (
                [*stretches, [token]] if not i or not learnt[i - 1] else [*stretches[:-1], [*stretches[-1], token]]
            )
    return [tokenizer.decode(stretch) for stretch in stretches]


# Drops thoughts from earlier answers, closes the whole with a mark of its own, and names no turn of the assistant's in advance.
_THINKING = (
    "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] | trim + '<eos>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% else %}{{ '<pad>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (PLAIN, ["Lima, on the coast.<eos>\n", "Santiago.<eos>\n"]),
        (MARKED, ["Lima, on the coast.<eos>\n", "Santiago.<eos>\n"]),
        (_THINKING, ["Lima, on the coast.<eos>\n", "<think></think>Santiago.<eos>\n<pad>"]),
        (_THINKING.replace(" and loop.last", ""), ["<think></think>Lima, on the coast.<eos>\n", "<think></think>Santiago.<eos>\n<pad>"]),
        (PLAIN.replace("{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}", ""),
         ["<bos>assistant\nLima, on the coast.<eos>\n", "<bos>assistant\nSantiago.<eos>\n"]),  # nothing asks for the turn
    ],
    ids=["plain", "marked", "thinking", "always thinking", "no request"],
)  # fmt: skip
def test_the_assistants_turns_are_learnt_and_nothing_else(template: str, expected: list[str]) -> None:
    assert learnt_text(chat_tokenizer(template), [SYSTEM, USER, ANSWER, *MORE]) == expected


def test_conversation_that_begins_with_the_assistant() -> None:
    strict = "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}" + PLAIN
    assert learnt_text(chat_tokenizer(strict), [ANSWER, *MORE]) == ["Lima, on the coast.<eos>\n", "Santiago.<eos>\n"]


def test_the_same_words_by_the_user_are_not_learnt() -> None:
    messages = [
        {"role": "user", "content": "Lima."},
        {"role": "assistant", "content": "Lima."},
        {"role": "user", "content": "Lima."},
    ]
    for template in (PLAIN, MARKED, _THINKING):
        assert [text.strip() for text in learnt_text(chat_tokenizer(template), messages)] == ["Lima.<eos>"]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (None, [USER, ANSWER], "has no chat template: choose a model tuned for chat"),
        ("{{ raise_exception('roles must alternate') }}", [USER, ANSWER], r"row 7: the chat template cannot write .*roles must alternate"),
        (PLAIN.replace("m['content'] +", "m['content'] | upper +"), [USER, ANSWER, USER], None),
        ("{% for m in messages %}{{ '<bos>' + m['content'] | upper }}{% endfor %}<eos>{{ messages | length }}", [USER, ANSWER, USER],
         r"row 7: the chat template writes what the assistant said otherwise.*\{% generation %\}"),
        (MARKED.replace("'assistant' %}{% gen", "'robot' %}{% gen"), [USER, ANSWER], "row 7: the chat template marks nothing"),
    ],
    ids=["none", "raises", "upper", "upper inside", "no marks"],
)  # fmt: skip
def test_template_that_cannot_tell(template: str | None, messages: Any, words: str | None) -> None:
    tokens = ChatTokens(chat_tokenizer(template))
    if words is None:  # turns are found without their content
        assert any(tokens.conversation(messages, "row 7")[1])
        return
    with pytest.raises(InputError, match=words):
        tokens.conversation(messages, "row 7")


# --- what rows are ---------------------------------------------------------------------------------------------------


def test_columns_say_what_rows_are() -> None:
    for columns, form in (
        ("messages", "messages"), ("conversations id", "messages"), ("prompt completion", "completion"), ("text meta", "text"),
        ("prompt chosen rejected", "preference"), ("chosen rejected", "preference"), ("prompt", "prompt"), ("body topic", None),
    ):  # fmt: skip
        assert form_of(columns.split()) == form


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER]}, "no turn of column 'messages' is the assistant's"),
        ({"messages": []}, "column 'messages' is empty"),
        ({"messages": "hello"}, "must hold a list of messages, each with role and content, not 'hello'"),
        ({"messages": ["hello"]}, "must hold messages with role and content, not 'hello'"),
        ({"messages": [{"role": "user"}, ANSWER]}, "has no role or no content: {'role': 'user'}"),
        ({"messages": '[{"role": }]'}, "begins like JSON and is none"),
        ({"prompt": "a", "completion": ""}, "column 'completion' is empty"),
        ({"prompt": "a", "completion": [ANSWER]}, "one of its columns is text and another a list"),
        ({"text": 3}, "must hold text or a list of messages"),
        (
            {"body": "a", "mesages": "b"},
            r"has the columns body, mesages, .* write a task file with a prompt; did you mean messages\?",
        ),
    ],
    ids=str,
)
def test_row_that_is_no_conversation_is_said(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row] * 10)
    with pytest.raises(InputError, match=words) as caught:
        load_splits(get_task("chat", str(path)))
    assert str(path) in str(caught.value)


def test_task_chat_needs_data(tmp_path: Path) -> None:
    with refused(
        tmp_path, "task chat has no examples of its own: name a file, a folder or a set of the hub with --data FILE"
    ) as ran:
        ran(cli("eval", "--model", "nothing", "--task", "chat"))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    support.tiny_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


DATA: dict[str, list[dict[str, Any]]] = {
    "messages": CONVERSATIONS,
    "completion": [{"prompt": [row["messages"][1]], "completion": row["messages"][2:3]} for row in CONVERSATIONS],
    "plain completion": [{"prompt": f"{i} and one is", "completion": f" {i + 1}"} for i in range(20)],
    "text": [{"text": f"A line of text, the {i}th."} for i in range(20)],
    "preference": [
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": f"Chile {i}"}]} for i in range(20)
    ],
    "implicit prompt": [
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": f"Chile {i}"}]} for i in range(20)
    ],
}


@pytest.mark.parametrize("name", DATA)
def test_data_are_tuned_on_without_a_task_file(tmp_path: Path, model: Path, name: str) -> None:
    data = write_jsonl(tmp_path / "my.jsonl", DATA[name])
    tuned = ("--tune", "lora") if "preference" in name else ()
    ran = done(
        "train", "--model", model, "--task", "chat", "--data", data, "--steps", 3, "--lr", 1e-2, "--eps", 1e-2, "--batch-size", 4,
        "--device", "cpu", "--output-dir", tmp_path / "run", *tuned,
    )  # fmt: skip
    metrics = read(tmp_path / "run")
    assert metrics["splits"] == {"train": 12, "dev": 4, "test": 4}
    metric = "accuracy" if "chosen" in DATA[name][0] else "token_accuracy"
    assert metrics["metric"] == metric
    assert metric in metrics["test"]
    assert metrics["before"]["loss"] != metrics["test"]["loss"]
    assert f"train: 12 of 16 examples of {data}" in ran.err
    again = done("eval", "--model", tmp_path / "run", "--task", "chat", "--data", data, "--device", "cpu")
    if "chosen" not in DATA[name][0]:
        assert json.loads(again.out)["test"] == pytest.approx(metrics["test"], abs=1e-5)


def test_task_chat_is_not_a_folder_of_that_name_and_a_run_is_resumed_from_elsewhere(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat").mkdir()
    write_jsonl(tmp_path / "my.jsonl", CONVERSATIONS)
    run = ("--steps", 2, "--lr", 1e-3, "--eps", 1e-3, "--device", "cpu", "--dev-examples", 0)
    done("train", "--model", model, "--task", "chat", "--data", "my.jsonl", "--output-dir", tmp_path / "run", *run)
    assert read(tmp_path / "run")["settings"]["task"] == "chat"
    monkeypatch.chdir(model)
    done("train", "--output-dir", tmp_path / "run", "--resume", "--steps", 4)
    assert read(tmp_path / "run")["steps"] == 4


def test_csv_of_prompts_and_completions(tmp_path: Path, model: Path) -> None:
    lines = [f'"{row["prompt"]}";"{row["completion"]}"' for row in DATA["plain completion"]]
    (tmp_path / "my.csv").write_text("\n".join(["prompt;completion", *lines]))
    (tmp_path / "chat.csv").write_text(
        "id,messages\n" + "".join(f'{i},"{json.dumps(row["messages"])}"\n'.replace('"', '""').replace('""', '"', 1)[:-3] + '"\n'
                                 for i, row in enumerate(CONVERSATIONS))
    )  # fmt: skip
    for name in ("my.csv", "chat.csv"):
        ran = done("eval", "--model", model, "--task", "chat", "--data", tmp_path / name, "--device", "cpu")
        assert json.loads(ran.out)["test"]["examples"] == 4


def test_prompts_alone_are_rewarded(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat_rewards.py").write_text(
        "def short(completions):\n    return [-float(len(c)) for c in completions]\n"
    )
    data = write_jsonl(tmp_path / "my.jsonl", [{"prompt": [{**USER, "content": f"{i}?"}]} for i in range(20)])
    ran = done(
        "eval",
        "--model",
        model,
        "--task",
        "chat",
        "--data",
        data,
        "--objective",
        "chat_rewards.py:short",
        "--device",
        "cpu",
    )
    assert json.loads(ran.out)["metric"] == "reward"


@torch.no_grad()
def test_loss_is_that_of_the_assistants_tokens() -> None:
    """The definition: one conversation at a time, all logits, the mean over the learnt tokens. In packed rows it is the same."""
    net, tokenizer = sharp_model(), chat_tokenizer()
    task = TASK.of_form("messages")
    examples = [task.example(row, f"row {i}") for i, row in enumerate(CONVERSATIONS[:6])]
    chat, losses, shares = ChatTokens(tokenizer), [], []
    for example in examples:
        tokens, learnt = chat.of_row(example.row, "messages", "")
        logits = net(input_ids=torch.tensor([tokens])).logits[0].float()
        places = [i for i, counts in enumerate(learnt) if counts]
        losses.append(-torch.stack([logits[i - 1].log_softmax(0)[tokens[i]] for i in places]).mean())
        shares.append(sum(int(logits[i - 1].argmax()) == tokens[i] for i in places) / len(places))
    encoded = Encoder(tokenizer, 200)(task, examples)
    for layout in (None, plain_layout(net, tokenizer)):
        outcomes: list[float] = []
        found = evaluate(net, tokenizer, task, encoded, layout=layout, batch_size=4, outcomes=outcomes)
        torch.testing.assert_close(torch.tensor(found["loss"]), torch.stack(losses).mean(), **CLOSE)
        assert outcomes == pytest.approx(shares)
        assert found["token_accuracy"] == pytest.approx(sum(shares) / 6)


def test_what_is_too_long_is_cut_on_the_right_and_left_out_if_nothing_is_learnt() -> None:
    tokenizer, task = chat_tokenizer(), TASK.of_form("messages")
    rows = [{"messages": [USER, ANSWER, *MORE]}, {"messages": [{**USER, "content": "long " * 60}, ANSWER]}]
    examples = [task.example(row, f"a.jsonl, example {i + 1}") for i, row in enumerate(rows)]
    encoder = Encoder(tokenizer, 60)
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 examples have nothing to learn within 60 tokens, the first of them a\.jsonl, example 2",
    ):
        (kept,) = encoder(task, examples)
    assert (kept.length < 60, encoder.truncated) == (True, 2)
    whole = Encoder(tokenizer, 1000)(task, examples[:1])[0]
    assert (kept.prompt, kept.options[0]) == (whole.prompt, whole.options[0][: len(kept.options[0])])
    with pytest.raises(InputError, match=r"1 of 1 examples have nothing .*raise max_length"):
        Encoder(tokenizer, 30)(task, examples[1:])


def test_control_tokens_in_messages_are_told() -> None:
    task = TASK.of_form("messages")
    example = task.example({"messages": [{**USER, "content": "end <eos> here"}, ANSWER]}, "a.jsonl, example 1")
    with pytest.warns(
        UserWarning, match=r"messages of 1 of 1 examples hold .* control tokens, the first in a\.jsonl, example 1"
    ):
        Encoder(chat_tokenizer(), 200)(task, [example])


# --- MeZOTrainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dataset", "list", "iterable", "packed", "formatting", "example"])
def test_trainer_takes_conversations(tmp_path: Path, kind: str) -> None:
    rows: Any = CONVERSATIONS
    how: dict[str, Any] = {"dataset": {}, "packed": {"packing": True, "max_length": 200, "eval_packing": False}}.get(
        kind, {}
    )
    if kind == "iterable":
        rows = datasets.IterableDataset.from_generator(lambda: iter(CONVERSATIONS))
    if kind == "formatting":
        how = {"formatting_func": lambda row: row["messages"][1]["content"]}
    if kind == "example":
        how = {"assignment": "example"}
    trainer = trainer_for(tmp_path, rows, eval_dataset=datasets.Dataset.from_list(CONVERSATIONS[:4]), **how)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    assert trainer.evaluate(CONVERSATIONS[:4])["eval_loss"] == trainer.evaluate()["eval_loss"]
    base = support.tiny_model()
    replay(trainer.step_log, base)
    support.assert_same_bits(base, support.snapshot(trainer.model))


@pytest.mark.parametrize("name", ["preference", "implicit prompt"])
def test_trainer_takes_preferences(tmp_path: Path, name: str) -> None:
    """At first the model is its own reference, and every loss is log 2; then chosen texts gain."""
    settings: dict[str, Any] = {"max_steps": 20, "learning_rate": 3e-2, "eps": 1e-2, "beta": 0.5}
    trainer = trainer_for(tmp_path, DATA[name], eval_dataset=datasets.Dataset.from_list(DATA[name][:6]), **settings)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < math.log(2) - 0.01
    with pytest.raises(InputError, match="pass them as eval_dataset to MeZOTrainer"):
        trainer.evaluate(DATA[name][:2])
    pairs = [
        ChatTokens(chat_tokenizer()).of_pair(TASK.of_form("preference").example(row, "").row, "") for row in DATA[name]
    ]
    assert [(one.prompt, *one.options) for one in trainer.train_dataset] == pairs


@torch.no_grad()
def test_packed_rows_have_the_losses_of_their_sequences(tmp_path: Path) -> None:
    model = sharp_model()
    alone = trainer_for(tmp_path, CONVERSATIONS[:8], model=model)
    packed = trainer_for(tmp_path, CONVERSATIONS[:8], model=model, packing=True, max_length=200)
    assert len(packed.train_dataset) < len(alone.train_dataset) == 8
    totals = []
    for trainer in (alone, packed):
        batch = trainer.data_collator(list(trainer.train_dataset))
        counted = (batch["labels"][:, 1:] != -100).sum()
        totals.append(trainer.compute_loss(model, batch) * counted)
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-5, atol=1e-3)


def test_model_that_mixes_packed_sequences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="MambaForCausalLM does not keep the sequences of a packed row apart: leave packing out"
    ):
        trainer_for(tmp_path, CONVERSATIONS, model=support.tiny_model("mamba"), packing=True, max_length=200)


def test_trainer_says_what_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="train_dataset holds prompts alone, of which nothing can be learnt without a reward"
    ):
        trainer_for(tmp_path, [{"prompt": "a"}])
    with pytest.raises(InputError, match=r"packing needs max_length"):
        trainer_for(tmp_path, CONVERSATIONS, packing=True, max_length=None)
    with pytest.raises(InputError, match="formatting_func must return text, not 3"):
        trainer_for(tmp_path, CONVERSATIONS, formatting_func=lambda row: 3)
    with pytest.raises(InputError, match="formatting_func makes texts of rows, and the data have tokens"):
        trainer_for(tmp_path, [{"input_ids": [1, 2], "labels": [1, 2]}], formatting_func=str)
    with pytest.raises(InputError, match=r"row 2: no turn of column 'messages' is the assistant's"):
        trainer_for(tmp_path, [CONVERSATIONS[0], {"messages": [USER]}])
    args = MeZOConfig(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(InputError, match="pass processing_class=tokenizer"):
        MeZOTrainer(support.tiny_model(), args, train_dataset=datasets.Dataset.from_list(CONVERSATIONS))
