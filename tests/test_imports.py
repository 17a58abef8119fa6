"""The core needs torch alone, help needs not even that, and dependencies run one way: from the edges to the noise."""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import forwardtune
from forwardtune import names
from forwardtune.cli.commands import make_parser
from forwardtune.cli.methods import METHODS
from forwardtune.method.estimators import ESTIMATORS
from forwardtune.method.rules import RULES
from forwardtune.noise import DIRECTIONS
from forwardtune.points import PERTURBATIONS

SOURCE = Path(forwardtune.__file__).parent

# A module imports from layers before its own, or from its own package. `forwardtune/__init__.py` may import them all.
LAYERS = (
    {"errors", "names"},
    {"files", "memory", "cores", "devices", "durations", "averages", "processes"},
    {"noise"},
    {"storage"},
    {"parameters"},
    {"config"},
    {"method"},
    {"points", "workers"},
    {"optimizer"},
    {"trajectory"},
    {"search"},
    {"tasks", "models", "strata"},
    {"objectives"},
    {"evaluation", "forgetting", "predictions", "run_folder"},
    {"reference"},
    {"hf", "paper"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

STANDARD = sys.stdlib_module_names
NEEDS = {
    "noise": {"torch"},
    "noise/cpu.py": {"torch", "numpy"},
    "noise/cpu_kernels.py": {"numba", "numpy"},
    "noise/cpu_conversions.py": {"numba", "numpy", "llvmlite"},
    "noise/kept.py": {"numba"},
    "noise/columns.py": {"torch", "numpy"},
    "noise/gpu.py": {"torch", "triton"},
    "noise/gpu_many.py": {"torch", "numpy"},
    "noise/gpu_kernels.py": {"triton"},
    "errors": set(),
    "names": set(),
    "cli/__init__.py": set(),
    "cli/commands.py": set(),
    "cli/parser.py": set(),
    "durations": set(),
    "averages": set(),
    "config": set(),
    "processes": set(),
    "trajectory": {"torch", "safetensors"},
} | {
    part: {"torch"}
    for part in (
        "storage",
        "parameters",
        "method",
        "points",
        "optimizer",
        "search",
        "cores",
        "devices",
        "workers",
        "strata",
    )
}
NEEDS |= {f"search/{file}.py": set() for file in ("budget", "guard", "line_search", "rates")}

# What `pip install forwardtune` does not bring, by the names that are imported.
EXTRA = {"sklearn", "matplotlib", "pandas", "seaborn", "submitit"}

MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def named(path: Path) -> str:
    """``trajectory/log.py`` -> ``forwardtune.trajectory.log``."""
    return ".".join(("forwardtune", *path.with_suffix("").parts)).removesuffix(".__init__")


FILES = {named(path): path for path in [Path("__init__.py"), *MODULES]}


def imports(path: Path, *, typing: bool = True) -> set[str]:
    """Dotted names of everything that a file imports, at the top or inside a function, for type checkers alone or not."""
    tree = ast.parse((SOURCE / path).read_text())
    for node in ast.walk(tree):
        if not typing and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    package = ("forwardtune", *path.parts[:-1])
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            # `from . import log` imports a module if there is one of that name, else something out of the package.
            found |= {inner if (inner := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return found


def part_of(module: Path) -> str:
    """``trajectory/log.py`` -> ``trajectory``, ``rules.py`` -> ``rules``."""
    return module.parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_lower_layers_do_not_import_upper_ones(module):
    own = part_of(module)
    assert own in RANK, f"{module} has no place in LAYERS"
    inner = {name.split(".")[1] for name in imports(module) if name.startswith("forwardtune.")} - {own}
    # `from .. import __version__`, read by an edge, is no dependency on an upper layer.
    upward = {other for other in inner if RANK[other] >= RANK[own]}
    assert not upward, f"{module} imports {upward}"


@pytest.mark.parametrize(
    "module", [m for m in MODULES if not NEEDS.keys().isdisjoint({part_of(m), m.as_posix()})], ids=str
)
def test_the_core_needs_torch_alone(module):
    allowed = NEEDS[module.as_posix() if module.as_posix() in NEEDS else part_of(module)] | STANDARD
    outside = {name.split(".")[0] for name in imports(module)} - allowed - {"forwardtune"}
    assert not outside


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) != "paper"], ids=str)
def test_the_packages_of_the_extra_serve_the_paper_alone(module):
    assert not {name.split(".")[0] for name in imports(module)} & EXTRA


def test_the_core_runs_with_torch_alone(tmp_path):
    """With every other dependency missing, a step, its log and its replay work, after one warning about speed."""
    script = """
        import sys, warnings

        for name in "transformers datasets accelerate peft numba llvmlite yaml tqdm safetensors triton".split():
            sys.modules[name] = None  # to import it raises ModuleNotFoundError

        import torch
        import forwardtune

        def model():
            torch.manual_seed(0)
            return torch.nn.Linear(4, 2)

        tuned, base = model(), model()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            optimizer = forwardtune.MeZO(tuned, lr=1e-2)
            with forwardtune.StepLog(sys.argv[1], optimizer):
                for _ in range(3):
                    optimizer.step(lambda: tuned(torch.ones(4)).sum())
            assert forwardtune.replay(sys.argv[1], base) == 3
        assert torch.equal(tuned.weight, base.weight) and not torch.equal(tuned.weight, model().weight)
        print(*(str(warning.message) for warning in told), sep="\\n")
    """
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "steps.jsonl")],
        capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE.parent), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    (warning,) = child.stdout.strip().splitlines()
    assert "plain torch" in warning
    assert "install numba" in warning


def test_the_package_shows_what_users_need_and_nothing_else():
    for shown in (set(forwardtune.__all__), {name for name in dir(forwardtune) if not name.startswith("_")}):
        assert shown == {"MeZO", "MeZOConfig", "MeZOTrainer", "StepLog", "replay"}
    assert forwardtune.AutoLR.__name__ == "AutoLR"  # not shown, and there


def test_every_public_name_exists():
    assert all(hasattr(forwardtune, name) for name in forwardtune.__all__)
    assert set(forwardtune.__all__) <= set(dir(forwardtune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        forwardtune.nothing  # noqa: B018


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in ("tasks", "objectives", "models")], ids=str)
def test_what_people_use_from_python_names_no_option_of_the_command_line(module):
    assert not re.findall(r"(?<!pip install )--[a-z][a-z-]*", (SOURCE / module).read_text())


# --- what start-up imports -------------------------------------------------------------------------------------------


def imported_by(script: str) -> set[str]:
    """The top-level packages that a fresh process has imported after the script."""
    child = subprocess.run(
        [sys.executable, "-c", f"{textwrap.dedent(script)}\nimport sys; print(*sys.modules, file=sys.stderr)"],
        capture_output=True, text=True, env={"PYTHONPATH": str(SOURCE.parent), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    return {name.split(".")[0] for name in child.stderr.splitlines()[-1].split()}


def test_help_and_version_import_the_standard_library_alone():
    (commands,) = (a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    lines = [["--help"], ["--version"], *([command, "--help"] for command in commands)]
    assert len(lines) > 10
    script = f"""
        from forwardtune.cli import main
        for line in {lines}:
            try:
                main(line)
            except SystemExit as end:
                assert end.code == 0, line
            else:
                raise AssertionError(line)
    """
    before = imported_by("pass")  # what the interpreter itself brings along
    assert imported_by(script) - before - STANDARD == {"forwardtune"}


def test_a_wrong_option_is_refused_before_anything_is_imported():
    script = """
        from forwardtune.cli import main
        try:
            main(["train", "--learning-rate", "1", "--output-dir", "x"])
        except SystemExit as end:
            assert end.code == 2
    """
    assert not imported_by(script) & {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        (None, {"torch", "numba", "transformers"}),
        ("NonFiniteLossError", {"torch", "numba", "transformers"}),
        ("MeZO", {"numba", "transformers", "safetensors", "yaml"}),
        ("StepLog", {"numba", "transformers", "yaml"}),
    ],
)
def test_the_package_imports_what_a_name_needs_and_no_more(name, absent):
    script = "import forwardtune" if name is None else f"from forwardtune import {name}"
    assert not imported_by(script) & absent


def test_the_names_without_torch_are_those_of_the_classes():
    assert tuple(ESTIMATORS) == names.ESTIMATORS
    assert tuple(RULES) == names.RULES
    assert tuple(DIRECTIONS) == names.DIRECTIONS
    assert set(names.PERTURBATIONS) - {"auto"} == set(PERTURBATIONS)
    assert tuple(METHODS) == names.METHODS


# --- cycles ----------------------------------------------------------------------------------------------------------


def cycles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules in which each leads to each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        frozenset(other for other in graph if other in reach[module] and module in reach[other])
        for module in graph
        if module in reach[module]
    }


def test_no_modules_import_each_other():
    """Not even inside functions, nor by a detour."""
    assert not cycles({name: imports(path, typing=False) & FILES.keys() for name, path in FILES.items()})


def test_a_cycle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert cycles(graph) == {frozenset("bc"), frozenset("e")}


def test_every_folder_is_a_package_that_an_installation_brings():
    folders = {path.parent for path in SOURCE.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_readme_shows_every_file():
    """Its tree names what is there, and nothing else."""
    text = (SOURCE.parents[1] / "README.md").read_text()
    tree = text[text.index("src/forwardtune/\n") : text.index("\nsweeps/  examples/")]
    shown: set[str] = set()
    folder = ""
    for line in tree.splitlines()[1:]:
        depth = len(line) - len(line.lstrip())
        names = list(itertools.takewhile(lambda word: word.endswith((".py", "/")), line.split()))
        if depth == 2 and names[0].endswith("/"):
            folder = names[0]
        shown |= {name if depth == 2 else folder + name for name in names}
    there = {path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")} - {Path("__init__.py"), Path("__main__.py")}
    parts = {path for path in there if path.name != "__init__.py"}
    inner = {path.parts[0] + "/" + path.parts[1] + "/" for path in parts if len(path.parts) > 2}
    files = {path.as_posix() for path in parts if len(path.parts) < 3}
    assert shown == files | inner | {path.parts[0] + "/" for path in parts if len(path.parts) > 1}
