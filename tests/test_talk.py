"""Text from a tuned model: written on, in conversation, and beside what the untuned model says."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import support
from forwardtune.cli.talk import side_by_side
from support.command import Setting, cli, done, refused, write_task

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
TOKENS = 12


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A tiny model whose tokenizer has a chat template."""
    folder = support.save_tiny_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return Setting(folder, write_task(tmp_path_factory.mktemp("task")))


@pytest.fixture(scope="module")
def runs(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run over all weights, and one of an adapter, far enough that they write something else."""
    folder = tmp_path_factory.mktemp("runs")
    done(*setting.train(folder / "all", lr=0.05))
    done(*setting.train(folder / "lora", lr=30.0, tune="lora", lora_targets="q_proj,v_proj,o_proj,down_proj"))
    return {name: folder / name for name in ("all", "lora")}


def expected(model: Any, folder: Path, text: str) -> str:
    """What transformers writes by itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def say_to(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.mark.parametrize("tuned", ["all", "lora"])
def test_generate_writes_what_transformers_writes(setting: Setting, runs: dict[str, Path], tuned: str) -> None:
    from peft import AutoPeftModelForCausalLM

    load = AutoPeftModelForCausalLM if tuned == "lora" else AutoModelForCausalLM
    text = "the film was"
    after = expected(load.from_pretrained(runs[tuned]).eval(), runs[tuned], text)
    before = expected(AutoModelForCausalLM.from_pretrained(setting.model).eval(), setting.model, text)
    assert before != after
    command = ["generate", "--model", runs[tuned], "--prompt", text, "--max-new-tokens", TOKENS]
    assert done(*command).out.strip() == after.strip()
    assert json.loads(done(*command, "--json").out) == {"prompt": text, "completion": after}
    both = json.loads(done(*command, "--compare", "--json").out)
    assert both == {"prompt": text, "completion": after, "before": before}
    columns = done(*command, "--compare").out
    assert columns == side_by_side({"before": before, "after": after}) + "\n"


def test_texts_stand_side_by_side() -> None:
    assert side_by_side({"before": "one two three four five six", "after": "a\n\nb"}, 43).splitlines() == [
        "before               | after",
        "-------------------- | --------------------",
        "one two three four   | a",
        "five six             |",
        "                     | b",
    ]


def test_generate_reads_stdin_and_draws_by_a_seed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["generate", "--model", setting.model, "--max-new-tokens", TOKENS]
    say_to(monkeypatch, "the film was\n")
    assert done(*command).out == done(*command, "--prompt", "the film was").out
    drawn = [done(*command, "--prompt", "a", "--temperature", 1, "--seed", seed).out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_chat_remembers_and_uses_the_template(
    setting: Setting, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(runs["all"]).eval()
    begin = "<system>be short\n<user>a film\n<assistant>"
    first = expected(model, runs["all"], begin)
    second = expected(model, runs["all"], f"{begin}{first}\n<user>and the dog\n<assistant>")
    say_to(monkeypatch, "a film\n\nand the dog\n/new\na film\n")
    command = ["chat", "--model", runs["all"], "--max-new-tokens", TOKENS, "--system", "be short"]
    assert done(*command).out == f"{first}\n{second}\n{first}\n"
    say_to(monkeypatch, "a film\n")
    before = expected(AutoModelForCausalLM.from_pretrained(setting.model).eval(), setting.model, begin)
    assert done(*command, "--compare").out == side_by_side({"before": before, "after": first}) + "\n"


def test_chat_forgets_the_oldest_questions(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model reads 256 tokens."""
    say_to(monkeypatch, "\n".join(["a film " * 20, "and a dog " * 20, "x " * 400, "a film"]) + "\n")
    ran = done("chat", "--model", runs["all"], "--max-new-tokens", 100)
    assert "the oldest 1 questions are forgotten" in ran.err
    assert "say it in fewer words" in ran.err


def test_chat_at_a_terminal(runs: dict[str, Path]) -> None:
    """A prompt, an answer as it is written, and Ctrl-D."""
    own, other = pty.openpty()
    command = [sys.executable, "-m", "forwardtune", "chat", "--model", str(runs["all"]), "--max-new-tokens", "4"]
    with subprocess.Popen(command, stdin=other, stdout=other, stderr=subprocess.PIPE, close_fds=True) as child:
        os.close(other)
        try:
            until(own, b"> ")
            os.write(own, b"a film\n")
            until(own, b"> ")
            os.write(own, b"\x04")
            _, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert child.returncode == 0, err
    assert b"Ctrl-D ends the conversation" in err


def until(terminal: int, words: bytes, seconds: float = 60) -> None:
    """Read until the words are shown."""
    shown, deadline = b"", time.monotonic() + seconds
    while words not in shown:
        assert select.select([terminal], [], [], max(0, deadline - time.monotonic()))[0], shown
        shown += os.read(terminal, 4096)


def test_what_cannot_talk_is_refused(setting: Setting, runs: dict[str, Path], tiny_folder: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    say_to(monkeypatch, "")
    masked = support.save_tiny_model(tmp_path / "bert", "bert")
    for words, command in (
        ("no chat template.*forwardtune generate", ["chat", "--model", tiny_folder]),
        ("the prompt is empty", ["generate", "--model", tiny_folder]),
        ("--compare needs to know", ["generate", "--model", tiny_folder, "--prompt", "a", "--compare"]),
        ("masked model", ["generate", "--model", masked, "--prompt", "a"]),
        (
            "fit beside --max-new-tokens 250",
            ["generate", "--model", tiny_folder, "--prompt", "a " * 20, "--max-new-tokens", 250],
        ),
    ):
        with refused(tmp_path, words) as ran:
            ran(cli(*command))
