from pathlib import Path

import numpy as np
import pytest
from simulated_data import World, simulated, zipf_ids

from a2gen_rec.config import Config
from a2gen_rec.data.batch import collate
from a2gen_rec.data.parquet_reader import read_columns, read_row_groups
from a2gen_rec.data.schema import ITEM_ID, DatasetCard
from a2gen_rec.errors import ConfigError
from tests.helpers.cards import full_tables


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """History -> dataset of one and the same log."""
    folder = tmp_path_factory.mktemp("datasets")
    return {history: simulated(folder / str(history), 12, 30, 40, history, max_targets=8) for history in (3, 20)}


def everything(dataset: str) -> World:
    card = DatasetCard.load(dataset)
    return World(card, read_columns(read_row_groups(sorted(map(str, Path(dataset, "train").iterdir()))), card))


def test_less_history_is_what_preparing_with_less_gives(datasets: dict[int, str]) -> None:
    short, long = everything(datasets[3]), everything(datasets[20])
    cut = long.with_history(3)
    assert cut.columns.lengths.sum() < long.columns.lengths.sum()
    tables, rows = full_tables(short.card, Config()), np.arange(len(short.columns))
    wanted, found = collate(short.columns, rows, tables), collate(cut.columns, rows, tables)
    for name in ("user_key", "lengths", "first_target", "ts_ms", "action", "offset_s", "target", "labels"):
        assert np.array_equal(getattr(wanted, name), getattr(found, name), equal_nan=True), name
    for feature in wanted.row_index:
        assert np.array_equal(wanted.ids(feature), found.ids(feature)), feature


def test_full_windows_only(datasets: dict[int, str]) -> None:
    world = World.read(datasets[20], windows=5, history=10, seed=0)
    columns = world.columns
    assert len(columns) == 5
    assert (columns.lengths - columns.first_target == 8).all()
    assert (columns.first_target > 10).all()
    again, other = (World.read(datasets[20], 5, 10, seed).columns.user_key for seed in (0, 1))
    assert np.array_equal(columns.user_key, again)
    assert not np.array_equal(columns.user_key, other)
    with pytest.raises(ConfigError, match="of the simulated windows have 10 impressions of history"):
        World.read(datasets[20], windows=5_000, history=10, seed=0)


def test_other_items(datasets: dict[int, str]) -> None:
    world = everything(datasets[3])
    other = world.with_items(1_000_000, 1.05, seed=0)
    assert {f.name: f.cardinality for f in other.card.features}[ITEM_ID] == 1_000_000
    ids = other.columns.impression_ids
    assert 1_000 < ids[ITEM_ID].max() < 1_000_000
    assert all(
        np.array_equal(ids[name], values) for name, values in world.columns.impression_ids.items() if name != ITEM_ID
    )


@pytest.mark.parametrize("exponent", [0.8, 1.05])
def test_zipf_frequencies(exponent: float) -> None:
    rows = 500
    ids = zipf_ids(rows, 400_000, exponent, np.random.default_rng(0))
    assert ids.dtype == np.int64
    counts = np.bincount(ids, minlength=rows)
    assert len(counts) == rows
    counts = np.sort(counts)[::-1]
    ranks = np.arange(10, 200)
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks]), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.05)
    busiest = np.argsort(np.bincount(ids))[-10:]
    assert np.diff(np.sort(busiest)).max() > 20, "frequent ids are no neighbours"
