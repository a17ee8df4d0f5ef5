#!/usr/bin/env bash
# duckdb 2.0.1 with pyarrow 26.0.1: `isnan` is false for NaN in a Parquet column without NULL.
#
# Expected: true. Parquet's statistics ignore NaN, so they do not exclude it.
#
# Seen: DuckDB takes the maximum of the statistics for the largest value, NaN included, and replaces `isnan(x)` by
# false. A column with NULL, or without statistics, is read correctly. Comparisons are affected as well: duckdb
# issue 25521.
#
# Hurt: pyarrow writes NaN of numpy arrays as NaN. A missing time counted as the time of an action that occurred.
# Workaround: `read_parquet(…, can_have_nan = true)`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pyarrow==26.0.1 duckdb==2.0.1
cd "$folder"
venv/bin/python - <<'PYTHON'
import math
import sys

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

print("duckdb", duckdb.__version__, "pyarrow", pa.__version__)
pq.write_table(pa.table({"x": [1.0, 5.0, math.nan]}), "plain.parquet")
pq.write_table(pa.table({"x": [1.0, 5.0, math.nan, None]}), "null.parquet")
readers = {
    "without NULL": "read_parquet('plain.parquet')",
    "with NULL": "read_parquet('null.parquet')",
    "can_have_nan": "read_parquet('plain.parquet', can_have_nan = true)",
}
seen = {name: duckdb.sql(f"SELECT isnan(x) FROM {reader}").fetchall()[2][0] for name, reader in readers.items()}
for name, value in seen.items():
    print(f"isnan(NaN) {name:13} expected True, seen {value}")
sys.exit(list(seen.values()) != [False, True, True])
PYTHON
