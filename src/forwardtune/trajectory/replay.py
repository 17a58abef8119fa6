"""Rebuilding tuned weights from base weights and the step log, without data and without a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ..errors import LogError
from ..method.rule import History, move_all
from ..noise import Update
from ..optimizer import MeZO
from ..parameters import TunedParameters, dtype_name
from .export import read_trajectory
from .format import noise_of, require_frozen
from .reader import Log, read_log
from .updates import Trajectory, trajectory_of

Progress = Callable[[int, int], object]


def replay(
    log: str | PathLike[str] | Log | Trajectory,
    module: nn.Module,
    *,
    steps: int | None = None,
    average: str | None = None,
    progress: Progress | None = None,
) -> int:
    """Bring a module from the base weights of a run to its tuned weights, bit for bit.

    Args:
        log: path of a ``steps.jsonl`` or an exported ``trajectory.safetensors``, or what was read from one.
        module: holds the base weights, in the dtypes of the run; changed in place.
        steps: replay this many steps only. Needed for a log without an end line, which may have lost its tail.
        average: rebuild an average of the weights of these steps (:class:`forwardtune.averages.Average`), such as ``"last:100"``; by
            default that which an export names, else ``"none"``.
        progress: called with the numbers of tensors done and in all.

    Returns:
        The number of steps replayed.

    Raises:
        LogError: the log is damaged or unfinished, or the module does not hold the weights that the run began with;
            or the result differs from the digest in the log's end line, or from that of the average in a note.
        InputError: the average is none of these steps, or the run's rule is not linear.
    """
    if isinstance(log, (str, PathLike)):
        log = read_trajectory(log) if Path(log).suffix == ".safetensors" else read_log(log)
    trajectory = log if isinstance(log, Trajectory) else trajectory_of(log)
    total = trajectory.steps
    if steps is None and trajectory.digest is None:
        raise LogError(
            f"{trajectory.path} has no end line: the run was killed after {total} steps, or the file lost its tail. "
            f"Resume the run, or replay what is there with steps={total} (--steps {total})"
        )
    steps = total if steps is None else steps
    if not 0 <= steps <= total:
        raise LogError(f"{trajectory.path} holds {total} steps: {steps} cannot be replayed")
    if steps != total and not trajectory.checked:
        raise LogError(
            f"{trajectory.path} was exported by an earlier version, without a checksum: damage would show only after all "
            f"{total} steps. Replay all of them, or export it again from the log"
        )
    averaged = trajectory.averaged(average, steps)
    tuned = tuned_by_header(trajectory, module)
    require_base(trajectory, tuned)
    apply_updates(averaged, tuned, averaged.first(steps), progress, keep=False)
    if steps == total and averaged.digest is not None and tuned.digest() != averaged.digest:
        raise LogError(
            f"the weights rebuilt from {trajectory.path} differ from those that the run ended with, though log and base "
            "weights are intact. Please report this, with the log's header"
        )
    return steps


def apply_log(log: Log, optimizer: MeZO) -> None:
    """Bring an optimizer to a log's last step; its weights must be the base weights."""
    trajectory = trajectory_of(log)
    require_base(trajectory, optimizer.tuned)
    history = apply_updates(trajectory, optimizer.tuned, trajectory.first(log.steps), None, keep=True)
    optimizer.fast_forward(log.records, history)


@torch.no_grad()
def apply_updates(
    trajectory: Trajectory,
    tuned: TunedParameters,
    updates: list[list[Update]],
    progress: Progress | None,
    *,
    keep: bool,
) -> History:
    """The sweeps: each tensor takes all its steps while it is in the cache. Returns what the rule remembers of them."""
    history = History()
    move_all(
        trajectory.rule,
        noise_of(trajectory.header),
        tuned,
        updates,
        history,
        keep=keep,
        from_base=True,
        folded_at=trajectory.folded_at(len(updates[0])),
        progress=progress,
    )
    return history


def tuned_by_header(trajectory: Trajectory | Log, module: nn.Module) -> TunedParameters:
    """The module's tensors that the header names, with the ids and groups of the run."""
    by_name = dict(module.named_parameters(remove_duplicate=False))
    groups: list[dict] = [{"params": []} for _ in trajectory.header["groups"]]
    missing = [described["name"] for described in trajectory.header["tensors"] if described["name"] not in by_name]
    if missing:
        raise LogError(
            f"{trajectory.path} tunes {missing[0]}, which this model does not have: replay it over the model "
            f"that the run began with ({trajectory.header['run'].get('model', 'not recorded')})"
        )
    for described in trajectory.header["tensors"]:
        parameter = by_name[described["name"]]
        found = (list(parameter.shape), dtype_name(parameter.dtype))
        if found != (described["shape"], described["dtype"]):
            raise LogError(
                f"{described['name']} is {described['dtype']} {described['shape']} in {trajectory.path}, but "
                f"{found[1]} {found[0]} in this model: load the run's own base model in its own dtype"
            )
        tied = sorted(name for name, other in by_name.items() if other is parameter)
        if tied != [described["name"], *described.get("tied", ())]:
            raise LogError(
                f"{described['name']} is tied to {', '.join(described.get('tied', ())) or 'nothing'} in {trajectory.path}, "
                f"but to {', '.join(n for n in tied if n != described['name']) or 'nothing'} in this model: load the run's "
                "own base model, with the same tied weights"
            )
        groups[described["group"]]["params"].append(parameter)
    return TunedParameters.from_groups(groups, module)


def require_base(trajectory: Trajectory, tuned: TunedParameters) -> None:
    """Raise LogError unless the tuned tensors hold the run's base weights, and a quantised model below them is the run's."""
    if tuned.digest() != trajectory.header["base"]:
        raise LogError(
            f"these are not the weights that the run of {trajectory.path} began with: its names, shapes and dtypes fit, "
            f"its values do not. Load the same base model ({trajectory.header['run'].get('model', 'not recorded')}), "
            "untuned"
        )
    require_frozen(trajectory.path, trajectory.header, tuned)
