"""The weights of a module come to the device when it is called, and go when it returns."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .home import Resident, home_of


class Visits:
    """Brings weights that live in a home to where it computes, module by module.

    What a perturbation has put in the place of a parameter brings its values itself, or is told them (``stand_for``).
    """

    def __init__(self, home: Resident) -> None:
        self._home = home
        self._own: WeakKeyDictionary[nn.Module, dict[str, nn.Parameter]] = WeakKeyDictionary()
        self._present: list[tuple[nn.Module, dict[str, Any]]] = []

    def expect(self, module: nn.Module) -> None:
        """From now on the weights of its modules come and go. Buffers, which are small, come for good."""
        device = self._home.computes_on(next(module.parameters()))
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = buffer if buffer is None else buffer.to(device)
            own = {name: p for name, p in owner._parameters.items() if p is not None and home_of(p) is self._home}
            if own and owner not in self._own:
                owner.register_forward_pre_hook(self._arrive)
                owner.register_forward_hook(self._leave, always_call=True)
            if own:
                self._own[owner] = own

    def _arrive(self, module: nn.Module, args: Any) -> None:
        there: dict[str, Any] = {}
        for name, parameter in self._own[module].items():
            present: Any = module._parameters[name]
            if present is parameter or isinstance(present, _Visitor):  # one that an interrupt kept from leaving
                there[name] = parameter
                copy = self._home.visit(self._home.read(parameter))
                module._parameters[name] = _Visitor(copy, parameter.requires_grad)
            elif hasattr(present, "stand_for"):
                there[name] = present
                present.stand_for(self._home.visit(self._home.read(parameter)))
        self._present.append((module, there))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._present:
            left, there = self._present.pop()
            for name, one in there.items():
                if isinstance(left._parameters[name], _Visitor):
                    left._parameters[name] = one
                elif hasattr(one, "stand_for"):
                    one.stand_for(self._home.read(self._own[left][name]))
            if left is module:
                return


class _Visitor(nn.Parameter):
    """A parameter for as long as its module runs."""
