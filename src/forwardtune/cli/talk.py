"""``forwardtune generate | chat``: text from a tuned model, as it is written, and from the untuned one beside it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models import context_length, load_model, model_kind
from ..objectives.generation import dense_head
from ..run_folder import RunFolder, is_run
from ..tasks.tokens import Tokens, padding_id
from . import say
from .model import open_model
from .options import ask

# Columns where there is no terminal to ask.
_WIDTH = 100


@dataclass
class Voice:
    """A model that can be asked for text.

    Attributes:
        name: ``before`` or ``after``.
        inside: a context in which the model has the weights that are asked.
    """

    name: str
    model: Any
    tokenizer: Any
    options: Any
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def write(self, tokens: Sequence[int], *, stream: bool) -> str:
        """What the model writes behind these tokens; with ``stream``, printed to stdout as it comes."""
        from transformers import TextStreamer

        inputs = torch.tensor([list(tokens)], device=self.model.device)
        how: dict[str, Any] = {"do_sample": False}
        if self.options.temperature:
            how = {"do_sample": True, "temperature": self.options.temperature}
            torch.manual_seed(self.options.seed)
        if stream:
            how["streamer"] = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with self.inside(), dense_head(self.model):
            written = self.model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.options.max_new_tokens,
                pad_token_id=padding_id(self.tokenizer),
                **how,
            )
        return str(self.tokenizer.decode(written[0, len(tokens) :], skip_special_tokens=True))

    @property
    def room(self) -> int:
        """The longest prompt, in tokens."""
        return context_length(self.model) - self.options.max_new_tokens


def run_generate(parsed: argparse.Namespace) -> None:
    """Write on behind a text."""
    options = ask(parsed, "generate").describe()
    prompts = list(parsed.prompt or [])
    if not prompts:
        if sys.stdin.isatty():
            raise InputError("there is no text to go on from: give --prompt, or text on stdin")
        prompts = [sys.stdin.read().rstrip("\n")]
    if any(not prompt.strip() for prompt in prompts):
        raise InputError("the prompt is empty: give --prompt, or text on stdin")
    voices = _voices(options)
    texts = Tokens(voices[-1].tokenizer)
    for prompt in prompts:
        tokens = texts.open(prompt)
        if len(tokens) > voices[-1].room:
            raise InputError(
                f"the prompt has {len(tokens)} tokens, and {voices[-1].room} fit beside --max-new-tokens "
                f"{options.max_new_tokens}: shorten it, or lower that"
            )
        stream = not (parsed.json or options.compare)
        written = {voice.name: voice.write(tokens, stream=stream) for voice in voices}
        if parsed.json:
            before = {"before": written["before"]} if "before" in written else {}
            print(json.dumps({"prompt": prompt, "completion": written["after"], **before}, ensure_ascii=False))
        elif options.compare:
            print(side_by_side(written))


def run_chat(parsed: argparse.Namespace) -> None:
    """A conversation, line by line, until the end of the input."""
    options = ask(parsed, "chat").describe()
    voices = _voices(options)
    if not getattr(voices[-1].tokenizer, "chat_template", None):
        raise InputError(
            f"the tokenizer of {options.model} has no chat template: talk to a model that was trained to, such as an "
            "instruct model, or use forwardtune generate"
        )
    begun = [{"role": "system", "content": options.system}] if options.system else []
    said = {voice.name: list(begun) for voice in voices}
    if sys.stdin.isatty():
        say("Ctrl-D ends the conversation, /new begins another")
    for line in _lines():
        if line.strip() == "/new":
            said = {voice.name: list(begun) for voice in voices}
            continue
        if not line.strip():
            continue
        written = {}
        for voice in voices:
            messages = said[voice.name]
            messages.append({"role": "user", "content": line.strip()})
            tokens = _fitting(voice, messages)
            if tokens is None:
                say("that is longer than the model can read: say it in fewer words")
                messages.pop()
                continue
            written[voice.name] = voice.write(tokens, stream=len(voices) == 1)
            messages.append({"role": "assistant", "content": written[voice.name]})
        if len(voices) > 1 and written:
            print(side_by_side(written), flush=True)


def _lines() -> Iterator[str]:
    """What the user says: with line editing at a terminal, without a word to anybody else."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  # gives input() a history
    except ImportError:  # there is none on Windows
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _fitting(voice: Voice, messages: list[dict[str, str]]) -> list[int] | None:
    """The conversation in tokens, as the tokenizer's template writes it; its oldest turns go if it is too long for the model.

    None if the last message alone is too long.
    """
    first = 1 if messages[0]["role"] == "system" else 0
    dropped = 0
    while True:
        text = voice.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = Tokens(voice.tokenizer).open(text)
        if len(tokens) <= voice.room:
            break
        if len(messages) < first + 3:
            return None
        del messages[first : first + 2]
        dropped += 1
    if dropped:
        say(f"the model reads no more than {voice.room} tokens: the oldest {dropped} questions are forgotten")
    return tokens


# --- before and after -------------------------------------------------------------------------------------------------


def _voices(options: Any) -> list[Voice]:
    """The tuned model, behind the untuned one where they are compared."""
    folder = Path(options.model).expanduser()
    run = RunFolder(folder) if is_run(folder) else None
    adapted = (folder / "adapter_config.json").is_file()
    base = run.settings.get("model") if run is not None else None
    if options.compare and not adapted and base is None:
        raise InputError(f"--compare needs to know what {options.model} was before: give the folder of a run")
    model, tokenizer = open_model(options)
    if model_kind(model) != "causal":
        raise InputError(f"{options.model} is a masked model, which writes no text: use forwardtune predict or eval")
    after = Voice("after", model, tokenizer, options)
    if not options.compare:
        return [after]
    if adapted:  # the same weights, beside which the adapter is put aside
        return [Voice("before", model, tokenizer, options, model.disable_adapter), after]
    say(f"loading {base}")
    dtype = str(model.dtype).removeprefix("torch.")
    return [Voice("before", *load_model(str(base), dtype=dtype, device=options.device), options), after]


def side_by_side(texts: dict[str, str], width: int | None = None) -> str:
    """Texts in columns under their names, as wide as the terminal."""
    width = width or shutil.get_terminal_size((_WIDTH, 0)).columns
    each = max(20, (width - 3 * (len(texts) - 1)) // len(texts))
    columns = [
        [
            name,
            "-" * each,
            *(piece for line in text.strip().splitlines() for piece in textwrap.wrap(line, each) or [""]),
        ]
        for name, text in texts.items()
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(cell.ljust(each) for cell in row).rstrip() for row in rows)
