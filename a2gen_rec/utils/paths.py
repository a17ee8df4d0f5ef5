"""Access to local and remote paths through iopath's path manager.

Register a custom storage once (``from iopath.common.file_io import g_pathmgr``;
``g_pathmgr.register_handler(...)``), and the package can read and write there.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from iopath.common.file_io import g_pathmgr

from a2gen_rec.errors import ConfigError, UserError


def join(base: str, *parts: str) -> str:
    """Join path segments of local paths or URIs."""
    base = str(base)
    if not parts:
        return base
    root = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return root + "/".join(parts)


def dirname(path: str) -> str:
    """Return the directory of a file; ``.`` for a bare name."""
    head, _, _ = str(path).rpartition("/")
    if head.endswith(":/"):
        return f"{head}/"  # root of a remote storage
    return head or ("/" if str(path).startswith("/") else ".")


def is_local(path: str) -> bool:
    """Return whether iopath reads ``path`` from the local file system.

    Raises:
        UserError: No registered storage serves the scheme of a remote path. iopath would take ``s3://bucket`` as the
            local directory ``s3:``.
    """
    path = str(path)
    if "://" not in path:
        return True
    if not any(path.startswith(prefix) for prefix in g_pathmgr._path_handlers):
        scheme = path.partition("://")[0]
        raise UserError(f"{path}: no storage is registered for {scheme}://; register a handler with iopath's g_pathmgr")
    return False


def abspath(path: str) -> str:
    """Return the absolute form of a local path; remote paths are unchanged."""
    return os.path.abspath(path) if is_local(path) else path


def resolve_relative(directory: str, path: str) -> str:
    """Resolve a relative path against ``directory``; absolute and remote paths are unchanged."""
    return join(directory, path) if is_local(path) and not os.path.isabs(path) else path


def exists(path: str) -> bool:
    """Return whether a file or directory exists; raises as :func:`is_local`."""
    is_local(path)
    return g_pathmgr.exists(str(path))


def listdir(path: str) -> list[str]:
    """Return the sorted names in a directory; empty if it does not exist."""
    return sorted(g_pathmgr.ls(str(path))) if exists(path) else []


def require_dir(path: str) -> None:
    """Raise UserError if ``path`` does not exist or is a file."""
    if not exists(path):
        raise UserError(f"{path}: directory not found")
    if g_pathmgr.isfile(str(path)):
        raise UserError(f"{path}: is a file, not a directory")


def to_local_path(path: str) -> str:
    """Return a local path with the content of ``path``: the path itself if it is local, else a copy.

    Raises:
        UserError: The path does not exist.
    """
    if not exists(path):
        raise UserError(f"{path}: not found")
    return g_pathmgr.get_local_path(str(path))


def read_text(path: str) -> str:
    """Return the text of a file in UTF-8, whatever the machine's locale, without a byte order mark.

    Raises:
        UserError: The file does not exist, is unreadable or not UTF-8.
    """
    is_local(path)
    try:
        with g_pathmgr.open(str(path), "rb") as file:
            return str(file.read(), "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


class _UniqueKeys:
    """Mixin of YAML loaders that rejects a mapping with a key twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _SafeLoader(_UniqueKeys, yaml.SafeLoader):
    """Loader of numbers, booleans and text."""


class _TextLoader(_UniqueKeys, yaml.BaseLoader):
    """Loader of every scalar as text."""


def read_yaml(path: str, as_text: bool = False) -> Any:
    """Return the content of a YAML file.

    Args:
        path: Path of the file.
        as_text: Whether every scalar is text, such as ``yes`` and ``2024-05-01``.

    Raises:
        ConfigError: The file is not valid YAML, or a mapping has a key twice.
        UserError: The file cannot be read.
    """
    try:
        return yaml.load(read_text(path), _TextLoader if as_text else _SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark, reason = error.problem_mark, error.problem
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(f"{path}: invalid YAML ({where}{reason})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: invalid YAML ({' '.join(str(error).split())})") from error


def remove(file: str) -> None:
    """Remove a file.

    Raises:
        UserError: The file cannot be removed.
    """
    try:
        g_pathmgr.rm(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be removed ({error.strerror or error})") from error


def write_text(path: str, text: str) -> None:
    """Write a file as :func:`atomic_writer`.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_writer(path) as stream:
        stream.write(text.encode())


@contextmanager
def atomic_writer(path: str) -> Iterator[IO[bytes]]:
    """Yield a binary stream whose content becomes the file ``path`` when the block succeeds.

    A local file is written under a temporary name next to it and renamed. If several processes write the same file,
    the last one wins. A remote file is written directly.

    Raises:
        UserError: The file cannot be written.
    """
    path = str(path)
    temporary = f"{path}.{secrets.token_hex(4)}.writing" if is_local(path) else path
    try:
        with g_pathmgr.open(temporary, "wb") as stream:
            yield stream
        if temporary != path:
            os.replace(temporary, path)
    except BaseException as error:
        if temporary != path:
            with suppress(OSError):
                os.remove(temporary)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error


def ensure_writable_dir(path: str) -> None:
    """Create a directory and its parents, and check that it is writable.

    Raises:
        UserError: It cannot be created or is not writable.
    """
    path = str(path)
    is_local(path)
    try:
        g_pathmgr.mkdirs(path)
        probe = join(path, f".writable-{secrets.token_hex(4)}")  # several ranks may check at the same time
        with g_pathmgr.open(probe, "w") as file:
            file.write("")
        g_pathmgr.rm(probe)
    except OSError as error:
        raise UserError(f"{path}: cannot write to directory ({error.strerror or error})") from error


def move_dir(local: str, target: str) -> None:
    """Move a finished local directory to ``target``, missing or empty: a local one by renaming, else by copying files.

    Raises:
        OSError: A local ``target`` is not empty, or on another file system.
    """
    if is_local(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        os.rename(local, target)  # atomic; unlike shutil.move, it never moves into a directory made by another process
        return
    for file in sorted(Path(local).rglob("*")):
        relative = file.relative_to(local).as_posix()
        if file.is_dir():
            g_pathmgr.mkdirs(join(target, relative))
        else:
            g_pathmgr.mkdirs(join(target, *relative.split("/")[:-1]))
            g_pathmgr.copy_from_local(str(file), join(target, relative), overwrite=True)
    shutil.rmtree(local)
