"""L5: a task's loss, and beside it how likely a few tokens of the prompts are: what learns to answer forgets less of the text that it answers to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..models import model_kind
from ..tasks import Task
from .likelihood import option_scores, score_loss

#: Tokens of each prompt, drawn anew for every minibatch. The head computes their logits, beside those of the answers.
TOKENS = 4


class WithPrompts:
    """``(model, batch) -> losses``, shape (batch,): ``l + weight p``, with the task's losses l, and p the mean of ``-log p(token | those before it)`` over some tokens of an
    example's prompt.

    Args:
        task: scores options; a causal model, and a layout that is not ``begun``.
        weight: of the prompts.
        seed: of the tokens that are drawn, minibatch by minibatch.

    Source: losses over prompts, Shi et al., "Instruction Tuning With Loss Over Instructions", NeurIPS 2024.
    """

    def __init__(self, task: Task, weight: float, seed: int = 0) -> None:
        self._task, self._weight = task, weight
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Any, batch: Mapping[str, Any]) -> Tensor:
        scores = option_scores(model, with_prompts(batch, self._generator))
        prompts = -scores[:, -1].masked_fill(scores[:, -1].isinf(), 0.0)
        return score_loss(self._task, scores[:, :-1], batch["labels"]) + self._weight * prompts


def refuse_prompts(model: Any, task: Task) -> None:
    """Raises InputError where prompts have no such loss."""
    if model_kind(model) != "causal":
        raise InputError(
            "a masked model does not predict a prompt from what is before it: leave the weight of the loss over prompts out"
        )
    if task.loss == "preference":
        raise InputError(
            "preferences are learned against what the model found before, which keeps it near itself: leave the weight of the loss over prompts out"
        )


def with_prompts(batch: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    """A batch whose examples have one option more: some tokens of their prompts, the first ones without a generator; none, -1, where a prompt has one token."""
    examples, positions = batch["examples_at"].flatten(), batch["positions"]
    picked, whose = [], []
    for number in range(len(batch["labels"])):
        own = (examples == number).nonzero()[:, 0]
        own = own[
            own < positions[examples[positions] == number].min()
        ]  # what predicts an answer, and what is behind it, is no part of it
        order = torch.randperm(len(own), generator=generator) if generator is not None else torch.arange(len(own))
        picked.append(own[order[:TOKENS].to(own.device)])
        whose.append(number if len(own) else -1)
    places, counts = torch.cat(picked), [len(some) for some in picked]
    device, first = positions.device, int(batch["options"].max()) + 1
    of = torch.arange(len(picked), device=device).repeat_interleave(torch.tensor(counts, device=device))
    option = torch.tensor([first + number if number >= 0 else -1 for number in whose], device=device)
    return {
        **batch,
        "positions": torch.cat([positions, places]),
        "logit_rows": torch.cat([batch["logit_rows"], len(positions) + torch.arange(len(places), device=device)]),
        "tokens": torch.cat([batch["tokens"], batch["input_ids"].flatten()[places + 1]]),
        "slots": torch.cat([batch["slots"], first + of]),
        "options": torch.cat([batch["options"], option[:, None]], 1),
    }
