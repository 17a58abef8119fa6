"""L2: how the model is evaluated at ``theta + scale * z``.

All ways are context managers: inside the block :meth:`Perturbation.shift` moves the model to a point, on exit the
model is back at theta, whatever happened in between. The weights are bit for bit as before.

=============  ==========================================  ========================  ==========================="""

from __future__ import annotations

from .copy import Copy
from .evaluator import PERTURBATIONS, Evaluator
from .perturbation import Closure, Perturbation, ReadElsewhereError, as_loss
from .scratch import Scratch
from .side_path import SidePath

__all__ = [
    "PERTURBATIONS",
    "Closure",
    "Copy",
    "Evaluator",
    "Perturbation",
    "ReadElsewhereError",
    "Scratch",
    "SidePath",
    "as_loss",
]
