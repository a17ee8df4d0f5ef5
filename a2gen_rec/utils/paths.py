"""Every path a user gives, local or remote, goes through iopath's path manager.

A site registers its own storage once (``from iopath.common.file_io import g_pathmgr``;
``g_pathmgr.register_handler(...)``) and all of the package reads and writes there.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from iopath.common.file_io import g_pathmgr

from a2gen_rec.errors import ConfigError, UserError


def join(base: str, *parts: str) -> str:
    """Join path segments; works for local paths and for URIs alike."""
    base = str(base)
    if not parts:
        return base
    root = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return root + "/".join(parts)


def dirname(path: str) -> str:
    """The folder that a file lies in; ``.`` for a bare name."""
    head, _, _ = str(path).rpartition("/")
    if head.endswith(":/"):
        return f"{head}/"  # the root of a remote storage
    return head or ("/" if str(path).startswith("/") else ".")


def is_local(path: str) -> bool:
    """Whether iopath serves ``path`` from the local file system."""
    return "://" not in str(path)


def abspath(path: str) -> str:
    """A local path in full, so that it means the same from another folder; remote ones as they are."""
    return os.path.abspath(path) if is_local(path) else path


def resolve_relative(folder: str, path: str) -> str:
    """A relative path as one of ``folder``; absolute and remote ones as they are."""
    return join(folder, path) if is_local(path) and not os.path.isabs(path) else path


def exists(path: str) -> bool:
    return g_pathmgr.exists(str(path))


def listdir(path: str) -> list[str]:
    """Names in a folder, sorted; an absent folder is empty."""
    return sorted(g_pathmgr.ls(str(path))) if g_pathmgr.exists(str(path)) else []


def to_local_path(path: str) -> str:
    """A local path with the content of ``path`` (the path itself when it is local already).

    Raises:
        UserError: nothing is there.
    """
    if not g_pathmgr.exists(str(path)):
        raise UserError(f"{path}: no such file or folder")
    return g_pathmgr.get_local_path(str(path))


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        UserError: the file is absent, unreadable or not UTF-8.
    """
    try:
        with g_pathmgr.open(str(path), "r") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_yaml(path: str) -> Any:
    """The plain data in a YAML file of settings.

    Raises:
        ConfigError: it is not YAML.
        UserError: it cannot be read.
    """
    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def write_text(path: str, text: str) -> None:
    """Write a whole file; a local one is written beside and moved into place.

    Raises:
        UserError: the place is not writable.
    """
    path = str(path)
    try:
        if is_local(path):
            beside = f"{path}.writing"
            try:
                with open(beside, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(beside, path)
            except OSError:
                with suppress(OSError):
                    os.remove(beside)
                raise
        else:
            with g_pathmgr.open(path, "w") as file:
                file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def ensure_writable_dir(path: str) -> None:
    """Create a folder and its parents, and check that it can be written to.

    Raises:
        UserError: it cannot.
    """
    path = str(path)
    try:
        g_pathmgr.mkdirs(path)
        probe = join(path, ".writable")
        with g_pathmgr.open(probe, "w") as file:
            file.write("")
        g_pathmgr.rm(probe)
    except OSError as error:
        raise UserError(f"{path}: folder cannot be written ({error.strerror or error})") from error


def move_into_place(local: str, target: str) -> None:
    """Move a finished local folder to ``target``: a rename where both are local, else file-by-file copies."""
    if is_local(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        if Path(target).is_dir() and not any(Path(target).iterdir()):
            Path(target).rmdir()
        shutil.move(local, target)
        return
    for file in sorted(Path(local).rglob("*")):
        relative = file.relative_to(local).as_posix()
        if file.is_dir():
            g_pathmgr.mkdirs(join(target, relative))
        else:
            g_pathmgr.mkdirs(join(target, *relative.split("/")[:-1]))
            g_pathmgr.copy_from_local(str(file), join(target, relative), overwrite=True)
    shutil.rmtree(local)
