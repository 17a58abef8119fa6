"""The largest models that a step of tuning fits on one GPU, and what it takes there.

    python benchmarks/largest.py                              # 30B in bfloat16 (all weights), 70B in NF4 (an adapter)
    python benchmarks/largest.py --rows 66b --gigabytes 141   # one that wants a larger card

Random weights of OPT's and Llama's shapes, made on the device; 16 x 64 tokens, one logit row a sequence. ``peak`` is what is allocated at the
peak of a step, ``more`` that without the peak of a forward pass alone, ``fits`` whether it is below the card's bytes with a twentieth to spare.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import parser, write
from shapes import OPT, loss_of, losses_of, make, minibatch, size_of
from timing import peak_of
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from forwardtune import MeZO
from forwardtune.models import tune

OPT["66b"] = (64, 72, 9216)
#: vocabulary, width, inner width, layers, heads, heads of keys and values
LLAMA_70B = (32000, 8192, 28672, 80, 64, 8)


def quantised(device: str, layers: int | None = None) -> Any:
    """A Llama of 70B parameters, its linear layers in NF4 but for the head, with an adapter."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    vocabulary, width, inner, depth, heads, pairs = LLAMA_70B
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=pairs,
    )  # fmt: skip
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = replace_with_bnb_linear(model, ["lm_head"], nf4)
    frequencies = type(model.model.rotary_emb)(config).to(device)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            shape = (
                (module.out_features, module.in_features) if isinstance(module, bnb.nn.Linear4bit) else parameter.shape
            )
            values = torch.empty(shape, dtype=torch.bfloat16, device=device).uniform_(-0.02, 0.02)
            if isinstance(module, bnb.nn.Linear4bit):
                packed, state = bnb.functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
                module._parameters[name] = bnb.nn.Params4bit(
                    packed, requires_grad=False, quant_state=state, quant_type="nf4", bnb_quantized=True, module=module
                )
                module.quant_state = state
            else:
                module._parameters[name] = nn.Parameter(values)
    model.model.rotary_emb = frequencies
    model.is_quantized, model.is_loaded_in_4bit = True, True
    model.config.quantization_config = nf4
    return tune(model.eval(), None, "lora")


def measure(name: str, device: str, layers: int | None = None, rounds: int = 3) -> dict[str, Any]:
    """Peaks and seconds of a row."""
    per_example = name == "70b-nf4-lora"
    model = quantised(device, layers) if per_example else make(name, torch.bfloat16, device)
    batch = minibatch(model, 64, device)
    with torch.no_grad():
        loss = losses_of(model, batch) if per_example else loss_of(model, batch)
        inference: int = peak_of(loss, device)
        optimizer = MeZO(model, lr=1e-7, eps=1e-3, assignment="example" if per_example else "shared")
        step: Callable[[], float] = lambda: optimizer.step(loss)  # noqa: E731
        peak, seconds = peak_of(step, device), []
        for _ in range(rounds):
            began = time.perf_counter()
            step()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = max(peak, peak_of(step, device))
    return {
        "row": name,
        "parameters": sum(
            p.quant_state.shape.numel() if hasattr(p, "quant_state") else p.numel() for p in model.parameters()
        ),
        "tuned": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weights": size_of(model),
        "inference": inference,
        "peak": peak,
        "more": peak - inference,
        "seconds": statistics.median(seconds),
    }  # fmt: skip


def main() -> None:
    """Print and save."""
    asked = parser(__doc__)
    asked.add_argument(
        "--rows", nargs="+", choices=("1.3b", "13b", "30b", "66b", "70b-nf4-lora"), default=["30b", "70b-nf4-lora"]
    )
    asked.add_argument("--gigabytes", type=float, default=80, help="of the card that it is for, in 10^9 bytes")
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--output", default="largest")
    asked.add_argument("--layers", type=int, help="of the 70B, to try it")
    options = asked.parse_args()
    rows = []
    for name in options.rows:
        row = measure(name, options.device, options.layers)
        row["card"], row["fits"] = options.gigabytes, row["peak"] <= 0.95 * options.gigabytes * 1e9
        rows.append(row)
        print(row, flush=True)
        write(options.output, {"rows": rows})
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
