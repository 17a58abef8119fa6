"""L5: parts of a model that text never enters, such as a vision tower: frozen before a run begins."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn

from ..method.estimators import Query
from ..noise import Noise
from ..parameters import TunedParameters
from ..points import Scratch
from .loading import context_length

# Tokens that are read to see which parts of a model take part; the second number where the first leaves some out.
_SHORT, _LONG = 8, 256


def freeze_unreached(model: Any) -> dict[str, int]:
    """Let what a forward pass on text does not enter require no grad. Returns the names of these parts, with the number of their tuned weights."""
    parts = unreached(model)
    for parameter in chain.from_iterable(parts.values()):
        parameter.requires_grad_(False)
    return {name: sum(parameter.numel() for parameter in part) for name, part in parts.items()}


def unreached(model: Any) -> dict[str, list[nn.Parameter]]:
    """The tuned weights of the parts that a forward pass on text does not enter, by the names of the parts.

    A part is a module none of whose tuned weights is read. Items of a list are no parts, as they may be experts that other texts are
    routed to, unless they are of another class than those which were read (cross-attention layers, for instance).
    """
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not tuned or tuned[0].device.type == "meta":  # only weights show what is read
        return {}
    parameters = TunedParameters.from_groups([{"params": tuned}], model)
    read = _read(model, parameters, _SHORT)
    if read and len(read) < len(
        tuned
    ):  # some layers sum up what lies far behind, and are not entered before there is such
        read |= _read(model, parameters, min(_LONG, context_length(model)) if hasattr(model, "config") else _LONG)
    unread = {id(parameter) for parameter in tuned} - read
    parts = _parts(model, "", unread, read) if unread and read else ()
    return {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts}


def _read(model: Any, parameters: TunedParameters, tokens: int) -> set[int]:
    """The ids of the parameters that a text of so many tokens reads; none if it wants more than text."""
    ids = (torch.arange(tokens, device=parameters[0].device) % _SHORT)[None]
    scratch = Scratch(parameters, Noise(0))
    try:
        with torch.no_grad(), scratch:
            scratch.shift(0, Query(0, 0.0))
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # its run will say so, or knows better
        return set()
    assert scratch.used is not None
    return {id(parameters[i].parameter) for i in scratch.used}


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
