"""Storage that only iopath can reach."""

import os
import shutil
from pathlib import Path
from typing import Any

from iopath.common.file_io import PathHandler

PREFIX = "memtest://"


class FolderBehindPrefix(PathHandler):
    """A site's own storage: everything below ``memtest://`` lies in one folder."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def real(self, path: str) -> Path:
        return self.root / path.removeprefix(PREFIX)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_: Any) -> Any:
        return open(self.real(path), mode)

    def _exists(self, path: str, **_: Any) -> bool:
        return self.real(path).exists()

    def _isfile(self, path: str, **_: Any) -> bool:
        return self.real(path).is_file()

    def _isdir(self, path: str, **_: Any) -> bool:
        return self.real(path).is_dir()

    def _ls(self, path: str, **_: Any) -> list[str]:
        return os.listdir(self.real(path))

    def _mkdirs(self, path: str, **_: Any) -> None:
        self.real(path).mkdir(parents=True, exist_ok=True)

    def _rm(self, path: str, **_: Any) -> None:
        self.real(path).unlink()

    def _get_local_path(self, path: str, force: bool = False, **_: Any) -> str:
        return str(self.real(path))

    def _mv(self, src_path: str, dst_path: str, **_: Any) -> bool:
        self.real(src_path).rename(self.real(dst_path))
        return True

    def _copy_from_local(self, local_path: str, dst_path: str, overwrite: bool = False, **_: Any) -> bool:
        shutil.copyfile(local_path, self.real(dst_path))
        return True
