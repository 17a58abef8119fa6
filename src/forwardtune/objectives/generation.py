"""What a model writes: batched generation with a key-value cache, up to a stop string."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..tasks import Task


@dataclass(frozen=True)
class Context:
    """A common beginning of prompts, and the keys and values that a model computed for it."""

    tokens: list[int]
    cache: Any

    def repeated(self, rows: int) -> Any:
        """A cache of one's own for so many rows; the model extends what it is given."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from ``softmax(logits / temperature)``.
        seed: of the draws. The same seed gives the same draws at both points of a probe, so that their difference is
            that of the weights. torch's global random state is left alone.
    """

    temperature: float = 0.0
    seed: int = 0


GREEDY = Sampling()

# What a model's own generation_config.json may ask for otherwise: we want its distribution as it is.
_PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    prompts: Sequence[Sequence[int]],
    context: Context | None = None,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """Continuations of tokenised prompts, up to the task's stop string, stripped.

    Args:
        context: what all prompts begin with, if it was processed already.
    """
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    known = 0 if context is None else len(context.tokens)
    # Padding stands on the left, but behind what is common to all.
    fills = [width - len(prompt) for prompt in prompts]
    rows = [[*p[:known], *[pad] * fill, *p[known:]] for p, fill in zip(prompts, fills, strict=True)]
    seen = [[1] * known + [0] * fill + [1] * (width - known - fill) for fill in fills]
    options: dict[str, Any] = {"stop_strings": [task.stop], "tokenizer": tokenizer} if task.stop else {}
    if context is not None:
        options["past_key_values"] = context.repeated(len(rows))
    if sampling.temperature:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    with _seeded(model.device, sampling.seed) if sampling.temperature else nullcontext():
        out = model.generate(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(seen, device=model.device),
            max_new_tokens=task.max_new_tokens,
            pad_token_id=pad,
            **{"do_sample": False, **_PLAIN, **options},
        )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [(text.split(task.stop)[0] if task.stop else text).strip() for text in texts]


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
