from pathlib import Path

import numpy as np
import pytest
from simulated_data import WindowSample, make_dataset, zipf_ids

from a2gen_rec.config import Config
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import ConfigError
from tests.helpers.cards import full_tables


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """History length -> dataset of the same log."""
    folder = tmp_path_factory.mktemp("datasets")
    return {history: make_dataset(folder / str(history), 12, 30, 40, history, max_targets=8) for history in (3, 20)}


def read_all(dataset: str) -> WindowSample:
    card = DatasetCard.load(dataset)
    return WindowSample(card, read_columns(read_row_groups(sorted(map(str, Path(dataset, "train").iterdir()))), card))


def test_with_history_matches_preparation_with_shorter_history(datasets: dict[int, str]) -> None:
    short, long = read_all(datasets[3]), read_all(datasets[20])
    truncated = long.with_history(3)
    assert truncated.columns.lengths.sum() < long.columns.lengths.sum()
    tables, rows = full_tables(short.card, Config()), np.arange(len(short.columns))
    expected, actual = collate(short.columns, rows, tables), collate(truncated.columns, rows, tables)
    for name in ("user_key", "lengths", "first_target", "ts_ms", "action", "offset_s", "target", "labels"):
        assert np.array_equal(getattr(expected, name), getattr(actual, name), equal_nan=True), name
    for feature in expected.row_index:
        assert np.array_equal(expected.ids(feature), actual.ids(feature)), feature


def test_draws_full_windows(datasets: dict[int, str]) -> None:
    sample = WindowSample.from_dataset(datasets[20], windows=5, history=10, seed=0)
    columns = sample.columns
    assert len(columns) == 5
    assert (columns.lengths - columns.first_target == 8).all()
    assert (columns.first_target > 10).all()
    same_seed, other_seed = (WindowSample.from_dataset(datasets[20], 5, 10, seed).columns.user_key for seed in (0, 1))
    assert np.array_equal(columns.user_key, same_seed)
    assert not np.array_equal(columns.user_key, other_seed)
    with pytest.raises(ConfigError, match="simulated windows have 10 impressions of history"):
        WindowSample.from_dataset(datasets[20], windows=5_000, history=10, seed=0)


def test_with_items_replaces_items_only(datasets: dict[int, str]) -> None:
    sample = read_all(datasets[3])
    resampled = sample.with_items(1_000_000, 1.05, seed=0)
    assert {f.name: f.cardinality for f in resampled.card.features}[ITEM_ID] == 1_000_000
    ids = resampled.columns.impression_ids
    assert 1_000 < ids[ITEM_ID].max() < 1_000_000
    assert all(
        np.array_equal(ids[name], values) for name, values in sample.columns.impression_ids.items() if name != ITEM_ID
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
    most_frequent = np.argsort(np.bincount(ids))[-10:]
    assert np.diff(np.sort(most_frequent)).max() > 20, "frequent ids are not adjacent"
