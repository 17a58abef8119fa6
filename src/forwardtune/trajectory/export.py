"""The smallest form of a run: ``trajectory.safetensors``, four bytes a probe and step.

Tensors: ``sizes`` float32 ``(groups or 1, steps, probes)``, the factors of the directions, NaN for a skipped step;
``decay`` float32 ``(groups, steps or 1)``, the factors of weight decay, absent when all are 1; ``lr`` float32
``(groups, steps or 1)``, the learning rates, for rules other than sgd, whose sizes contain them. Metadata: the log's header
without versions, with the rollbacks, with what steps left alone and with the average that is meant, deflated, as base 85, the digest of the tuned weights, and ``check``, SHA-256 over all
of this. The digest can tell damage only where the whole run is replayed; the checksum is compared whenever the file is read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..averages import NONE
from ..errors import LogError
from ..method.rule import Rule, Step
from ..noise import Update
from .format import numbers, ranges, rows_read, without_rows
from .reader import Log, Rollback, check_header, rule_of
from .updates import Trajectory, trajectory_of


def export_trajectory(log: Log, path: str | PathLike[str], average: str = NONE) -> int:
    """Write a log's trajectory to a new file and return its size in bytes.

    Args:
        average: of the run's weights, which is what the file will be replayed to (:class:`forwardtune.averages.Average`).

    Raises:
        LogError: the log is unfinished, or the file exists.
        InputError: the average is none of these steps, or the run's rule is not linear.
    """
    from safetensors.torch import save_file

    trajectory = trajectory_of(log)
    averaged = trajectory.averaged(average, trajectory.steps)
    path = Path(path)
    if trajectory.digest is None:
        raise LogError(f"{log.path} has no end line: resume the run and let it finish, then export it")
    if path.exists():
        raise LogError(f"{path} exists: choose another name (nothing was overwritten)")
    groups, steps = len(trajectory.updates), trajectory.steps
    probes = max((len(update.sizes) for update in trajectory.updates[0]), default=0)
    if not probes or log.header.get("assignment", "shared") == "shared":
        probes = log.header["probes"]  # of which a step may have fewer
    sizes = torch.tensor(  # what a short minibatch lacks is 0: no direction
        [[_padded(update.sizes, probes) for update in group] for group in trajectory.updates],
        dtype=torch.float32,
        device="cpu",
    ).reshape(groups, steps, probes)
    taken = ~sizes.isnan().any(dim=2)
    decay = _compact([[update.decay for update in group] for group in trajectory.updates], taken)
    if all(torch.equal(group.nan_to_num(), sizes[0].nan_to_num()) for group in sizes):
        sizes = sizes[:1]
    tensors = {"sizes": sizes.contiguous()}
    if (decay != 1.0).any():
        tensors["decay"] = decay
    if needs_lr(trajectory.rule):
        tensors["lr"] = _compact(
            [[getattr(update, "lr", 1.0) for update in group] for group in trajectory.updates], taken
        )
    header = {key: value for key, value in log.header.items() if key != "versions"}
    if log.rollbacks:
        header["rollbacks"] = [[rollback.at, rollback.to] for rollback in log.rollbacks]
    if log.folds:
        header["folds"] = log.folds
    if average != NONE:
        header["average"] = {"of": average, "digest": averaged.digest}
    if unused := _runs(trajectory.updates[0]):
        header["unused"] = unused
    if rows := _rows(trajectory.updates[0]):
        header["rows"] = rows
    packed = base64.b85encode(zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"forwardtune": "trajectory", "header": packed, "digest": trajectory.digest}
    save_file(tensors, path, metadata={**metadata, "check": _checksum(metadata, tensors)})
    return path.stat().st_size


def _padded(sizes: tuple[float, ...], count: int) -> tuple[float, ...]:
    return (*sizes, *(0.0,) * (count - len(sizes))) if sizes else (math.nan,) * count


def _runs(updates: list[Update]) -> list[list[Any]]:
    """Which tensors were left alone, for every run of steps that left the same ones alone: first step, last step, their ids."""
    runs: list[list[Any]] = []
    for update in updates:
        if not update.unused:
            continue
        text = ranges(sorted(update.unused))
        if runs and runs[-1][1:] == [update.step - 1, text]:
            runs[-1][1] = update.step
        else:
            runs.append([update.step, update.step, text])
    return runs


def _rows(updates: list[Update]) -> list[list[Any]]:
    """Which rows were read for the first time, for every step at which some were: step, by id of the tensor."""
    before: Mapping[int, Tensor] = {}
    found: list[list[Any]] = []
    for update in updates:
        if update.sizes:
            if rows := rows_read(before, update.unread):
                found.append([update.step, rows])
            before = update.unread
    return found


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata's names and values, then names, shapes and bytes of the tensors, both in order of names, as hex."""
    state = hashlib.sha256()
    for key, value in sorted(metadata.items()):
        state.update(f"{key}\0{value}\0".encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        state.update(struct.pack(f"<{tensor.numel()}f", *tensor.flatten().tolist()))
    return state.hexdigest()


def needs_lr(rule: Rule) -> bool:
    """Whether a step has a learning rate beside its sizes."""
    return isinstance(rule.plan(0, [1.0], 1e-3, 0.0), Step)


def _compact(rows: list[list[float]], taken: Tensor) -> Tensor:
    """A number for every group and step; one for every group when those of the steps that were taken are all equal."""
    numbers = torch.tensor(rows, dtype=torch.float32, device="cpu").reshape(taken.shape)
    # Skipped steps have no number of their own.
    values = [row[mask].unique() for row, mask in zip(numbers, taken, strict=True)]
    if all(len(value) <= 1 for value in values):
        return torch.stack([value if len(value) else numbers.new_ones(1) for value in values])
    return numbers


def read_trajectory(path: str | PathLike[str]) -> Trajectory:
    """Read an exported trajectory.

    Raises:
        LogError: the file is missing, damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise LogError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        check = metadata.pop("check", None)
        if metadata.keys() != {"forwardtune", "header", "digest"}:
            raise ValueError("its metadata are not those of a trajectory")
        if {tensor.dtype for tensor in tensors.values()} != {torch.float32}:
            raise ValueError("its numbers are not float32")
        if check is not None and check != _checksum(metadata, tensors):
            raise ValueError("its checksum does not fit, so it was altered")
        header = json.loads(zlib.decompress(base64.b85decode(metadata["header"])))
        digest = metadata["digest"]
        rollbacks = [Rollback(at, to) for at, to in header.pop("rollbacks", [])]
        folds = header.pop("folds", []) if header.get("fold") == "refresh" else None
        average = header.pop("average", {"of": NONE, "digest": None})
        groups = len(header["groups"])
        unused = {
            step: frozenset(numbers(text, len(header["tensors"])))
            for first, last, text in header.pop("unused", [])
            for step in range(first, last + 1)
        }
        read = dict(header.pop("rows", []))
        unread_at: list[Mapping[int, Tensor]] = []
        sizes = tensors["sizes"]
        for step in range(sizes.shape[1]):
            unread_at.append(without_rows(unread_at[-1] if unread_at else {}, read.get(step, {}), header))
        if sizes.shape[2] != header["probes"] and header.get("assignment", "shared") == "shared":
            raise ValueError("it has another number of directions than its header")
        sizes = sizes.expand(groups, -1, sizes.shape[2])
        one = torch.ones(1, dtype=torch.float32, device="cpu")  # whatever torch makes by default
        decay = tensors.get("decay", one).expand(groups, sizes.shape[1])
        rated = "lr" in tensors
        lr = tensors.get("lr", one).expand(groups, sizes.shape[1])
    except (
        SafetensorError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        ValueError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise LogError(f"{path} is not an intact exported trajectory ({error}): export it again from the log") from None
    check_header(path, header)
    rule = rule_of(path, header)
    if rated != needs_lr(rule):
        raise LogError(
            f"{path} lacks the learning rates of its rule, or has some too many: export it again from the log"
        )

    def update(step: int, row: list[float], factor: float, rate: float) -> Update:
        if any(map(math.isnan, row)):
            return Update(step, ())
        left = unused.get(step, frozenset())
        return (
            Step(step, tuple(row), factor, lr=rate, unused=left, unread=unread_at[step])
            if rated
            else Update(step, tuple(row), factor, unused=left, unread=unread_at[step])
        )

    updates = [
        [update(step, *numbers) for step, numbers in enumerate(zip(rows, factors, rates, strict=True))]
        for rows, factors, rates in zip(sizes.tolist(), decay.tolist(), lr.tolist(), strict=True)
    ]
    averages = {} if average["digest"] is None else {average["of"]: average["digest"]}
    return Trajectory(path, header, rule, updates, rollbacks, digest, check is not None, averages, average["of"], folds)
