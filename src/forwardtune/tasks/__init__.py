"""L5: a task is a small declaration: data, prompt, answers, metric.

The tasks that come with the package are the YAML files in ``library/``, in the format that users write their own in
(``docs/tasks.md``).
"""

from .data import Split, load_split, load_splits
from .reader import get_task, task_names
from .task import Example, Task

__all__ = ["Example", "Split", "Task", "get_task", "load_split", "load_splits", "task_names"]
