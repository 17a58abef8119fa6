"""Seconds of a full-tuning step, against its floor of two forward passes and against the published loop.

    python benchmarks/step.py

The model has the shape of SmolLM2-135M with random weights, the batch 16 sequences of 32 tokens, and one logit row a
sequence is computed, as for a task with one-token answers. ``reference`` transcribes the published loop: three passes of
``torch.normal`` over the stored weights and one for the update, with a logit row for every token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from machine import write
from timing import interleave
from transformers import LlamaConfig, LlamaForCausalLM

from forwardtune import MeZO
from forwardtune.objectives import logits_at

BATCH, LENGTH, EPS = 16, 32, 1e-3


def model_like_smollm2(dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def reference_step(model: LlamaForCausalLM, input_ids: torch.Tensor, last: torch.Tensor, lr: float, seed: int) -> None:
    """One step of the published loop."""

    def add_noise(scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            z = torch.normal(mean=0, std=1, size=parameter.shape, dtype=parameter.dtype)
            parameter.data = parameter.data + scale * z

    def loss() -> float:
        logits = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)[last].float()
        return float(logits.logsumexp(dim=-1).mean())

    add_noise(EPS)
    plus = loss()
    add_noise(-2 * EPS)
    minus = loss()
    add_noise(EPS)
    add_noise(-lr * (plus - minus) / (2 * EPS))


def perturbed(optimizer: MeZO, loss: Callable[[], torch.Tensor]) -> None:
    """One evaluation at theta + eps z."""
    assert optimizer.perturbation is not None
    with optimizer.perturbation as perturbation:
        perturbation.shift(0, 0, EPS)
        loss()


def main() -> None:
    """Print and save the ratios."""
    input_ids = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    last = torch.arange(BATCH) * LENGTH + LENGTH - 1
    batch = {"input_ids": input_ids, "positions": last}
    rows = {}
    print(f"{'dtype':10}{'step / 2 forwards':>20}{'reference / 2 forwards':>24}{'reference / step':>18}")
    for dtype in (torch.bfloat16, torch.float32):
        model = model_like_smollm2(dtype)
        optimizer = MeZO(model, lr=1e-9, eps=EPS)

        @torch.no_grad()
        def loss(model: LlamaForCausalLM = model) -> torch.Tensor:
            return logits_at(model, batch).logsumexp(dim=-1).mean()

        optimizer.step(loss)
        assert optimizer.perturbation is not None
        assert optimizer.perturbation.name == "scratch"
        seconds = interleave(
            {
                "forward": loss,
                "perturbed_forward": lambda optimizer=optimizer, loss=loss: perturbed(optimizer, loss),
                "step": lambda optimizer=optimizer, loss=loss: optimizer.step(loss),
                "reference": lambda model=model: reference_step(model, input_ids, last, 1e-9, 0),
            },
            rounds=9,
        )
        floor = 2 * seconds["forward"]
        name = str(dtype).removeprefix("torch.")
        rows[name] = {
            "seconds": seconds,
            "step_over_floor": seconds["step"] / floor,
            "reference_over_floor": seconds["reference"] / floor,
            "reference_over_step": seconds["reference"] / seconds["step"],
        }
        row = rows[name]
        print(
            f"{name:10}{row['step_over_floor']:20.2f}{row['reference_over_floor']:24.2f}{row['reference_over_step']:18.2f}"
        )
    write("step", {"batch": [BATCH, LENGTH], "rows": rows})


if __name__ == "__main__":
    main()
