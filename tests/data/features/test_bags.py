"""Multi-valued features: conservation from the log to a batch, vocabularies, refusal of malformed lists."""

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import Config, LoaderConfig, PrepareConfig
from a2gen_rec.data.bag_sql import VALUES_TYPE
from a2gen_rec.data.bags import Bags
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.features.encodings import hash_encoding
from a2gen_rec.data.items import find_candidate_items
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.schema import FeatureSpec
from a2gen_rec.data.sources.spec import load_spec
from a2gen_rec.data.window_reader import read_columns
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.sharding.workload import workload_from_dataset
from tests.helpers.raw_logs import START_MS, read_log, write_files

SPEC = {
    "kind": "impressions",
    "files": "*",
    "columns": {"user": "user", "item": "item", "time": "ts"},
    "actions": {"like": {"flag": "like"}},
    "features": [
        {"name": "hobbies", "level": "user", "multi_valued": True, "delimiter": ","},
        {"name": "tags", "level": "item", "multi_valued": True, "weights": "tag_weights", "min_count": 2},
        {"name": "topics", "level": "context", "kind": "hash", "size": 20, "multi_valued": True},
    ],
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}
CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)


def write_log(folder, count=80):
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 6, count), rng.integers(0, 9, count)
    tags = [[f"t{k}" for k in rng.choice(7, number % 4, replace=False)] for number in range(9)]
    table = pa.table(
        {
            "user": [f"u{number}" for number in user],
            "item": [f"i{number}" for number in item],
            "ts": START_MS + 60_000 * np.arange(count),
            "like": (rng.random(count) < 0.3).astype(int),
            "hobbies": [" ,".join(f"h{k}" for k in range(number)) for number in user],
            "tags": [tags[number] for number in item],
            "tag_weights": [[1.5 + k for k in range(len(tags[number]))] for number in item],
            "topics": [None if number % 5 == 0 else [number % 7, number % 3] for number in range(count)],
        }
    )
    write_files(folder / "raw", {"log.parquet": table})
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    card = prepare("generic", str(folder / "raw"), str(folder / "data"), CONFIG, str(folder / "spec.yaml"))
    return card, {row["ts"]: row for row in table.to_pylist()}


def bag(bags: Bags, index: int) -> list[tuple[int, float]]:
    (one,) = [bags[np.array([index])]]
    return list(zip(one.ids.tolist(), one.weights.tolist(), strict=True))


def test_every_value_reaches_the_loader(tmp_path):
    card, rows = write_log(tmp_path)
    dataset, seen = Dataset.open(str(tmp_path / "data")), set()
    row_of = {
        name: {row["value"]: row["row"] for row in pq.read_table(file).to_pylist()}
        for name in ("hobbies", "tags")
        for file in [tmp_path / f"data/vocabulary/{name}.parquet"]
    }
    encoding = hash_encoding(FeatureSpec("topics", "context", "hash", 20, multi_valued=True))

    def hashed(values):
        raw = f"(SELECT ?::{VALUES_TYPE} AS topics) AS raw"
        query = f'SELECT list_transform({encoding.row_sql}, lambda x: x."row") FROM {raw}'
        entries = [{"value": value, "weight": 1.0} for value in sorted({str(value) for value in values or []})]
        return duckdb.connect().execute(query, [entries or None]).fetchall()[0][0]

    def known(name, values, weights):
        pairs = sorted(
            (row_of[name][value], weight)
            for value, weight in zip(values, weights, strict=True)
            if value in row_of[name]
        )
        return pairs or [(0, 1.0)]

    for split in ("train", "valid", "test"):
        loader = WindowDataset(dataset, split, LoaderConfig(prefetch=False), {}, shuffle=False)
        columns = read_columns(loader.groups, card)
        window = np.repeat(np.arange(len(columns)), columns.lengths)
        for impression, ts_ms in enumerate(columns.ts_ms.tolist()):
            row = rows[ts_ms]
            assert bag(columns.impression_bags["tags"], impression) == known("tags", row["tags"], row["tag_weights"])
            assert bag(columns.impression_bags["topics"], impression) == [(x, 1.0) for x in hashed(row["topics"])]
            hobbies = [value.strip() for value in row["hobbies"].split(",") if value]
            expected = known("hobbies", hobbies, [1.0] * len(hobbies))
            assert bag(columns.user_bags["hobbies"], window[impression]) == expected
            seen.add(ts_ms)
        for batch in loader:
            assert len(batch.ids("tags")) == len(batch.bags["tags"].weights)
    assert seen == set(rows)
    item = next(row for row in rows.values() if len(row["tags"]) == 3)
    items = find_candidate_items(dataset, ["new", item["item"]])
    assert bag(items.bags["tags"], 0) == [(0, 1.0)]
    assert bag(items.bags["tags"], 1) == known("tags", item["tags"], item["tag_weights"])
    # The planner counts every value.
    tags = next(feature for feature in card.features if feature.name == "tags")
    assert tags.mean_values > 1
    workload = workload_from_dataset(card, Config())
    ids = {table.name: table.ids for table in workload.tables}
    assert ids["tags"] == pytest.approx(ids["item_id"] * tags.mean_values)


def read_list(folder, values, feature):
    table = pa.table(
        {
            "user": ["u"] * 2,
            "item": ["v"] * 2,
            "ts": [START_MS, START_MS + 1],
            "dwell": [1, 1],
            "like": [0, 0],
            **values,
        }
    )
    features = [{"name": "x", "level": "item", "multi_valued": True, **feature}]
    return [row["x"] for row in read_log(folder, {"log.parquet": table}, features=features)]


def entries(**weights):
    return [{"value": value, "weight": weight} for value, weight in weights.items()]


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ({"x": [["b", "a", "b", None, ""], []]}, {}, [entries(a=1, b=1), None]),
        ({"x": ["b| a||b", ""]}, {"delimiter": "|"}, [entries(a=1, b=1), None]),
        ({"x": [[5, 3], None]}, {}, [[{"value": "3", "weight": 1}, {"value": "5", "weight": 1}], None]),
        ({"x": [[5.0, None], None]}, {}, [[{"value": "5", "weight": 1}], None]),
        ({"x": [["b", "a", "b"], ["c"]], "w": [[1.0, 2.0, 3.0], [0.0]]}, {"weights": "w"}, [entries(a=2, b=4), None]),
        ({"x": ["b,a", None], "w": ["0.5,2", None]}, {"delimiter": ",", "weights": "w"}, [entries(a=2, b=0.5), None]),
    ],
)
def test_lists_by_hand(tmp_path, values, feature, expected):
    assert read_list(tmp_path, values, feature) == expected


@pytest.mark.parametrize(
    ("values", "feature", "reason"),
    [
        (
            {"x": [["a"], ["b"]], "w": [[1.0], [1.0, 2.0]]},
            {"weights": "w"},
            "row 2, field 'w': .* must have one weight",
        ),
        (
            {"x": [["a"], ["b"]], "w": [[1.0], [-1.0]]},
            {"weights": "w"},
            "row 2, field 'w': .* must be numbers of at least 0",
        ),
        (
            {"x": ["a", "b"], "w": ["1", "much"]},
            {"delimiter": ",", "weights": "w"},
            "row 2, field 'w': 'much' must be num",
        ),
        ({"x": ["a", "b"]}, {}, "field 'x': is text: set the delimiter"),
        ({"x": [1, 2]}, {}, "field 'x': is BIGINT, expected a list or text"),
        ({"x": [[["a"]], [["b"]]]}, {}, "field 'x': has the nested type"),
        ({"x": [[1.0], [2.0**53]]}, {}, "row 2, field 'x': .* merges whole numbers"),
    ],
)
def test_malformed_lists_are_rejected(tmp_path, values, feature, reason):
    with pytest.raises(DataError, match=reason):
        read_list(tmp_path, values, feature)


@pytest.mark.parametrize(
    ("feature", "reason"),
    [
        ({"kind": "buckets", "multi_valued": True}, "must not be multi_valued"),
        ({"delimiter": ","}, "delimiter and weights require multi_valued"),
    ],
)
def test_contradictory_specs_are_rejected(tmp_path, feature, reason):
    (tmp_path / "spec.yaml").write_text(
        yaml.safe_dump({**SPEC, "features": [{"name": "x", "level": "item", **feature}]})
    )
    with pytest.raises(ConfigError, match=reason):
        load_spec(str(tmp_path / "spec.yaml"))


@pytest.mark.parametrize(
    ("column", "change", "reason"),
    [
        ("tags", lambda bags: [[] for _ in bags], "field 'tags': list is empty"),
        ("tags", lambda bags: [[99] * len(bag) for bag in bags], r"field 'tags': id is not in \[0"),
        (
            "weights of tags",
            lambda bags: [[0.0] * len(bag) for bag in bags],
            "field 'weights of tags': weight is not positive",
        ),
        ("weights of tags", lambda bags: [[*bag, 1.0] for bag in bags], "field 'weights of tags': differs in length"),
    ],
)
def test_invalid_datasets_are_rejected(tmp_path, column, change, reason):
    write_log(tmp_path)
    dataset = Dataset.open(str(tmp_path / "data"))
    file = next(file for file in dataset.files("train") if pq.read_metadata(file).num_rows)
    table = pq.read_table(file)
    index = table.column_names.index(column)
    changed = [change(bags) for bags in table[column].to_pylist()]
    pq.write_table(table.set_column(index, column, pa.array(changed, table[column].type)), file)
    with pytest.raises(DataError, match=reason):
        list(WindowDataset(dataset, "train", LoaderConfig(prefetch=False), {}, shuffle=False, file=file))
