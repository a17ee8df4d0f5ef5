"""Lock of a run directory: its checkpoints must have tensors and state of the same training.

Rank 0 locks a local run through the operating system, and a second training is refused. Remote storages have no such
locks, and a marker that outlives a killed training would block its successor. There, the last training to start owns
the run, and an earlier one that still runs stops at its next checkpoint without writing it.
"""

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from iopath.common.file_io import g_pathmgr

from a2gen_rec.errors import UserError
from a2gen_rec.training.run_dir import RunDir
from a2gen_rec.utils import paths
from a2gen_rec.utils.file_lock import exclusive_file_lock, lock_owner

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of local file systems without locks, such as Lustre mounted without ``flock``."""


@dataclass(frozen=True)
class RunLock:
    """Ownership of a run.

    Attributes:
        run: Run directory.
        is_held: Whether the run is still owned.
    """

    run: str
    is_held: Callable[[], bool]

    def check(self) -> None:
        """Raise UserError if the run is not owned any more."""
        if not self.is_held():
            raise UserError(
                f"{self.run}: another `a2gen train` took over this run, or it was removed; stopping without saving"
            )


@contextmanager
def lock_run(run: str) -> Iterator[RunLock]:
    """Own a run, which is created if it is missing. Called by rank 0 before it reads the run.

    Raises:
        UserError: Another training uses the run, or the directory cannot be written.
    """
    if not paths.is_local(run):
        with _own_by_token(run) as lock:
            yield lock
        return
    with ExitStack() as stack:
        if not os.path.exists(run):
            stack.callback(_remove_empty, run)  # if the training is refused
        try:
            os.makedirs(run, exist_ok=True)
            lock = RunLock(run, stack.enter_context(exclusive_file_lock(RunDir(run).lock_file)).is_held)
        except BlockingIOError as error:
            owner = lock_owner(RunDir(run).lock_file)
            raise UserError(f"{run}: another `a2gen train` uses this run{owner and f' ({owner})'}") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f"{run}: cannot write to directory ({error.strerror or error})") from error
            lock = stack.enter_context(_own_by_token(run))
        yield lock


@contextmanager
def _own_by_token(run: str) -> Iterator[RunLock]:
    """Own a run by the content of its lock file, which a later owner replaces."""
    file, token = RunDir(run).lock_file, f"process {os.getpid()} on {os.uname().nodename}, {secrets.token_hex(8)}\n"

    def is_held() -> bool:
        return paths.exists(file) and paths.read_text(file) == token

    paths.ensure_writable_dir(run)
    paths.write_text(file, token)
    try:
        yield RunLock(run, is_held)
    finally:
        with suppress(OSError, UserError):
            if is_held():
                g_pathmgr.rm(file)


def _remove_empty(directory: str) -> None:
    with suppress(OSError):
        os.rmdir(directory)
