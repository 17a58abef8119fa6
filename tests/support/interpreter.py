"""Triton's interpreter, without the two thirds of an operation's time that change nothing."""

from __future__ import annotations

import dataclasses
from typing import Any


def hurry() -> None:
    """For the rest of this process: what the interpreter computes stays bit for bit as it is. What compiles is as it was."""
    from triton.language import core
    from triton.runtime import interpreter

    names = ("interpreter_builder", "_get_np_dtype", "_patch_lang")
    if not all(hasattr(interpreter, name) for name in names):
        return  # another version, which is as slow as it is
    builder, slow, patched = (getattr(interpreter, name) for name in names)
    if getattr(slow, "remembers", False):
        return
    if builder.options.sanitize_overflow and not builder.options.debug:
        # Whether an addition overflows is computed with eight operations more, and then nobody asks unless he debugs.
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    numpys, blocks, tensors = {}, {}, {}  # type: ignore[var-annotated]
    of_block, of_tensor = core.block_type.__init__, core.tensor.__init__

    def remembered(dtype: Any) -> Any:
        """NumPy's name of a type, for which a table of all of them is made at every call. Its own name tells all that matters."""
        name = dtype.scalar.name
        if name not in numpys:
            numpys[name] = slow(dtype)
        return numpys[name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            of_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            of_tensor(self, handle, type)
            tensors[type.name] = {name: value for name, value in vars(self).items() if name != "handle"}
        vars(self).update(tensors[type.name], handle=handle)

    def patch(kernel: Any) -> Any:
        """What else stands for the language while a kernel runs: types and tensors that are not made anew each time."""
        scope = patched(kernel)
        scope.set_attr(core.block_type, "__init__", block)
        scope.set_attr(core.tensor, "__init__", tensor)
        return scope

    remembered.remembers = True  # type: ignore[attr-defined]
    interpreter._get_np_dtype, interpreter._patch_lang = remembered, patch
