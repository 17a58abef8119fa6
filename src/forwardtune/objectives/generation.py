"""What a model writes: batched generation with a key-value cache, up to a stop string."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..storage import device_of
from ..tasks import Task
from ..tasks.tokens import padding_id


@dataclass(frozen=True)
class Context:
    """A common beginning of prompts, and the keys and values that a model computed for it."""

    tokens: list[int]
    cache: Any

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, tokens: list[int]) -> Context:
        """The keys and values that the model computes now, in one forward pass over the tokens."""
        ids = torch.tensor([tokens], device=device_of(model))
        return cls(tokens, model(input_ids=ids, use_cache=True).past_key_values)

    def repeated(self, rows: int) -> Any:
        """A cache of one's own for so many rows; the model extends what it is given."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        return cache


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    The same seed gives the same draws at both points of a probe, so that their difference is that of the weights. torch's
    global random state is left alone.
    """

    temperature: float = 0.0  # 0 takes the likeliest token; otherwise they are drawn from softmax(logits / temperature)
    seed: int = 0


GREEDY = Sampling()


@dataclass(frozen=True)
class Written:
    """What a model wrote, one entry for each prompt."""

    texts: list[str]  # up to the stop string, stripped
    tokens: list[list[int]]  # the stop string's among them; without the end-of-text token and padding


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
    """Continuations of tokenised prompts; ``context`` is what all of them begin with, if it was processed already."""
    width, pad = max(map(len, prompts)), padding_id(tokenizer)
    known = 0 if context is None else len(context.tokens)
    # Padding stands on the left, but behind what is common to all.
    fills = [width - len(prompt) for prompt in prompts]
    rows = [[*p[:known], *[pad] * fill, *p[known:]] for p, fill in zip(prompts, fills, strict=True)]
    seen = [[1] * known + [0] * fill + [1] * (width - known - fill) for fill in fills]
    stop = _Stop(tokenizer, task.stop, width)
    options: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([stop])} if task.stop else {}
    if context is not None:
        options["past_key_values"] = context.repeated(len(rows))
    if sampling.temperature:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    draws = _seeded(device_of(model), sampling.seed) if sampling.temperature else nullcontext()
    with draws, dense_head(model):
        out = model.generate(
            input_ids=torch.tensor(rows, device=device_of(model)),
            attention_mask=torch.tensor(seen, device=device_of(model)),
            max_new_tokens=task.max_new_tokens,
            pad_token_id=pad,
            **{"do_sample": False, **_PLAIN, **options},
        )
    own_ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, *(own_ends if isinstance(own_ends, list) else [own_ends])}
    # Behind the stop string stands padding or, if the model has no end-of-text token, what it wrote while others went on.
    rows = [row[: stop.ended.get(i)] for i, row in enumerate(out[:, width:].tolist())]
    tokens = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Written([(text.split(task.stop)[0] if task.stop else text).strip() for text in texts], tokens)


class _Stop(StoppingCriteria):
    """Ends a row when the text that it wrote holds the stop string.

    ``StopStringCriteria`` of transformers looks tokens up by their own texts, and fails on a vocabulary whose tokens read
    otherwise one after the other, such as words that are joined by spaces. Here the end of what was written is decoded.
    """

    def __init__(self, tokenizer: Any, stop: str, begin: int) -> None:
        self._tokenizer, self._stop, self._begin = tokenizer, stop, begin
        # A token reads as a byte at least; the first ones may read otherwise than behind others.
        self._tail = len(stop.encode()) + 4
        self.ended: dict[int, int] = {}  # row -> how many tokens it wrote, up to the stop string and with it

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        written = input_ids.shape[1] - self._begin
        open_rows = [row for row in range(len(input_ids)) if row not in self.ended]
        tails = input_ids[:, self._begin :][open_rows, -self._tail :].tolist()
        for row, text in zip(open_rows, self._tokenizer.batch_decode(tails), strict=True):
            if self._stop in text:
                self.ended[row] = written
        return torch.tensor([row in self.ended for row in range(len(input_ids))], device=input_ids.device)


@contextmanager
def dense_head(model: Any) -> Iterator[None]:
    """Inside, the vocabulary head gets rows without gaps between them.

    The last positions of a batch, of which generation takes the logits, have gaps. torch multiplies such rows by a weight that
    requires no grad as a batch of products, for which it may copy the whole weight once for every row of the batch.
    """

    def close(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)

    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(close)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
