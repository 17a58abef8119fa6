"""L5: parts of a model that text never enters, such as a vision tower: frozen before a run begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters
from ..points import Scratch

# So many tokens are read to see which parts of a model take part.
_TOKENS = 8


def freeze_unreached(model: Any) -> dict[str, int]:
    """Let what a forward pass on text does not enter require no grad.

    A part is a module none of whose tuned weights is read. Items of a list are no parts, as they may be experts that other texts are
    routed to, unless they are of another class than those which were read (cross-attention layers, for instance).

    Returns:
        The names of the parts, with the number of their tuned weights.
    """
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if model.device.type == "meta":  # only weights show what is read
        return {}
    parameters = TunedParameters.from_groups([{"params": tuned}], model)
    ids = torch.arange(_TOKENS, device=model.device)[None]
    scratch = Scratch(parameters, Noise(0))
    try:
        with torch.no_grad(), scratch:
            scratch.shift(0, Query(0, 0.0))
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # it wants more than text: its run will say so, or knows better
        return {}
    assert scratch.used is not None
    read = {id(parameters[i].parameter) for i in scratch.used}
    unread = {id(parameter) for parameter in tuned} - read
    found: dict[str, int] = {}
    for name, part in _parts(model, "", unread, read) if unread and read else ():
        found[name] = sum(p.numel() for p in part.parameters() if p.requires_grad)
        for parameter in part.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in read)
    return found


def _parts(module: nn.Module, prefix: str, unread: set[int], read: set[int]) -> list[tuple[str, nn.Module]]:
    """The largest modules below this one with tuned weights of which none was read."""
    parts = []
    of_read = {type(child) for child in module.children() if any(id(p) in read for p in child.parameters())}
    for name, child in module.named_children():
        own = {id(parameter) for parameter in child.parameters()}
        if not own & unread:
            continue
        if own & read:
            parts += _parts(child, f"{prefix}{name}.", unread, read)
        elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(child) not in of_read:
            parts.append((f"{prefix}{name}", child))
    return parts
