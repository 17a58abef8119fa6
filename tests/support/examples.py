"""Encoded examples of random tokens, and models whose logits tell them apart."""

from __future__ import annotations

from typing import Any

import torch

from forwardtune.tasks.encoding import Encoded

from .models import VOCABULARY, tiny_model, token_batch, tokenizer

TOKENIZER = tokenizer()
PLAIN = [i for i in range(3, VOCABULARY) if (text := TOKENIZER.decode([i])).isascii() and text.isprintable()]


def tokens(count: int, seed: int) -> list[int]:
    return token_batch(1, count, seed)[0].tolist()


def encoded(prompt: int, *options: int, label: int = 0, **more: Any) -> Encoded:
    """An example with so many tokens in its prompt and options."""
    return Encoded(tokens(prompt, prompt), [tokens(n, 100 * i + n) for i, n in enumerate(options)], (label,), **more)


def sharp(model: Any) -> Any:
    """A model whose attention matters: a freshly initialised one looks at nothing in particular."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model


def sharp_model(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return sharp(tiny_model(family, dtype))


def talking_model(family: str = "llama") -> Any:
    """A model that produces printable text, and not the same token for ever."""
    model = sharp_model(family)
    head = torch.zeros(VOCABULARY, 32)
    head[PLAIN] = torch.randn(len(PLAIN), 32, generator=torch.Generator().manual_seed(3))
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    return model
