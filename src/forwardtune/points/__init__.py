"""L2: how the model is evaluated at ``theta + scale * z``.

All ways are context managers: inside the block :meth:`Perturbation.shift` moves the model to a point, on exit the
model is back at theta, whatever happened in between. The weights are bit for bit as before.

=============  ==========================================  ========================  ==================================
name           how                                         extra memory              directions
=============  ==========================================  ========================  ==================================
``scratch``    each module computes on a perturbed copy    the largest module that   shared by the minibatch
               of its own weights, made just before it     owns weights
               runs, in a reused buffer
``copy``       all perturbed weights at once, in a         all tuned weights         shared by the minibatch
               second set of tensors
``side_path``  the weights stay; what a direction would    factors of the            one for each example, or shared
               add to a layer's output is added there      directions of a probe
=============  ==========================================  ========================  ==================================

``scratch`` and ``copy`` evaluate at the same point: float32 addition, rounded to nearest in the weights' dtype. ``side_path`` evaluates
there up to rounding: it adds in the dtype of the activations, and no weight is rounded.
"""

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
