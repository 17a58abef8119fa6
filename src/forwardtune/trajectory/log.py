"""Writing a step log as a run goes."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from ..optimizer import MeZO, StepRecord
from .format import LogError, header_content, identity, seal, step_content
from .reader import Log, read_log
from .replay import apply_records

try:
    import fcntl
except ImportError:  # not on this platform: two writers of one log are not noticed
    fcntl = None  # type: ignore[assignment]


class StepLog:
    """Writes every step of an optimizer to a file, one line a step, as it happens.

    Example::

        optimizer = MeZO(model, lr=1e-5)
        with StepLog("steps.jsonl", optimizer):
            for batch in loader:
                optimizer.step(lambda: model(**batch).loss)

    Args:
        path: the file; it must not exist yet.
        optimizer: its present weights are the base weights.
        run: anything else to keep in the header, as JSON.

    Raises:
        LogError: the file exists, or cannot be written.
    """

    def __init__(self, path: str | PathLike[str], optimizer: MeZO, run: dict[str, Any] | None = None) -> None:
        self._open(Path(path), optimizer, new=True)
        self._write(header_content(optimizer, run))
        optimizer.recorders.append(self.record)

    @classmethod
    def resume(cls, path: str | PathLike[str], optimizer: MeZO) -> StepLog:
        """Go on with a log: bring the optimizer's weights, which must be the base weights, to its last step.

        A torn last line is cut off. The optimizer must be set up as at the start (its learning rate may differ).

        Raises:
            LogError: the log is damaged, or belongs to other weights or settings.
        """
        log = read_log(path)
        require_same_run(log, optimizer)
        if optimizer.next_step == 0:
            apply_records(log, log.records, optimizer.tuned)
            optimizer.fast_forward(log.records)
        self = cls.__new__(cls)
        self._continue(log, optimizer)
        return self

    @classmethod
    def append(cls, log: Log, optimizer: MeZO) -> StepLog:
        """Go on with a log whose steps the optimizer's weights already hold."""
        require_same_run(log, optimizer)
        self = cls.__new__(cls)
        self._continue(log, optimizer)
        return self

    def _continue(self, log: Log, optimizer: MeZO) -> None:
        if optimizer.next_step != log.steps:
            raise LogError(
                f"{log.path} holds {log.steps} steps, the optimizer has taken {optimizer.next_step}: "
                "resume from the base weights, or from a checkpoint of the log's last step"
            )
        self._open(log.path, optimizer, new=False)
        self._file.truncate(log.length)
        self._check = log.check
        optimizer.recorders.append(self.record)

    def _open(self, path: Path, optimizer: MeZO, *, new: bool) -> None:
        self.path = path
        self._optimizer = optimizer
        self._check = ""
        self._weight_decay: tuple[float, ...] = tuple(float(g["weight_decay"]) for g in optimizer.param_groups)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(path, "x" if new else "a", encoding="utf-8", newline="\n")
        except FileExistsError:
            raise LogError(
                f"{path} already holds a run: resume that run, or choose another folder (nothing was overwritten)"
            ) from None
        except OSError as error:
            raise LogError(f"{path} cannot be written: {error.strerror}") from None
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                raise LogError(f"{path} is being written by another process: wait for it, or stop it first") from None

    def record(self, record: StepRecord) -> None:
        """Write one step. Raises LogError when the file cannot take it (a full disk)."""
        if record.weight_decay != self._weight_decay:
            raise LogError("weight decay changed during the run, which a step log cannot hold: start a new run")
        self._write(step_content(record))

    def _write(self, content: dict[str, Any]) -> None:
        line, check = seal(self._check, content)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise LogError(
                f"{self.path} could not be written: {error.strerror}. Every earlier step is in it: make room, then "
                "resume the run"
            ) from None
        self._check = check

    def finish(self) -> None:
        """Write the end line, with the digest of the tuned weights: a log without one is unfinished."""
        self._write({"end": self._optimizer.next_step, "digest": self._optimizer.tuned.digest()})

    def close(self) -> None:
        """Stop recording. Does not write the end line."""
        if self.record in self._optimizer.recorders:
            self._optimizer.recorders.remove(self.record)
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError:  # a full disk was reported by the write itself
                pass

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self.close()


def cut_log(log: Log, steps: int) -> Log:
    """Keep the first ``steps`` steps of a log; what is cut off is appended to ``*.cut.jsonl`` beside it."""
    lines = log.path.read_bytes()[: log.length].splitlines(keepends=True)
    is_step = [line[:8] == b'{"step":' for line in lines]
    keep = next((i for i, line in enumerate(is_step) if sum(is_step[:i]) == steps and line), len(lines))
    if keep < len(lines):
        with open(log.path.with_suffix(".cut.jsonl"), "ab") as file:
            file.writelines(lines[keep:])
        partial = log.path.with_suffix(".partial")
        partial.write_bytes(b"".join(lines[:keep]))
        os.replace(partial, log.path)
    return read_log(log.path)


def require_same_run(log: Log, optimizer: MeZO) -> None:
    """Raise LogError, naming the first difference, unless the optimizer is set up as the log's header says."""
    for key, ours in identity(optimizer).items():
        theirs = log.header.get(key)
        if theirs == ours:
            continue
        if key == "tensors":
            names = [{t["name"] for t in tensors} for tensors in (theirs or [], ours)]
            odd = sorted(names[0] ^ names[1])
            if odd:
                where = "only in the log" if odd[0] in names[0] else "only in this run"
                detail = f"{len(odd)} tensors are tuned {where}, such as {odd[0]}"
            else:
                a, b = next((a, b) for a, b in zip(theirs or [], ours, strict=True) if a != b)
                detail = f"{a['name']} is {a['dtype']} {a['shape']} (group {a['group']}) in the log, "
                detail += f"{b['dtype']} {b['shape']} (group {b['group']}) here"
        else:
            detail = f"{key} is {theirs!r} in the log, {ours!r} here"
        raise LogError(f"{log.path} belongs to another run: {detail}. Use the run's own settings, or another folder")
