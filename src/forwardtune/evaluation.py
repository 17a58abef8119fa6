"""L5: measuring a model on the held-out examples of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .objectives import option_cross_entropy, option_scores, target_likelihood
from .tasks import Task, metrics
from .tasks.encoding import Encoded, collate

Progress = Callable[[int, int], object]


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 16,
    shared: bool = True,
    progress: Progress | None = None,
    outcomes: list[float] | None = None,
) -> dict[str, float]:
    """The task's metric and mean loss.

    Args:
        examples: encoded examples of the task.
        shared: whether options share their prompt's computation (:func:`forwardtune.tasks.encoding.collate`).
        progress: called with the numbers of examples done and in all.
        outcomes: filled with the task's metric for every example, in their order.

    Returns:
        ``{"accuracy": ..., "loss": ..., "examples": ...}`` for answers, ``{"f1", "exact_match", "loss", "examples"}``
        for free text, where predictions are decoded greedily.
    """
    model.eval()
    by_length = sorted(range(len(examples)), key=lambda i: examples[i].length)
    totals: dict[str, float] = {}
    by_example = [0.0] * len(examples)
    for lo in range(0, len(examples), batch_size):
        numbers = by_length[lo : lo + batch_size]
        batch = [examples[i] for i in numbers]
        for name, values in _measure(model, tokenizer, task, batch, shared).items():
            totals[name] = totals.get(name, 0.0) + sum(values)
            if name == task.metric:
                for i, value in zip(numbers, values, strict=True):
                    by_example[i] = value
        if progress is not None:
            progress(lo + len(batch), len(examples))
    if outcomes is not None:
        outcomes[:] = by_example
    return {**{name: total / len(examples) for name, total in totals.items()}, "examples": len(examples)}


def sign_test(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """How many examples came out better and worse, and how likely chance alone makes a split at least so uneven.

    Returns:
        ``{"better": ..., "worse": ..., "p_value": ...}``: the exact two-sided sign test over the examples that changed.
    """
    better = sum(b < a for b, a in zip(before, after, strict=True))
    worse = sum(b > a for b, a in zip(before, after, strict=True))
    changed = better + worse
    tail = sum(math.comb(changed, k) for k in range(min(better, worse) + 1)) / 2**changed
    return {"better": better, "worse": worse, "p_value": min(1.0, 2 * tail)}


def prepare(model: Any, tokenizer: Any, batch: Sequence[Encoded], *, shared: bool = True) -> dict[str, torch.Tensor]:
    """A batch as model input, on the model's device."""
    inputs = collate(batch, tokenizer.pad_token_id, shared=shared, dtype=model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def can_share_prompts(model: Any, tokenizer: Any, examples: Sequence[Encoded]) -> bool:
    """Whether the model scores options that stand side by side as it scores them one by one.

    It does when it honours positions and a block mask; the answer is found by trying it on the two shortest examples
    whose options take more than one token.
    """
    long = sorted((e for e in examples if sum(len(o) > 1 for o in e.options) > 1), key=lambda e: e.length)[:2]
    if not long:
        return True
    plain = option_scores(model, prepare(model, tokenizer, long, shared=False))
    try:
        shared = option_scores(model, prepare(model, tokenizer, long))
    except (TypeError, ValueError, RuntimeError):  # no such arguments, or a mask that it cannot take
        return False
    # Far above rounding in any dtype, far below the effect of seeing the other options.
    return torch.allclose(plain, shared, rtol=0.02, atol=0.02)


def _measure(
    model: Any, tokenizer: Any, task: Task, batch: Sequence[Encoded], shared: bool
) -> dict[str, Sequence[float]]:
    inputs = prepare(model, tokenizer, batch, shared=shared)
    if task.answers is not None:
        scores = option_scores(model, inputs)
        right = scores.argmax(dim=1) == inputs["labels"]
        losses = torch.nn.functional.cross_entropy(scores, inputs["labels"], reduction="none")
        return {"accuracy": right.float().tolist(), "loss": losses.tolist()}
    predictions = generate(model, tokenizer, task, [example.prompt for example in batch])
    pairs = [(prediction, example.text) for prediction, example in zip(predictions, batch, strict=True)]
    return {
        "f1": [metrics.f1(*pair) for pair in pairs],
        "exact_match": [metrics.exact_match(*pair) for pair in pairs],
        "loss": target_likelihood(model, inputs).tolist(),
    }


def generate(model: Any, tokenizer: Any, task: Task, prompts: Sequence[Sequence[int]]) -> list[str]:
    """Greedy continuations of tokenised prompts, up to the task's stop string."""
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    attention_mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )
    stops = {"stop_strings": [task.stop], "tokenizer": tokenizer} if task.stop else {}
    out = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        **stops,
    )
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [(text.split(task.stop)[0] if task.stop else text).strip() for text in texts]


def training_objective(task: Task) -> Callable[[Any, Any], torch.Tensor]:
    """What MeZO lowers for a task: option cross-entropy, or the likelihood of the target text."""
    return option_cross_entropy if task.answers is not None else target_likelihood
