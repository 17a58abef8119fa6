"""One writer a step log: a lock that outlives the log's own file, which is replaced when the log is cut."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LogError

try:
    import fcntl
except ImportError:  # not on this platform: two writers of one log are not noticed
    fcntl = None  # type: ignore[assignment]


class LogLock:
    """The right to write a step log, from now until :meth:`release`, or until the process ends.

    It is the lock of a file beside the log, ``steps.jsonl.lock``. Whoever reads a log in order to cut it, or to go on with it, takes
    it before reading.

    Args:
        log: the step log, which need not exist yet; its folder is made.

    Raises:
        LogError: somebody else has it, or the folder cannot be written.
    """

    def __init__(self, log: Path) -> None:
        self.path = log.with_name(f"{log.name}.lock")
        self._file: int | None = None
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LogError(f"{log} cannot be written: {log.parent}: {error.strerror}") from None
        try:
            while fcntl is not None and self._file is None:
                self._file = self._try()
        except BlockingIOError:
            raise LogError(f"{log} is being written by another process: wait for it, or stop it first") from None
        except OSError as error:
            raise LogError(f"{log} cannot be written: {error.strerror}") from None

    def _try(self) -> int | None:
        """The locked file; None if its last owner removed it meanwhile."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                return file  # a file system without locks: two writers are not noticed
            if os.path.samestat(os.stat(self.path), os.fstat(file)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
        return None

    def release(self) -> None:
        """Let others write. The lock's file is removed."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self.path.unlink(missing_ok=True)
        fcntl.flock(file, fcntl.LOCK_UN)  # children of a fork may still have the file open
        os.close(file)
