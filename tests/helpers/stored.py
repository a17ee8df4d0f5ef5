"""Ways to store the rows of a raw log, of which no dataset may depend, and the bytes of a dataset."""

import csv
import gzip
import hashlib
import io
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.prepare.pipeline import prepare
from tests.helpers.raw_logs import machine_time_zone

CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)
MACHINE_ZONES = st.sampled_from(["UTC", "Asia/Shanghai", "America/New_York"])
Types = Mapping[str, Sequence[pa.DataType]]
"""Column -> Parquet types that store its values exactly, in column order."""


def typed_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return values as an array of a Parquet type; timestamps are given in milliseconds since 1970."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pa.array([None if value is None else str(value) for value in values], pa.string()).cast(kind)
    if pa.types.is_decimal(kind):
        return pa.array([None if value is None else Decimal(str(value)) for value in values], kind)
    plain = pa.array(values)
    return plain.cast(kind) if not pa.types.is_timestamp(kind) else plain.cast(pa.timestamp("ms", "UTC")).cast(kind)


@st.composite
def parquet_bytes(draw: st.DrawFn, rows: Sequence[Sequence[Any]], types: Types, shuffle_columns: bool = True) -> bytes:
    """Draw a Parquet file of rows."""
    columns = dict(zip(types, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(types, ())
    order = draw(st.permutations(list(types))) if shuffle_columns else list(types)
    table = pa.table({name: typed_array(columns[name], draw(st.sampled_from(types[name]))) for name in order})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression=draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        row_group_size=draw(st.sampled_from([1, 7, 1000])),
    )
    return sink.getvalue().to_pybytes()


@st.composite
def csv_bytes(draw: st.DrawFn, rows: Sequence[Sequence[Any]], names: Sequence[str]) -> bytes:
    """Draw a CSV file of rows, with a header."""
    order = draw(st.permutations(range(len(names))))
    stream = io.StringIO(newline="")
    quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    writer = csv.writer(stream, quoting=quoting, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow([names[index] for index in order])
    writer.writerows(["" if row[index] is None else row[index] for index in order] for row in rows)
    return draw(compressed(stream.getvalue().encode()))


@st.composite
def compressed(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a compression of a text file, which its name does not show."""
    kind = draw(st.sampled_from(["none", "gzip", "zstd"]))
    if kind == "gzip":
        return gzip.compress(content)
    return content if kind == "none" else pa.compress(content, codec="zstd", asbytes=True)


@st.composite
def parts(draw: st.DrawFn, rows: Sequence[Any], max_cuts: int = 4) -> list[list[Any]]:
    """Draw an order of rows and their division into parts, of which some may be empty."""
    ordered = draw(st.permutations(rows))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=max_cuts)))
    return [ordered[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


@st.composite
def stored_files(
    draw: st.DrawFn,
    rows: Sequence[Sequence[Any]],
    types: Types,
    folders: Sequence[str] = ("", "user=9/", "ts=2020-01-01/", "a[1]/", "z/like=5/"),
    stem: str = "",
) -> dict[str, bytes]:
    """Draw CSV and Parquet files that store rows, in any order.

    Args:
        draw: Function that draws from a strategy.
        rows: Values in the order of ``types``.
        types: Columns.
        folders: Folders of the files, which end with a slash.
        stem: Text that every name of a file contains.
    """
    files = {}
    for number, part in enumerate(draw(parts(rows))):
        suffix = draw(st.sampled_from(["", ".csv", ".parquet", ".gz"]))
        name = f"{draw(st.sampled_from(folders))}{draw(st.sampled_from('abcxyz'))}{stem}{number}{suffix}"
        files[name] = draw(parquet_bytes(part, types) if draw(st.booleans()) else csv_bytes(part, list(types)))
    return files


def prepare_stored(
    folder: Path,
    source: str,
    raw: Path,
    spec: Mapping[str, Any] | None = None,
    machine: str = "UTC",
    config: PrepareConfig = CONFIG,
) -> DatasetCard:
    """Prepare a raw log to ``folder / "out"``, on a machine in some time zone; return the card."""
    if spec is not None:
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    with machine_time_zone(machine):
        return prepare(source, str(raw), str(folder / "out"), config, spec and str(folder / "spec.yaml"))


def total_rows(card: DatasetCard) -> int:
    """Return the rows of a dataset: impressions, dropped rows and duplicates."""
    return sum(split.targets for split in card.splits.values()) + sum(card.dropped_rows.values())


def file_digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below a folder by its name."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
