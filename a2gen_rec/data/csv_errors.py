"""DuckDB's errors on raw files as one line with file, row and field."""

import re
from typing import BinaryIO

import duckdb
import pyarrow as pa

from a2gen_rec.errors import DataError, first_line

COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a file -> compression."""
CHUNK_BYTES = 1 << 20
_REASONS = (
    r"^(Could not convert .+?|Expected Number of Columns.+?"
    r"|Value with unterminated quote found|Maximum line size.+?)\.?$"
)
_OTHER_ENDINGS = {b"\n": rb"\r\n?", b"\r\n": rb"(?<!\r)\n|\r(?!\n)", b"\r": rb"\r?\n"}
"""Line ending of a file -> pattern of the others."""


def compression_of(start: bytes) -> str:
    """Return the compression of a file from its first bytes; "none" for none."""
    return next((name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), "none")


def open_bytes(file: object) -> BinaryIO:
    """Open a file for reading, decompressed."""
    with open(str(file), "rb") as stream:
        compression = compression_of(stream.read(4))
    return pa.input_stream(str(file), compression=None if compression == "none" else compression)


def check_complete(file: object) -> None:
    """Check that a compressed file does not end early; its rows are then not known.

    DuckDB 2.0.1 reads an incomplete zstd file up to its end without an error, and reports an incomplete gzip file.

    Raises:
        DataError: the file is incomplete or cannot be decompressed.
    """
    with open(str(file), "rb") as stream:
        if compression_of(stream.read(4)) != "zstd":
            return
    try:
        with open_bytes(file) as stream:
            while stream.read(CHUNK_BYTES):
                pass
    except OSError as error:
        raise DataError(f"cannot be read ({first_line(error)})", file=file) from error


def to_data_error(error: duckdb.Error, file: object) -> DataError:
    """Return an error with the file, line and column of DuckDB's message, if present; ``file`` is the fallback."""
    text = str(error)
    file_line = re.search(r"^\s*file\s*=\s*(.+)$", text, re.MULTILINE)
    named = file_line[1].strip() if file_line else file
    if "state machine reached an invalid state" in text:
        return _line_ending_error(named)
    line = re.search(r"CSV Error on Line: (\d+)", text)
    if line is None:
        return DataError(first_line(error), file=file)
    column = re.search(r'converting column "([^"]+)"', text)
    reason = re.search(_REASONS, text, re.MULTILINE)
    message = reason[1] if reason else "is not valid CSV"
    if "Invalid unicode" in text:
        message = "is not UTF-8"
    return DataError(message, file=named, row=int(line[1]), field=column[1] if column else None)


def _line_ending_error(file: object) -> DataError:
    """Return the error of the first line that ends unlike the lines before it, which DuckDB 2.0.1 cannot read."""
    row, usual, rest = 1, b"", b""
    with open_bytes(file) as stream:
        while chunk := rest + (more := stream.read(CHUNK_BYTES)):
            # An ending may continue in the next chunk.
            chunk, rest = (chunk[:-1], chunk[-1:]) if more and chunk.endswith(b"\r") else (chunk, b"")
            usual = usual or next(iter(re.findall(rb"\r\n|\n|\r", chunk)), b"")
            if usual and (other := re.search(_OTHER_ENDINGS[usual], chunk)):
                row += chunk[: other.start()].count(usual)
                ending = other[0].decode().replace("\r", "\\r").replace("\n", "\\n")
                return DataError(f"ends with {ending}, unlike the rows before it", file=file, row=row)
            row += chunk.count(usual) if usual else 0
    return DataError("is not valid CSV", file=file)
