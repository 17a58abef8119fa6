"""What it costs to begin: seconds and peak memory of a fresh process, against one that imports torch.

    python benchmarks/startup.py [--rounds 7]

Rounds are interleaved, each a process of its own; ratios are of medians. Files are in the page cache after the first round, which is
not counted.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import parser, write

WORKS = {
    "import torch": ["-c", "import torch"],
    "forwardtune --help": ["-m", "forwardtune", "--help"],
    "forwardtune train --help": ["-m", "forwardtune", "train", "--help"],
    "forwardtune --version": ["-m", "forwardtune", "--version"],
    "import forwardtune": ["-c", "import forwardtune"],
    "from forwardtune import MeZO": ["-c", "from forwardtune import MeZO"],
    "from transformers import Trainer": ["-c", "from transformers import Trainer"],
    "from forwardtune import MeZOTrainer": ["-c", "from forwardtune import MeZOTrainer"],
}
SOURCE = str(Path(__file__).parent.parent / "src")


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and MiB of a process."""
    environment = os.environ | {"PYTHONPATH": SOURCE, "CUDA_VISIBLE_DEVICES": ""}
    began = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, arguments
    return seconds, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Print and save seconds, memory, and their ratios to torch's."""
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=7)
    options = asked.parse_args()
    rounds = [{name: measure(arguments) for name, arguments in WORKS.items()} for _ in range(options.rounds + 1)][1:]
    rows = {}
    for name in WORKS:
        seconds, memory = (statistics.median(one[name][i] for one in rounds) for i in (0, 1))
        rows[name] = {"seconds": seconds, "mib": memory}
    torch = rows["import torch"]
    print(f"{'':38}{'seconds':>10}{'of torch':>10}{'MiB':>8}{'of torch':>10}")
    for name, row in rows.items():
        row |= {"seconds_of_torch": row["seconds"] / torch["seconds"], "mib_of_torch": row["mib"] / torch["mib"]}
        print(
            f"{name:38}{row['seconds']:10.2f}{row['seconds_of_torch']:10.2f}{row['mib']:8.0f}{row['mib_of_torch']:10.2f}"
        )
    # This imports torch, and a process that is forked inherits the peak of its parent.
    write("startup", {"rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
