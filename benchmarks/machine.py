"""What every script needs: its options, and where results go with a word on where they came from."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def parser(about: str | None) -> argparse.ArgumentParser:
    """A script's options, with its docstring as the help."""
    return argparse.ArgumentParser(
        allow_abbrev=False, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def write(name: str, result: dict[str, Any]) -> None:
    """Save a result with machine, versions and commit as ``NAME.json`` in ``results/``, or in ``FORWARDTUNE_RESULTS``."""
    folder = Path(os.environ.get("FORWARDTUNE_RESULTS") or HERE / "results")
    folder.mkdir(exist_ok=True)
    save(folder / f"{name}.json", {"machine": describe(), **result})


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole at any moment."""
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def describe() -> dict[str, Any]:
    """Processor, threads, versions, commit and day; a package that is not there is None."""
    import torch  # not before: startup.py measures what an import takes

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
