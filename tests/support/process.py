"""Scripts in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def python(script: str, *arguments: object, without: tuple[str, ...] = (), **environment: str) -> str:
    """What a script prints that a process of its own runs; ``without`` names variables that it does not inherit."""
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=inherited | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
