"""What ``gpu.py`` runs, the most wanted first."""

from __future__ import annotations

from dataclasses import dataclass

PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short", "--maxfail=40", "--durations=5",
          # A process compiles its kernels on one core.
          "-n", "12", "--dist", "worksteal",
          # A hint of a version that was not seen before is to be read; it is no failure here.
          "-W", "default", "-o", "faulthandler_timeout=60")  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        command: what follows the interpreter.
        limit: seconds that it may take; fewer if fewer are left.
        packages: what it cannot run without.
        memory: free GiB on the device, likewise.
    """

    name: str
    what: str
    command: tuple[str, ...]
    limit: float
    packages: tuple[str, ...] = ("torch",)
    memory: float = 0.0


def _script(name: str, what: str, line: str, limit: float, memory: float = 0.0) -> Stage:
    """A benchmark; those that say how much memory they need load models."""
    packages = ("torch", "transformers") if memory else ("torch",)
    return Stage(name, what, tuple(f"benchmarks/{line}".split()), limit, packages, memory)


def _step(shape: str, lengths: str, limit: float, memory: float) -> Stage:
    whose = shape if shape.startswith("smollm2") else f"OPT-{shape.upper()}"
    what = f"a step over two forward passes and over the published loop, {whose}'s shape, 16 x {lengths.replace(' ', ', ')}"
    line = f"step.py --device cuda --shapes {shape} --lengths {lengths}"
    return _script(f"step-{shape}", what, line, limit, memory)


STAGES = (
    Stage(
        "test-kernels",
        "tests/test_noise_gpu.py: the bits of the definition from compiled kernels",
        (*PYTEST, "tests/test_noise_gpu.py", "-k", "not interpret"),
        110,
        ("torch", "triton", "pytest", "xdist"),
    ),
    Stage(
        "test-steps",
        "tests/test_cuda.py: steps, replay, Trainer, tensors past 2^31 elements",
        (*PYTEST, "tests/test_cuda.py", "-k", "not command_line and not plan"),
        115,
        ("torch", "pytest", "xdist"),
    ),
    _step("13b", "32 64", 90, 32),
    _step("smollm2-135m", "32 64", 40, 4),
    _step("1.3b", "64 32 400", 70, 8),
    _script(
        "offload",
        "steps with the weights in the host's memory, against weights on the device, OPT-1.3B's and 13B's shapes",
        "offload.py --parts gpu --rounds 3",
        70,
        40,
    ),
    _script("largest", "30B in bfloat16, all weights, 16 x 64", "largest.py --rows 30b --output largest-dense", 40, 70),
    Stage(
        "largest-nf4",
        "70B in NF4 with an adapter, 16 x 64",
        ("benchmarks/largest.py", "--rows", "70b-nf4-lora", "--output", "largest-nf4"),
        50,
        ("torch", "transformers", "peft", "bitsandbytes"),
        45,
    ),
    Stage(
        "test-commands",
        "tests/test_cuda.py: runs of the command line, and plan, which begin many processes",
        (*PYTEST, "tests/test_cuda.py", "-k", "command_line or plan"),
        115,
        ("torch", "pytest", "xdist"),
    ),
    _script(
        "kernels",
        "bits against the definition without pytest, speed against it, host time of a launch",
        "noise_kernels.py --device cuda",
        70,
    ),
    _script(
        "memory-1.3b",
        "peak memory of a step, of inference and of Adam, OPT-1.3B's shape, 16 x 64",
        "memory.py --device cuda --sizes 1.3b --dtypes bfloat16 --length 64",
        60,
        8,
    ),
    _script(
        "profile",
        "the kernels of a step and of a forward pass, OPT-1.3B's shape, 16 x 64",
        "step.py --device cuda --shapes 1.3b --lengths 64 --profile --no-reference --rounds 3 --output profile-cuda",
        40,
        8,
    ),
    _script(
        "sweep",
        "a sweep over 100M weights against a multiply-add over the same memory",
        "sweep.py --device cuda",
        45,
    ),
    _step("6.7b", "32 64", 60, 18),
    _step("125m", "32 64 400", 40, 4),
)
