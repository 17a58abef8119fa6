"""L5: measuring a model on the held-out examples of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .models import model_kind, stateful_layers, takes_lengths
from .objectives import (
    Context,
    Reward,
    Written,
    learnt_tokens,
    option_scores,
    score_loss,
    target_likelihood,
    task_scores,
    write,
)
from .points.owners import to_device
from .storage import device_of
from .tasks import Task, metrics
from .tasks.batching import Layout, collate, common_beginning
from .tasks.encoding import Encoded
from .tasks.tokens import padding_id
from .workers import Alone

Progress = Callable[[int, int], object]

# So much of a common beginning is tried, to see that a model can go on from it. Who does not see it is off by more than this (3.2 and
# more, measured), and rounding in bfloat16 by less: logits of 16 and more are an eighth apart, and scores were off by up to 0.5.
_TRIED, _ROUNDED = 32, 1.0


@torch.no_grad()
def evaluate(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Encoded],
    *,
    batch_size: int = 16,
    layout: Layout | None = None,
    calibrations: Sequence[Encoded] | None = None,
    rewards: Sequence[Reward] = (),
    progress: Progress | None = None,
    outcomes: list[float] | None = None,
    completions: list[str] | None = None,
    scores: list[list[float]] | None = None,
    workers: Alone | None = None,
    loss_alone: bool = False,
) -> dict[str, float]:
    """The task's metric and mean loss. What all prompts begin with, such as demonstrations, is processed once.

    Args:
        examples: encoded examples of the task.
        layout: how batches stand in the model's input; found by trial if it is not given.
        calibrations: the same examples without content (:meth:`~forwardtune.tasks.encoding.Encoder.calibrations`):
            scores are then ``log p(option | prompt) - log p(option | prompt without content)``, each length-normalised
            (surface form competition, Holtzman et al. 2021).
        rewards: functions of what the model writes, for free text; their weighted sum is measured as ``reward``. A reward
            that is None for an example adds nothing to its sum; the example is left out of that reward's own mean and, if
            all of them are None, of the mean of the sums (its outcome is 0).
        progress: called with the numbers of examples done and in all.
        outcomes: filled with the task's metric, or the reward, for every example, in their order.
        completions: filled with what the model wrote for every example, in their order, for free text.
        scores: filled with the scores of every example's options, or with its preference margin, in their order.
        workers: who share the batches; all have the result.
        loss_alone: nothing is written: of free text that has answers the loss alone is measured.

    Returns:
        ``{"accuracy": ..., "loss": ..., "examples": ...}`` for a choice, for preferences with a reference also
        ``margin_accuracy``, the share whose margin over the reference is positive; for free text, decoded greedily, the task's
        metric with what follows the same rules (``f1`` and ``exact_match``), ``loss`` and ``examples``; for conversations
        ``token_accuracy``, the share of an example's learnt tokens that the model finds likeliest, ``loss`` and ``examples``.
    """
    model.eval()
    layout = layout or find_layout(model, tokenizer, examples)
    context = _common_context(model, examples, layout)
    bare = None if calibrations is None else _common_context(model, calibrations, layout)
    known: dict[str, list[float]] = {}
    by_length = sorted(range(len(examples)), key=lambda i: examples[i].length)
    measurements: dict[str, list[float | None]] = {}
    texts: list[str] = []

    every: list[list[float]] = []

    def measure(numbers: list[int]) -> tuple[dict[str, list[float | None]], list[str], list[list[float]]]:
        batch = [examples[i] for i in numbers]
        texts: list[str] = []
        scored: list[list[float]] = []
        if task.free_text and task.label and loss_alone:
            measured = {"loss": target_likelihood(model, _inputs(model, batch, layout, context)).tolist()}
        elif task.free_text:
            written = write(model, tokenizer, task, [example.prompt for example in batch], context)
            texts = written.texts
            measured = _measure_text(task, batch, written, rewards)
            if task.label:
                measured["loss"] = target_likelihood(model, _inputs(model, batch, layout, context)).tolist()
        elif task.conversational:
            likely, share = learnt_tokens(model, _inputs(model, batch, layout, context))
            measured = {"token_accuracy": share.tolist(), "loss": (-likely[:, 0]).tolist()}
        else:
            found = task_scores(model, _inputs(model, batch, layout, context), task)
            if calibrations is not None:
                found = found - _cached_scores(model, [calibrations[i] for i in numbers], layout, bare, known, found)
            scored = found.reshape(len(batch), -1).tolist()
            measured = _measure_choice(task, batch, found)
        return measured, texts, scored

    batches = [by_length[lo : lo + batch_size] for lo in range(0, len(examples), batch_size)]
    reach = None if progress is None else lambda done: progress(min(done * batch_size, len(examples)), len(examples))
    for measured, own, some in (workers or Alone()).divided(measure, batches, reach):
        texts += own
        every += some
        for name, values in measured.items():
            measurements.setdefault(name, []).extend(values)

    def in_order(values: Sequence[Any]) -> list[Any]:
        return [value for _, value in sorted(zip(by_length, values, strict=True), key=lambda pair: pair[0])]

    if outcomes is not None:
        judged = measurements.get("reward" if rewards else task.metric, [0.0] * len(examples))
        outcomes[:] = [value or 0.0 for value in in_order(judged)]
    if completions is not None and task.free_text:
        completions[:] = in_order(texts)
    if scores is not None and every:
        scores[:] = in_order(every)
    return {**{name: _mean(values) for name, values in measurements.items()}, "examples": len(examples)}


def _mean(values: Sequence[float | None]) -> float:
    """Over what is not None; NaN if that is nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def sign_test(before: Sequence[float], after: Sequence[float]) -> dict[str, float]:
    """How many examples came out better and worse, and how likely chance alone makes a split at least so uneven.

    Returns:
        ``{"better": ..., "worse": ..., "p_value": ...}``: the exact two-sided sign test over the examples that changed.
    """
    from scipy.stats import binomtest  # takes half a second to import

    better = sum(b < a for b, a in zip(before, after, strict=True))
    worse = sum(b > a for b, a in zip(before, after, strict=True))
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return {"better": better, "worse": worse, "p_value": float(p_value)}


def training_objective(task: Task) -> Callable[[Any, Any], Tensor]:
    """The task's loss, ``(model, batch) -> losses`` of shape (batch,): what is lowered unless the user wants otherwise."""
    return lambda model, batch: score_loss(task, task_scores(model, batch, task), batch["labels"])


# --- layouts ----------------------------------------------------------------------------------------------------------


def plain_layout(model: Any, tokenizer: Any) -> Layout:
    """Every option in a row of its own, padded on the right: right for any model."""
    causal = model_kind(model) == "causal"
    return Layout(padding_id(tokenizer), model.dtype, shared=False, packed=False, causal=causal)


def prepare(model: Any, tokenizer: Any, batch: Sequence[Encoded], layout: Layout | None = None) -> dict[str, Any]:
    """A batch as model input, on the model's device; in the plain layout unless another one is given."""
    return _inputs(model, batch, plain_layout(model, tokenizer) if layout is None else layout, None)


@torch.no_grad()
def find_layout(model: Any, tokenizer: Any, examples: Sequence[Encoded]) -> Layout:
    """The layout with the least work in which the model scores options as it does one by one.

    Packed rows and shared prompts need a model that honours position ids and a block mask. Whether it does is found by
    trying it on a few examples that would be packed or have long options. Examples longer than a sliding window keep
    the plain layout, whose mask is the model's own, and models with layers that keep a state, which takes no mask, share a prompt between answers of one token alone. Attention of variable length takes no masks, and needs none: with it all stand in one row.
    """
    plain = plain_layout(model, tokenizer)
    if model.device.type == "meta":  # nothing can be tried without weights: as most models
        return replace(plain, shared=True, packed=True)
    if not all(example.options for example in examples) and not common_beginning(examples):
        return plain  # nothing to score, and nothing to share
    examples = _scorable(examples)
    by_length = sorted(examples, key=lambda example: example.length)
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    window, lengths = getattr(config, "sliding_window", None), takes_lengths(model)
    if not lengths and window is not None and by_length[-1].length > window:
        return plain  # the block mask would take the window's place
    if stateful_layers(model):  # what leaks from text to text may be too little for half precision to show
        apart = all(len(option) < 2 for example in examples for option in example.options)
        return replace(plain, shared=True) if apart and plain.causal else plain
    # Two that fit into one row beside the longest, and one with long options: enough to see what the model honours.
    chosen = by_length[:2] + by_length[2:][-1:]
    chosen += [e for e in by_length[2:-1] if sum(len(option) > 1 for option in e.options) > 1][-1:]
    trial = [_shortened(example, length) for example, length in zip(chosen, (12, 20, 48, 48), strict=False)]
    expected = option_scores(model, _inputs(model, trial, plain, None))
    best = replace(plain, shared=True, packed=True)
    blocks = (best, replace(best, first_position=padding_id(tokenizer) + 1), replace(best, packed=False))
    for layout in (replace(plain, packed=True, flat=True),) if lengths else blocks:
        if _agrees(model, trial, layout, expected):
            return layout
    return plain


@torch.no_grad()
def with_common_beginning(
    model: Any, tokenizer: Any, examples: Sequence[Encoded], layout: Layout, *, generates: bool = False
) -> Layout:
    """The layout in which what all examples begin with stands once in a row, if it pays and the model scores them so as it does one by one.

    For minibatches at one point, which may be a perturbed one: where every example has a direction of its own, nothing is common to them.

    Args:
        generates: whether the model also writes behind the beginning, for which it must go on from the keys and values.
    """
    common = common_beginning(examples) if layout.shared and layout.packed and layout.causal else []
    if not common:
        return layout
    begun = replace(layout, begun=True)
    if model.device.type == "meta":  # as most models
        return begun
    trial = [replace(e, prompt=common[:_TRIED] + _shortened(e, 12).prompt) for e in _scorable(examples[:3])]
    expected = option_scores(model, _inputs(model, trial, plain_layout(model, tokenizer), None))
    same = _agrees(model, trial, begun, expected, rounded=_ROUNDED)
    return begun if same and (not generates or _common_context(model, examples, layout) is not None) else layout


def _scorable(examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples; those without options, of which a text is generated, with some token to score."""
    return [example if example.options else replace(example, options=[example.prompt[-1:]]) for example in examples]


def _agrees(
    model: Any,
    trial: Sequence[Encoded],
    layout: Layout,
    expected: Tensor,
    context: Context | None = None,
    rounded: float = 0.02,
) -> bool:
    """Whether the model scores examples as expected; ``rounded`` is what bfloat16 may be off by."""
    try:
        scores = option_scores(model, _inputs(model, trial, layout, context))
    except (TypeError, ValueError, RuntimeError, IndexError):  # no such arguments, or a mask that it cannot take
        return False
    # Far above rounding, below the effect of seeing another text.
    close = {torch.bfloat16: rounded, torch.float16: 0.02}.get(layout.dtype, 1e-3)
    return torch.allclose(expected, scores, rtol=min(close, 0.02), atol=close)


def _inputs(model: Any, batch: Sequence[Encoded], layout: Layout, context: Context | None) -> dict[str, Any]:
    if context is not None:
        skip = len(context.tokens)
        batch = [example.without(skip) for example in batch]
        layout = replace(layout, context=skip)
    inputs = {
        name: to_device(value, device_of(model)) if isinstance(value, Tensor) else value
        for name, value in collate(batch, layout).items()
    }
    if context is not None:
        inputs["past_key_values"] = context.repeated(len(inputs["input_ids"]))
    return inputs


# --- what all prompts begin with --------------------------------------------------------------------------------------


def _common_context(model: Any, examples: Sequence[Encoded], layout: Layout) -> Context | None:
    """The common beginning of all prompts, processed once; None if it is short or the model cannot go on from it."""
    common = common_beginning(examples) if layout.shared and layout.causal else []
    if not common:
        return None
    try:
        # Whether the model can go on from a cache under a block mask is tried on the beginning of it.
        begin = Context.of(model, common[:_TRIED])
        trial = [replace(e, prompt=begin.tokens + _shortened(e, 12).prompt) for e in _scorable(examples[:3])]
        expected = option_scores(model, _inputs(model, trial, layout, None))
        same = _agrees(model, trial, layout, expected, begin, rounded=_ROUNDED)
        return Context.of(model, common) if same else None
    except (TypeError, ValueError, AttributeError):  # no cache, or one of another kind
        return None


def _shortened(example: Encoded, length: int) -> Encoded:
    """The example with the end of its prompt alone, for trials; a masked one as it is."""
    if example.mask is not None:
        return example
    return replace(example, prompt=example.prompt[-max(length, example.scored + 1) :])


def _cached_scores(
    model: Any,
    batch: Sequence[Encoded],
    layout: Layout,
    context: Context | None,
    known: dict[str, list[float]],
    like: Tensor,
) -> Tensor:
    """Option scores, each distinct example scored once; 0 where an example has fewer options."""
    keys = [f"{example.prompt} {example.options}" for example in batch]
    new = {key: example for key, example in zip(keys, batch, strict=True) if key not in known}
    if new:
        scores = option_scores(model, _inputs(model, list(new.values()), layout, context))
        known.update(zip(new, scores.tolist(), strict=True))
    result = torch.zeros_like(like)
    for row, (key, example) in enumerate(zip(keys, batch, strict=True)):
        count = len(example.options)
        result[row, :count] = torch.tensor(known[key][:count])
    return result


# --- measuring --------------------------------------------------------------------------------------------------------


def _measure_choice(task: Task, batch: Sequence[Encoded], scores: Tensor) -> dict[str, list[float | None]]:
    labels = torch.tensor([example.label for example in batch], device=scores.device)
    losses = score_loss(task, scores, labels).tolist()
    if task.preference is not None:
        # Whether the model itself prefers the chosen text, and whether it does so more than its reference.
        margins = scores.tolist()
        references = [example.reference or (0.0, 0.0) for example in batch]
        own = [margin + chosen - rejected for margin, (chosen, rejected) in zip(margins, references, strict=True)]
        measured: dict[str, list[float | None]] = {"accuracy": [float(margin > 0) for margin in own], "loss": losses}
        if all(example.reference is not None for example in batch):
            measured["margin_accuracy"] = [float(margin > 0) for margin in margins]
        return measured
    chosen = scores.argmax(dim=1).tolist()
    right: list[float | None] = [float(option in example.right) for option, example in zip(chosen, batch, strict=True)]
    return {"accuracy": right, "loss": losses}


def _measure_text(
    task: Task, batch: Sequence[Encoded], written: Written, rewards: Sequence[Reward]
) -> dict[str, list[float | None]]:
    measured: dict[str, list[float | None]] = {}
    if rewards:
        by_reward = [reward([e.example for e in batch], written.texts, written.tokens) for reward in rewards]
        if len(rewards) > 1:
            measured |= {reward.name: values for reward, values in zip(rewards, by_reward, strict=True)}
        weights = [reward.weight for reward in rewards]
        measured["reward"] = [
            sum(w * v for w, v in zip(weights, values, strict=True) if v is not None)
            if any(v is not None for v in values)
            else None
            for values in zip(*by_reward, strict=True)
        ]
    if not task.label:
        return measured
    for name in metrics.related(task.metric):
        pairs = zip(written.texts, batch, strict=True)
        measured[name] = [metrics.score(name, text, example.texts) for text, example in pairs]
    return measured
