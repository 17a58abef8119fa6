"""The local effective rank r = tr H / |H| of a model, and when forward passes can see it.

    python examples/theory/effective_rank.py                    # the embedded model on four embedded reviews: minutes
    python examples/theory/effective_rank.py --model FOLDER     # another causal model

Hutchinson: tr H = E[z' H z], and z' H z = (L(theta + eps z) + L(theta - eps z) - 2 L(theta)) / eps^2 + O(eps^2), three
forward passes. The division by eps^2 lifts the rounding noise of the losses: too small an eps shows that noise alone. H is the
Hessian of one minibatch's loss at the given weights, over all of them.

|H| takes backward passes here (power iteration), which also check the forward ones. H has negative eigenvalues, so r alone
may be small because they cancel; |H|_F^2 / |H|^2 cannot. (MeZO, section 4.1, Assumption 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, variance
from typing import Any

import torch
from figures import BLUE, GREEN, GREY, RED, panels, parser, save

from forwardtune import MeZO
from forwardtune.evaluation import prepare, training_objective
from forwardtune.method.estimators import Query
from forwardtune.models import context_length, load_model
from forwardtune.points import Scratch
from forwardtune.tasks import get_task, load_split
from forwardtune.tasks.encoding import Encoder


def problem(options: Any, dtype: str) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The model in that dtype, and the loss of one minibatch as a closure."""
    model, tokenizer = load_model(options.model, dtype=dtype)
    model.set_attn_implementation("eager")  # the others have no second derivative
    task = get_task(options.task)
    examples = load_split(task, "train", data_dir=options.data_dir, limit=options.batch_size).examples
    batch = prepare(model, tokenizer, Encoder(tokenizer, min(512, context_length(model)))(task, examples))
    return model, lambda: training_objective(task)(model, batch).mean()


@torch.no_grad()
def by_forward_passes(model: Any, loss: Any, eps: float, directions: int) -> list[float]:
    """z' H z of each direction from second differences of the loss."""
    optimizer, centre = MeZO(model, eps=eps), float(loss())
    values = []
    with Scratch(optimizer.tuned, optimizer.noise) as point:
        for k in range(directions):
            around = 0.0
            for scale in (eps, -eps):
                point.shift(0, Query(k, scale))
                around += float(loss()) - centre
            values.append(around / eps**2)
    return values


def by_backward_passes(model: Any, loss: Any, directions: int, iterations: int) -> dict[str, list[float]]:
    """What the others are checked against, from exact products H v.

    z' H z and |H z|^2 of the same directions, and |H| by power iteration from the gradient.
    """
    optimizer = MeZO(model)
    weights = [t.parameter for t in optimizer.tuned]
    gradient = torch.autograd.grad(loss(), weights, create_graph=True)
    found: dict[str, list[float]] = {"curvatures": [], "squares": [], "power_iteration": []}
    for k in range(directions):
        z = [optimizer.noise.z(t.parameter, tensor=t.id, step=0, probe=k) for t in optimizer.tuned]
        product = torch.autograd.grad(gradient, weights, z, retain_graph=True)
        found["curvatures"].append(dot(z, product))
        found["squares"].append(dot(product, product))
    v: Any = [g.detach() for g in gradient]
    for _ in range(iterations):
        length = dot(v, v) ** 0.5
        v = torch.autograd.grad(gradient, weights, [x / length for x in v], retain_graph=True)
        found["power_iteration"].append(dot(v, v) ** 0.5)
    return found


def dot(a: Any, b: Any) -> float:
    """Inner product over all tensors, in float64."""
    return sum(float((x.double() * y).sum()) for x, y in zip(a, b, strict=True))


def interval(values: list[float], statistic: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float, float]:
    """A statistic of the columns, with the ends of its 95% bootstrap interval."""
    x = torch.tensor(values)
    picks = torch.randint(len(x), (len(x), 4000), generator=torch.Generator().manual_seed(0))
    low, high = statistic(x[picks]).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(statistic(x[:, None])), low, high


def error(values: list[float], exact: list[float]) -> float:
    """Root mean square difference over the directions."""
    return fmean((a - b) ** 2 for a, b in zip(values, exact, strict=True)) ** 0.5


def measure(options: Any) -> dict[str, Any]:
    """The sweep over eps in both dtypes, then the effective rank in float32 at one eps."""
    sweep: dict[str, Any] = {}
    for dtype in ("bfloat16", "float32"):
        model, loss = problem(options, dtype)
        sweep[dtype] = {eps: by_forward_passes(model, loss, eps, options.directions) for eps in options.sweep}
    backward = by_backward_passes(model, loss, options.directions, options.iterations)
    values, norm = by_forward_passes(model, loss, options.eps, options.rank_directions), backward["power_iteration"][-1]
    return {
        "model": options.model,
        "weights": sum(p.numel() for p in model.parameters()),
        "sweep": sweep,
        "backward": backward,
        "eps": options.eps,
        "values": values,
        "norm": norm,
        # E[z' H z] = tr H and, for Gaussian z, Var[z' H z] = 2 |H|_F^2.
        "trace": interval(values, lambda x: x.mean(0)),
        "frobenius": interval(values, lambda x: (x.var(0) / 2).sqrt()),
        "effective_rank": interval(values, lambda x: x.mean(0) / norm),
        "stable_rank": interval(values, lambda x: x.var(0) / 2 / norm**2),
    }


def table(result: dict[str, Any]) -> str:
    """The sweep, and the effective rank with its parts."""
    exact = result["backward"]["curvatures"]
    lines = [f"{'eps':>8}" + "".join(f"{dtype + ': mean':>16} {'error':>10}" for dtype in result["sweep"])]
    for eps in next(iter(result["sweep"].values())):
        cells = (f"{fmean(v[eps]):16.4g} {error(v[eps], exact):10.3g}" for v in result["sweep"].values())
        lines.append(f"{eps!s:>8}" + "".join(cells))
    lines.append(f"z' H z of {len(exact)} directions; by backward passes: mean {fmean(exact):.4g}, "
                 f"standard deviation {variance(exact) ** 0.5:.3g}")  # fmt: skip
    lines.append("")
    lines.append(f"{len(result['values'])} directions, float32, eps {result['eps']}   (95% interval)")
    labels = {"trace": "tr H", "frobenius": "|H|_F", "effective_rank": "tr H / |H|", "stable_rank": "|H|_F^2 / |H|^2"}
    for key, label in labels.items():
        value, low, high = result[key]
        lines.append(f"  {label:16} {value:10.4g}   ({low:.3g} to {high:.3g})")
    frobenius = fmean(result["backward"]["squares"]) ** 0.5
    lines.append(f"by backward passes: |H| {result['norm']:.4g}, |H|_F {frobenius:.4g}")
    lines.append(f"weights: {result['weights']:,}")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> Any:
    """Error of z' H z by eps, and the estimate of the trace by eps with its interval."""
    figure, (left, right) = panels(2)
    exact = result["backward"]["curvatures"]
    for (dtype, by_eps), colour, marker, aside in zip(
        result["sweep"].items(), (RED, BLUE), "so", (1.06, 0.94), strict=True
    ):
        eps, values = [float(e) for e in by_eps], list(by_eps.values())
        errors = [error(v, exact) for v in values]
        left.loglog(eps, errors, color=colour, marker=marker, markersize=5, label=dtype)
        means = [interval(v, lambda x: x.mean(0)) for v in values]
        bars = [[m - low for m, low, _ in means], [high - m for m, _, high in means]]
        right.errorbar([e * aside for e in eps], [m for m, _, _ in means], bars, color=colour, marker=marker,
                       markersize=5, capsize=3, linewidth=1, label=dtype)  # fmt: skip
        left.loglog(eps, [errors[0] * (eps[0] / e) ** 2 for e in eps], ":", color=colour, linewidth=1, zorder=0)
    spread = variance(exact) ** 0.5
    left.axhline(spread, color=GREEN, linestyle="--", label="spread over directions", zorder=0)
    left.set_ylim(bottom=min(error(v, exact) for by_eps in result["sweep"].values() for v in by_eps.values()) / 3)
    left.set(xlabel="eps", ylabel="error of z' H z, root mean square", title="rounding (dotted: slope -2), then bias")
    right.axhline(fmean(exact), color=GREEN, linestyle="--", label="by backward passes", zorder=0)
    right.axhline(0, color=GREY, linewidth=0.8, zorder=0)
    decade = 10 ** math.ceil(math.log10(spread))
    right.set_xscale("log")
    right.set_yscale("symlog", linthresh=decade)
    low, high = right.get_ylim()
    ticks = [0.0, *(sign * decade * 10**k for k in range(6) for sign in (-1.0, 1.0))]
    right.set_yticks([t for t in ticks if low <= t <= high])
    right.set(xlabel="eps", ylabel="mean of z' H z", title=f"tr H from {len(exact)} directions, 95% intervals")
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write figure and numbers."""
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2-135m", help="hub id, local folder or embedded model")
    options.add_argument("--task", default="reviews")
    options.add_argument("--data-dir", help="folder with the task's data, instead of its own source")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--sweep", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    options.add_argument("--directions", type=int, default=8, help="directions at every eps of the sweep")
    options.add_argument("--eps", type=float, default=1e-3, help="eps of the effective rank")
    options.add_argument("--rank-directions", type=int, default=64)
    options.add_argument("--iterations", type=int, default=10, help="of the power iteration")
    options = options.parse_args(arguments)
    if options.quick:
        options.sweep, options.rank_directions = [1e-4, 1e-3, 1e-2], 64
    result = measure(options)
    print(table(result))
    return save("effective_rank", result, draw(result), options.output_dir)


if __name__ == "__main__":
    main()
