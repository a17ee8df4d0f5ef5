"""Lock of the output directory of an experiment or a backtest."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.file_lock import exclusive_file_lock


@contextmanager
def locked_output(out: str, command: str) -> Iterator[None]:
    """Lock a directory: concurrent commands would train the same runs and overwrite results.

    Args:
        out: Local output directory.
        command: Name of the command, for the error.

    Raises:
        UserError: The directory is locked by another command, or cannot be locked.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive_file_lock(paths.join(out, "lock")))
        except BlockingIOError as error:
            raise UserError(f"{out}: locked by another `a2gen {command}`") from error
        except OSError as error:
            raise UserError(f"{out}: cannot be locked ({error.strerror or error})") from error
        yield
