"""L4: a training run is a list of scalars. The step log holds it; replaying it over the base weights gives the tuned ones.

``docs/step-log.md`` specifies the format.
"""

from ..errors import LogError
from .export import export_trajectory
from .log import StepLog
from .point import ReturnPoint, keep_base
from .reader import Log, read_log
from .replay import replay

__all__ = ["Log", "LogError", "ReturnPoint", "StepLog", "export_trajectory", "keep_base", "read_log", "replay"]
