"""Output directories that appear complete or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths


def require_empty_dir(out: str) -> None:
    """Raise UserError if ``out`` is a file or a directory that is not empty."""
    if paths.is_local(out) and Path(out).is_file():
        raise UserError(f"{out}: is a file, not a directory")
    if paths.listdir(out):
        raise UserError(f"{out}: output directory is not empty")


@contextmanager
def atomic_output_dir(out: str) -> Iterator[Path]:
    """Yield an empty temporary directory that is moved to ``out`` when the block succeeds.

    Its parent is scratch space for the block and is removed afterwards. The parent is next to a local ``out``, so the
    move is a rename. If the block fails, nothing remains, including parents of ``out`` that were created here.

    Raises:
        UserError: ``out`` is not empty or cannot be written.
    """
    require_empty_dir(out)
    parent = Path(out).absolute().parent if paths.is_local(out) else None
    created = [] if parent is None else [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{Path(out).name}.writing-", dir=parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    published = False
    try:
        output = scratch / "output"
        output.mkdir()
        yield output
        require_empty_dir(out)  # another process may have written it by now
        paths.move_dir(str(output), out)
        published = True
    except OSError as error:  # e.g. the disk is full
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for folder in [] if published else created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
