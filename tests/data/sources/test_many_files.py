"""Logs of many files: the number of connections and queries does not depend on the number of files."""

import duckdb
import pyarrow as pa
import pytest
import yaml

from a2gen_rec.config import PrepareConfig
from a2gen_rec.data.prepare import pipeline
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources import files, open_source
from a2gen_rec.errors import DataError
from tests.helpers.raw_logs import HOUR_MS, SPEC, START_MS, write_files

CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)


class CountingConnection:
    """Connection that counts its queries."""

    def __init__(self, connection, queries):
        self.connection, self.queries = connection, queries

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()

    def execute(self, query, *arguments):
        self.queries.append(query)
        return self.connection.execute(query, *arguments)


@pytest.fixture
def queries(monkeypatch):
    """Return the queries of all connections of a2gen prepare."""
    executed = []
    connect = pipeline.connect

    class Duckdb:
        DuckDBPyConnection = duckdb.DuckDBPyConnection
        Error = duckdb.Error

        @staticmethod
        def connect(*arguments, **options):
            return CountingConnection(duckdb.connect(*arguments, **options), executed)

    monkeypatch.setattr(files, "duckdb", Duckdb)
    monkeypatch.setattr(pipeline, "connect", lambda *arguments: CountingConnection(connect(*arguments), executed))
    return executed


def log_of(count, kind):
    """Return files with three impressions each."""
    content = {}
    for number in range(count):
        starts = [START_MS + (number * 3 + row) * HOUR_MS for row in range(3)]
        columns = {"user": [f"u{number % 7}"] * 3, "item": [row + number % 5 for row in range(3)], "ts": starts}
        columns |= {"dwell": [1.5, 2.0, None], "like": [0, 1, 0]}
        if kind == "parquet":
            content[f"day={number % 9}/part-{number:05d}.parquet"] = pa.table(columns)
        else:
            rows = zip(*columns.values(), strict=True)
            text = "".join(",".join("" if value is None else str(value) for value in row) + "\n" for row in rows)
            content[f"day={number % 9}/part-{number:05d}.csv"] = f"user,item,ts,dwell,like\n{text}"
    return content


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_number_of_queries(tmp_path, queries, kind):
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "partition_columns": ["day"]}))
    counts = []
    for count in (12, 120):
        raw = write_files(tmp_path / str(count), log_of(count, kind))
        card = prepare("generic", str(raw), str(tmp_path / f"out{count}"), CONFIG, str(tmp_path / "spec.yaml"))
        assert sum(split.targets for split in card.splits.values()) == 3 * count
        counts.append(len(queries))
        queries.clear()
    assert counts[0] == counts[1] > 10


def test_first_invalid_row_of_many_files(tmp_path):
    content = log_of(50, "csv") | {"zz.parquet": log_of(1, "parquet").popitem()[1]}
    names = sorted(content, key=str)
    bad = content["day=4/part-00022.csv"].splitlines()
    content["day=4/part-00022.csv"] = "\n".join([*bad[:3], bad[3].replace(",0", ",7")])
    content["day=7/part-00034.csv"] = content["day=7/part-00034.csv"].replace("1.5", "-1")
    raw = write_files(tmp_path / "raw", content)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    source = open_source("generic", str(raw), str(tmp_path / "spec.yaml"))
    with duckdb.connect() as connection, pytest.raises(DataError, match=r"00022.csv, row 4, field 'like': '7' must be"):
        source.impressions(connection)
    assert len(names) == 51


def test_many_different_headers(tmp_path):
    content = {
        f"{number}.csv": f"x{number},user,item,ts,dwell,like\n0,u,{number},{START_MS},1,0\n" for number in range(300)
    }
    raw = write_files(tmp_path / "raw", content)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    source = open_source("generic", str(raw), str(tmp_path / "spec.yaml"))
    with duckdb.connect() as connection:
        relation = source.impressions(connection)
        assert connection.execute(f"SELECT count(DISTINCT item_id) FROM ({relation})").fetchone() == (300,)
