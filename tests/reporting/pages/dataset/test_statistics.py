"""Dataset statistics against reference loops over windows."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import COMPLETE, SPLITS, Feature
from a2gen_rec.errors import DataError
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics, compute_statistics
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts
from tests.helpers.cards import make_card, write_dataset

DURATION = Feature("length", "item", "buckets", 5, [10.0, 20.0, 40.0])


def card_with_durations() -> DatasetCard:
    card = make_card()
    return replace(card, features=[*card.features, DURATION])


def with_ties(folder: Path) -> Path:
    """Merge users across files and splits, and round starts and offsets so that some are equal."""
    for file in folder.glob("*/part-*.parquet"):
        table = pq.read_table(file).to_pydict()
        table["user_key"] = [key % 9 for key in table["user_key"]]
        table["ts_ms"] = [[ms // 20_000 * 20_000 for ms in window] for window in table["ts_ms"]]
        table["action_offset_s"] = [
            [[float(np.floor(offset)) for offset in steps] for steps in window] for window in table["action_offset_s"]
        ]
        table["dwell_s"] = [[steps[-1] for steps in window] for window in table["action_offset_s"]]
        schema = pq.read_schema(file)
        pq.write_table(pa.table(table, schema=schema), file)
    return folder


def targets(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return each target as one row of plain values, by a loop."""
    rows = []
    for file in sorted((folder / split).glob("*.parquet")):
        for window in pq.read_table(file).to_pylist():
            for index in range(window["first_target"], len(window["ts_ms"])):
                lists = {name: value for name, value in window.items() if isinstance(value, list)}
                row = {name: value[index] for name, value in lists.items() if name != "statistics"}
                rows.append(row | {"user": window["user_key"]})
    return rows


def assert_same(distribution: ValueCounts, values: list[float]) -> None:
    expected = sorted(float(f"{value:.4g}") for value in values if not math.isnan(value))
    assert np.repeat(distribution.values, distribution.counts) == pytest.approx(expected, rel=1.1e-3)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatasetCard, DataStatistics]:
    folder, card = tmp_path_factory.mktemp("statistics"), card_with_durations()
    data = with_ties(write_dataset(folder / "data", card, windows=40))
    (folder / "scratch").mkdir()
    with Progress(disable=True) as bars:
        return data, card, compute_statistics(str(data), folder / "scratch", bars)


def test_splits(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, card, statistics = computed
    train_users = {row["user"] for row in targets(data, "train")}
    for split in SPLITS:
        rows, numbers = targets(data, split), statistics.splits[split]
        assert numbers.counts.targets == len(rows)
        assert numbers.counts.first_ms == min(row["ts_ms"] for row in rows)
        assert numbers.counts.last_ms == max(row["ts_ms"] for row in rows)
        assert numbers.users == len({row["user"] for row in rows})
        assert numbers.items == len({row["item_id"] for row in rows} - {0})
        assert numbers.unknown_item_impressions == sum(row["item_id"] == 0 for row in rows) > 0
        assert numbers.new_user_impressions == sum(row["user"] not in train_users for row in rows)
        assert numbers.num_actions == sum(len(row["action"]) - 2 for row in rows)
        for code, name in enumerate(card.predicted_actions, start=1):
            assert numbers.counts.positives[name] == sum(code in row["action"] for row in rows)
            assert numbers.counts.num_known[name] == len(rows)
        for name in ("label_click", "objective_glance", "objective_effective"):
            known = [row[name] for row in rows if not math.isnan(row[name])]
            assert numbers.counts.positives[name.partition("_")[2]] == sum(known)
            assert numbers.counts.num_known[name.partition("_")[2]] == len(known)
        assert_same(numbers.watch_time, [row["dwell_s"] for row in rows])


def test_users_without_training_targets_are_new(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", make_card(), windows=5)
    file = data / "test" / "part-00000.parquet"
    table = pq.read_table(file)
    known = pq.read_table(data / "train" / "part-00000.parquet")["user_key"][0].as_py()
    keys = pa.array([known, *range(-4, 0)], pa.int64())
    pq.write_table(table.set_column(table.column_names.index("user_key"), "user_key", keys), file)
    for other in ("part-00001.parquet", "part-00002.parquet"):
        (data / "test" / other).unlink()
    lengths = pc.subtract(pc.list_value_length(table["ts_ms"]), table["first_target"]).to_pylist()
    (tmp_path / "scratch").mkdir()
    with Progress(disable=True) as bars:
        statistics = compute_statistics(str(data), tmp_path / "scratch", bars)
    assert statistics.splits["test"].new_user_impressions == sum(lengths[1:])
    assert statistics.splits["train"].new_user_impressions == 0


def test_activity_and_sequences(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, _, statistics = computed
    rows = targets(data, "train")
    assert_same(statistics.impressions_per_user, list(map(float, Counter(row["user"] for row in rows).values())))
    assert_same(
        statistics.impressions_per_item,
        list(map(float, Counter(row["item_id"] for row in rows if row["item_id"]).values())),
    )
    assert_same(statistics.actions_per_impression, [float(len(row["action"]) - 2) for row in rows])
    sequences = Counter(tuple(row["action"][1:-1]) for row in rows)
    assert statistics.distinct_sequences == len(sequences)
    assert [count for _, count in statistics.sequences] == sorted(sequences.values(), reverse=True)[:20]
    assert all(sequences[tuple(codes)] == count for codes, count in statistics.sequences)


def test_times(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, card, statistics = computed
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in card.actions}
    for row in targets(data, "train"):
        for code, seconds in zip(row["action"], row["action_offset_s"], strict=True):
            times[card.actions[code]].append((seconds, row["dwell_s"]))
    assert list(statistics.times) == ["like", "follow", "exit"]
    for name in statistics.times:
        assert_same(statistics.times[name], [seconds for seconds, _ in times[name]])
    assert list(statistics.relative_times) == ["like", "follow"]
    for name, distribution in statistics.relative_times.items():
        shares = [seconds / watched for seconds, watched in times[name] if watched > 0 and not math.isnan(seconds)]
        assert np.repeat(distribution.values, distribution.counts) == pytest.approx(sorted(shares), abs=0.00051)


def test_pairs(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, card, statistics = computed
    rows, pairs, number = targets(data, "train"), statistics.pairs, len(card.predicted_actions)
    both, before, simultaneous = (Counter[tuple[int, int]]() for _ in range(3))
    for row in rows:
        steps = list(zip(row["action"], row["action_offset_s"], strict=True))[1:-1]
        for (a, first), (b, second) in permutations(steps, 2):
            both[a - 1, b - 1] += 1
            before[a - 1, b - 1] += first < second
            simultaneous[a - 1, b - 1] += first == second
    assert sum(simultaneous.values()) > 0
    assert sum(before.values()) > 0
    order, lift = pairs.order(), pairs.lift(len(rows))
    single = [sum(code in row["action"] for row in rows) for code in range(1, number + 1)]
    for a, b in combinations(range(number), 2):
        for i, j in ((a, b), (b, a)):
            assert pairs.both[i, j] == both[a, b]
            assert pairs.before[i, j] == before[i, j]
            assert pairs.simultaneous[i, j] == simultaneous[a, b]
            different = before[a, b] + before[b, a]
            assert order[i, j] == pytest.approx(before[i, j] / different if different else math.nan, nan_ok=True)
            expected = (single[i] / len(rows)) * (single[j] / len(rows))
            assert lift[i, j] == pytest.approx((both[a, b] / len(rows)) / expected)
    assert pairs.both.diagonal().tolist() == single
    assert np.isnan(lift.diagonal()).all()


def test_durations(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, _, statistics = computed
    rows = [row for row in targets(data, "train") if row["length"]]
    assert statistics.by_duration is not None
    assert [(group.from_s, group.to_s) for group in statistics.by_duration] == [
        (None, 10),
        (10, 20),
        (20, 40),
        (40, None),
    ]
    for bucket, group in enumerate(statistics.by_duration, start=1):
        inside = [row for row in rows if row["length"] == bucket]
        assert group.targets == len(inside)
        for name in ("glance", "effective"):
            known = [row[f"objective_{name}"] for row in inside if not math.isnan(row[f"objective_{name}"])]
            assert getattr(group, name) == pytest.approx(sum(known) / len(known))
        watched = sum(not math.isnan(row["dwell_s"]) for row in inside)
        assert group.complete == pytest.approx(sum(row["feedback"] == COMPLETE for row in inside) / watched)


def test_gaps_and_sessions(computed: tuple[Path, DatasetCard, DataStatistics]) -> None:
    data, card, statistics = computed
    gaps, sessions = [], []
    rows = targets(data, "train")
    for user in {row["user"] for row in rows}:
        starts = sorted(row["ts_ms"] for row in rows if row["user"] == user)
        sessions.append(1.0)
        for earlier, later in pairwise(starts):
            gaps.append((later - earlier) / 1000)
            if gaps[-1] > card.session_gap_s:
                sessions.append(0.0)
            sessions[-1] += 1
    assert 0.0 in gaps
    assert len(set(sessions)) > 2
    assert statistics.gaps is not None
    assert statistics.impressions_per_session is not None
    assert_same(statistics.gaps, gaps)
    assert_same(statistics.impressions_per_session, sessions)


def test_duration_buckets_are_merged_to_similar_sizes(tmp_path: Path) -> None:
    """Thirty buckets make at most twelve contiguous groups with all targets."""
    boundaries = [float(bound) for bound in range(1, 30)]
    card = make_card()
    card = replace(card, features=[*card.features, Feature("length", "item", "buckets", 31, boundaries)])
    data = write_dataset(tmp_path / "data", card, windows=100)
    (tmp_path / "scratch").mkdir()
    with Progress(disable=True) as bars:
        groups = compute_statistics(str(data), tmp_path / "scratch", bars).by_duration
    assert groups is not None
    assert 8 < len(groups) <= 12
    assert groups[0].from_s is None
    assert groups[-1].to_s is None
    assert [group.to_s for group in groups[:-1]] == [group.from_s for group in groups[1:]]
    assert sum(group.targets for group in groups) == sum(row["length"] > 0 for row in targets(data, "train"))


def test_names_a_file_that_violates_the_format(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", make_card(), windows=5)
    file = data / "valid" / "part-00001.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["first_target"]), file)
    with Progress(disable=True) as bars, pytest.raises(DataError, match=r"part-00001\.parquet: .*first_target"):
        compute_statistics(str(data), tmp_path, bars)


def test_rejects_a_dataset_without_training_impressions(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", make_card(), windows=5)
    for file in (data / "train").iterdir():
        file.unlink()
    with Progress(disable=True) as bars, pytest.raises(DataError, match="data: no training impressions"):
        compute_statistics(str(data), tmp_path, bars)
