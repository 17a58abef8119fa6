"""SPSA estimates the gradient without bias: its error falls as 1 / sqrt(n), down to a floor of order eps^2.

    python examples/theory/unbiased.py                   # a tiny random GPT-2
    python examples/theory/unbiased.py --model FOLDER    # a causal model of your own, a small one

The mean of c_k z_k over n directions (MeZO, definition 1) against the gradient by backpropagation; then the mean over all
2^d Rademacher directions, which leaves no chance: what remains is the bias, eps^2 on a transformer and none on a quadratic.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from statistics import fmean
from typing import Any

import torch
from figures import BLUE, GREEN, RED, panels, parser, save
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from forwardtune import MeZO
from forwardtune.method.estimators import SPSA
from forwardtune.models import load_model
from forwardtune.points import Scratch


def tiny_gpt2(dtype: torch.dtype) -> Any:
    """One layer, drawn wide enough for a loss with some shape."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, n_inner=16, initializer_range=0.3,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config).to(dtype).eval()


def loss_of(model: Any) -> Any:
    """A closure: next-token loss on a fixed batch of random tokens, in the model's own precision."""
    tokens = torch.randint(3, min(32, model.config.vocab_size), (4, 16), generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def gradient(model: Any, loss: Any) -> list[torch.Tensor]:
    """The gradient by backpropagation, in the order of the parameters that are tuned."""
    return list(torch.autograd.grad(loss(), [t.parameter for t in MeZO(model).tuned]))


@torch.no_grad()
def errors(model: Any, loss: Any, truth: list[torch.Tensor], eps: float, most: int) -> dict[int, float]:
    """n -> |mean of n estimates - gradient| / |gradient|, root mean square over the most / n blocks of n directions."""
    optimizer, spsa = MeZO(model, eps=eps), SPSA(eps)
    squares: dict[int, list[float]] = defaultdict(list)
    waiting: dict[int, list[torch.Tensor]] = {}  # n -> sum over a block of n that has no partner yet
    with Scratch(optimizer.tuned, optimizer.noise) as point:
        for k in range(most):
            losses = []
            for query in spsa.queries():
                point.shift(0, query._replace(probe=k))
                losses.append(float(loss()))
            (c,) = spsa.coefficients(losses)
            total = [c * optimizer.noise.z(t.parameter, tensor=t.id, step=0, probe=k) for t in optimizer.tuned]
            n = 1
            squares[n].append(distance(total, truth) ** 2)
            while n in waiting:
                total, n = [a + b for a, b in zip(waiting.pop(n), total, strict=True)], 2 * n
                squares[n].append(distance([x / n for x in total], truth) ** 2)
            waiting[n] = total
    return {n: fmean(values) ** 0.5 for n, values in squares.items()}


@torch.no_grad()
def bias(weight: torch.Tensor, loss: Any, truth: torch.Tensor, eps: float) -> float:
    """Relative error of the mean over all 2^d Rademacher directions of a weight of d elements."""
    start, total, spsa = weight.clone(), torch.zeros_like(weight), SPSA(eps)
    for signs in itertools.product((-1.0, 1.0), repeat=weight.numel()):
        z = torch.tensor(signs, dtype=weight.dtype)
        losses = [float(loss(weight.copy_(start + query.scale * z))) for query in spsa.queries()]
        total += spsa.coefficients(losses)[0] * z
    weight.copy_(start)
    return distance([total / 2 ** weight.numel()], [truth])


def distance(estimate: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """|estimate - truth| / |truth|, over all tensors."""
    apart = sum(float((e - t).double().square().sum()) for e, t in zip(estimate, truth, strict=True))
    return (apart / sum(float(t.double().square().sum()) for t in truth)) ** 0.5


def slope(by_x: dict[Any, float]) -> float:
    """Least-squares slope of log y by log x."""
    x, y = torch.tensor([float(k) for k in by_x]).log(), torch.tensor(list(by_x.values())).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def measure(options: Any) -> dict[str, Any]:
    """Error by number of directions, bias by eps, bias on a quadratic."""
    model = load_model(options.model, dtype="float32")[0] if options.model else tiny_gpt2(torch.float32)
    loss = loss_of(model)
    truth = gradient(model, loss)
    by_eps = {eps: errors(model, loss, truth, eps, options.directions) for eps in options.eps}

    exact = tiny_gpt2(torch.float64)
    for name, parameter in exact.named_parameters():
        parameter.requires_grad_(name == "transformer.ln_f.weight")  # 8 elements: 256 directions
    loss = loss_of(exact)
    (truth,) = gradient(exact, loss)
    weight, scales = exact.transformer.ln_f.weight, (0.3, 0.1, 0.03, 0.01, 0.003)
    biases = {eps: bias(weight, lambda _: loss(), truth, eps) for eps in scales}

    draw = torch.Generator().manual_seed(2)
    root, theta = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((8, 8), (8,)))
    on_quadratic = bias(theta, lambda x: (root @ x).square().sum() / 2, root.T @ root @ theta, 0.1)
    return {
        "model": options.model or "tiny random GPT-2",
        "weights": sum(p.numel() for p in model.parameters()),
        "errors": by_eps,
        "slope": slope(by_eps[options.eps[0]]),
        "bias": biases,
        "bias_slope": slope(biases),
        "bias_on_quadratic": on_quadratic,
    }


def table(result: dict[str, Any]) -> str:
    """Errors by n and eps; the biases."""
    d, rows = result["weights"], list(next(iter(result["errors"].values())))
    lines = [f"{'n':>6} {'sqrt((d+1)/n)':>14}" + "".join(f"{f'eps {eps}':>11}" for eps in result["errors"])]
    for n in rows[::2] + ([] if len(rows) % 2 else [rows[-1]]):
        errors = "".join(f"{by_n[n]:11.4f}" for by_n in result["errors"].values())
        lines.append(f"{n:>6} {((d + 1) / int(n)) ** 0.5:14.4f}{errors}")
    lines.append(f"slope of the first in log-log: {result['slope']:.3f} (1 / sqrt(n): -0.5), d = {d}")
    lines.append("all 256 directions, relative bias by eps:")
    lines.append("  " + "   ".join(f"{eps}: {b:.1e}" for eps, b in result["bias"].items()))
    lines.append(f"  slope in log-log: {result['bias_slope']:.3f} (eps^2: 2)")
    lines.append(f"  on a quadratic, eps 0.1: {result['bias_on_quadratic']:.1e}")
    return "\n".join(lines)


def draw(result: dict[str, Any]) -> Any:
    """Error by n for every eps; bias by eps."""
    figure, (left, right) = panels(2)
    counts = [int(n) for n in next(iter(result["errors"].values()))]
    for (eps, by_n), colour, marker in zip(result["errors"].items(), (BLUE, GREEN, RED), "os^", strict=False):
        left.loglog(counts, list(by_n.values()), color=colour, marker=marker, markersize=4, label=f"eps = {eps}")
    expected = [((result["weights"] + 1) / n) ** 0.5 for n in counts]
    left.loglog(counts, expected, "k:", linewidth=1, label="sqrt((d + 1) / n)", zorder=3)
    left.set(xlabel="directions n", ylabel="error of the mean, relative to |gradient|",
             title=f"{result['weights']:,} weights of a transformer")  # fmt: skip
    left.legend(loc="lower left")
    eps, biases = [float(e) for e in result["bias"]], list(result["bias"].values())
    right.loglog(eps, biases, color=BLUE, marker="o", markersize=5, label="transformer")
    right.loglog(eps, [biases[0] * (e / eps[0]) ** 2 for e in eps], "k:", linewidth=1, label="slope 2", zorder=3)
    right.loglog([0.1], [result["bias_on_quadratic"]], "s", color=RED, label="quadratic: rounding alone")
    right.set(xlabel="eps", ylabel="bias, relative to |gradient|", title="mean over all 256 Rademacher directions")
    right.legend(loc="center left")
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write figure and numbers."""
    options = parser(__doc__)
    options.add_argument("--model", help="hub id or local folder; default: a tiny random GPT-2")
    options.add_argument("--eps", type=float, nargs="+", default=[1e-3, 0.05, 0.2])
    options.add_argument("--directions", type=int, default=4096, help="most directions, a power of two")
    options = options.parse_args(arguments)
    if options.quick:
        options.directions = 256
    result = measure(options)
    print(table(result))
    return save("unbiased", result, draw(result), options.output_dir)


if __name__ == "__main__":
    main()
