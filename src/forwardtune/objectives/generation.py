"""What a model writes: batched generation with a key-value cache, up to a stop string."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

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


@dataclass(frozen=True)
class Written:
    """What a model wrote, one entry for each prompt.

    Attributes:
        texts: up to the stop string, stripped.
        tokens: as they were written, the stop string's among them; without the end-of-text token and padding.
    """

    texts: list[str]
    tokens: list[list[int]]


# What a model's own generation_config.json may ask for otherwise: we want its distribution as it is.
_PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def generate(
    model: Any,
    tokenizer: Any,
    task: Task,
    prompts: Sequence[Sequence[int]],
    context: Context | None = None,
    sampling: Sampling = GREEDY,
) -> list[str]:
    """The texts of :func:`write`."""
    return write(model, tokenizer, task, prompts, context, sampling).texts


@torch.no_grad()
def write(
    model: Any,
    tokenizer: Any,
    task: Task,
    prompts: Sequence[Sequence[int]],
    context: Context | None = None,
    sampling: Sampling = GREEDY,
) -> Written:
    """Continuations of tokenised prompts, up to the task's stop string.

    Args:
        context: what all prompts begin with, if it was processed already.
    """
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    known = 0 if context is None else len(context.tokens)
    # Padding stands on the left, but behind what is common to all.
    fills = [width - len(prompt) for prompt in prompts]
    rows = [[*p[:known], *[pad] * fill, *p[known:]] for p, fill in zip(prompts, fills, strict=True)]
    seen = [[1] * known + [0] * fill + [1] * (width - known - fill) for fill in fills]
    options: dict[str, Any] = (
        {"stopping_criteria": _stopping(tokenizer, len(tokenizer), task.stop)} if task.stop else {}
    )
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
    texts = [(text.split(task.stop)[0] if task.stop else text).strip() for text in texts]
    ends = {pad, *_listed(model.generation_config.eos_token_id), *_listed(tokenizer.eos_token_id)}
    return Written(texts, [list(takewhile(lambda t: t not in ends, row)) for row in out[:, width:].tolist()])


def _listed(tokens: int | list[int] | None) -> list[int]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


@lru_cache(maxsize=4)
def _stopping(tokenizer: Any, size: int, stop: str) -> StoppingCriteriaList:
    """The stop string's criterion. Making it goes through the vocabulary, which would be a tenth of a short generation.

    Args:
        size: of the vocabulary: the criterion is made anew when tokens were added.
    """
    return StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
