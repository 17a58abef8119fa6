"""What homes outside the device have in common: all weights of a module move in, tuned and frozen ones, one after the other."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..noise import flattened
from .ferry import Ferry
from .home import RESIDENT, Resident, home_of, settle
from .visits import Visits

# Copies of fewer bytes are over before they would have overlapped with anything.
_SMALL = 1 << 20


class Offloaded(Resident):
    """Values that live elsewhere than in the memory of the device.

    Where the device is not the host, the weights of a module come when it is called, and go when it returns. For an update they come a piece at a
    time, are moved by the device's kernels, and go back. Input is given on the device, as to a model that lies there.

    Args:
        device: where the model computes.
    """

    #: What ``offload`` calls it.
    name: str

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._visits = Visits(self) if self.device.type != "cpu" else None

    @cached_property
    def _ferry(self) -> Ferry | None:
        return None if self._visits is None else Ferry(self.device)

    # --- one tensor ------------------------------------------------------------------------------------------------

    def change(self, parameter: nn.Parameter) -> Any:
        self.wait()  # a copy of the old values may be under way
        return super().change(parameter)

    def pieces(
        self, parameter: nn.Parameter, beside: Sequence[Tensor] = (), unit: int = 8
    ) -> Iterator[tuple[int, list[Tensor]]]:
        if self._ferry is None:
            yield from super().pieces(parameter, beside, unit)
            return
        with flattened(self.read(parameter)) as flat:
            yield from self._ferry.trips([flat, *beside], unit)
            if not self.read(parameter).is_contiguous():  # what is flat is a copy, and is given back now
                self.wait()

    def wait(self) -> None:
        if self._ferry is not None:
            self._ferry.wait()

    def computes_on(self, parameter: nn.Parameter) -> torch.device:
        return self.device

    def visit(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        if self._ferry is None:
            return values
        out = torch.empty_like(values, device=self.device) if out is None else out
        if values.nbytes < _SMALL or not (values.is_contiguous() and out.is_contiguous()):
            return out.copy_(values, non_blocking=True)
        self._ferry.bring(values, out)
        return out

    def outline(self, values: Tensor) -> Tensor:
        if self._visits is None:
            return values
        return torch.empty((), dtype=values.dtype, device=self.device).expand(values.shape)

    # --- a module --------------------------------------------------------------------------------------------------

    def place(self, module: nn.Module) -> None:
        """Let the values of all parameters of a module live here from now on. Those that have moved already stay where they are.

        A module that accelerate has offloaded (weights on ``meta`` between calls) gives up its hooks: its weights are read one after
        the other from where accelerate keeps them, and are never in memory together.

        Raises:
            InputError: it is quantised, has no values, or there is no room.
        """
        if getattr(module, "is_quantized", False):  # transformers' mark
            raise InputError(
                "quantised weights stay on the device, as their packages read them there: leave offload out", "offload"
            )
        elsewhere = _taken_from_accelerate(module)
        new = [p for p in module.parameters() if home_of(p) is RESIDENT and p.numel()]
        if any(p.is_meta and id(p) not in elsewhere for p in new):
            raise InputError("weights of the model have no values (meta device): load them before it is offloaded")
        for parameter, room in zip(new, self._rooms(new), strict=True):
            with torch.no_grad():
                room.copy_(elsewhere[id(parameter)]() if parameter.is_meta else parameter.data)
            if parameter.is_meta:
                # The same object, as modules and optimizers hold it.
                torch.utils.swap_tensors(parameter, nn.Parameter(room, requires_grad=parameter.requires_grad))
            else:
                parameter.data = room
            settle(parameter, self)
        if self._visits is not None:
            self._visits.expect(module)

    @abstractmethod
    def _rooms(self, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor]:
        """Memory for the values of each, on the host."""


def _taken_from_accelerate(module: nn.Module) -> dict[int, Callable[[], Tensor]]:
    """Take accelerate's hooks off. Returns, by the id of each parameter that is on ``meta`` afterwards, what reads its values."""
    hooked = {name: m for name, m in module.named_modules() if hasattr(m, "_hf_hook")}
    if not hooked:
        return {}
    maps = {name: values for name, m in hooked.items() if (values := _weights_map(m._hf_hook)) is not None}
    remove: Any = sys.modules["accelerate.hooks"].remove_hook_from_module  # whoever put them there has imported it
    remove(module, recurse=True)
    vars(module).pop("hf_device_map", None)
    getattr(module, "tie_weights", lambda: None)()  # the hooks gave each place a parameter of its own
    found: dict[int, Callable[[], Tensor]] = {}
    for name, values in maps.items():
        for key, parameter in module.get_submodule(name).named_parameters():
            if parameter.is_meta and key in values:
                found.setdefault(id(parameter), partial(values.__getitem__, key))
    return found


def _weights_map(hook: Any) -> Any:
    """From where a hook, or one of several in a row, brings the weights."""
    if (values := getattr(hook, "weights_map", None)) is not None:
        return values
    return next((found for inner in getattr(hook, "hooks", ()) if (found := _weights_map(inner)) is not None), None)
