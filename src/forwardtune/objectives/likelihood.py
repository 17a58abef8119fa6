"""How likely a model finds the options of an example, and the losses made of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import forward
from ..points.owners import examples_at, in_all_copies, positions_of
from ..tasks import Task


def option_scores(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Length-normalised log-likelihood of every option, ``(1/T) sum_t log p(option_t | prompt, option_<t)``.

    ``batch`` is from :func:`forwardtune.evaluation.prepare`. The scores are float32, shape (batch, most options), -inf
    where an example has fewer options. Source: MeZO, appendix E.3.
    """
    total, length = option_likelihoods(model, batch)
    return (total / length)[batch["options"].clamp(min=0)].masked_fill(batch["options"] < 0, float("-inf"))


def option_likelihoods(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-likelihood of every option, ``sum_t log p(option_t | prompt, option_<t)``, and its length in tokens.

    Both are float32, shape (options of all examples,), in the order of ``batch["slots"]``.
    """
    logits = logits_at(model, batch)
    rows, tokens, slots = batch["logit_rows"], batch["tokens"], batch["slots"]
    log_likelihood = logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]
    count = int(batch["options"].max()) + 1
    total = log_likelihood.new_zeros(count).index_add(0, slots, log_likelihood)
    length = log_likelihood.new_zeros(count).index_add(0, slots, torch.ones_like(log_likelihood))
    return total, length


def score_loss(task: Task, scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of every example from its options' scores, or from its preference margin, shape (batch,).

    ``cross_entropy``: ``-log softmax(scores)[label]``; ``likelihood``: ``-scores[label]``; ``preference``:
    ``-log sigmoid(beta * margin)`` (direct preference optimization). The first two are times the weight of the label's class,
    where the task has weights.
    """
    if task.loss == "preference":
        return F.softplus(-task.beta * scores)
    if task.loss == "likelihood":
        losses = -scores.gather(1, labels[:, None])[:, 0]
    else:
        losses = F.cross_entropy(scores, labels, reduction="none")
    return losses if task.class_weights is None else losses * losses.new_tensor(task.class_weights)[labels]


def task_scores(model: nn.Module, batch: Mapping[str, Any], task: Task) -> Tensor:
    """What :func:`score_loss` is made of: scores of the options (batch, most options), or margins (batch,)."""
    return preference_margins(model, batch) if task.loss == "preference" else option_scores(model, batch)


def option_cross_entropy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """``-log softmax(scores)[label]`` over the options' length-normalised log-likelihoods, shape (batch,)."""
    return F.cross_entropy(option_scores(model, batch), batch["labels"], reduction="none")


def target_likelihood(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Negative mean log-likelihood of the right continuation's tokens (teacher forcing), shape (batch,)."""
    scores = option_scores(model, batch)
    return -scores.gather(1, batch["labels"][:, None])[:, 0]


def learnt_tokens(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Of each example's learnt tokens (teacher forcing), the mean log-likelihood, as a score of one option, shape (batch, 1), and
    the share that the model finds likeliest, shape (batch,)."""
    logits = logits_at(model, batch)
    rows, tokens, slots = batch["logit_rows"], batch["tokens"], batch["slots"]
    likely = logits.argmax(dim=-1)[rows] == tokens
    log_likelihood = logits[rows, tokens] - logits.logsumexp(dim=-1)[rows]
    per_token = torch.stack([log_likelihood, likely.float(), torch.ones_like(log_likelihood)])
    total = per_token.new_zeros(3, int(batch["options"].max()) + 1).index_add(1, slots, per_token)
    mean, share = (total[:2] / total[2])[:, batch["options"][:, 0]]
    return mean[:, None], share


def preference_margins(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """How much more the model prefers the chosen text than its reference does, shape (batch,).

    ``[log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]``, likelihoods of whole texts. The
    reference's are in ``batch["reference"]``, shape (batch, 2); without it they are 0. Source: Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, equation 7.
    """
    total, _ = option_likelihoods(model, batch)
    chosen, rejected = (total[batch["options"][:, i]] for i in (0, 1))
    if "reference" not in batch:
        return chosen - rejected
    return (chosen - batch["reference"][:, 0]) - (rejected - batch["reference"][:, 1])


_INPUTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
)  # fmt: skip


def logits_at(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Logits at ``batch["positions"]`` alone, float32, shape (positions, vocabulary).

    The vocabulary head is given just those hidden states, so no logit is computed that nobody reads.
    """
    inputs: dict[str, Any] = {name: batch[name] for name in _INPUTS if name in batch}
    if hasattr(getattr(model, "config", None), "use_cache"):
        inputs["use_cache"] = False
    whose = examples_at(batch["examples_at"], len(batch["labels"])) if "examples_at" in batch else nullcontext()
    with whose, _head_sees_only(model, batch["positions"]) as selected:
        logits = forward(model, **inputs).logits
    return (logits.squeeze(0) if selected else logits.flatten(0, 1)[batch["positions"]]).float()


@contextmanager
def _head_sees_only(model: nn.Module, positions: Tensor) -> Iterator[bool]:
    """Inside, the vocabulary head works on those positions of the flattened batch; yields False if there is no head."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        yield False
        return

    def select(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        places = in_all_copies(positions, hidden.shape[0] * hidden.shape[1], hidden.device)
        inside.enter_context(positions_of(places))
        return (hidden.flatten(0, 1)[places].unsqueeze(0), *rest)

    with ExitStack() as hooks, ExitStack() as inside:
        hooks.callback(head.register_forward_pre_hook(select).remove)
        hooks.callback(head.register_forward_hook(lambda *_: inside.close(), always_call=True).remove)
        yield True
