"""The core needs torch alone, and dependencies run one way: from the edges to the noise."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import forwardtune

SOURCE = Path(forwardtune.__file__).parent

# A module imports from layers before its own, or from its own package. `forwardtune/__init__.py` may import them all.
LAYERS = (
    {"errors", "files", "memory", "cores", "noise"},
    {"parameters", "durations", "processes"},
    {"config"},
    {"method"},
    {"points"},
    {"optimizer"},
    {"trajectory"},
    {"search"},
    {"tasks", "models"},
    {"objectives"},
    {"evaluation"},
    {"hf", "paper"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

STANDARD = sys.stdlib_module_names
NEEDS = {
    "noise": {"torch"},
    "noise/cpu.py": {"torch", "numba", "numpy", "llvmlite"},
    "noise/gpu.py": {"torch", "triton"},
    "durations": set(),
    "config": set(),
    "processes": set(),
    "search": {"torch", "transformers"},
    "trajectory": {"torch", "safetensors"},
} | {part: {"torch"} for part in ("parameters", "method", "points", "optimizer", "cores")}
NEEDS |= {f"search/{file}.py": set() for file in ("auto", "guard", "line_search")}
NEEDS["search/epsilon.py"] = {"torch"}

MODULES = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def part_of(module: Path) -> str:
    """``trajectory/log.py`` -> ``trajectory``, ``rules.py`` -> ``rules``."""
    return module.parts[0].removesuffix(".py")


def imports(module: Path) -> Iterator[tuple[int, str]]:
    """Level and dotted name of everything that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse((SOURCE / module).read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names] if node.module is None else [node.module]
            yield from ((node.level, name) for name in names)


def inner_imports(module: Path) -> set[str]:
    """Parts of forwardtune that a file imports."""
    package = ("forwardtune", *module.parts[:-1])
    found = set()
    for level, name in imports(module):
        parts = (*package[: len(package) - level + 1], *name.split(".")) if level else tuple(name.split("."))
        if parts[0] == "forwardtune":
            found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_lower_layers_do_not_import_upper_ones(module):
    own = part_of(module)
    assert own in RANK, f"{module} has no place in LAYERS"
    # `from .. import __version__`, read by an edge, is no dependency on an upper layer.
    upward = {other for other in inner_imports(module) - {own, "__version__"} if RANK[other] >= RANK[own]}
    assert not upward, f"{module} imports {upward}"


def test_no_two_modules_import_each_other():
    """Not even inside functions, nor by a detour. A package's ``__init__`` may import its parts late: it is what hands them out."""
    needs = {path: set(own_imports(path)) for path in SOURCE.rglob("*.py")}
    while free := {path for path, others in needs.items() if not others & needs.keys()}:
        needs = {path: others for path, others in needs.items() if path not in free}
    assert not needs, sorted(str(path.relative_to(SOURCE)) for path in needs)


def own_imports(path: Path) -> Iterator[Path]:
    """The files of forwardtune that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if path.name == "__init__.py" else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            whole = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in (alias.name for alias in node.names):
                places = (
                    whole / f"{name}.py",
                    whole / name / "__init__.py",
                    whole.with_suffix(".py"),
                    whole / "__init__.py",
                )
                yield from [place for place in places if place.is_file()][:1]


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in NEEDS], ids=str)
def test_the_core_needs_torch_alone(module):
    allowed = NEEDS.get(module.as_posix(), NEEDS[part_of(module)]) | STANDARD
    outside = {name.split(".")[0] for level, name in imports(module) if not level} - allowed
    assert not outside


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


def test_every_public_name_exists():
    assert all(hasattr(forwardtune, name) for name in forwardtune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        forwardtune.nothing  # noqa: B018
