"""L1: where the values of a model's weights live, between the evaluations that read them and the updates that change them.

==================  =====================================================  ==========================================
home                where                                                  what visits the device
==================  =====================================================  ==========================================
``RESIDENT``        in the parameter, on the device                        nothing
``OnDisk``          in a private file that is mapped                       pages of the file, as they are read
``InHostMemory``    in the host's memory, beside a GPU that computes       the weights of one module at a time
==================  =====================================================  ==========================================
"""

from __future__ import annotations

from os import PathLike

from .disk import OnDisk
from .ferry import on_the_way
from .home import RESIDENT, Resident, at_home_afterwards, device_of, home_of, is_offloaded
from .host import InHostMemory
from .offloaded import Offloaded

__all__ = [
    "RESIDENT",
    "InHostMemory",
    "Offloaded",
    "OnDisk",
    "Resident",
    "at_home_afterwards",
    "device_of",
    "home_of",
    "is_offloaded",
    "on_the_way",
    "storage_named",
]


def storage_named(offload: str | None, folder: str | PathLike[str], device: str) -> Offloaded | None:
    """The home that ``offload`` names (``cpu``, ``disk``) of a model that computes on a device; None: the weights stay on it.

    Raises:
        InputError: ``cpu``, and the device is the host.
    """
    if offload is None:
        return None
    return OnDisk(folder, device) if offload == OnDisk.name else InHostMemory(device)
