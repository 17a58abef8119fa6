"""Mutation testing with mutmut: small faults are put into the code, one at a time, and the tests must notice each.

    python tests/mutants.py [NAME ...]     # such as 'forwardtune.search.guard*'; everything without a name

``[tool.mutmut]`` in pyproject.toml says what is mutated and by which tests it is tried. Results are kept in ``mutants/``: a
mutant that was killed stays so until its function changes, and one that survived is tried again by the tests as they are now.
``mutmut show MUTANT`` prints the fault. Of a test with many cases three are run; FORWARDTUNE_MOST_CASES=1000 runs all.
"""

from __future__ import annotations

import os
import sys

import libcst as cst
from mutmut import __main__ as mutmut
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.runners.harness import PytestRunner
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files

CAUGHT = ("killed", "timeout", "segfault")


def mutate_what_runs_without_gradients() -> None:
    """mutmut leaves decorated functions alone, which would leave out most of the optimizer. no_grad changes nothing else."""
    skip = MutationVisitor._skip_node_and_children

    def without_no_grad(self: MutationVisitor, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and len(node.decorators) == 1:
            decorator = cst.Module([]).code_for_node(node.decorators[0].decorator)
            if decorator == "torch.no_grad()":
                return False
        return skip(self, node)

    MutationVisitor._skip_node_and_children = without_no_grad


def load_kernels_once() -> None:
    """Before processes are forked, one for each mutant: to load them takes as long as most of its tests."""
    collect = PytestRunner.warm_up

    def warm_up(self: PytestRunner) -> None:
        collect(self)
        import test_noise

        test_noise.everything()

    PytestRunner.warm_up = warm_up


def results() -> dict[str, dict[str, str]]:
    """Of every file, its mutants and what became of them."""
    found = {}
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        found[str(path)] = {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
    return found


def forget_survivors() -> None:
    """Let them be tried again: the tests may have become sharper."""
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        if any(status_by_exit_code[code] not in CAUGHT for code in data.exit_code_by_key.values()):
            for name, code in data.exit_code_by_key.items():
                data.exit_code_by_key[name] = code if status_by_exit_code[code] in CAUGHT else None
            data.save()


def report() -> None:
    """A line for each file, and every mutant that survived."""
    survivors = []
    print(f"\n{'':44} mutants  caught   score")
    for path, mutants in results().items():
        tried = {name: status for name, status in mutants.items() if status != "not checked"}
        caught = sum(status in CAUGHT for status in tried.values())
        survivors += [f"{status:10} {name}" for name, status in tried.items() if status not in CAUGHT]
        if tried:
            print(f"{path:44} {len(tried):7} {caught:7} {100 * caught / len(tried):6.1f}%")
    print(*["", *survivors], sep="\n")


if __name__ == "__main__":
    os.environ.setdefault("FORWARDTUNE_MOST_CASES", "3")  # a survivor costs as long as all its tests
    mutate_what_runs_without_gradients()
    load_kernels_once()
    forget_survivors()
    mutmut._run(sys.argv[1:], max_children=1)
    report()
