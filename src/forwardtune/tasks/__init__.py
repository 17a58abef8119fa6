"""L5: a task is a small declaration: data, prompt, answers, metric.

The tasks that come with the package are the YAML files in ``library/``, in the format that users write their own in
(``docs/tasks.md``).
"""

from .data import BadRowsError, Split, load_split, load_splits
from .doubts import doubts
from .reader import get_task, task_names
from .task import Example, Task

__all__ = [
    "BadRowsError", "Example", "Split", "Task", "doubts", "get_task", "load_split", "load_splits", "task_names",
]  # fmt: skip
