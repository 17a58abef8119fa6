"""L1: which tensors are tuned, what they are called, and which number each has in the noise.

A tensor's id is its place among the sorted names of the tuned tensors, so neither the order of construction nor the
order of parameter groups changes its directions. Tied tensors are one tensor: they count once, under the first of their
sorted names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from .errors import InputError
from .storage import RESIDENT, Resident, home_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_ELEMENTS = 2**35  # a 32-bit block counter times eight elements a block
_DIGEST_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False)
class TunedTensor:
    """One tuned tensor.

    Attributes:
        name: fully qualified name in the module.
        id: place among the sorted names; the tensor word of the noise counter.
        parameter: the parameter itself.
        aliases: its other names, if it is tied.
        group: index of its parameter group, which holds its learning rate and weight decay.
        home: where its values live.
    """

    name: str
    id: int
    parameter: nn.Parameter
    group: int
    aliases: tuple[str, ...] = ()
    home: Resident = RESIDENT

    def read(self) -> Tensor:
        """Its values, where they live; not to be changed."""
        return self.home.read(self.parameter)

    def change(self) -> AbstractContextManager[Tensor]:
        """Inside, what is written to the tensor is its value afterwards."""
        return self.home.change(self.parameter)

    def pieces(self, beside: Sequence[Tensor] = (), unit: int = 8) -> Iterator[tuple[int, list[Tensor]]]:
        """Its values on its device, to be changed, in pieces; see :meth:`.storage.Resident.pieces`."""
        return self.home.pieces(self.parameter, beside, unit)

    @property
    def device(self) -> torch.device:
        """Where the model computes with it."""
        return self.home.computes_on(self.parameter)


class TunedParameters(Sequence[TunedTensor]):
    """The tuned tensors of one run, in the order of their ids."""

    def __init__(self, tensors: Sequence[TunedTensor], module: nn.Module | None = None) -> None:
        self._tensors = tuple(tensors)
        self.module = module
        #: A file with the values that the run began with, for what decays towards them (:class:`forwardtune.method.base.BaseFile`).
        self.base: Path | None = None

    @classmethod
    def from_groups(cls, groups: Iterable[Mapping[str, Any]], module: nn.Module | None = None) -> TunedParameters:
        """Collect the parameters of ``torch.optim`` parameter groups.

        Names come from ``module`` if it is given, else from named parameter groups, else from the position
        (``parameter.000003``).

        Raises:
            ValueError: no parameter at all, or one that the module does not hold, that has no storage or none of its own
                values in it (quantised, distributed, sparse), or whose dtype or size is not supported.
        """
        names: dict[int, list[str]] = {}
        if module is not None:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                names.setdefault(id(parameter), []).append(name)
        found: dict[str, tuple[nn.Parameter, int]] = {}
        position = 0
        for number, group in enumerate(groups):
            given = group.get("param_names") or [None] * len(group["params"])
            for parameter, name in zip(group["params"], given, strict=True):
                if module is not None:
                    if id(parameter) not in names:
                        raise ValueError(
                            f"a parameter of group {number} (shape {tuple(parameter.shape)}) is not in the module: "
                            "pass the module that holds every tuned parameter"
                        )
                    name = min(names[id(parameter)])
                name = name or f"parameter.{position:06d}"
                _check(name, parameter)
                if name in found:
                    raise ValueError(
                        f"two parameters have the name {name}: give them distinct names, or pass the module that holds both"
                    )
                found[name] = (parameter, number)
                position += 1
        if not found:
            raise ValueError("there is nothing to tune: no parameter has requires_grad=True")
        aliases = {min(all_names): tuple(sorted(all_names)[1:]) for all_names in names.values()}
        return cls(
            [
                TunedTensor(name, i, *found[name], aliases.get(name, ()), home_of(found[name][0]))
                for i, name in enumerate(sorted(found))
            ],
            module,
        )

    @overload
    def __getitem__(self, index: int) -> TunedTensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TunedTensor]: ...
    def __getitem__(self, index: int | slice) -> TunedTensor | Sequence[TunedTensor]:
        return self._tensors[index]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[TunedTensor]:
        return iter(self._tensors)

    @property
    def numel(self) -> int:
        """Number of tuned weights."""
        return sum(tensor.parameter.numel() for tensor in self)

    def describe(self) -> list[dict[str, Any]]:
        """Name, shape, dtype and group of every tensor, as the step log's header holds them; other names of tied ones."""
        return [
            {
                "name": tensor.name,
                "shape": list(tensor.parameter.shape),
                "dtype": dtype_name(tensor.parameter.dtype),
                "group": tensor.group,
                **({"tied": list(tensor.aliases)} if tensor.aliases else {}),
            }
            for tensor in self
        ]

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and row-major little-endian bytes of all tuned tensors, as hex."""
        state = hashlib.sha256()
        for tensor in self:
            parameter = tensor.read()
            state.update(f"{tensor.name}\0{dtype_name(parameter.dtype)}\0{tuple(parameter.shape)}\0".encode())
            _digest_values(state, parameter)
        return state.hexdigest()

    def frozen_digest(self) -> str | None:
        """SHA-256 over what decides the meaning of the tuned tensors and is none of them, as hex; None if there is nothing.

        Of a quantised module it is all else that it is stored as, integers and scales: what runs over one quantisation of a model is worth
        nothing over another, and their tuned tensors, an adapter's, may be the same. Of other modules it is a frozen A beside each tuned B of LoRA.
        """
        if self.module is None:
            return None
        tuned = {name for tensor in self for name in (tensor.name, *tensor.aliases)}
        beside = {tensor.name.replace(".lora_B.", ".lora_A.") for tensor in self} - tuned
        quantised = getattr(self.module, "is_quantized", False)  # transformers' mark
        if not quantised and not beside:
            return None
        state = hashlib.sha256()
        for name, stored in sorted(self.module.state_dict().items()):
            if isinstance(stored, Tensor) and (name in beside or (quantised and name not in tuned)):
                for part, tensor in _stored(name, stored):
                    state.update(f"{part}\0{dtype_name(tensor.dtype)}\0{tuple(tensor.shape)}\0".encode())
                    _digest_values(state, tensor)
        return state.hexdigest()


def require_settings(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless a parameter group has a learning rate and a weight decay that can be used."""
    for name, at_least in (("lr", "positive"), ("weight_decay", "not negative")):
        value = group[name]
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise ValueError(
                f"{name} must be a number, got {value!r}" + ("; MeZOTrainer finds one" if value == "auto" else "")
            )
        if not (0 <= value < math.inf) or (name == "lr" and value == 0):
            raise ValueError(f"{name} must be {at_least}, got {value!r}")


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def _raw_bytes(flat: Tensor) -> memoryview | bytes:
    # By a last dimension, as one element alone may keep a stride that is not 1.
    raw = flat.cpu().contiguous().unsqueeze(-1).view(torch.uint8).view(-1)
    try:
        return memoryview(raw.numpy())  # type: ignore[arg-type]  # NumPy's stubs lag behind Buffer
    except RuntimeError:  # torch without NumPy
        return bytes(raw.tolist())


def _digest_values(state: Any, tensor: Tensor) -> None:
    flat = tensor.reshape(-1)
    for lo in range(0, flat.numel(), _DIGEST_CHUNK):
        state.update(_raw_bytes(flat[lo : lo + _DIGEST_CHUNK]))


def _stored(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The ordinary tensors that one is made of, by name."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _stored(f"{name}.{part}", getattr(tensor, part))


def is_plain(parameter: Tensor) -> bool:
    """Whether it is an ordinary tensor of numbers that can be perturbed; a quantised one is not."""
    return parameter.dtype in DTYPES and _holds_its_values(parameter)


def _holds_its_values(parameter: Tensor) -> bool:
    """Whether it is an ordinary strided tensor. A subclass with its own dispatch keeps its values elsewhere: integers and scales
    of a quantised tensor, this process's shard of a DTensor."""
    own_dispatch = type(parameter.data).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return parameter.layout == torch.strided and not own_dispatch


def require_values(module: nn.Module) -> None:
    """Raise InputError if parameters have no values, as where accelerate keeps them elsewhere between calls."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            _check(name, parameter)


def _check(name: str, parameter: Tensor) -> None:
    if parameter.dtype not in DTYPES:
        known = ", ".join(dtype_name(dtype) for dtype in DTYPES)
        raise ValueError(
            f"{name} has dtype {dtype_name(parameter.dtype)}, which cannot be perturbed (only {known}): "
            "set requires_grad=False on it, or tune an adapter instead"
        )
    if not _holds_its_values(parameter):
        what = type(parameter.data).__name__
        kind = what if what != "Tensor" else f"tensor of layout {parameter.layout}"
        raise InputError(
            f"{name} is a {kind}, which cannot be perturbed, as its memory does not hold its values one by one (it is quantised, "
            "distributed or sparse): set requires_grad=False on it and tune an adapter, such as LoRA, or load the model as "
            "ordinary tensors on one device"
        )
    if parameter.device.type == "meta":
        raise InputError(
            f"{name} has no values of its own (meta device): they were left on disk, or in memory that no layer reaches by itself. Pass "
            "MeZO(storage=OnDisk(folder)), or MeZOConfig(offload='disk'), which take such a model over, or load it without device_map"
        )
    if parameter.numel() > _MAX_ELEMENTS:
        raise ValueError(f"{name} has {parameter.numel()} elements; at most 2**35 are supported in one tensor")
