"""L5: the weights that pay best for being perturbed: feed-forward matrices behind the first third of the layers.

A step's noise is what all perturbed weights add to the loss, ``tr H``; what it learns is what they share of ``|g|^2``. On a model of 135M weights the layers of the
first third have a fifth to two fifths of the mean ratio of these, later ones 1.2 to 2 times, and feed-forward matrices more than
those of attention (``benchmarks/methods.py`` compares runs).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from ..errors import InputError

#: The share of a model's layers that are late.
LATE = 2 / 3
# What configurations call the width of a feed-forward block, in all its layers or in one expert.
_WIDTHS = (
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size",
    "expert_ffn_hidden_size", "block_ff_dim", "mlp_hidden_size", "intermediate_dim",
)  # fmt: skip


def late_mlp(model: Any) -> list[str]:
    """Names of the feed-forward matrices, or stacks of them, of all layers but the first third.

    A matrix is one that leads from the width of the model to that of a feed-forward block, or to two of these side by side, or back. Where there is none, as in Mamba,
    all matrices of these layers are meant.

    Raises:
        InputError: the model has no layers in a row.
    """
    layers, pairs = late(model), _pairs(model)
    matrices = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name.startswith(layers)
    ]
    found = [
        name
        for name, p in matrices
        if frozenset(p.shape[-2:]) in pairs and not re.search(r"attn|attention", name.rpartition(".")[0])
    ]
    return found or [name for name, _ in matrices]


def late_down(model: Any) -> list[str]:
    """Names of the linear layers among them that lead from a feed-forward block back to the width of the model, so that what they give is added
    to what the head reads. The base may be quantised.

    Raises:
        InputError: the model has no layers in a row, or no such linear layers.
    """
    layers = late(model)
    found = [
        name for name in adding_to_stream(model) if name.startswith(layers) and not re.search(r"attn|attention", name)
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no linear layers that lead from a feed-forward block back, which late-down stands for: name the targets "
            "of LoRA"
        )
    return found


# Last parts of the names of the layers behind attention; those of queries, keys and values may be as wide.
_BEHIND_ATTENTION = re.compile(r"\.(o_proj|out_proj|c_proj|dense|wo)$")


def adding_to_stream(model: Any) -> list[str]:
    """Names of the linear layers whose output is added to what the head reads: those that lead from a feed-forward block back to the width of the
    model, and those behind attention. With an adapter a layer has the name of the layer below it."""
    pairs, hidden = _pairs(model), model.config.get_text_config().hidden_size
    found = []
    for name, module in model.named_modules():
        sides = [
            getattr(module, side, None)
            for side in (("nx", "nf") if hasattr(module, "nf") else ("in_features", "out_features"))
        ]
        is_attention = re.search(r"attn|attention", name) is not None
        back = frozenset(sides) in pairs and not is_attention
        if sides[1] == hidden and (back or (is_attention and _BEHIND_ATTENTION.search(name))):
            found.append(name)
    return found


def late(model: Any) -> tuple[str, ...]:
    """What the names in all layers but the first third begin with."""
    layers = row_of_layers(model)
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers in a row, of which late-mlp could take the last two thirds: choose all, or a pattern "
            "of parameter names"
        )
    return tuple(f"{layer}." for layer in layers[len(layers) // 3 :])


def _pairs(model: Any) -> set[frozenset[int]]:
    """The two sides of a matrix between the width of the model and that of a feed-forward block, or two of these side by side."""
    config = model.config.get_text_config()
    widths = {width for name in _WIDTHS if isinstance(width := getattr(config, name, None), int)}
    return {frozenset((config.hidden_size, k * width)) for width in {4 * config.hidden_size, *widths} for k in (1, 2)}


def row_of_layers(model: nn.Module) -> list[str]:
    """Names of the layers of the longest row of them that text goes through; none if there is no row."""
    rows = {
        name: [f"{name}.{k}" for k in range(len(module))]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not re.search("vis|image|audio|expert", name)
    }
    return max(rows.values(), key=len, default=[])


def expert_stacks(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that hold a matrix for every expert, by name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    }
