"""``torch.distributed.checkpoint`` storage on any file system that iopath supports."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from iopath.common.file_io import g_pathmgr
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystemBase

from a2gen_rec.utils import paths


class IOPathFileSystem(FileSystemBase):
    """File operations of checkpoints, through iopath."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with g_pathmgr.open(os.fspath(path), mode) as stream:
            yield stream

    def concat_path(self, path: str | os.PathLike, suffix: str) -> str:
        return paths.join(os.fspath(path), suffix)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        g_pathmgr.mv(os.fspath(path), os.fspath(new_path))

    def init_path(self, path: str | os.PathLike) -> str:
        return os.fspath(path)

    def mkdir(self, path: str | os.PathLike) -> None:
        g_pathmgr.mkdirs(os.fspath(path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True

    def exists(self, path: str | os.PathLike) -> bool:
        return g_pathmgr.exists(os.fspath(path))

    def rm_file(self, path: str | os.PathLike) -> None:
        g_pathmgr.rm(os.fspath(path))

    def ls(self, path: str | os.PathLike) -> list[str]:
        return g_pathmgr.ls(os.fspath(path))


class IOPathWriter(FileSystemWriter):
    """Checkpoint writer through iopath."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.fs = IOPathFileSystem()  # type: ignore[assignment]
        self.path = folder


class IOPathReader(FileSystemReader):
    """Checkpoint reader through iopath."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.fs = IOPathFileSystem()  # type: ignore[assignment]
        self.path = folder
