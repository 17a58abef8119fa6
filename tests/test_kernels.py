"""The compiled noise kernels: when they are compiled, and what becomes of the code that Numba keeps of them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from forwardtune.noise import Noise, Update, cpu, kept
from support.logs import file_size_limit
from support.process import python


@pytest.fixture
def keep_in(tmp_path, monkeypatch):
    """Numba's cache is a folder of this test; nothing was told of it yet. Gives a function that makes a kernel again."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(kept, "_told", False)
    source = tmp_path / "tripling.py"
    source.write_text("def triple(x):\n    return 3 * x\n")
    space: dict[str, Any] = {"__name__": "tripling"}
    exec(compile(source.read_text(), str(source), "exec"), space)
    return lambda: kept.kernel(space["triple"])


def kept_files(tmp_path: Path, suffix: str) -> list[Path]:
    return list((tmp_path / "kept").rglob(f"*.{suffix}"))


@pytest.mark.parametrize("damaged", ["nbi", "nbc"], ids=["index", "code"])
@pytest.mark.parametrize("left", [0, 40], ids=["empty", "torn"])
def test_a_damaged_cache_is_compiled_anew_and_mended(damaged, left, keep_in, tmp_path):
    assert keep_in()(2) == 6
    (file,) = kept_files(tmp_path, damaged)
    os.truncate(file, left)
    again, after = keep_in(), keep_in()
    assert again(2) == 6
    assert sum(again.stats.cache_misses.values()) == 1
    assert after(2) == 6
    assert sum(after.stats.cache_hits.values()) == 1


def test_a_change_in_any_file_of_the_kernels_compiles_them_anew(keep_in, monkeypatch):
    """Numba by itself sees a change of the file of the kernel alone."""
    assert keep_in()(2) == 6
    monkeypatch.setattr(kept, "_SOURCES", "as of another version")
    again = keep_in()
    assert again(2) == 6
    assert sum(again.stats.cache_misses.values()) == 1


def test_a_full_disk_costs_the_cache_and_a_warning_alone(keep_in, tmp_path):
    with file_size_limit(0), pytest.warns(UserWarning, match="NUMBA_CACHE_DIR") as told:
        results = [keep_in()(2), keep_in()(2)]
    assert results == [6, 6]
    assert len(told) == 1
    assert not kept_files(tmp_path, "nbc")


READ_ONLY = """
import sys, warnings
import torch
from forwardtune.noise import Noise, Update, cpu
assert cpu.__file__.startswith(sys.argv[1])
weight, said = torch.linspace(-1, 1, 600), []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Noise(0).update(weight, [Update(0, (1e-3,))], tensor=0)
    Noise(0).perturb(weight, weight, tensor=0, step=0, probe=0, scale=1e-3)
print(weight.double().sum().item().hex())
print(*(warning.message for warning in caught), sep="\\n")
"""


def test_where_nothing_can_be_written_the_kernels_are_compiled_and_one_warning_says_so(tmp_path):
    package = tmp_path / "forwardtune"
    shutil.copytree(Path(cpu.__file__).parents[1], package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "noise" / "__pycache__").touch()  # root writes to any folder, but not below a file
    unusable = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path)}
    out = python(READ_ONLY, tmp_path, without=("NUMBA_CACHE_DIR",), **unusable, PYTHONDONTWRITEBYTECODE="1")
    found, message = out.splitlines()
    weight = torch.linspace(-1, 1, 600)
    Noise(0).update(weight, [Update(0, (1e-3,))], tensor=0)
    Noise(0).perturb(weight, weight, tensor=0, step=0, probe=0, scale=1e-3)
    assert found == weight.double().sum().item().hex()
    assert "cannot be kept" in message
    assert "NUMBA_CACHE_DIR" in message


COMPILE = """
import json, sys
import torch
from forwardtune.noise import compile_kernels, cpu
kernels = {"perturb": cpu.kernels.perturb, "rows": cpu.kernels.perturb_rows, "update": cpu.kernels.update, "store": cpu.kernels.store}
said = []
compile_kernels([torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float64)], announce=said.append)
print(json.dumps([said, {name: len(kernel.signatures) for name, kernel in kernels.items()}]))
"""


def test_kernels_are_compiled_ahead_for_the_dtype_at_hand_and_said_once(tmp_path):
    (said, compiled), again = (json.loads(python(COMPILE, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert len(said) == 1
    assert compiled == {"perturb": 1, "rows": 1, "update": 1, "store": 0}
    assert again == [[], compiled]


STEPS_AFTER = """
import torch
from torch import nn
from forwardtune import MeZO
from forwardtune.noise import compile_kernels, cpu
kernels = (cpu.kernels.perturb, cpu.kernels.perturb_rows, cpu.kernels.update, cpu.kernels.store)
for dtype in cpu.DTYPES:
    for rule in ("sgd", "sign", "momentum", "adam"):
        net = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 8)).to(dtype)
        compile_kernels(net.parameters(), buffered=rule != "sgd")
        before = [len(kernel.signatures) for kernel in kernels]
        MeZO(net, lr=1e-3, rule=rule, perturbation="scratch").step(lambda: net(torch.arange(3)).float().sum())
        assert [len(kernel.signatures) for kernel in kernels] == before, (dtype, rule)
"""


def test_nothing_is_compiled_in_a_step_after_compiling_ahead():
    python(STEPS_AFTER)
