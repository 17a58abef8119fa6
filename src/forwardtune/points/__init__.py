"""L2: how the model is evaluated at ``theta + scale * z``.

All three ways are context managers: inside the block :meth:`Perturbation.shift` moves the model to a point, on exit the
model is back at theta, whatever happened in between.

============  =======================================  =======================  ========================================
name          how                                      extra memory             afterwards
============  =======================================  =======================  ========================================
``scratch``   each module computes on a perturbed      the largest module       bit for bit as before
              copy of its own weights, made just       that owns weights
              before it runs, in a reused buffer
``copy``      all perturbed weights at once, in a      all tuned weights        bit for bit as before
              second set of tensors
``in_place``  ``+eps z``, ``-2 eps z``, ``+eps z``     none                     off by rounding, which adds up: in
              on the weights (the published loop)                               half precision it ruins the weights
============  =======================================  =======================  ========================================

All three evaluate at the same point: float32 addition, rounded to nearest in the weights' dtype.
"""

from __future__ import annotations

from .copy import Copy
from .in_place import InPlace
from .perturbation import Closure, Perturbation, ReadElsewhereError, as_loss
from .scratch import Scratch

__all__ = ["PERTURBATIONS", "Closure", "Copy", "InPlace", "Perturbation", "ReadElsewhereError", "Scratch", "as_loss"]

PERTURBATIONS: dict[str, type[Perturbation]] = {cls.name: cls for cls in (Scratch, Copy, InPlace)}
