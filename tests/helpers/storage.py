"""Custom storage that is accessible only through iopath."""

import os
import shutil
from pathlib import Path
from typing import Any

from iopath.common.file_io import PathHandler

PREFIX = "memtest://"


class DirectoryStorage(PathHandler):
    """Storage that maps ``memtest://`` to a directory."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def local_path(self, path: str) -> Path:
        return self.root / path.removeprefix(PREFIX)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self.local_path(path), mode)

    def _exists(self, path: str, **_: Any) -> bool:
        return self.local_path(path).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self.local_path(path).is_file()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self.local_path(path).is_dir()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self.local_path(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        self.local_path(path).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self.local_path(path).unlink()

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(self.local_path(path))

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        self.local_path(src_path).rename(self.local_path(dst_path))
        return True

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        shutil.copyfile(local_path, self.local_path(dst_path))
        return True
