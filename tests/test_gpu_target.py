"""``make gpu`` where there is no GPU: stages that end, fail, crash and hang are real processes; only what they do is small."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {"lacking": ["numba", "peft"], "device": "none", "free_gib": 20.0}


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    return load("gpu")


def load(name: str) -> Any:
    """A script of ``benchmarks/`` as a module; they import each other by name."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        sys.modules[spec.name] = module  # where dataclasses look
        spec.loader.exec_module(module)
    return module


def script(code: str) -> tuple[str, str]:
    return "-c", textwrap.dedent(code)


SAVE = """
import json, os, time
def save(name, **result):
    folder = os.environ["FORWARDTUNE_RESULTS"]
    with open(f"{folder}/part", "w") as file:
        json.dump(result, file)
    os.replace(f"{folder}/part", f"{folder}/{name}.json")
"""


def outcomes(run: Any) -> dict[str, str]:
    return {row["stage"]: row["outcome"] for row in run.rows}


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_a_stage_that_fails_crashes_or_hangs_costs_the_others_nothing(gpu, tmp_path, capsys):
    stages = [
        gpu.Stage("good", "", script(SAVE + "save('a', x=1); save('b', y=2); print('so far so good')"), 60),
        gpu.Stage("bad", "", script("raise SystemExit(3)"), 60),
        gpu.Stage("crashed", "", script("import ctypes; print('here', flush=True); ctypes.string_at(0)"), 60),
        gpu.Stage(
            "hanging",
            "",
            script(SAVE + """
                import subprocess, sys
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                save("partial", rows=[1, 2], child=child.pid)
                def the_place():
                    time.sleep(600)
                the_place()
                """.replace("\n                ", "\n")),
            4,
        ),
        gpu.Stage("poor", "", script("print('never')"), 60, packages=("torch", "peft")),
        gpu.Stage("large", "", script("print('never')"), 60, memory=30),
        gpu.Stage("last", "", script("import forwardtune; print('from', forwardtune.__file__)"), 60),
    ]  # fmt: skip
    run = gpu.Run(MACHINE, tmp_path, 200)
    assert not run.all(stages)
    assert outcomes(run) == {
        "good": "done",
        "bad": "failed: exit code 3",
        "crashed": "failed: SIGSEGV",
        "hanging": "stopped after 4 s",
        "poor": "left out: no peft",
        "large": "left out: needs 30 GiB of device memory, 20 are free",
        "last": "done",
    }
    saved = json.loads((tmp_path / "gpu.json").read_text())
    assert saved["stages"] == run.rows
    assert saved["machine"] == MACHINE
    results = {row["stage"]: row["results"] for row in saved["stages"]}
    assert results["good"] == {"a": {"x": 1}, "b": {"y": 2}}
    assert results["hanging"]["partial"]["rows"] == [1, 2]
    assert gone(results["hanging"]["partial"]["child"])
    log = (tmp_path / "gpu.log").read_text()
    # What was printed is kept, with the place of a crash and of a hang; and all of it was shown.
    for text in ("so far so good", "here", "Segmentation fault", "in the_place", f"from {ROOT}/src"):
        assert text in log
    assert capsys.readouterr().out == log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]


def test_stages_share_what_is_left_of_the_time(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "RESERVE", 1.0)
    hanging = script("import time; time.sleep(600)")
    stages = [gpu.Stage(name, "", hanging, limit) for name, limit in (("first", 2), ("second", 12), ("third", 12))]
    began = time.monotonic()
    run = gpu.Run(MACHINE, tmp_path, 7)
    assert not run.all(stages)
    assert time.monotonic() - began < 7
    assert outcomes(run)["first"] == "stopped after 2 s"
    assert outcomes(run)["second"] in ("stopped after 3 s", "stopped after 4 s")
    assert outcomes(run)["third"] == "left out: 0 s were left"


WAITS = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import gpu
code = {code!r}
gpu.STAGES = (gpu.Stage("a", "", ("-c", code), 300), gpu.Stage("b", "", ("-c", code), 300))
gpu.probe = lambda python: {{"lacking": [], "device": "none"}}
sys.argv = ["gpu.py"]
sys.exit(gpu.main())
"""


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_what_was_measured_is_there_whatever_ends_the_run(ending, tmp_path):
    code = SAVE + "save('partial', pid=os.getpid()); time.sleep(600)"
    run = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(benchmarks=str(ROOT / "benchmarks"), code=code)],
        env=os.environ | {"OUT": str(tmp_path)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    results: dict[str, Any] = {}
    deadline = time.monotonic() + 60
    try:
        while not results and time.monotonic() < deadline:
            time.sleep(0.05)
            if (tmp_path / "gpu.json").exists():
                results = json.loads((tmp_path / "gpu.json").read_text())["stages"][0]["results"]
        pid = results["partial"]["pid"]
    finally:
        run.send_signal(ending)
        out, _ = run.communicate(timeout=60)
    row, *others = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert row["results"] == {"partial": {"pid": pid}}
    assert not others
    if ending == signal.SIGKILL:
        os.killpg(pid, signal.SIGKILL)  # nobody else is left to
        return
    assert run.returncode == 1
    assert row["outcome"] == "interrupted"
    assert gone(pid)
    assert "interrupted" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("missing", [(), ("pytest", "numba"), ("torch",)], ids=str)
def test_without_a_device_it_says_what_it_would_do(missing, tmp_path, gpu):
    """``OUT`` is taken if it is a folder."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u, sys\nfind = u.find_spec\n"
        f"u.find_spec = lambda name, *a: None if name in {missing!r} else find(name, *a)\n"
        f"sys.modules.update(dict.fromkeys({missing!r}))\n"
    )
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}"],
        env=os.environ | {"OUT": str(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No CUDA device here" in done.stdout
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if " s  " in line}
    assert list(lines) == [stage.name for stage in gpu.STAGES]
    for stage in gpu.STAGES:
        assert f"{stage.limit:.0f} s" in lines[stage.name]
        assert ("left out" in lines[stage.name]) == bool({*missing} & {*stage.packages})
    assert f"{tmp_path}/gpu.json" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


def test_the_plan_names_scripts_that_exist_and_fits_what_a_lender_takes_back(gpu):
    for stage in gpu.STAGES:
        scripts = [part for part in stage.command if part.endswith(".py")]
        assert scripts
        assert all((ROOT / part).is_file() for part in scripts)
    assert len({stage.name for stage in gpu.STAGES}) == len(gpu.STAGES)
    assert max(stage.limit for stage in gpu.STAGES) < gpu.MINUTES * 60 / 4


POOR = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite", "peft", "datasets", "xdist"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
import importlib.util as u
find = u.find_spec
def found(name, package=None):
    try:
        return find(name, package)
    except ModuleNotFoundError:
        return None
u.find_spec = found
sys.meta_path.insert(0, Missing())
"""


def test_the_tests_need_neither_numba_nor_peft_nor_datasets(gpu, tmp_path):
    """As on a machine with a Python of its own. What needs a device is skipped here; everything is imported."""
    (tmp_path / "sitecustomize.py").write_text(POOR)
    command = load("stages").PYTEST
    names = ["test_a_step_reads and sign", "test_half_words", "test_tensors_past"]
    done = subprocess.run(
        [
            sys.executable,
            *command,
            "-n",
            "2",
            "tests/test_noise_gpu.py",
            "tests/test_cuda.py",
            "-k",
            " or ".join(names),
        ],
        cwd=ROOT,
        env=gpu.environment(str(tmp_path)) | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_check_without_pytest_tells_right_from_wrong_bits():
    """A last element that is off by one unit in the last place, in each of the sweeps."""
    from forwardtune.noise import cpu as compiled

    kernels, cpu = load("noise_kernels"), torch.device("cpu")

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            def sweep(out: torch.Tensor, *arguments: Any) -> Any:
                result = getattr(compiled, name)(out, *arguments)
                out.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
                return result

            return sweep

    compared = (kernels.GAUSSIAN, torch.bfloat16, cpu)
    assert list(kernels.differences(compiled, *compared)) == []
    found = [line.split(",")[0] for line in kernels.differences(Wrong(), *compared)]
    count = len(kernels.SIZES)
    assert Counter(found) == {"perturb": count, "update": count, "store": count, "perturb_rows": 4}


def test_no_script_has_the_name_of_a_package():
    """A script's folder comes first where Python looks: transformers would take kernels.py for the package that it asks for."""
    from transformers.utils import import_utils

    asked = set(re.findall(r'_is_package_available\(\s*"(\w+)"', Path(import_utils.__file__).read_text()))
    assert "kernels" in asked
    taken = asked | {name.split(".")[0] for name in packages_distributions()} | sys.stdlib_module_names
    assert not {script.stem for script in (ROOT / "benchmarks").glob("*.py")} & taken
