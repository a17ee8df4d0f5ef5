"""State of a raw log from which a dataset was prepared: resolved path, files, and digest of its spec."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest


def read_log_state(raw: str, spec: str, exclude: str) -> dict[str, Any]:
    """Return the state of a log as plain data; two logs with the same state are the same log.

    Args:
        raw: File or directory of the log. The files of a remote log are compared by name only, because storages differ
            in the metadata they have.
        spec: Description of the log; empty for none.
        exclude: Directory whose files are not part of the log: that of the experiment.

    Returns:
        ``raw``, its path without links; ``spec_digest``, empty without a spec; ``files``, name -> size in bytes and
        modification time in ns, empty if the log is missing.

    Raises:
        UserError: The spec or the log cannot be read.
    """
    digest = hex_digest(paths.read_text(spec), 16) if spec else ""
    if not paths.is_local(raw):
        names: list[str] = []
        with suppress(NotImplementedError):  # iopath's HTTP storage cannot list
            names = paths.listdir(raw)
        return {"raw": raw, "spec_digest": digest, "files": dict.fromkeys(names, "remote")}
    root = os.path.realpath(raw)
    files: dict[str, list[int]] = {}
    try:
        for file in _files(Path(root), Path(os.path.realpath(exclude))):
            status = file.stat()
            name = file.name if file == Path(root) else file.relative_to(root).as_posix()
            files[name] = [status.st_size, status.st_mtime_ns]
    except OSError as error:
        raise UserError(f"{raw}: cannot be read ({error.strerror or error})") from error
    return {"raw": root, "spec_digest": digest, "files": dict(sorted(files.items()))}


def differing(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the keys that differ, with the first differing name of a mapping.

    A log that is missing now has no files to compare: a dataset outlives its log.
    """
    keys = []
    for name in {**before, **now}:
        first, second = before.get(name), now.get(name)
        if first == second or (name == "files" and not second):
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            name += f" {next(key for key in {**first, **second} if first.get(key) != second.get(key))}"
        keys.append(name)
    return keys


def _files(root: Path, exclude: Path) -> Iterator[Path]:
    """Yield the files of a log. Linked directories are followed, each once: a link may lead to its own parent."""
    if root.is_file():
        yield root
    visited = {exclude}
    for folder, directories, names in os.walk(root, followlinks=True):
        if (real := Path(os.path.realpath(folder))) in visited:
            directories.clear()
            continue
        visited.add(real)
        yield from (file for name in names if (file := Path(folder, name)).is_file())
