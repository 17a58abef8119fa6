"""L5: (model, batch) -> one loss per example. Lower is better; MeZO asks for no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import forward


def option_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Length-normalised log-likelihood of every option, ``(1/T) sum_t log p(option_t | prompt, option_<t)``.

    Args:
        batch: from :func:`forwardtune.evaluation.prepare`.

    Returns:
        float32, shape (batch, most options), -inf where an example has fewer options.

    Source: MeZO, appendix E.3.
    """
    logits = logits_at(model, batch)
    rows, tokens, slots, options = batch["logit_rows"], batch["tokens"], batch["slots"], batch["options"]
    log_likelihood = logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]
    count = int(options.max()) + 1
    total = log_likelihood.new_zeros(count).index_add(0, slots, log_likelihood)
    length = log_likelihood.new_zeros(count).index_add(0, slots, torch.ones_like(log_likelihood))
    scores = (total / length)[options.clamp(min=0)]
    return scores.masked_fill(options < 0, float("-inf"))


def option_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """``-log softmax(scores)[label]`` over the options' length-normalised log-likelihoods, shape (batch,)."""
    return F.cross_entropy(option_scores(model, batch), batch["labels"], reduction="none")


def target_likelihood(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative mean log-likelihood of the right continuation's tokens (teacher forcing), shape (batch,)."""
    scores = option_scores(model, batch)
    return -scores.gather(1, batch["labels"][:, None])[:, 0]


def logits_at(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits at ``batch["positions"]`` alone, float32, shape (positions, vocabulary).

    The vocabulary head is given just those hidden states, so no logit is computed that nobody reads.
    """
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    with _head_sees_only(model, batch["positions"]) as selected:
        logits = forward(model, **inputs).logits
    if selected:
        return logits.squeeze(0).float()
    return logits.flatten(0, 1)[batch["positions"]].float()


@contextmanager
def _head_sees_only(model: nn.Module, positions: Tensor) -> Iterator[bool]:
    """Inside, the vocabulary head works on those positions of the flattened batch; yields False if there is no head."""
    find_head: Any = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if head is None:
        yield False
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden.flatten(0, 1)[positions.to(hidden.device)].unsqueeze(0), *rest)

    hook = head.register_forward_pre_hook(select)
    try:
        yield True
    finally:
        hook.remove()
