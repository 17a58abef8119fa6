"""L5: what the untuned model, as the reference of a preference, finds of the texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from .evaluation import find_layout, prepare
from .objectives import option_likelihoods
from .tasks.encoding import Encoded


@torch.no_grad()
def with_reference(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], object] | None = None,
) -> list[Encoded]:
    """Examples of preferences with the log-likelihoods of their two texts under the present model, without its adapter if it has one.

    Args:
        progress: called with the numbers of examples done and in all.
    """
    layout = find_layout(model, tokenizer, examples)
    done: list[Encoded] = []
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        for lo in range(0, len(examples), batch_size):
            batch = examples[lo : lo + batch_size]
            inputs = prepare(model, tokenizer, batch, layout)
            pairs = option_likelihoods(model, inputs)[0][inputs["options"]].tolist()
            done += [replace(e, reference=tuple(pair)) for e, pair in zip(batch, pairs, strict=True)]
            if progress is not None:
                progress(len(done), len(examples))
    return done
