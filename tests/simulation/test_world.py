"""Logs of several days: births, retirement, popularity, tastes, turnover of users, folders and the source."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import SimulateConfig
from a2gen_rec.data.sources.simulated import Simulated
from a2gen_rec.errors import ConfigError, DataError
from a2gen_rec.simulation import viewing
from a2gen_rec.simulation.log_files import LABEL_NAME
from a2gen_rec.simulation.population import ACTIONS, USER_ID_STRIDE, SimulatedUsers
from a2gen_rec.simulation.simulator import build_simulation, simulate
from a2gen_rec.simulation.world import NEVER, block_days, build_catalog
from tests.simulation.test_simulator import auc, occurred

DAYS = SimulateConfig(users=1_100, items=300, authors=40, impressions_per_day=8, days=5, vectors=2)
NAMES = [f"2024-03-0{day}" for day in range(1, 6)]
Log = list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("days") / "log"
    simulate(str(out), DAYS)
    return out


@pytest.fixture(scope="module")
def log(folder: Path) -> Log:
    return read_days(folder)


def read_days(folder: Path) -> Log:
    """Return the columns of the impressions of each day."""
    tables = [pq.read_table(day / "impressions") for day in sorted(folder.iterdir()) if day.is_dir()]
    return [{name: table[name].to_numpy() for name in table.column_names} for table in tables]


def simulate_days(out: Path, config: SimulateConfig) -> Log:
    simulate(str(out), config)
    return read_days(out)


def digest(table: pa.Table) -> str:
    """Return a digest of the integers and texts of a table, and of the missing values."""
    text = repr(
        [
            (name, column.is_null().to_pylist() if pa.types.is_floating(column.type) else column.to_pylist())
            for name, column in zip(table.column_names, table.columns, strict=True)
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Determinism


@pytest.mark.parametrize("days", [{}, {"days": 1, "births_per_day": 0.5, "taste_drift": 1.0, "new_users_per_day": 1.0}])
def test_a_static_log_keeps_its_rows(tmp_path: Path, days: dict[str, float]) -> None:
    """The digests are those of the simulator before it had days."""
    simulate(str(tmp_path / "log"), SimulateConfig(users=40, items=30, impressions_per_user=20, seed=3, **days))
    assert {file.stem: digest(pq.read_table(file)) for file in sorted((tmp_path / "log").rglob("*.parquet"))} == {
        "items": "778ffe722a00f3b3",
        "part-00000": "d89daaf28bed2522",
        "users": "68164546e434f5f5",
    }


def file_bytes(folder: Path, day: str) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in (folder / day).rglob("*.parquet")}


def test_a_day_does_not_depend_on_the_number_of_days(folder: Path, tmp_path: Path) -> None:
    simulate(str(tmp_path / "shorter"), replace(DAYS, days=3))
    for day in NAMES[:3]:
        assert len(file_bytes(folder, day)) == 4
        assert file_bytes(tmp_path / "shorter", day) == file_bytes(folder, day)
    assert sorted(day.name for day in (tmp_path / "shorter").iterdir()) == [*NAMES[:3], "simulation.yaml"]
    assert sorted(file_bytes(folder, NAMES[1]).values()) != sorted(file_bytes(folder, NAMES[2]).values())


def test_a_day_does_not_depend_on_the_number_of_users_and_the_size_of_files(folder: Path, tmp_path: Path) -> None:
    simulate(str(tmp_path / "fewer"), replace(DAYS, users=1_000))
    simulate(str(tmp_path / "chunked"), replace(DAYS, users_per_file=1_000))
    for day in NAMES:
        full, fewer, chunked = (
            pq.read_table(path / day / "impressions") for path in (folder, tmp_path / "fewer", tmp_path / "chunked")
        )
        assert chunked.equals(full)
        assert fewer.equals(full.slice(0, fewer.num_rows))
        assert len(list((tmp_path / "chunked" / day / "impressions").iterdir())) == 2


# Videos


def test_videos_are_shown_from_birth_to_retirement(folder: Path, log: Log) -> None:
    catalog = build_catalog(DAYS)
    for day, columns in enumerate(log):
        items = pq.read_table(folder / NAMES[day] / "items.parquet")
        shown = items["item_id"].to_numpy()
        assert np.isin(columns["item_id"], shown).all()
        assert np.all(catalog.birth_day[columns["item_id"]] <= day)
        assert np.all(catalog.retirement_day[columns["item_id"]] > day)
        assert np.array_equal(items["birth_day"].to_numpy(), catalog.birth_day[shown])
        assert items["birth_day"].to_numpy().max() == day
    shown_days = [set(pq.read_table(folder / name / "items.parquet")["item_id"].to_pylist()) for name in NAMES]
    assert all(len(later - earlier) == DAYS.num_births for earlier, later in pairwise(shown_days))
    retired = shown_days[0] - shown_days[1]
    assert retired
    assert not any(retired & later for later in shown_days[1:])


def test_catalog_is_stationary() -> None:
    config = replace(DAYS, items=5_000, days=40)
    catalog = build_catalog(config)
    for day in (0, 20, 39):
        shown = catalog.shown(day)
        age = day - catalog.birth_day[shown]
        assert len(shown) == pytest.approx(config.items, rel=0.05)
        assert (age == 0).mean() == pytest.approx(config.births_per_day, rel=0.2)
        assert age.mean() == pytest.approx(1 / config.births_per_day - 1, rel=0.1)


def test_popularity_halves_every_half_life(tmp_path: Path) -> None:
    half_life = 2.0
    config = replace(
        DAYS,
        **{"users": 400, "impressions_per_day": 50.0, "births_per_day": 0.1, "popularity_half_life": half_life},
        **{"popularity_exponent": 0.0, "topic_drift": 0.0, "personalized_share": 0.0, "vectors": 0},
    )
    catalog = build_catalog(config)
    ages, log2_impressions = [], []
    for day, columns in enumerate(simulate_days(tmp_path / "log", config)):
        count = np.bincount(columns["item_id"], minlength=len(catalog.birth_day))
        shown = catalog.shown(day)
        for age in range(6):
            cohort = shown[catalog.birth_day[shown] == day - age]
            ages.append(age)
            log2_impressions.append(np.log2(count[cohort].mean()))
    slope = np.polyfit(ages, log2_impressions, 1)[0]
    assert -1 / slope == pytest.approx(half_life, rel=0.05)


def test_popularity_of_topics_drifts(tmp_path: Path) -> None:
    config = replace(
        DAYS, users=400, impressions_per_day=50.0, births_per_day=0.0, topic_drift=0.5, personalized_share=0.0
    )
    catalog = build_catalog(config)
    assert np.all(catalog.retirement_day == NEVER)
    first, *_, last = simulate_days(tmp_path / "log", config)
    topic = catalog.items.topic
    change = np.log(np.bincount(topic[last["item_id"]], minlength=config.topics)) - np.log(
        np.bincount(topic[first["item_id"]], minlength=config.topics)
    )
    trend = catalog.trends[-1] - catalog.trends[0]
    assert np.ptp(trend) > 1
    assert np.corrcoef(change, trend)[0, 1] > 0.98
    for trends in build_catalog(replace(config, topic_drift=0.0)).trends:
        assert not trends.any()


def test_spread_of_trends_is_bounded() -> None:
    config = replace(DAYS, items=20, births_per_day=0.0, topics=200, days=200, topic_drift=0.2)
    std = np.array([trend.std() for trend in build_catalog(config).trends])
    assert std.min() > 0.4
    assert std.max() < 0.9


# Users


def all_days(config: SimulateConfig) -> list[SimulatedUsers]:
    return list(block_days(config, build_catalog(config), 0))


def test_users_arrive_and_leave(log: Log, folder: Path) -> None:
    users = [pq.read_table(folder / name / "users.parquet")["user_id"].to_numpy() for name in NAMES]
    for day, (columns, present) in enumerate(zip(log, users, strict=True)):
        assert len(present) == len(np.unique(present)) == DAYS.users
        assert np.isin(columns["user_id"], present).all()
        assert np.array_equal(
            pq.read_table(folder / NAMES[day] / "users.parquet")["arrival_day"].to_numpy(), present // USER_ID_STRIDE
        )
        new = np.flatnonzero(present // USER_ID_STRIDE == day)
        assert np.isin(present[new], columns["user_id"]).all(), "a new user has an impression"
        if day > 0:
            assert not np.isin(present[new], np.concatenate(users[:day])).any()
            assert len(new) / DAYS.users == pytest.approx(DAYS.new_users_per_day, abs=0.02)
            gone = np.setdiff1d(users[day - 1], present)
            assert len(gone) == len(new)
            assert not np.isin(gone, np.concatenate(users[day:])).any()


def test_a_user_keeps_everything_but_tastes() -> None:
    first, *_, last = all_days(replace(DAYS, days=8))
    stays = first.user_id == last.user_id
    assert 0.7 < stays.mean() < 0.9
    for name in ("group", "age_band", "activity_level", "activity", "propensity", "leave_propensity"):
        assert np.array_equal(getattr(first, name)[stays], getattr(last, name)[stays])
        assert not np.array_equal(getattr(first, name)[~stays], getattr(last, name)[~stays])
    assert np.array_equal(np.sort(first.affinity[stays]), np.sort(last.affinity[stays]))


@pytest.mark.parametrize("taste_drift", [0.0, 0.1, 1.0])
def test_tastes_move_by_one_favourite_at_a_time(taste_drift: float) -> None:
    days = all_days(replace(DAYS, new_users_per_day=0.0, taste_drift=taste_drift, days=6))
    for earlier, later in pairwise(days):
        changed = (earlier.affinity != later.affinity).sum(axis=1)
        assert set(changed) <= {0, 2}
        assert (changed > 0).mean() == pytest.approx(taste_drift, abs=0.04)
        lost = np.take_along_axis(later.affinity, earlier.affinity.argmax(axis=1)[:, None], axis=1)[:, 0]
        assert (lost != earlier.affinity.max(axis=1)).mean() == pytest.approx(taste_drift / 3, abs=0.04)


def test_new_favourites_follow_popular_topics() -> None:
    config = replace(DAYS, new_users_per_day=0.0, taste_drift=1.0, topic_drift=1.0, days=2)
    catalog = build_catalog(config)
    first, second = block_days(config, catalog, 0)
    gained = ((second.affinity > first.affinity) & (second.affinity > 0.4)).sum(axis=0)
    assert np.corrcoef(np.log(gained + 1), catalog.trends[1])[0, 1] > 0.5


# The oracle


def test_true_probabilities_match_outcomes_on_each_day(log: Log) -> None:
    for day, columns in enumerate(log):
        for name in (*ACTIONS, LABEL_NAME):
            truth, observed = columns[f"true_{name}"], occurred(columns, name)
            z = (observed.sum() - truth.sum()) / np.sqrt((truth * (1 - truth)).sum())
            assert abs(z) < 4.5, (day, name)
            assert truth.mean() == pytest.approx(getattr(DAYS, f"{name}_rate"), rel=0.25)


def test_an_oracle_of_old_tastes_loses_accuracy_with_age(tmp_path: Path) -> None:
    config = replace(DAYS, users=1_000, days=9, taste_drift=0.2)
    simulated, days = build_simulation(config), all_days(config)
    loss = []
    for day, columns in enumerate(simulate_days(tmp_path / "log", config)):
        known = columns["user_id"] < USER_ID_STRIDE
        row, item = columns["user_id"][known], columns["item_id"][known]
        truth, old = (
            viewing.exact_marginals(
                viewing.segment_probabilities(config, simulated.base_logits, simulated.catalog.items, users, row, item)
            ).long_view
            for users in (days[day], replace(days[day], affinity=days[0].affinity))
        )
        assert np.allclose(truth, columns["true_long_view"][known])
        observed = occurred(columns, LABEL_NAME)[known]
        loss.append(auc(observed, truth) - auc(observed, old))
    assert loss[0] == 0
    assert 0.005 < loss[2] < loss[5] < loss[8]
    assert loss[8] > 0.05


# Files


def test_times_are_within_the_day(log: Log) -> None:
    for day, columns in enumerate(log):
        assert_within_day(columns, day)
        assert len(np.unique(columns["ts_ms"] // 3_600_000)) == 24


def assert_within_day(columns: dict[str, np.ndarray], day: int) -> None:
    start_ms = datetime(2024, 3, 1 + day, tzinfo=UTC).timestamp() * 1000
    assert columns["ts_ms"].min() >= start_ms
    assert (columns["ts_ms"] + 1000 * columns["dwell_s"]).max() <= start_ms + 86_400_000
    same_user = np.diff(columns["user_id"]) == 0
    assert np.all((np.diff(columns["ts_ms"]) - np.round(1000 * columns["dwell_s"][:-1]))[same_user] >= 200)


def test_a_day_of_more_than_24_hours_is_cut(tmp_path: Path) -> None:
    config = replace(DAYS, users=3, days=2, impressions_per_day=15_000)
    log = simulate_days(tmp_path / "log", config)
    for day, columns in enumerate(log):
        assert_within_day(columns, day)
    assert sum(columns["dwell_s"].sum() for columns in log) > 0.5 * 6 * 86_400


def test_simulation_file_counts_days(folder: Path, log: Log) -> None:
    simulation = yaml.safe_load((folder / "simulation.yaml").read_text())
    assert simulation["period"] == ["2024-03-01T00:00:00+00:00", "2024-03-06T00:00:00+00:00"]
    assert simulation["impressions"] == sum(len(columns["user_id"]) for columns in log)
    assert simulation["items"] == DAYS.items + 4 * DAYS.num_births
    assert simulation["users"] == DAYS.users + sum(day["new_users"] for day in simulation["days"][1:])
    for day, columns in zip(simulation["days"], log, strict=True):
        assert day["impressions"] == len(columns["user_id"])
        assert day["users"] == DAYS.users


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [
        {"items": 1, "topics": 1, "groups": 1, "users": 1, "taste_drift": 1.0, "impressions_per_day": 0.01},
        {"births_per_day": 1.0, "new_users_per_day": 1.0, "popularity_half_life": 0.001, "vectors": 3},
        {"births_per_day": 0.0, "new_users_per_day": 0.0, "popularity_half_life": 0.001, "vectors": 3},
        {"births_per_day": 0.5, "items": 2, "popularity_half_life": float("inf")},
        {"topics": 2, "groups": 2, "topic_drift": 10.0, "taste_drift": 1.0},
    ],
)
def test_extreme_settings(tmp_path: Path, settings: dict[str, float]) -> None:
    config = SimulateConfig(**{"users": 20, "items": 30, "days": 4, "impressions_per_day": 5.0, **settings})
    summary = simulate(str(tmp_path / "log"), config)
    assert summary.impressions == sum(len(columns["user_id"]) for columns in read_days(tmp_path / "log")) > 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("days", 0),
        ("days", 367),
        ("span_days", 0),
        ("impressions_per_day", float("inf")),
        ("births_per_day", 1.1),
        ("popularity_half_life", 0.0),
        ("popularity_half_life", float("nan")),
        ("taste_drift", -0.1),
        ("topic_drift", -0.1),
        ("new_users_per_day", 2.0),
    ],
)
def test_rejects_invalid_settings(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        SimulateConfig(**{setting: value})


# The source


def rows(raw: Path, days: list[str]) -> Iterator[set[tuple]]:
    """Yield the relation of a log, then that of each of its days."""
    for path in (raw, *(raw / day for day in days)):
        connection = duckdb.connect()
        yield set(connection.execute(Simulated(str(path)).impressions(connection)).fetchall())


def test_a_log_is_the_union_of_its_days(folder: Path, log: Log) -> None:
    whole, *days = rows(folder, NAMES)
    assert whole == set().union(*days)
    assert len(whole) == sum(len(day) for day in days) == sum(len(columns["user_id"]) for columns in log)
    assert {row[-1] for row in whole} == {None}


def test_a_day_describes_itself_as_the_log(folder: Path) -> None:
    log, day = (Simulated(str(path)).describe() for path in (folder, folder / NAMES[2]))
    assert replace(log, vectors=()) == replace(day, vectors=())
    connection = duckdb.connect()
    log_vectors, day_vectors = (
        dict(connection.execute(info.vectors[0].relation(connection)).fetchall()) for info in (log, day)
    )
    assert len(log_vectors) == DAYS.items + 4 * DAYS.num_births
    assert len(day_vectors) == pq.read_metadata(folder / NAMES[2] / "items.parquet").num_rows
    assert day_vectors.items() <= log_vectors.items()


def test_rejects_a_video_that_differs_between_days(folder: Path, tmp_path: Path) -> None:
    for day in NAMES[:2]:
        for file, content in file_bytes(folder, day).items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
    items = pq.read_table(tmp_path / NAMES[1] / "items.parquet")
    column = items.column_names.index("category")
    items = items.set_column(column, "category", pa.array(items["category"].to_numpy() + 1))
    pq.write_table(items, tmp_path / NAMES[1] / "items.parquet")
    connection = duckdb.connect()
    with pytest.raises(DataError, match=r"2024-03-02/items.parquet, field 'item_id': \d+ occurs in several rows"):
        Simulated(str(tmp_path)).impressions(connection)
    (tmp_path / NAMES[1] / "users.parquet").unlink()
    with pytest.raises(DataError, match=r"2024-03-02/users.parquet: file not found"):
        Simulated(str(tmp_path)).describe()
