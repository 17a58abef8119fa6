"""Seconds of a step of a mixture of experts over its floor of two forward passes, by the number of tokens that are routed.

    python benchmarks/experts.py                                   # 64 experts in one tensor, 2 a token, bfloat16
    python benchmarks/experts.py --experts 16 --tokens 4 --rounds 2 --output smoke

Models have random weights, of Qwen3-MoE's architecture. ``all`` evaluates with every expert perturbed and moves everything, as if nothing were
known of the routes; ``read`` perturbs and moves what tokens are routed to. A step log of the same steps says what that costs in bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from machine import parser, write
from timing import interleave

from forwardtune import MeZO, StepLog
from forwardtune.points import scratch

SIZES = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip
LOGGED = 10


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--output", default="experts")
    arguments.add_argument("--experts", type=int, default=64)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[8, 64, 512])
    options = arguments.parse_args()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=options.experts, num_experts_per_tok=2, tie_word_embeddings=False
    )
    model: Any = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    rows = []
    for tokens in options.tokens:
        ids = torch.randint(5, SIZES["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))

        def loss(ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return model(input_ids=ids, use_cache=False).logits[:, -1].float().logsumexp(dim=-1).mean()

        read, everything = MeZO(model, lr=1e-9), MeZO(model, lr=1e-9, move="all")
        with mock.patch.object(scratch, "of_experts", return_value=frozenset()):
            everything.step(loss)
        works: dict[str, Callable[[], object]] = {
            "forward": loss,
            "read": partial(read.step, loss),
            "all": partial(everything.step, loss),
        }
        seconds = interleave(works, options.rounds)
        row = {"tokens": tokens, "seconds": seconds}
        row |= {f"{name}_over_floor": seconds[name] / (2 * seconds["forward"]) for name in ("read", "all")}
        assert read.last is not None
        left = [int(mask.sum()) for i, mask in read.last.unread.items() if "experts" in read.tuned[i].name]
        row["experts_unread"] = sum(left) / (2 * SIZES["num_hidden_layers"])
        row["log_bytes"] = logged(model, loss)
        rows.append(row)
        print(row, flush=True)
    write(
        options.output,
        {"weights": sum(p.numel() for p in model.parameters()), "experts": options.experts, "rows": rows},
    )


def logged(model: Any, loss: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Bytes of the first line and of a later one, with what was read and without."""
    found = {}
    for move in ("read", "all"):
        with tempfile.TemporaryDirectory() as folder:
            path, optimizer = Path(folder, "steps.jsonl"), MeZO(model, lr=1e-9, move=move)
            with StepLog(path, optimizer):
                for _ in range(LOGGED):
                    optimizer.step(loss)
            lines = path.read_text().splitlines()[1:-1]
        found |= {f"first_{move}": len(lines[0]), f"later_{move}": sum(map(len, lines[1:])) / (LOGGED - 1)}
    return found


if __name__ == "__main__":
    main()
