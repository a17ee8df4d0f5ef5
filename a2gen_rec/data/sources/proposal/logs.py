"""Files of a raw log whose spec is proposed: those with columns of users, items and times, and their separators."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from a2gen_rec.data.csv_errors import STANDARD_DIALECT, CsvDialect
from a2gen_rec.data.sources.files import RawFiles, find_files
from a2gen_rec.data.sources.formats import read_format
from a2gen_rec.data.sources.proposal.dialects import guess_dialects, looks_like_values
from a2gen_rec.data.sources.proposal.profiles import LogProfile
from a2gen_rec.data.sources.proposal.roles import name_score
from a2gen_rec.errors import DataError

MAX_DIALECTS = 4
NO_HEADER = (
    "the first line looks like values, not like the names of columns (built-in sources such as jd need no spec;"
    " see a2gen prepare --help)"
)


@dataclass(frozen=True)
class LogFiles:
    """Files of a log.

    Attributes:
        paths: their paths.
        dialects: possible separators of CSV files, the most probable one first.
        pattern: pattern of the paths below the raw directory; empty for a single file.
        is_exact: whether only these files match the pattern.
        partitions: names of folders ``name=value``.
        skipped: file -> reason why it is not part of the log.
    """

    paths: tuple[Path, ...]
    dialects: tuple[CsvDialect, ...]
    pattern: str
    is_exact: bool
    partitions: tuple[str, ...]
    skipped: dict[str, str]


@dataclass(frozen=True)
class _Candidate:
    path: Path
    names: tuple[str, ...]
    dialects: tuple[CsvDialect, ...]
    score: int


def find_log_files(raw: Path) -> LogFiles:
    """Return the log's files: of several kinds of files, those whose names of columns are most like a log's.

    Raises:
        DataError: no file, or no file with names of columns.
    """
    files = [raw] if raw.is_file() else find_files(raw, "**/*")
    partitions = () if raw.is_file() else _partitions(raw, files)
    candidates, skipped, first_error = [], {}, None
    for file in files:
        try:
            candidates.append(_read_names(file, partitions))
        except DataError as error:
            first_error = first_error or error
            skipped[_relative(file, raw)] = str(error).removeprefix(f"{file}").lstrip(",: ")
    if not candidates:
        assert first_error is not None
        raise first_error
    best = max(candidate.score for candidate in candidates)
    chosen = [candidate for candidate in candidates if candidate.score == best]
    if best < 3:
        # Unclear names: the kind of file with the most bytes.
        sizes: dict[tuple[str, ...], int] = {}
        for candidate in chosen:
            sizes[candidate.names] = sizes.get(candidate.names, 0) + candidate.path.stat().st_size
        chosen = [candidate for candidate in chosen if candidate.names == max(sizes, key=lambda names: sizes[names])]
    csv_dialects = [candidate.dialects for candidate in chosen if candidate.dialects]
    dialects = csv_dialects[0] if csv_dialects else (STANDARD_DIALECT,)
    for candidate in candidates:
        if candidate not in chosen:
            skipped[_relative(candidate.path, raw)] = "its columns are less like those of a log"
        elif candidate.dialects and candidate.dialects[0] != dialects[0]:
            skipped[_relative(candidate.path, raw)] = f"has another delimiter, {candidate.dialects[0].delimiter!r}"
    paths = tuple(candidate.path for candidate in chosen if _relative(candidate.path, raw) not in skipped)
    if raw.is_file():
        return LogFiles(paths, dialects, "", True, (), skipped)
    return LogFiles(paths, dialects, *_pattern(raw, paths), _partitions(raw, paths), skipped)


def read_profile(connection: duckdb.DuckDBPyConnection, log: LogFiles) -> tuple[LogProfile, CsvDialect, list[str]]:
    """Return the statistics of all columns, the dialect with which the whole log can be read, and the partitions.

    Raises:
        DataError: the log cannot be read with any of the dialects; for the most probable one.
    """
    first_error: DataError | None = None
    for dialect in log.dialects[:MAX_DIALECTS]:
        try:
            columns = {name for path in log.paths for name in read_format(path, dialect).names}
            partitions = [name for name in log.partitions if name not in columns]
            return LogProfile(connection, RawFiles(log.paths, [], dialect, partitions), partitions), dialect, partitions
        except DataError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _read_names(file: Path, partitions: Sequence[str]) -> _Candidate:
    kind = read_format(file, STANDARD_DIALECT)
    dialects: list[CsvDialect] = []
    if not kind.is_parquet:
        dialects = guess_dialects(file)
        kind = read_format(file, dialects[0])
        if looks_like_values(kind.names):
            raise DataError(NO_HEADER, file=file, row=1)
    return _Candidate(file, kind.names, tuple(dialects), name_score([*kind.names, *partitions]))


def _partitions(raw: Path, files: Sequence[Path]) -> tuple[str, ...]:
    """Return the names of folders ``name=value`` in the path of every file below ``raw``."""
    names = [[part.partition("=")[0] for part in file.relative_to(raw).parent.parts if "=" in part] for file in files]
    return tuple(name for name in dict.fromkeys(names[0]) if name and all(name in other for other in names))


def _relative(file: Path, raw: Path) -> str:
    return file.name if raw.is_file() else str(file.relative_to(raw))


def _pattern(raw: Path, paths: Sequence[Path]) -> tuple[str, bool]:
    """Return a short pattern of the files, and whether no other file matches it."""
    relative = [_relative(path, raw) for path in paths]
    suffixes = Path(relative[0]).suffixes
    suffix = "".join(suffixes[-2:] if suffixes[-1:] in ([".gz"], [".zst"]) else suffixes[-1:])
    prefix = _common_prefix(relative)
    ending = _common_prefix([name[::-1] for name in relative])[::-1]
    folder = prefix[: prefix.rfind("/") + 1]
    exact = glob.escape(relative[0]) if len(relative) == 1 else f"{glob.escape(prefix)}*{glob.escape(ending)}"
    patterns = [f"*{suffix}", "*", f"{glob.escape(folder)}*{suffix}", f"{glob.escape(folder)}*", exact]
    patterns += [f"**/*{suffix}", "**/*"]
    for pattern in patterns:
        if set(raw.glob(pattern)) >= set(paths) and find_files(raw, pattern) == sorted(paths):
            return pattern, True
    return exact, False


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((index for index, x in enumerate(first) if last[index : index + 1] != x), len(first))]
