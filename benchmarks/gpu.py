"""What a machine with a CUDA device can show in a few minutes: the CUDA tests, then the GPU benchmarks, the most wanted first.

    make gpu                                                # with .venv's Python where there is a .venv
    make gpu PYTHON=python3                                 # with another one that has torch: nothing is installed
    python3 benchmarks/gpu.py --stages kernels step-13b --minutes 3

Every stage is a process of its own with a time limit, cut to the time that is left, so a crash or a kernel that never ends costs the
others nothing. A stage is left out, by name, if a package or device memory is missing. What the stages print goes to ``gpu.log``,
what they measured to ``gpu.json``, which is written anew whenever there is more: both in ``benchmarks/results``, or in the folder
that the environment variable ``OUT`` names. Exit code 1 if a stage failed or was stopped.

Without a device it says what it would do. It needs no package itself.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import parser, save
from stages import STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 8.0
# To end what is stopped, and to write the last results.
RESERVE = 4.0
PROBE = """
import importlib.util, json, sys
packages = "torch triton transformers accelerate numba peft datasets bitsandbytes pytest xdist".split()
found = {"python": sys.version.split()[0], "device": None, "lacking": [p for p in packages if not importlib.util.find_spec(p)]}
if "torch" not in found["lacking"]:
    import torch
    found["torch"], found["cuda"] = torch.__version__, torch.version.cuda
    if torch.cuda.is_available():
        torch.ones(1, device="cuda").item()
        properties = torch.cuda.get_device_properties(0)
        found["device"], found["capability"] = properties.name, f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["free_gib"], found["total_gib"] = (round(x / 2**30, 1) for x in torch.cuda.mem_get_info(0))
    if "triton" not in found["lacking"]:
        import triton
        found["triton"] = triton.__version__
print(json.dumps(found))
"""


@dataclass
class Run:
    """Stages one after the other, within a time, with their results in a folder."""

    machine: dict[str, Any]
    output: Path
    seconds: float
    python: str = sys.executable
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.output.mkdir(parents=True, exist_ok=True)
        self.log = self.output / "gpu.log"
        self.log.write_bytes(b"")
        self._shown = 0

    def all(self, stages: Sequence[Stage]) -> bool:
        """Run them in order; whether all that were begun came to a good end."""
        for stage in stages:
            row = {
                "stage": stage.name,
                "command": " ".join(stage.command),
                "outcome": "",
                "seconds": 0.0,
                "results": {},
            }
            self.rows.append(row)
            left = self.end - RESERVE - time.monotonic()
            if reason := lacks(stage, self.machine):
                row["outcome"] = f"left out: {reason}"
            elif left < stage.limit / 4:
                row["outcome"] = f"left out: {max(left, 0):.0f} s were left"
            else:
                self._one(stage, row, min(stage.limit, left))
            self._tell(f"--- {stage.name}: {row['outcome']}\n")
            self._save()
        return all(row["outcome"] == "done" or row["outcome"].startswith("left out") for row in self.rows)

    def _one(self, stage: Stage, row: dict[str, Any], limit: float) -> None:
        self._tell(f"\n--- {stage.name}: {stage.what} (at most {limit:.0f} s)\n")
        row["outcome"] = "running"
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, open(self.log, "ab") as log:
            process = subprocess.Popen(
                [self.python, *stage.command], cwd=ROOT, env=environment(folder), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() - began < limit:
                    time.sleep(0.1)
                    self._show()
                    if self._gather(Path(folder), row):
                        self._save()
                ended = process.poll() is not None
            except BaseException:
                row["outcome"] = "interrupted"
                raise
            finally:
                stop(process)
                row["seconds"] = round(time.monotonic() - began, 1)
                self._show()
                self._gather(Path(folder), row)
                self._save()
        code = process.returncode
        if not ended:
            row["outcome"] = f"stopped after {limit:.0f} s"
        elif code < 0:
            row["outcome"] = f"failed: {signal.Signals(-code).name}"
        else:
            row["outcome"] = "done" if code == 0 else f"failed: exit code {code}"

    def _gather(self, folder: Path, row: dict[str, Any]) -> bool:
        """Take over the result files of a stage; whether there was anything new."""
        found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        new = found != row["results"]
        row["results"] = found
        return new

    def _save(self) -> None:
        save(self.output / "gpu.json", {"machine": self.machine, "seconds": self.seconds, "stages": self.rows})

    def _tell(self, text: str) -> None:
        with open(self.log, "ab") as log:
            log.write(text.encode())
        self._show()

    def _show(self) -> None:
        """Print what the log has more than was printed."""
        with open(self.log, "rb") as log:
            log.seek(self._shown)
            new = log.read()
        self._shown += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()


def lacks(stage: Stage, machine: dict[str, Any]) -> str | None:
    """What a stage needs and this machine has not."""
    missing = [package for package in stage.packages if package in machine["lacking"]]
    if missing:
        return "no " + ", ".join(missing)
    free = machine.get("free_gib")
    if free is not None and free < stage.memory:
        return f"needs {stage.memory:.0f} GiB of device memory, {free:.0f} are free"
    return None


def environment(results: str) -> dict[str, str]:
    """A stage's: the library from ``src``, no hub, where results go, and a traceback where it is stopped or crashes."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    own = {"FORWARDTUNE_RESULTS": results, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage and everything that it started. First by a signal on which Python prints where it is."""
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)
        _wait(process, 1.0)
    try:
        os.killpg(process.pid, signal.SIGKILL)  # its session's group, children that outlive it included
    except ProcessLookupError:
        pass
    _wait(process, 2.0)  # a process may hang in the driver: it is left to it


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def probe(python: str) -> dict[str, Any]:
    """What this Python and this machine have, found in a process of its own: it may crash, or hang, in the driver."""
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        sys.exit("the device did not answer in 90 seconds")
    if done.returncode:
        sys.exit(f"torch cannot use the device:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def plan(stages: Sequence[Stage], machine: dict[str, Any], seconds: float, output: Path) -> str:
    """What would be done with a device."""
    has = f"torch {machine['torch']}" if "torch" in machine else "this Python has no torch (make setup, or PYTHON=...)"
    lines = [
        f"No CUDA device here: {has}. With one, in at most {seconds:.0f} seconds in all, each stage only while time is left:",
        "",
        *(
            f"{stage.name:18}{stage.limit:4.0f} s  {stage.what}"
            + (f" [left out with this Python: {reason}]" if (reason := lacks(stage, machine)) else "")
            for stage in stages
        ),
        "",
        f"Results would go to {output}/gpu.json, what the stages print to gpu.log beside it.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the stages, or say what would be run."""
    asked = parser(__doc__)
    names = [stage.name for stage in STAGES]
    asked.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    asked.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    options = asked.parse_args()
    began = time.monotonic()
    stages = [stage for stage in STAGES if stage.name in options.stages]
    out = Path(os.environ.get("OUT", ""))
    output = out if os.environ.get("OUT") and out.is_dir() else ROOT / "benchmarks" / "results"
    machine = probe(sys.executable)
    if machine["device"] is None:
        print(plan(stages, machine, 60 * options.minutes, output))
        return 0
    print(", ".join(f"{key} {value}" for key, value in machine.items() if value), flush=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for ending in (signal.SIGTERM, signal.SIGINT):  # in the background SIGINT is ignored unless asked for
        signal.signal(ending, signal.default_int_handler)
    run = Run(machine, output, 60 * options.minutes - (time.monotonic() - began))
    try:
        good = run.all(stages)
    except KeyboardInterrupt:
        good = False
    print("\n" + "\n".join(f"{row['stage']:18}{row['seconds']:6.1f} s  {row['outcome']}" for row in run.rows))
    print(f"results in {output}/gpu.json and gpu.log")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
