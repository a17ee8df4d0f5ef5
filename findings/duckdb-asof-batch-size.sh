#!/usr/bin/env bash
# duckdb 2.0.1: ASOF JOIN picks the first of equal timestamps for up to 63 left rows and the last for 64 or
# more.
#
# Expected: the joined feature row of an impression depends on the impression and the feature table, not on the
# number of other impressions in the query. An as-of join returns the latest row at or before a time; equal
# times need one rule.
#
# Seen: the setting asof_loop_join_threshold (64; "the maximum number of rows we need on the left side of an
# ASOF join to use a nested loop join") switches the algorithm. The loop keeps the first row of equal times, the
# sorted join the last. SET asof_loop_join_threshold = 0 gives the last row for both sizes. pandas.merge_asof
# and Polars document the last row.
#
# Hurt: point-in-time features with timestamps in seconds, where several updates share a time. A unit test or a
# service with a few rows gets other features than the training job with thousands. Workaround: set the
# threshold to 0, or make times unique by aggregation before the join.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check duckdb==2.0.1
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import sys
import duckdb

print("duckdb", duckdb.__version__)
print(duckdb.sql("SELECT value FROM duckdb_settings() WHERE name = 'asof_loop_join_threshold'").fetchall(), "= threshold")
duckdb.sql("CREATE TABLE features AS SELECT 1 AS user, 5 AS time, version FROM range(4) AS versions(version)")
query = '''
    SELECT DISTINCT version FROM (SELECT 1 AS user, 5 AS time FROM range({rows})) impressions
    ASOF LEFT JOIN features ON impressions.user = features.user AND impressions.time >= features.time'''


def versions(rows: int) -> list[int]:
    return [version for (version,) in duckdb.sql(query.format(rows=rows)).fetchall()]


seen = {rows: versions(rows) for rows in (1, 63, 64, 1000)}
print("four versions 0..3 at one time; joined version by number of left rows:", seen, "; expected: one version")
duckdb.sql("SET asof_loop_join_threshold = 0")
without_loop = {rows: versions(rows) for rows in (1, 63, 64, 1000)}
print("without the loop join:", without_loop)
sys.exit(not (seen == {1: [0], 63: [0], 64: [3], 1000: [3]} and set(map(tuple, without_loop.values())) == {(3,)}))
PYTHON
