"""What every result file says of where it came from, and where it goes: ``results/``, or the folder ``FORWARDTUNE_RESULTS``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent


def write(name: str, result: dict[str, Any]) -> None:
    """Save a result with machine, versions and commit as ``NAME.json``, whole at any moment."""
    folder = Path(os.environ.get("FORWARDTUNE_RESULTS") or HERE / "results")
    folder.mkdir(exist_ok=True)
    text = json.dumps({"machine": describe(), **result}, indent=2) + "\n"
    beside = folder / f"{name}.json.new"
    beside.write_text(text)
    beside.replace(folder / f"{name}.json")


def describe() -> dict[str, Any]:
    """Processor, threads, versions, commit and day; a package that is not there is None."""
    gpu = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        **({"cuda": torch.version.cuda, "triton": _version("triton")} if gpu else {}),
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "transformers", "numba")},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", ":/src") else ""),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:  # a machine that was given the files alone
        return ""
    return done.stdout.strip()
