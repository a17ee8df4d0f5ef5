"""Vectors of items: from side files and log columns to batches, refusal of malformed vectors, simulated vectors."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.artifact.quantized_tables import quantize_rows
from a2gen_rec.config import LoaderConfig, PrepareConfig, SimulateConfig
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.items import find_candidate_items
from a2gen_rec.data.loader import WindowDataset
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.data.sources.spec import load_spec
from a2gen_rec.data.vectors import VectorTable
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.simulation.simulator import simulate
from tests.helpers.raw_logs import START_MS, write_files

SPEC = {
    "kind": "impressions",
    "files": "*.parquet",
    "columns": {"user": "user", "item": "item", "time": "ts"},
    "actions": {"like": {"flag": "like"}},
    "split": {"valid_fraction": 0.2, "test_fraction": 0.2},
}
SIDE = {"name": "content", "width": 3, "file": "vectors.parquet", "item": "id", "column": "embedding"}
CONFIG = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5)


def write_log(folder, vectors, side=None, log=None, count=40):
    rng = np.random.default_rng(0)
    item = rng.integers(0, 9, count)
    columns = {
        "user": [f"u{number}" for number in rng.integers(0, 4, count)],
        "item": [f"i{number}" for number in item],
        "ts": START_MS + 60_000 * np.arange(count),
        "like": (rng.random(count) < 0.3).astype(int),
    }
    files = {"log.parquet": pa.table(columns | (log(item) if log else {}))}
    if side is not None:
        files["vectors.parquet"] = pa.table(side)
    write_files(folder / "raw", files)
    (folder / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "vectors": vectors}))


def prepare_log(folder):
    card = prepare("generic", str(folder / "raw"), str(folder / "data"), CONFIG, str(folder / "spec.yaml"))
    return card, Dataset.open(str(folder / "data"))


def check_batches(dataset, expected):
    """Check every impression's vector; ``expected``: raw item -> elements."""
    items = pq.read_table(dataset.items_file)["item"].to_pylist()
    seen = 0
    for split in ("train", "valid", "test"):
        for batch in WindowDataset(dataset, split, LoaderConfig(prefetch=False), {}, shuffle=False):
            vectors = batch.vectors["content"][batch.vector_index]
            assert len(vectors) == len(batch.ts_ms)
            windows = pq.read_table(dataset.files(split))["item_index"].combine_chunks().flatten()
            assert set(windows.to_pylist()) <= set(range(len(items)))
            seen += len(vectors)
    for item in items:
        table = dataset.open_vectors()["content"]
        np.testing.assert_allclose(table.lookup(np.array([items.index(item)]))[0], expected[item], rtol=1e-3)
    assert seen


def test_side_files(tmp_path):
    elements = {f"i{number}": [number, -number / 2, 0.1] for number in range(8)} | {"new": [1.0, 2.0, 3.0]}
    side = {"id": list(elements), "embedding": pa.array(list(elements.values()), pa.list_(pa.float32()))}
    write_log(tmp_path, [SIDE], side)
    card, dataset = prepare_log(tmp_path)
    (vector,) = card.vectors
    assert (vector.name, vector.width) == ("content", 3)
    assert vector.rms == pytest.approx(np.sqrt(np.mean(np.square(list(elements.values())))), rel=1e-3)
    check_batches(dataset, elements | {"i8": [np.nan] * 3})
    # An item that nobody has seen has its vector and nothing else.
    items = find_candidate_items(dataset, ["new", "i3", "nowhere"])
    vectors = dataset.open_vectors()["content"].lookup(items.index)
    np.testing.assert_allclose(vectors, [elements["new"], elements["i3"], [np.nan] * 3], rtol=1e-3)
    assert items.rows["item_id"][0] == 0
    assert items.is_known.tolist() == [True, True, False]


def test_impressions_have_the_vectors_of_their_items(tmp_path):
    side = {"id": [f"i{number}" for number in range(9)], "embedding": [[number, 0.0, 1.0] for number in range(9)]}
    write_log(tmp_path, [SIDE], side)
    _, dataset = prepare_log(tmp_path)
    log = pq.read_table(tmp_path / "raw" / "log.parquet").to_pylist()
    item_at = {row["ts"]: int(row["item"][1:]) for row in log}
    for split in ("train", "valid", "test"):
        for batch in WindowDataset(dataset, split, LoaderConfig(prefetch=False), {}, shuffle=False):
            vectors = batch.vectors["content"][batch.vector_index]
            assert vectors[:, 0].tolist() == [item_at[ts_ms] for ts_ms in batch.ts_ms.tolist()]


def test_log_columns_give_the_latest_vector(tmp_path):
    def log(item):
        vectors = [None if number == 2 else f"{number};{index};0" for index, number in enumerate(item)]
        return {"content": vectors}

    write_log(tmp_path, [{"name": "content", "width": 3, "delimiter": ";"}], log=log)
    _, dataset = prepare_log(tmp_path)
    last = {
        f"i{number}": [number, index, 0] for index, number in enumerate(np.random.default_rng(0).integers(0, 9, 40))
    }
    check_batches(dataset, last | {"i2": [np.nan] * 3})


@pytest.mark.parametrize(
    ("embedding", "reason"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0]], r"vectors.parquet, row 2, field 'embedding': '2' elements, expected 3"),
        ([[1.0, 2.0, 3.0], [1.0, None, 2.0]], r"row 2, field 'embedding': .* missing, not finite"),
        ([[1.0, 2.0, 3.0], [1.0, np.inf, 2.0]], r"row 2, field 'embedding': .* missing, not finite"),
        ([[1.0, 2.0, 3.0], [1.0, 1e6, 2.0]], r"row 2, field 'embedding': .* above 65504"),
        (["1 2 3", "4 5 6"], r"field 'embedding': is text: set the delimiter"),
    ],
)
def test_malformed_vectors_are_rejected(tmp_path, embedding, reason):
    write_log(tmp_path, [SIDE], {"id": ["i0", "i1"], "embedding": embedding})
    with pytest.raises(DataError, match=reason):
        prepare_log(tmp_path)
    assert not (tmp_path / "data").exists()


def test_duplicate_items_are_rejected(tmp_path):
    write_log(tmp_path, [SIDE], {"id": ["i0", "i0"], "embedding": [[1.0, 2.0, 3.0]] * 2})
    with pytest.raises(DataError, match="'i0' occurs in several rows"):
        prepare_log(tmp_path)


def test_contradictory_specs_are_rejected(tmp_path):
    for change, reason in [({"width": 0}, "width 0"), ({"item": ""}, "file and item require each other")]:
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump({**SPEC, "vectors": [{**SIDE, **change}]}))
        with pytest.raises(ConfigError, match=reason):
            load_spec(str(tmp_path / "spec.yaml"))


def test_damaged_datasets_are_rejected(tmp_path):
    write_log(tmp_path, [SIDE], {"id": ["i0"], "embedding": [[1.0, 2.0, 3.0]]})
    _, dataset = prepare_log(tmp_path)
    file = tmp_path / "data" / "vectors" / "content.npy"
    np.save(file, np.zeros((9, 4), np.float16))
    with pytest.raises(DataError, match=r"content.npy: must contain float16 vectors of width 3"):
        dataset.open_vectors()
    file.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"content.npy: cannot be read"):
        dataset.open_vectors()
    file.unlink()
    with pytest.raises(DataError, match=r"content.npy: file not found"):
        dataset.open_vectors()


def test_codes_of_8_bits_are_close():
    import torch

    values = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float16)
    values[7] = np.nan
    stored = quantize_rows(torch.from_numpy(values), "int8")
    table = VectorTable(stored.values.numpy(), stored.scale.numpy())
    index = np.array([3, 7, -1, 49])
    found, exact = table.lookup(index), VectorTable(values).lookup(index)
    assert np.isnan(found[1:3]).all() and np.isnan(exact[1:3]).all()  # noqa: PT018
    np.testing.assert_allclose(found[[0, 3]], exact[[0, 3]], atol=np.abs(exact[[0, 3]]).max() / 200)


def test_simulated_vectors_describe_topics(tmp_path):
    config = SimulateConfig(users=20, items=200, authors=20, topics=4, impressions_per_user=20)
    simulate(str(tmp_path / "without"), config)
    config.vectors = 8
    simulate(str(tmp_path / "raw"), config)
    names = ["items.parquet", "users.parquet", "impressions/part-00000.parquet"]
    for name in names:  # the vectors change nothing else
        assert pq.read_table(tmp_path / "raw" / name).equals(pq.read_table(tmp_path / "without" / name))
    card = prepare("simulated", str(tmp_path / "raw"), str(tmp_path / "data"), CONFIG)
    assert [(vector.name, vector.width) for vector in card.vectors] == [("content", 8)]
    dataset = Dataset.open(str(tmp_path / "data"))
    items = pq.read_table(dataset.items_file)["item"].to_pylist()
    assert len(items) == 200
    vectors = np.array(dataset.open_vectors()["content"].values, np.float32)
    raw = pq.read_table(tmp_path / "raw" / "items.parquet").to_pydict()
    topic = dict(zip(map(str, raw["item_id"]), raw["category"], strict=True))
    topics = np.array([topic[item] for item in items])
    distance = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    assert (topics[distance.argmin(1)] == topics).mean() > 0.6  # 0.25 by chance
