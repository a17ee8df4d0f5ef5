"""Numbers: standardization on training data, conservation from the log to a batch, refusal of invalid values."""

import math

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import LoaderConfig, PrepareConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.features.numbers import LIMIT, fit_number, number_encoding
from a2gen_rec.data.items import find_candidate_items
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.errors import DataError
from tests.helpers.raw_logs import START_MS, read_log, write_files

SPEC = {
    "kind": "impressions",
    "files": "*",
    "columns": {"user": "user", "item": "item", "time": "ts"},
    "actions": {"like": {"flag": "like"}},
    "features": [
        {"name": "age", "level": "user", "kind": "number"},
        {"name": "views", "level": "item", "kind": "number"},
        {"name": "battery", "level": "context", "kind": "number"},
    ],
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}
CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)


def fit(values: list[float | None]):
    connection = duckdb.connect()
    connection.register("log", pa.table({"x": pa.array(values, pa.float64())}))
    encoding = fit_number(connection, "log", FeatureSpec("x", "item", "number"))
    rows = connection.sql(f"SELECT {encoding.value_sql} AS value FROM log AS raw").to_arrow_table()["value"]
    return encoding.number, rows.to_numpy().astype(float)


def test_standardized_on_training_data():
    values = np.random.default_rng(0).normal(50, 20, 1000)
    number, encoded = fit([*values, None, math.nan])
    assert number.transform == "none"
    assert number.mean == pytest.approx(values.mean(), rel=1e-6)
    assert number.std == pytest.approx(values.std(), rel=1e-6)
    np.testing.assert_allclose(encoded[:1000], (values - values.mean()) / values.std(), atol=1e-5)
    assert np.isnan(encoded[1000:]).all()


def test_skewed_numbers_of_at_least_0_are_logarithmic():
    values = np.exp(np.random.default_rng(0).normal(5, 2, 1000))
    number, encoded = fit([*values])
    assert number.transform == "log1p"
    np.testing.assert_allclose(
        encoded, (np.log1p(values) - np.log1p(values).mean()) / np.log1p(values).std(), atol=1e-5
    )
    assert fit([*-values])[0].transform == "none"  # negative


@pytest.mark.parametrize("values", [[], [None, math.nan], [7.0, 7.0], [math.inf, 7.0]])
def test_numbers_without_variation(values):
    number, encoded = fit(values)
    assert number.std == 1
    assert all(value in (0, LIMIT) or math.isnan(value) for value in encoded)


def test_outliers_are_clipped():
    number, _ = fit([float(value) for value in range(100)])
    connection = duckdb.connect()
    query = f"SELECT {number_encoding(number).value_sql} FROM (VALUES (1e30), (-1e30)) AS raw(x)"
    assert connection.sql(query).fetchall() == [(LIMIT,), (-LIMIT,)]


def write_log(folder, count=60):
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 6, count), rng.integers(0, 9, count)
    table = pa.table(
        {
            "user": [f"u{number}" for number in user],
            "item": [f"i{number}" for number in item],
            "ts": START_MS + 60_000 * np.arange(count),
            "like": (rng.random(count) < 0.3).astype(int),
            "age": pa.array(np.where(user == 1, np.nan, 20.0 + user), from_pandas=True),
            "views": pa.array(np.where(item == 2, np.nan, item**4.0), from_pandas=True),
            "battery": rng.random(count).round(2),
        }
    )
    write_files(folder / "raw", {"log.parquet": table})
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    return table.to_pylist()


def standardized(card: DatasetCard, name: str, value: float | None) -> float:
    (number,) = [number for number in card.numbers if number.name == name]
    if value is None:
        return math.nan
    return ((math.log1p(value) if number.transform == "log1p" else value) - number.mean) / number.std


def test_every_value_reaches_the_batch(tmp_path):
    rows = {row["ts"]: row for row in write_log(tmp_path)}
    card = prepare("generic", str(tmp_path / "raw"), str(tmp_path / "data"), CONFIG, str(tmp_path / "spec.yaml"))
    dataset, seen = Dataset.open(str(tmp_path / "data")), set()
    for split in ("train", "valid", "test"):
        for batch in WindowDataset(dataset, split, LoaderConfig(prefetch=False), {}, shuffle=False):
            window = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
            for impression, ts_ms in enumerate(batch.ts_ms.tolist()):
                row = rows[ts_ms]
                expected = [standardized(card, name, row[name]) for name in ("views", "battery")]
                np.testing.assert_allclose(batch.numbers[impression], expected, rtol=1e-5, atol=1e-6)
                age = [standardized(card, "age", row["age"])]
                np.testing.assert_allclose(batch.user_numbers[window[impression]], age, rtol=1e-5, atol=1e-6)
                seen.add(ts_ms)
    assert seen == set(rows)
    views = {row["item"]: row["views"] for row in rows.values()}
    items = find_candidate_items(dataset, ["i3", "new", "i2"])
    expected = [[standardized(card, "views", views["i3"])], [math.nan], [math.nan]]
    np.testing.assert_allclose(items.numbers, expected, rtol=1e-5)


@pytest.mark.parametrize(("value", "reason"), [("high", "'high' is not a number"), ("inf", "'inf' is not finite")])
def test_invalid_values_are_rejected(tmp_path, value, reason):
    content = f"user,item,ts,dwell,like,x\nu,v,{START_MS},1,0,1.5\nu,v,{START_MS + 1},1,0,{value}\n"
    with pytest.raises(DataError, match=rf"log.csv, row 3, field 'x': {reason}"):
        read_log(tmp_path, {"log.csv": content}, features=[{"name": "x", "level": "item", "kind": "number"}])


def test_invalid_datasets_are_rejected(tmp_path):
    write_log(tmp_path)
    prepare("generic", str(tmp_path / "raw"), str(tmp_path / "data"), CONFIG, str(tmp_path / "spec.yaml"))
    dataset = Dataset.open(str(tmp_path / "data"))
    file = next(file for file in dataset.files("train") if pq.read_metadata(file).num_rows)
    table = pq.read_table(file)
    lists = [[math.inf for _ in row] for row in table["battery"].to_pylist()]
    battery = table.set_column(table.column_names.index("battery"), "battery", pa.array(lists, pa.list_(pa.float32())))
    pq.write_table(battery, file)
    with pytest.raises(DataError, match=r"row 0, field 'battery': value is infinite"):
        list(WindowDataset(dataset, "train", LoaderConfig(prefetch=False), {}, shuffle=False, file=file))
    pq.write_table(table.drop_columns(["age"]), file)
    with pytest.raises(DataError, match=r"field 'age': column is missing"):
        list(WindowDataset(dataset, "train", LoaderConfig(prefetch=False), {}, shuffle=False, file=file))
