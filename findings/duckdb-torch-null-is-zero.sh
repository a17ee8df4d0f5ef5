#!/usr/bin/env bash
# duckdb 2.0.1 with torch 2.13.0: `.torch()` turns NULL into 0 without a warning.
#
# Expected: NULL is refused, or becomes NaN in a float column. DuckDB's own `.fetchnumpy()` returns a masked
# array. torch.from_dlpack on a pyarrow array with nulls raises "Can only use DLPack on arrays with no nulls".
#
# Seen: BIGINT, FLOAT and BOOLEAN columns with NULL become tensors with 0, 0.0 and False. The mask of the masked
# array is dropped. DECIMAL becomes float64: the id 9007199254740993 becomes 9007199254740992.
#
# Hurt: an unknown label (no exposure, not yet observed) becomes a negative example, an unknown watch time 0
# seconds, an unknown id the item 0. Workaround: fetch with `.fetchnumpy()` and read the mask, or select
# coalesce and IS NULL explicitly.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 duckdb==2.0.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import duckdb
import torch

print("duckdb", duckdb.__version__, "torch", torch.__version__)
query = (
    "SELECT * FROM (VALUES (7::BIGINT, 12.5::FLOAT, true, 9007199254740993::DECIMAL(18, 0)), (NULL, NULL, NULL, 1))"
    " AS log(item_id, watch_s, is_like, user_id)"
)
tensors, arrays = duckdb.sql(query).torch(), duckdb.sql(query).fetchnumpy()
for name, tensor in tensors.items():
    print(f"{name:8} fetchnumpy {arrays[name]!s:40} torch {tensor.tolist()}")
print("expected: an error or NaN for NULL, and exact ids")
null = [tensors[name][1].item() for name in ("item_id", "watch_s", "is_like")]
sys.exit(not (null == [0, 0.0, False] and arrays["watch_s"].mask[1] and int(tensors["user_id"][0]) == 9007199254740992))
PYTHON
