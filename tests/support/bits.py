"""The bits of tensors, before and after."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every parameter and buffer has the bits that it had."""
    after = module.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert same_bits(after[name], tensor), name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of storage, which tells -0 from 0 and NaN payloads apart."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
