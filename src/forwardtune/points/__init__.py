"""L2: how the model is evaluated at ``theta + scale * z``.

Both ways are context managers: inside the block :meth:`Perturbation.shift` moves the model to a point, on exit the model is
back at theta, bit for bit, whatever happened in between.

============  ==================================================================  ===================================
name          how                                                                 extra memory
============  ==================================================================  ===================================
``scratch``   each module computes on a perturbed copy of its own weights, made   the largest module that owns weights
              just before it runs, in a reused buffer
``copy``      all perturbed weights at once, in a second set of tensors           all tuned weights
============  ==================================================================  ===================================

Both evaluate at the same point: float32 addition, rounded to nearest in the weights' dtype.
"""

from __future__ import annotations

from .copy import Copy
from .perturbation import Closure, Perturbation, ReadElsewhereError, as_loss
from .scratch import Scratch

__all__ = ["PERTURBATIONS", "Closure", "Copy", "Perturbation", "ReadElsewhereError", "Scratch", "as_loss"]

PERTURBATIONS: dict[str, type[Perturbation]] = {cls.name: cls for cls in (Scratch, Copy)}
