"""L6: many runs from one file: methods x tasks x seeds x a grid of options (``docs/sweeps.md``).

``reader`` checks the file and lays out its runs, ``plan`` says what a run is, ``folder`` knows what a run has left on the
disk, ``runner`` starts the processes. Choosing the best point of a grid is the report's work.
"""

from .folder import SweepFolder
from .plan import Run, Sweep
from .reader import read_sweep
from .runner import run_sweep

__all__ = ["Run", "Sweep", "SweepFolder", "read_sweep", "run_sweep"]
