"""``--general-text``: the loss of every token of a text that is not the task's, and its change, paired by token."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import support
from forwardtune import forgetting
from forwardtune.errors import InputError
from forwardtune.forgetting import compared, measured, read_general, token_losses
from forwardtune.run_folder import forgetting as sentence
from support.command import done, message_of, read, write_task

TEXT = " ".join(support.TEXT * 3)


def opened() -> Any:
    """A tokenizer that opens every text with a mark."""
    from tokenizers.processors import TemplateProcessing

    made = support.tokenizer()
    token = made.convert_ids_to_tokens(7)
    made._tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, 7)])
    assert made("a")["input_ids"][0] == 7
    return made


@pytest.mark.parametrize("marked", [False, True], ids=["no mark", "opening mark"])
def test_losses_of_a_causal_model_are_those_of_one_prefix_after_another(
    monkeypatch: pytest.MonkeyPatch, marked: bool
) -> None:
    monkeypatch.setattr(forgetting, "_WINDOW", 10)
    model, tokenizer = support.tiny_model(), opened() if marked else support.tokenizer()
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    size = 9 if marked else 10
    expected = []
    for lo in range(0, len(tokens), size):
        window = tokens[lo : lo + size]
        for place in range(0 if marked else 1, len(window)):
            before = torch.tensor([[*([7] if marked else []), *window[:place]]])
            with torch.no_grad():
                likely = model(before).logits[0, -1].float().log_softmax(0)
            expected.append(-float(likely[window[place]]))
    assert token_losses(model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-4)


def test_losses_of_a_masked_model_are_those_of_tokens_that_it_cannot_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "_WINDOW", 20)
    monkeypatch.setattr(forgetting, "_MASKED", 4)
    model, tokenizer = support.tiny_model("bert"), support.tokenizer()
    with pytest.raises(InputError, match="has no mask"):
        token_losses(model, tokenizer, TEXT)
    tokenizer.mask_token = tokenizer.convert_ids_to_tokens(9)
    tokens, mask = tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.mask_token_id
    expected = []
    for lo in range(0, len(tokens), 20):
        window = tokens[lo : lo + 20]
        for place, token in enumerate(window):
            hidden = [mask if i % 4 == place % 4 else one for i, one in enumerate(window)]
            with torch.no_grad():
                expected.append(-float(model(torch.tensor([hidden])).logits[0, place].float().log_softmax(0)[token]))
    assert token_losses(model, tokenizer, TEXT) == pytest.approx(expected, rel=1e-4)


def test_ten_thousand_tokens_of_a_longer_text_are_scored() -> None:
    tokenizer = support.tokenizer()
    scored = len(token_losses(support.tiny_model(), tokenizer, TEXT * 300))
    assert 10_000 < scored < 11_000 < len(tokenizer(TEXT * 300)["input_ids"])
    whole = tokenizer(TEXT)["input_ids"]
    assert len(token_losses(support.tiny_model(), tokenizer, TEXT)) == len(whole) - 2  # two windows


def test_differences_are_paired() -> None:
    before, after = [1.0, 5.0, 2.0], [1.5, 5.5, 3.5]
    found = compared(before, after)
    mean = 2.5 / 3
    deviation = math.sqrt(((0.5 - mean) ** 2 * 2 + (1.5 - mean) ** 2) / 2)
    assert found["difference"] == pytest.approx(mean)
    assert found["standard_error"] == pytest.approx(deviation / math.sqrt(3))
    assert (found["before"], found["after"], found["tokens"]) == (measured(before), measured(after), 3)
    assert measured(before) == pytest.approx({"loss": 8 / 3, "perplexity": math.exp(8 / 3)})


def test_the_packaged_text_is_a_few_thousand_words() -> None:
    words = read_general("packaged").split()
    assert 3000 < len(words) < 5000
    assert len(set(words)) > 1000


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file"), (b"", "no two words"), (b"\xff\xfe\x00w", "no text in UTF-8")]
)
def test_a_text_that_cannot_be_used_is_refused_before_anything_is_opened(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_general(str(file))
    for command in ("train", "eval"):
        told = message_of(
            command, "--model", "absent", "--task", "absent", "--output-dir", tmp_path / "run", "--general-text", file
        )
        assert why in told
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_it_forgot(tiny_folder: Path, tmp_path: Path) -> None:
    task, text, folder = write_task(tmp_path), tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    told = done(
        "train", "--model", tiny_folder, "--task", task, "--steps", 4, "--lr", 1e-2, "--eps", 1e-3, "--batch-size", 2,
        "--device", "cpu", "--general-text", text, "--output-dir", folder,
    ).err  # fmt: skip
    facts = read(folder)["general_text"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    losses = [
        token_losses(AutoModelForCausalLM.from_pretrained(place), tokenizer, TEXT) for place in (tiny_folder, folder)
    ]
    expected = compared(*losses)
    assert facts["text"] == str(text)
    assert facts["difference"] == pytest.approx(expected["difference"], rel=1e-4)
    assert facts["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-4)
    assert facts["difference"] != 0
    said = sentence(read(folder))
    assert f"tokens of text.txt): {facts['before']['perplexity']:.4g} before" in said
    done("report", folder, "--no-plots")
    page = (folder / "report" / "report.html").read_text().replace("&#43;", "+")
    for place in (told, (folder / "README.md").read_text(), page):
        assert said in place
    # More steps: what it was before the run is not measured again, on another model.
    told = done("train", "--output-dir", folder, "--resume", "--steps", 6).err
    assert ("general text before" in told, "general text after" in told) == (False, True)
    again = read(folder)["general_text"]
    assert again["before"] == facts["before"]
    out = done("eval", "--model", folder, "--task", task, "--general-text", text, "--device", "cpu").out
    assert f'"loss": {again["after"]["loss"]:.6f}'[:14] in out
