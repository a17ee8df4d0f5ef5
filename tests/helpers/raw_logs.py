"""Raw files of generic logs, and the rows that their source reads."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from a2gen_rec.data.sources import open_source
from a2gen_rec.data.sql import connect, translate_errors

HOUR_MS = 3_600_000
START_MS = 1_714_521_600_000
"""1 May 2024, 00:00 UTC."""
SPEC: dict[str, Any] = {
    "kind": "impressions",
    "files": "**/*",
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}},
}
Content = str | bytes | pa.Table


def write_files(folder: Path, files: Mapping[str, Content]) -> Path:
    """Write text, bytes, or tables (as Parquet whatever the name is) below a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def read_log(folder: Path, content: Mapping[str, Content], **spec: Any) -> list[dict[str, Any]]:
    """Return the rows of a generic log in the order of users, times and items; NaN is the text "nan"."""
    raw = write_files(folder / "raw", content)
    (folder / "spec.yaml").write_text(yaml.safe_dump({**SPEC, **spec}, allow_unicode=True))
    source = open_source("generic", str(raw), str(folder / "spec.yaml"))
    connection = connect(0.5, 1, folder / "spill")
    with connection, translate_errors(raw):
        query = f"SELECT * FROM ({source.impressions(connection)}) ORDER BY user_id, ts_ms, item_id"
        rows = connection.sql(query).to_arrow_table().to_pylist()
    return [
        {name: "nan" if isinstance(value, float) and math.isnan(value) else value for name, value in row.items()}
        for row in rows
    ]


@contextmanager
def machine_time_zone(name: str) -> Iterator[None]:
    """Run a block in a time zone of the machine."""
    previous = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ") if previous is None else os.environ.update(TZ=previous)
        time.tzset()
