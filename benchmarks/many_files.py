"""Logs of many small files for `prepare.py`: the same rows as one file and as many, in CSV and in Parquet."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

ROWS_PER_FILE = 10
FORMATS = ("csv", "parquet")
SPEC = """\
kind: impressions
columns: {user: user, item: item, time: ts, dwell_s: dwell}
actions: {like: {flag: like}}
"""


def make_rows(count: int, seed: int = 0) -> pa.Table:
    """Return impressions at increasing times."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "user": rng.integers(0, max(count // 50, 1), count),
            "item": rng.integers(0, max(count // 100, 1), count),
            "ts": 1_714_521_600_000 + 1000 * np.arange(count),
            "dwell": rng.exponential(10, count).round(2),
            "like": rng.integers(0, 2, count),
        }
    )


def write_files(folder: Path, table: pa.Table, num_files: int, file_format: str) -> None:
    """Write consecutive rows to files of equal size."""
    folder.mkdir(parents=True)
    ends = np.linspace(0, len(table), num_files + 1).astype(int).tolist()
    for number, (start, end) in enumerate(pairwise(ends)):
        file = folder / f"part-{number:05d}.{file_format}"
        part = table.slice(start, end - start)
        csv.write_csv(part, file) if file_format == "csv" else pq.write_table(part, file)
