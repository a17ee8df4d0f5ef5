"""What an exported model consists of, and the check that a folder still holds just that.

``manifest.json`` names every other file of the folder with its size and SHA-256. Its ``version`` is a digest of all
else it says, so that two models never share one and no part of it changes unnoticed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
"""Format 1 told rows of videos' lengths, which now follow from the lengths; it is read like this one."""


@dataclass(frozen=True)
class Manifest:
    """All that is said of an exported model.

    Attributes:
        files: path in the folder -> ``{"bytes": …, "sha256": …}``.
        dtype: of the tables that are looked up by id.
        source: run, step and digest of the checkpoint, and the dataset's name.
        versions: of what wrote it.
        metrics: of the exported model beside the original's.
        version: twelve hexadecimal digits.
        format: of the folder.
    """

    files: dict[str, dict[str, Any]]
    dtype: str
    source: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any]
    version: str
    format: int = FORMAT_VERSION


def write_manifest(
    folder: Path, dtype: str, source: Mapping[str, Any], versions: Mapping[str, str], metrics: Mapping[str, Any]
) -> Manifest:
    """Describe all files that are in ``folder``."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = {name: _of_file(str(folder / name)) for name in names if name != MANIFEST}
    said: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "dtype": dtype,
        "source": dict(source),
        "versions": dict(versions),
        "metrics": dict(metrics),
        "files": files,
    }
    manifest = Manifest(**said, version=_digest(said))
    paths.write_text(str(folder / MANIFEST), json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def read_manifest(folder: str) -> Manifest:
    """Read a folder's manifest and check the folder against it.

    Raises:
        UserError: there is no manifest, it is damaged or of a newer format; a file is missing, truncated or damaged.
    """
    file = paths.join(folder, MANIFEST)
    if not paths.exists(file):
        raise UserError(f"{folder}: no exported model here ({MANIFEST} is missing)")
    try:
        raw = json.loads(paths.read_text(file))
        if raw["format"] > FORMAT_VERSION:
            raise UserError(
                f"{file}: is of format {raw['format']}, this version of a2gen_rec reads up to {FORMAT_VERSION}"
            )
        manifest = Manifest(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not an exported model's manifest ({error})") from error
    if _digest({name: value for name, value in raw.items() if name != "version"}) != manifest.version:
        raise UserError(f"{file}: is damaged (its version is not that of what it says)")
    for name, expected in manifest.files.items():
        _check(paths.join(folder, *name.split("/")), expected)
    return manifest


def _check(file: str, expected: Mapping[str, Any]) -> None:
    if not paths.exists(file):
        raise UserError(f"{file}: is missing")
    found = _of_file(paths.to_local_path(file))
    if found["bytes"] != expected["bytes"]:
        raise UserError(f"{file}: has {found['bytes']} bytes, not {expected['bytes']}; it is truncated or another's")
    if found["sha256"] != expected["sha256"]:
        raise UserError(f"{file}: is damaged (its SHA-256 is not the manifest's)")


def _of_file(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return {"bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]
