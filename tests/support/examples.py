"""Encoded examples of random tokens, and models that have something to say of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import support
from forwardtune.tasks import Task
from forwardtune.tasks.batching import Layout
from forwardtune.tasks.encoding import Encoded

TOKENIZER = support.tokenizer()
CHOICE = Task("choice", "{text}", "label", {"0": "a", "1": "b"}, "accuracy")

# Layouts compute the same sums in float32, but batched matrix products and attention over longer rows add in another
# order: a few hundred additions of numbers up to 10 err by at most 1e-5.
CLOSE: dict[str, float] = {"rtol": 0.0, "atol": 1e-5}

PLAIN = [i for i in range(3, support.VOCABULARY) if (text := TOKENIZER.decode([i])).isascii() and text.isprintable()]

LAYOUTS = [None, *(Layout(0, shared=shared, packed=packed) for shared in (True, False) for packed in (True, False))]
every_layout = pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda found: f"shared={found.shared},packed={found.packed}" if found else "default"
)


def sharpened(model: Any) -> Any:
    """A model whose attention matters: a freshly initialised one looks at nothing in particular."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def sharp_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return sharpened(support.tiny_model(family, dtype))


def talking_model(family: str = "llama") -> Any:
    """A model that produces printable text, and not the same token for ever."""
    model = sharp_model(family)
    head = torch.zeros(support.VOCABULARY, 32)
    head[PLAIN] = torch.randn(len(PLAIN), 32, generator=torch.Generator().manual_seed(3))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    return model


@contextlib.contextmanager
def inputs_of(model: Any) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the token ids of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    embeddings = model.get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


def tokens(count: int, seed: int) -> list[int]:
    return support.token_batch(1, count, seed)[0].tolist()


def encoded(prompt: int, *options: int, label: int = 0, scored: int = 0) -> Encoded:
    """An example with so many tokens in its prompt and options."""
    texts = [tokens(n, 100 * i + n) for i, n in enumerate(options)]
    return Encoded(tokens(prompt, prompt), texts, (label,), scored=scored)


@torch.no_grad()
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
