"""L6: linear probing. The vocabulary head is fitted again by logistic regression; the rest of the model is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError, warn
from ...evaluation import prepare
from ...objectives import logits_at
from ...storage import device_of
from ...tasks import Task
from ...tasks.batching import Layout
from ...tasks.encoding import Encoded
from ..extra import PROBING, require

#: Inverse strengths of the penalty that are tried.
GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Without development examples, one training example in so many stands aside to choose the strength.
_HELD_OUT = 5
# Logit of a token that the classifier does not know, e^-100 being no probability to speak of. It cannot win: the classes'
# logits sum to nearly zero (a common shift gains a softmax regression nothing, and the fit starts from zeros), so the
# largest is above it. And it is finite: answers with more and with fewer such tokens can still be told apart.
_NEVER = -100.0


class ProbeHead(nn.Linear):
    """A classifier in the place of a vocabulary head: ``logits[..., tokens] = W h + b``, and -100 elsewhere.

    Args:
        weight: shape (classes, hidden).
        bias: shape (classes,).
        tokens: token of every class, shape (classes,).
        vocabulary: how many logits there are.
    """

    tokens: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, tokens: Tensor, vocabulary: int) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("tokens", tokens)
        self.vocabulary = vocabulary

    def forward(self, hidden: Tensor) -> Tensor:
        """float32 logits, shape (..., vocabulary), of hidden states in any dtype, shape (..., hidden)."""
        known = super().forward(hidden.to(self.weight))
        logits = known.new_full((*known.shape[:-1], self.vocabulary), _NEVER)
        return logits.index_copy(-1, self.tokens, known)


@dataclass
class Probe:
    """A fitted probe. Inside ``with probe:`` its classifier is the vocabulary head of the model.

    Attributes:
        model: the model that it was fitted for.
        head: the classifier.
        C: the chosen inverse strength of the penalty.
        converged: whether the last fit reached its tolerance.
    """

    model: Any
    head: ProbeHead
    C: float
    converged: bool

    def __post_init__(self) -> None:
        self._places: list[tuple[nn.Module, str, nn.Module]] = []

    def __enter__(self) -> Probe:
        if self._places:
            raise RuntimeError("the probe is in place already: leave its with block before entering another")
        old = _head_of(self.model)
        # The module is exchanged, not its weights: those may be the input embedding's too.
        self._places = [
            (parent, name, old) for parent in self.model.modules() for name, m in parent._modules.items() if m is old
        ]
        for parent, name, _ in self._places:
            setattr(parent, name, self.head)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for parent, name, old in self._places:
            setattr(parent, name, old)
        self._places = []


def probe(
    model: Any,
    tokenizer: Any,
    task: Task,
    train: Sequence[Encoded],
    dev: Sequence[Encoded] | None = None,
    *,
    batch_size: int = 16,
    grid: Sequence[float] = GRID,
    max_iterations: int = 1000,
    layout: Layout | None = None,
) -> Probe:
    """Fit a linear probe; ``with probe(...): evaluate(...)`` then measures it.

    Features are the inputs of the vocabulary head where a token of the right answer is predicted, classes are those
    tokens: one an example for answers of one token, several for longer answers and free text. They are standardised,
    x' = (x - mean) / deviation, which the fit needs to converge and the classifier then undoes. The classifier is

        min over W, b of  sum_i -log softmax(W x'_i + b)[y_i] + |W|^2 / (2 C),

    with the C of the grid under which the development examples' tokens are likeliest (those that training knows); every
    fifth training example stands in for them in the choice if there are none. Fitting time grows with the number of
    classes times that of tokens: for free text give a grid of one value, and fewer ``max_iterations``.

    Args:
        model: a causal or masked language model. It is put in evaluation mode, and not changed.
        train, dev: encoded examples of the task.
        grid: values of C.
        max_iterations: of L-BFGS, for each value.
        layout: how batches stand in the model's input; the plain one if it is not given.

    Raises:
        InputError: no example, only one class, a grid without positive numbers, a model without vocabulary head, or
            features that are not finite; scikit-learn is missing.

    Warns:
        UserWarning: the fit did not converge.

    Source: the linear probing of the MeZO paper's code, but for the standardisation with the intercept that goes with
    it, the choice of C (there by cross-validation over the training tokens), and tokens that training never saw (they
    keep their pre-trained rows there, whose logits are on another scale).
    """
    require("linear probes", PROBING)
    if not train or not grid or not all(0 < c < float("inf") for c in grid):
        raise InputError("linear probing needs training examples and positive values of C: give at least one of each")
    features, tokens, groups, vocabulary = _features(model, tokenizer, task, train, batch_size, layout)
    if len(set(tokens)) < 2:
        raise InputError(
            f"linear probing needs two different answers, and all {len(train)} training examples of task {task.name} "
            "have the same: give more examples"
        )
    best = grid[0]
    if len(grid) > 1:
        if dev:
            held_out = _features(model, tokenizer, task, dev, batch_size, layout)[:2]
            fitted_on = features, tokens
        else:
            aside = groups % _HELD_OUT == _HELD_OUT - 1
            held_out, fitted_on = (features[aside], tokens[aside]), (features[~aside], tokens[~aside])
        best = _choose(grid, fitted_on, held_out, max_iterations)
    classifier, converged = _fit(features, tokens, best, max_iterations)
    if not converged:
        warn(
            f"linear probing of task {task.name}: logistic regression with C={best:g} did not converge in "
            f"{max_iterations} iterations. Raise max_iterations, or give a grid of smaller values",
        )
    return Probe(model, _head(classifier, vocabulary, device_of(model)), best, converged)


def _features(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Encoded], batch_size: int, layout: Layout | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Features (n, hidden), tokens (n,) and examples' numbers (n,) of the right answers' tokens; vocabulary size."""
    model.eval()
    features, tokens, numbers = [], [], []
    seen: list[tuple[Tensor, int]] = []
    hook = _head_of(model).register_forward_hook(
        lambda module, args, logits: seen.append((args[0].flatten(0, -2), logits.shape[-1]))
    )
    try:
        for lo in range(0, len(examples), batch_size):
            # With the right answer alone, an example's number in the batch is that of its only option.
            right = [replace(e, options=[e.options[e.label]], right=(0,)) for e in examples[lo : lo + batch_size]]
            batch = prepare(model, tokenizer, right, layout)
            with torch.no_grad():
                logits_at(model, batch)
            hidden, vocabulary = seen.pop()
            features.append(hidden[batch["logit_rows"].to(hidden.device)].double().cpu().numpy())
            tokens.append(batch["tokens"].cpu().numpy())
            numbers.append(lo + batch["slots"].cpu().numpy())
    finally:
        hook.remove()
    together = np.concatenate(features)
    if not np.isfinite(together).all():
        raise InputError(
            f"linear probing of task {task.name}: the model's hidden states are not finite. Load it in float32 or bfloat16"
        )
    return together, np.concatenate(tokens), np.concatenate(numbers), vocabulary


def _choose(
    grid: Sequence[float],
    fitted_on: tuple[np.ndarray, np.ndarray],
    held_out: tuple[np.ndarray, np.ndarray],
    max_iterations: int,
) -> float:
    """The value under which the held-out tokens are likeliest; the middle one if nothing can be learnt from them."""
    from scipy.special import log_softmax

    known = np.isin(held_out[1], fitted_on[1])
    if not known.any() or len(set(fitted_on[1])) < 2:
        return sorted(grid)[len(grid) // 2]
    losses = {}
    for c in grid:
        classifier, _ = _fit(*fitted_on, c, max_iterations)
        scores = classifier.decision_function(held_out[0][known])
        if scores.ndim == 1:  # of two classes, the difference
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        columns = np.searchsorted(classifier.classes_, held_out[1][known])
        losses[c] = -log_softmax(scores, axis=1)[np.arange(len(columns)), columns].mean()
    return min(losses, key=losses.__getitem__)


def _fit(features: np.ndarray, tokens: np.ndarray, c: float, max_iterations: int) -> tuple[Any, bool]:
    """A pipeline of scaler and logistic regression, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=max_iterations))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(features, tokens)
    return classifier, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def _head(classifier: Any, vocabulary: int, device: torch.device) -> ProbeHead:
    """The classifier for features as they are: W x' + b = (W / deviation) x + (b - (W / deviation) mean)."""
    scaler, regression = classifier[0], classifier[-1]
    weight, bias = regression.coef_, regression.intercept_
    if len(weight) == 1:  # of two classes, the difference is fitted: give each one half
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    bias = bias - weight @ scaler.mean_
    tokens = torch.as_tensor(regression.classes_, device=device)
    weight, bias = (torch.as_tensor(array, dtype=torch.float32, device=device) for array in (weight, bias))
    return ProbeHead(weight, bias, tokens, vocabulary)


def _head_of(model: Any) -> nn.Module:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no vocabulary head to fit: choose a causal or masked language model"
        )
    return head
