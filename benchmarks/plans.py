"""Whether plans come true: peak memory and seconds a step, as `forwardtune plan` says them and as `forwardtune train` finds them.

    python benchmarks/plans.py [--rounds 3] [--cases all lora]

SmolLM2-135M in bfloat16 on the embedded task, six ways to tune. ``estimated`` is what ``plan --no-weights`` says of shapes alone, ``said`` what
``plan`` measured on three steps, ``found`` what a run of eight steps took: its peak, and its median step without the first. A round
takes plan and run of every case in turn, each a process of its own; the medians of the rounds are compared, as the machine may be shared.
Targets: peaks within 10%, seconds within 30%.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import parser, write

from forwardtune.trajectory import read_log

CASES: dict[str, dict[str, str]] = {
    "default": {},
    "all": {"tune": "all"},
    "example": {"tune": "all", "assignment": "example"},
    "lora": {"tune": "lora"},
    "int8": {"tune": "lora", "quantize": "int8"},
    "nf4": {"tune": "lora", "quantize": "nf4"},
}
COMMON = {"model": "smollm2-135m", "task": "reviews", "dtype": "bfloat16", "device": "cpu"}


def forwardtune(command: str, case: str, *more: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    given = [word for name, value in (COMMON | CASES[case]).items() for word in (f"--{name}", value)]
    words = [sys.executable, "-m", "forwardtune", command, *given, "--json", *map(str, more)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run_of(case: str) -> tuple[int, float]:
    """Peak memory and seconds a step of a run."""
    with tempfile.TemporaryDirectory() as folder:
        how = ("--steps", 8, "--lr", 1e-6, "--eps", 1e-3, "--no-before", "--test-examples", 8, "--output-dir")
        metrics = forwardtune("train", case, *how, Path(folder) / "run")
        steps = read_log(Path(folder) / "run" / "steps.jsonl").records
        return metrics["peak_memory_bytes"], statistics.median(step.seconds for step in steps[1:])


def main() -> None:
    """Print and save the table."""
    asked = parser(__doc__)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = asked.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {case: [] for case in options.cases}
    estimated = {case: forwardtune("plan", case, "--no-weights")["ways"][0]["peak_memory_bytes"] for case in rounds}
    for _ in range(options.rounds):
        for case, found in rounds.items():
            said = forwardtune("plan", case, "--alone")
            peak, seconds = run_of(case)
            found.append(
                {"said": said["peak_memory_bytes"], "peak": peak, "step": said["seconds_per_step"], "seconds": seconds}
            )
            middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
            row = f"{case:10}" + "".join(
                f"{value / 2**20:12,.0f}" for value in (estimated[case], middle["said"], middle["peak"])
            )
            print(row + f" MiB {middle['step']:8.2f}{middle['seconds']:8.2f} s", flush=True)
            write("plans", {"estimated": estimated, "rounds": rounds})


if __name__ == "__main__":
    main()
