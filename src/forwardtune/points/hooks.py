"""Hooks that come and go with a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Hooks:
    """Hooks before and after the calls of modules, which are there only inside a block.

    They are made once: a step that registered its hundreds of hooks anew would leave as many dead objects, and Python would go through
    the whole heap of the process for them every few steps.
    """

    def __init__(self) -> None:
        self._known: list[tuple[nn.Module, int, Callable[..., Any], int, Callable[..., Any]]] = []
        self._on = 0  # so many of them are there

    def add(self, module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        """Know these hooks from now on; ``after`` is called after an exception, too. They are there from the next :meth:`enter` on."""
        first = module.register_forward_pre_hook(before)
        second = module.register_forward_hook(after, always_call=True)
        self._known.append((module, first.id, before, second.id, after))
        first.remove()
        second.remove()

    def __bool__(self) -> bool:
        return bool(self._known)

    def enter(self) -> None:
        """Let all be there, behind those that others registered since."""
        for module, first, before, second, after in self._known:
            module._forward_pre_hooks[first] = before
            module._forward_hooks[second] = after
            module._forward_hooks_always_called[second] = True
            self._on += 1

    def leave(self) -> None:
        """Let none be there."""
        for module, first, _, second, _ in self._known[: self._on]:
            module._forward_pre_hooks.pop(first, None)
            module._forward_hooks.pop(second, None)
            module._forward_hooks_always_called.pop(second, None)
        self._on = 0
