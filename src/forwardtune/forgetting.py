"""L5: what tuning costs elsewhere: how well a model predicts general text, token by token, before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F

from .errors import InputError
from .models import context_length, model_kind
from .objectives import logits_at
from .tasks.tokens import Tokens
from .workers import Alone

#: The name of the text that comes with the package, of some 3,500 words: enough for a first look.
PACKAGED = "packaged"
#: So many tokens of a text are scored, if it has them.
TOKENS = 10_240
# Tokens that are read at once, and how many of them are masked at once.
_WINDOW, _MASKED = 256, 8
# More characters than a token has, in the mean of so many.
_CHARACTERS = 50


def read_general(name: str) -> str:
    """The text in a file, or the packaged one.

    Raises:
        InputError: there is no such file, it is no text, or it is empty.
    """
    try:
        with files("forwardtune").joinpath("general_text.txt").open() if name == PACKAGED else open(name) as file:
            text = file.read(_CHARACTERS * TOKENS)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise InputError(
            f"general text {name}: {why}. Name a text file, or {PACKAGED!r} for the one in the package"
        ) from None
    if len(text.split()) < 2:
        raise InputError(f"general text {name} has no two words: name a longer one, or {PACKAGED!r}")
    return text


@torch.no_grad()
def token_losses(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    workers: Alone | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[float]:
    """Minus the log-likelihood of each token of a text, in nats, in their order; of the first 10,240 where there are more.

    The text is read in windows of 256 tokens, none of which sees another. A causal model predicts a token from those before it in its window;
    the first is predicted from the mark that opens texts, and left out where the tokenizer has none. A masked model predicts every
    eighth token of a window at once, masked, from the rest: so its losses are a pseudo-likelihood (Salazar et al., 2020), of eight tokens
    masked at a time.

    Args:
        workers: who share the windows; all have the result.
        progress: called with the numbers of windows done and in all.
    """
    model.eval()
    opening, closing = Tokens(tokenizer).marks
    is_causal = model_kind(model) == "causal"
    size = min(_WINDOW, context_length(model)) - len(opening) - (0 if is_causal else len(closing))
    unscored = int(is_causal and not opening)
    if not is_causal and tokenizer.mask_token_id is None:
        raise InputError(
            "a masked model predicts masked tokens, and this tokenizer has no mask: leave general text out"
        )
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    windows = [tokens[lo : lo + size] for lo in range(0, len(tokens), size)][: -(-TOKENS // (size - unscored))]

    def losses(window: list[int]) -> list[float]:
        if is_causal:
            return _score_next(model, opening, window)
        return _score_masked(model, opening, window, closing, tokenizer.mask_token_id)

    reach = None if progress is None else lambda done: progress(done, len(windows))
    return [loss for own in (workers or Alone()).divided(losses, windows, reach) for loss in own]


def _score_next(model: Any, opening: list[int], window: list[int]) -> list[float]:
    row = torch.tensor([*opening, *window], device=model.device)
    first = max(1, len(opening))
    places = torch.arange(first - 1, len(row) - 1, device=model.device)
    return _losses(model, row[None], places, row[first:]) if len(places) else []


def _score_masked(model: Any, opening: list[int], window: list[int], closing: list[int], mask: int) -> list[float]:
    row = torch.tensor([*opening, *window, *closing], device=model.device)
    losses = [0.0] * len(window)
    for shift in range(min(_MASKED, len(window))):
        places = torch.arange(shift, len(window), _MASKED, device=model.device) + len(opening)
        losses[shift::_MASKED] = _losses(model, row.index_fill(0, places, mask)[None], places, row[places])
    return losses


def _losses(model: Any, input_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "positions": positions}
    found: list[float] = F.cross_entropy(logits_at(model, batch), wanted, reduction="none").tolist()
    return found


def measured(losses: Sequence[float]) -> dict[str, float]:
    """The mean loss of tokens, in nats, and the perplexity that it stands for."""
    loss = math.fsum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def compared(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The losses of the same tokens by two models: the mean difference, positive if the second is worse, and its standard error over the tokens."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = math.fsum(differences) / len(differences)
    spread = math.fsum((d - mean) ** 2 for d in differences)
    return {
        "tokens": len(differences),
        "before": measured(before),
        "after": measured(after),
        "difference": mean,
        "standard_error": math.sqrt(spread / max(1, len(differences) - 1) / len(differences)),
    }
