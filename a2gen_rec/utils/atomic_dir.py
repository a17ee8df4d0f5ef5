"""A folder that appears whole or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths


def require_empty_dir(out: str) -> None:
    """Raise UserError when ``out`` is a file or a folder with something in it."""
    if paths.is_local(out) and Path(out).is_file():
        raise UserError(f"{out}: is a file, not a folder")
    if paths.listdir(out):
        raise UserError(f"{out}: is not empty; name a new folder, or remove this one")


@contextmanager
def atomic_output_dir(out: str) -> Iterator[Path]:
    """A temporary folder whose sub-folder ``dataset`` is published as ``out`` when the block ends well.

    It lies beside a local ``out``, so that publishing is a rename. When the block fails nothing is left, nor the
    parents of ``out`` that had to be made.

    Raises:
        UserError: ``out`` holds something already, or nothing can be written there.
    """
    require_empty_dir(out)
    parent = Path(out).absolute().parent if paths.is_local(out) else None
    made = [] if parent is None else [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{Path(out).name}.preparing-", dir=parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    published = False
    try:
        (folder / "dataset").mkdir()
        yield folder
        paths.move_into_place(str(folder / "dataset"), out)
        published = True
    except OSError as error:  # the disk is full, or was taken away
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in [] if published else made:
            if empty.exists() and not any(empty.iterdir()):
                empty.rmdir()
