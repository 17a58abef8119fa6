"""L2: who evaluates which query of a step, and how the losses come together. Scalars are all that is exchanged.

=============  ===================================================================================
``Alone``      one process evaluates everything
``Ranks``      the processes of ``torchrun`` or ``accelerate launch`` share queries, and parts of the minibatch
``Parts``      a minibatch in parts
=============  ===================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..processes import Launch
from .alone import Alone, Evaluate, Seen
from .parts import Closure, Parts, Unit, cut, deal

if TYPE_CHECKING:
    from .ranks import Ranks

__all__ = ["Alone", "Closure", "Evaluate", "Parts", "Seen", "Unit", "cut", "deal", "workers_of_launch"]

_launched: dict[Launch, Ranks] = {}


def workers_of_launch(timeout: float = 600.0) -> Alone:
    """The ranks of this launch, which meet at the first call; :class:`Alone` where one process was started.

    Raises:
        InputError: as :class:`~.ranks.Ranks`.
    """
    launch = Launch.read()
    if launch.count == 1:
        return Alone()
    if launch not in _launched:
        from .ranks import Ranks  # torch.distributed takes its time

        _launched[launch] = Ranks(timeout)
    return _launched[launch]


def launched() -> Alone:
    """The ranks of this launch if they have met; else :class:`Alone`."""
    return next(iter(_launched.values()), Alone())
