"""L4: a training run is a list of scalars. The step log holds it; replaying it over the base weights gives the tuned ones.

``docs/step-log.md`` specifies the format.
"""

from .base import BaseWeights
from .export import export_trajectory
from .format import LogError
from .log import StepLog
from .reader import Log, read_log
from .replay import replay

__all__ = ["BaseWeights", "Log", "LogError", "StepLog", "export_trajectory", "read_log", "replay"]
