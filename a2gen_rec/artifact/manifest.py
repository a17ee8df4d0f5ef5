"""Manifest of an exported model, and the check of a directory against it.

``manifest.json`` lists every other file of the directory with its size and SHA-256. Its ``version`` is a digest of the
rest of the manifest: two models never share a version, and no change goes unnoticed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from a2gen_rec.errors import UserError
from a2gen_rec.utils import paths
from a2gen_rec.utils.digest import hex_digest

MANIFEST = "manifest.json"
FORMAT_VERSION = 5


@dataclass(frozen=True)
class Manifest:
    """Description of an exported model.

    Attributes:
        files: Path within the directory -> ``{"bytes": …, "sha256": …}``.
        dtype: Data type of the tables looked up by id.
        source: Run, step and digest of the checkpoint; name, digest and lineage of the dataset; lineage of the
            training data.
        versions: Versions of the software that wrote it.
        metrics: Metrics of the exported and of the original model.
        version: Version of the model, twelve hexadecimal digits.
        format: Format version of the directory.
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
    """Write the manifest of all files in ``folder``."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = {name: _describe_file(str(folder / name)) for name in names if name != MANIFEST}
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "dtype": dtype,
        "source": dict(source),
        "versions": dict(versions),
        "metrics": dict(metrics),
        "files": files,
    }
    manifest = Manifest(**content, version=_digest(content))
    paths.write_text(str(folder / MANIFEST), json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def read_manifest(model_dir: str) -> Manifest:
    """Read the manifest of a directory and check the directory against it.

    Raises:
        UserError: The directory is missing; the manifest is missing, corrupted or of an unsupported format; or a file
            is missing, truncated or corrupted.
    """
    file = paths.join(model_dir, MANIFEST)
    if not paths.exists(file):
        paths.require_dir(model_dir)
        raise UserError(f"{model_dir}: no exported model found ({MANIFEST} is missing)")
    try:
        raw = json.loads(paths.read_text(file))
        if raw["format"] != FORMAT_VERSION:
            raise UserError(f"{file}: unsupported format version {raw['format']}, expected {FORMAT_VERSION}")
        manifest = Manifest(**raw)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: invalid manifest ({error})") from error
    if _digest({name: value for name, value in raw.items() if name != "version"}) != manifest.version:
        raise UserError(f"{file}: corrupted: version does not match the contents")
    for name, expected in manifest.files.items():
        _check_file(paths.join(model_dir, *name.split("/")), expected)
    return manifest


def _check_file(file: str, expected: Mapping[str, Any]) -> None:
    if not paths.exists(file):
        raise UserError(f"{file}: not found")
    actual = _describe_file(paths.to_local_path(file))
    if actual["bytes"] != expected["bytes"]:
        size, expected_size = actual["bytes"], expected["bytes"]
        raise UserError(f"{file}: size is {size} bytes, expected {expected_size}: truncated or replaced")
    if actual["sha256"] != expected["sha256"]:
        raise UserError(f"{file}: corrupted: SHA-256 does not match the manifest")


def _describe_file(file: str) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return {"bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def _digest(content: Mapping[str, Any]) -> str:
    return hex_digest(json.dumps(content, sort_keys=True), 12)
