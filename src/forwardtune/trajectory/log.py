"""Writing a step log as a run goes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import accumulate
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch import Tensor

from ..errors import LogError, LogWriteError
from ..method.estimators import ESTIMATORS
from ..method.record import StepRecord
from ..method.rules import RULES, logged_rule
from ..noise import DIRECTIONS
from ..optimizer import MeZO
from .format import (
    ABSENT,
    DESCRIPTIVE,
    FOUND,
    emphasis_of,
    header_content,
    identity,
    require_frozen,
    seal,
    step_content,
)
from .lock import LogLock
from .reader import Log, Rollback, read_log
from .replay import apply_log
from .updates import folded_steps


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
        lock: the log's lock, if the caller has it already, and keeps it. Else it is taken until :meth:`close`.

    Raises:
        LogError: the file exists, cannot be written, or is being written by another process; or the run could not be replayed
            from it, because of a direction or a rule that is not registered.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        optimizer: MeZO,
        run: dict[str, Any] | None = None,
        *,
        lock: LogLock | None = None,
    ) -> None:
        _require_known(optimizer)
        content = header_content(optimizer, run)
        #: Digest of the weights that the run began with.
        self.base: str = content["base"]
        header, check = seal("", content)
        self._open(Path(path), optimizer, lock, new=True)
        try:
            self._write(header, check)
        except LogError:
            self.close()
            self.path.unlink()
            raise
        self._listen()

    @classmethod
    def resume(cls, path: str | PathLike[str], optimizer: MeZO, *, lock: LogLock | None = None) -> StepLog:
        """Go on with a log: bring the optimizer's weights, which must be the base weights, to its last step.

        A torn last line is cut off; steps that waited to be folded into the weights are cut out, too, and are to be taken again. The optimizer must be set up as at the start (its learning rate may differ). If it has
        taken the log's steps already, its weights are left as they are.

        Raises:
            LogError: the log is damaged, in use, or belongs to other weights or settings.
        """
        self = cls.__new__(cls)
        self._open(Path(path), optimizer, lock, new=False)
        try:
            log = read_log(path)  # after the lock: nobody else writes to it now
            require_same_run(log, optimizer)
            if (steps := folded_steps(log, log.steps)) < log.steps:
                log = cut_log(log, steps)
                self._file.close()  # the file is another one now
                self._file = open(path, "r+b", buffering=0)
            optimizer.emphasise(emphasis_of(log.header))
            optimizer.leave_out(number for record in log.records for number in record.left_out)
            if optimizer.next_step == 0:
                apply_log(log, optimizer)
            if optimizer.next_step != log.steps:
                raise LogError(
                    f"{log.path} holds {log.steps} steps, the optimizer has taken {optimizer.next_step}: "
                    "resume from the base weights, or from a checkpoint of the log's last step"
                )
            self._file.truncate(log.length)
            self._file.seek(0, os.SEEK_END)
        except BaseException:
            self.close()
            raise
        self._check, self.base = log.check, log.header["base"]
        self._unread = log.records[-1].unread if log.records else {}
        self.step_check = log.step_checks[-1] if log.steps else None
        if optimizer.pending is not None:
            optimizer.pending.go_on(log.steps, log.folds)
        self._listen()
        return self

    def _listen(self) -> None:
        self._optimizer.recorders.append(self.record)
        if self._optimizer.pending is not None:
            self._optimizer.pending.recorders.append(self.folded)

    def _open(self, path: Path, optimizer: MeZO, lock: LogLock | None, *, new: bool) -> None:
        self.path = path
        #: Checksum of the last line that moved the weights, a step or a rollback, which follows from everything before it; None
        #: before the first step.
        self.step_check: str | None = None
        self._optimizer = optimizer
        self._check = ""
        self._unread: Mapping[int, Tensor] = {}  # rows, as the lines so far say
        self._failed = False
        self._weight_decay = tuple(float(group["weight_decay"]) for group in optimizer.param_groups)
        if not new and not path.exists():
            raise LogError(f"{path}: there is no such file")
        self._own_lock = LogLock(path) if lock is None else None
        try:
            # Unbuffered: what could not be written must not be written later, behind other lines.
            self._file: IO[bytes] = open(path, "xb" if new else "r+b", buffering=0)
        except OSError as error:
            self._release()
            if isinstance(error, FileExistsError):
                raise _holds_a_run(path) from None
            raise LogError(f"{path} cannot be written: {error.strerror}") from None

    def _release(self) -> None:
        if self._own_lock is not None:
            self._own_lock.release()

    def record(self, record: StepRecord) -> None:
        """Write one step. Raises LogWriteError when the file cannot take it, as on a full disk."""
        if record.weight_decay != self._weight_decay:
            raise LogError("weight decay changed during the run, which a step log cannot hold: start a new run")
        self._write(*seal(self._check, step_content(record, self._unread)))
        self._unread = record.unread
        self.step_check = self._check

    def note(self, content: dict[str, Any]) -> None:
        """Keep something beside the steps, as JSON: a decision, and what it was based on. Replay ignores it."""
        self._write(*seal(self._check, {"note": content}))

    def rolled_back(self, to: int) -> None:
        """Write that the weights are again those after ``to`` steps; :meth:`ReturnPoint.go_back` moves them.

        Raises:
            ValueError: ``to`` is no earlier step.
        """
        Rollback(self._optimizer.next_step, to)
        self._write(*seal(self._check, {"rollback": to}))
        self.step_check = self._check

    def folded(self, steps: int) -> None:
        """Write that what waited is folded into the weights after so many steps."""
        self._write(*seal(self._check, {"fold": steps}))
        self.step_check = self._check

    def _write(self, line: str, check: str) -> None:
        if self._failed:
            raise LogWriteError(f"{self.path} lacks a step that could not be written: resume the run from it")
        data = (line + "\n").encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._failed = True
            raise LogWriteError(
                f"{self.path} could not be written: {error.strerror}. Every earlier step is in it: make room, then "
                "resume the run"
            ) from None
        self._check = check

    def finish(self) -> None:
        """Write the end line, with the digest of the tuned weights: a log without one is unfinished."""
        self._optimizer.require_whole_weights()
        self._optimizer.fold()
        self._write(*seal(self._check, {"end": self._optimizer.next_step, "digest": self._optimizer.tuned.digest()}))

    def close(self) -> None:
        """Stop recording. Does not write the end line."""
        if self.record in self._optimizer.recorders:
            self._optimizer.recorders.remove(self.record)
        if self._optimizer.pending is not None and self.folded in self._optimizer.pending.recorders:
            self._optimizer.pending.recorders.remove(self.folded)
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError:  # a full disk was reported by the write itself
            pass
        finally:
            self._file.close()
            self._release()

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()


def add_note(path: Path, content: dict[str, Any]) -> None:
    """Keep something in a log that nobody writes now, behind its last whole line. Raises LogError as :func:`read_log` does."""
    lock = LogLock(path)
    try:
        log = read_log(path)
        with open(path, "r+b") as file:
            file.truncate(log.length)
            file.seek(0, os.SEEK_END)
            file.write((seal(log.check, {"note": content})[0] + "\n").encode())
    finally:
        lock.release()


def require_no_log(path: Path) -> None:
    """Raise LogError if the file exists."""
    if path.exists():
        raise _holds_a_run(path)


def _holds_a_run(path: Path) -> LogError:
    return LogError(f"{path} already holds a run: resume that run, or choose another folder (nothing was overwritten)")


def _require_known(optimizer: MeZO) -> None:
    """Raise LogError unless direction, estimator and rule can be made again from what the header will say of them."""
    direction, rule, estimator = optimizer.noise.direction, optimizer.rule, optimizer.estimator
    if estimator.per_example and ESTIMATORS.get(estimator.name) is not type(estimator):
        raise LogError(
            f"the estimator {estimator.name!r} is not registered, and coefficients of examples are derived from their losses when the log is "
            f"read: put {type(estimator).__qualname__} into forwardtune.method.estimators.ESTIMATORS under its name, in a module that is "
            "imported wherever the log is read"
        )
    known = DIRECTIONS.get(direction.name)
    if known is None or known.digest() != direction.digest():
        raise LogError(
            f"the direction {direction.name!r} is not registered, so its log could never be read: call "
            "forwardtune.noise.register_direction with it, under a name of its own, in a module that is imported wherever the "
            "log is read"
        )
    name = getattr(rule, "name", type(rule).__qualname__)
    if RULES.get(name) is not type(rule):
        raise LogError(
            f"the rule {name!r} is not registered as {type(rule).__qualname__}, so its log could never be read: give the class a "
            "name of its own and decorate it with forwardtune.method.rules.register_rule, in a module that is imported wherever the log "
            "is read"
        )
    try:
        again = logged_rule(name, json.loads(json.dumps(rule.settings())))
    except (TypeError, ValueError) as error:
        why = str(error)
    else:
        if vars(again) == vars(rule):
            return
        why = f"they give {vars(again)}, the rule has {vars(rule)}"
    raise LogError(
        f"the rule {name!r} cannot be made again from its settings() {rule.settings()} ({why}): its log could not be replayed. "
        "Let settings() return every argument of the class, as JSON"
    )


def cut_log(log: Log, steps: int) -> Log:
    """Keep the first ``steps`` steps of a log, with the notes and rollbacks that follow the last of them.

    The caller has the log's lock. What is cut off is appended to ``*.cut.jsonl`` beside it.
    """
    lines = log.path.read_bytes()[: log.length].splitlines(keepends=True)
    is_step = [line[:8] == b'{"step":' for line in lines]
    before = accumulate(is_step, initial=0)
    keep = next(
        (i for i, (line, n) in enumerate(zip(is_step, before, strict=False)) if line and n == steps), len(lines)
    )
    if keep < len(lines):
        with open(log.path.with_suffix(".cut.jsonl"), "ab") as file:
            file.writelines(lines[keep:])
        partial = log.path.with_suffix(".partial")
        partial.write_bytes(b"".join(lines[:keep]))
        os.replace(partial, log.path)
    return read_log(log.path)


def require_same_run(log: Log, optimizer: MeZO) -> None:
    """Raise LogError, naming the first difference, unless the optimizer is set up as the log's header says."""
    own = identity(optimizer)
    for key in (key for key in dict.fromkeys([*own, *log.header]) if key not in (*DESCRIPTIVE, FOUND)):
        ours, theirs = (header.get(key, ABSENT.get(key)) for header in (own, log.header))
        if theirs == ours:
            continue
        if key == "tensors":
            names = [{t["name"] for t in tensors} for tensors in (theirs or [], own[key])]
            odd = sorted(names[0] ^ names[1])
            if odd:
                where = "only in the log" if odd[0] in names[0] else "only in this run"
                detail = f"{len(odd)} tensors are tuned {where}, such as {odd[0]}"
            else:
                a, b = next((a, b) for a, b in zip(theirs or [], own[key], strict=True) if a != b)
                detail = f"{a['name']} is {a['dtype']} {a['shape']} (group {a['group']}) in the log, "
                detail += f"{b['dtype']} {b['shape']} (group {b['group']}) here"
        else:
            detail = f"{key} is {theirs!r} in the log, {ours!r} here"
        raise LogError(f"{log.path} belongs to another run: {detail}. Use the run's own settings, or another folder")
    require_frozen(log.path, log.header, optimizer.tuned)
