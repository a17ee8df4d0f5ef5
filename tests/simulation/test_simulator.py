"""Simulated logs: exact probabilities, documented effects, output files and the source."""

from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from a2gen_rec.config import SimulateConfig
from a2gen_rec.data.sources.simulated import Simulated
from a2gen_rec.errors import ConfigError, DataError, UserError
from a2gen_rec.simulation import simulator, viewing
from a2gen_rec.simulation.log_files import IMPRESSION_SCHEMA, LABEL_NAME, LOG_END
from a2gen_rec.simulation.population import ACTIONS, HOOK_DURATION_MS, sample_user_block
from a2gen_rec.simulation.simulator import build_simulation, simulate

SMALL = SimulateConfig(users=1_200, items=300, authors=40, impressions_per_user=30, span_days=5)
# Large effects and frequent actions expose errors in the recursion.
STRONG = replace(
    SMALL,
    **{"like_rate": 0.4, "follow_rate": 0.3, "collect_rate": 0.3, "comment_rate": 0.3, "forward_rate": 0.2},
    **{
        "highlight_like_boost": 3.0,
        "follow_retention_boost": 3.0,
        "highlight_strength": 2.0,
        "glance_rate": 0.15,
        "long_view_rate": 0.5,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "log"
    simulate(str(out), SMALL)
    return out


@pytest.fixture(scope="module")
def log(folder: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(folder / "impressions")
    items = pq.read_table(folder / "items.parquet")
    columns = {name: table[name].to_numpy() for name in table.column_names}
    columns["duration_s"] = items["duration_s"].to_numpy()[columns["item_id"]]
    return columns


def auc(positive: np.ndarray, score: np.ndarray) -> float:
    _, rank, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = (count.cumsum() - (count - 1) / 2)[rank]
    positives = int(positive.sum())
    pairs = positives * (len(positive) - positives)
    return float((mean_rank[positive].sum() - positives * (positives + 1) / 2) / pairs)


def occurred(log: dict[str, np.ndarray], name: str) -> np.ndarray:
    return log[name] > 0 if name == LABEL_NAME else ~np.isnan(log[name])


# Viewing: exact probabilities against sampling


def strong_probabilities(config: SimulateConfig, row: np.ndarray, item: np.ndarray) -> viewing.SegmentProbabilities:
    simulated = build_simulation(STRONG)
    return viewing.segment_probabilities(
        config, simulated.base_logits, simulated.catalog.items, sample_user_block(STRONG, 0), row, item
    )


def most_affected_pair(effect: str) -> tuple[int, int]:
    """Return the pair of user and item with the largest influence of an order effect."""
    rng = np.random.default_rng(5)
    row, item = rng.integers(1_000, size=4_000), rng.integers(STRONG.items, size=4_000)
    full = viewing.exact_marginals(strong_probabilities(STRONG, row, item))
    without = viewing.exact_marginals(strong_probabilities(replace(STRONG, **{effect: 0.0}), row, item))
    gain = full.action.sum(axis=0) - without.action.sum(axis=0) + full.log1p_watch - without.log1p_watch
    return int(row[gain.argmax()]), int(item[gain.argmax()])


def test_exact_probabilities_equal_monte_carlo() -> None:
    repeats = 200_000
    pairs = [
        most_affected_pair("highlight_like_boost"),
        most_affected_pair("follow_retention_boost"),
        (3, 10),
        (77, 200),
    ]
    rows, items = np.array(pairs).T
    probabilities = strong_probabilities(STRONG, rows, items)
    truth = viewing.exact_marginals(probabilities)
    for pair in range(len(rows)):
        draws = strong_probabilities(STRONG, np.full(repeats, rows[pair]), np.full(repeats, items[pair]))
        watched = viewing.sample_views(draws, np.random.default_rng(pair))
        dwell_s = watched.dwell_ms / 1000.0
        threshold = viewing.long_view_threshold_ms(probabilities.edges_ms[-1, pair])
        sampled = [*(watched.offset_ms >= 0), watched.dwell_ms >= threshold, watched.dwell_ms < HOOK_DURATION_MS]
        expected = np.array([*truth.action[:, pair], truth.long_view[pair], truth.glance[pair]])
        deviation = np.sqrt(expected * (1 - expected) / repeats)
        z = (np.mean(sampled, axis=1) - expected) / deviation
        assert np.abs(z).max() < 4.5, dict(zip([*ACTIONS, LABEL_NAME, "glance"], z, strict=True))
        log1p = np.log1p(dwell_s)
        # Watch times are truncated to milliseconds, up to 1e-3 s below the continuous ones.
        assert abs(log1p.mean() - truth.log1p_watch[pair]) < 4.5 * log1p.std() / np.sqrt(repeats) + 1e-3


def test_monte_carlo_detects_missing_order_effects() -> None:
    noise = 0.5 / np.sqrt(200_000)
    for effect in ("highlight_like_boost", "follow_retention_boost"):
        row, item = (np.array([value]) for value in most_affected_pair(effect))
        full = viewing.exact_marginals(strong_probabilities(STRONG, row, item))
        without = viewing.exact_marginals(strong_probabilities(replace(STRONG, **{effect: 0.0}), row, item))
        gain = full.action - without.action
        if effect == "follow_retention_boost":
            assert (full.long_view - without.long_view).item() > 20 * noise
        else:
            assert gain[viewing.FOLLOW].item() > 20 * noise
            assert gain[viewing.COLLECT].item() > 20 * noise
            assert gain[viewing.COMMENT].item() == 0


def test_probabilities_are_in_the_unit_interval() -> None:
    rng = np.random.default_rng(1)
    row, item = rng.integers(1_000, size=2_000), rng.integers(STRONG.items, size=2_000)
    for config in (
        STRONG,
        replace(STRONG, highlight_like_boost=-10.0, follow_retention_boost=-10.0, interest_strength=10.0),
    ):
        draws = strong_probabilities(config, row, item)
        truth = viewing.exact_marginals(draws)
        for values in (truth.action, truth.long_view, truth.glance):
            assert np.all((values >= -1e-12) & (values <= 1 + 1e-12))
        assert np.all(truth.long_view + truth.glance <= 1 + 1e-12)
        assert np.all(truth.log1p_watch <= np.log1p(draws.edges_ms[-1] / 1000))


def sample_repeatedly(effect: str) -> tuple[viewing.SegmentProbabilities, viewing.SampledViews]:
    row, item = (np.full(100_000, value) for value in most_affected_pair(effect))
    draws = strong_probabilities(STRONG, row, item)
    return draws, viewing.sample_views(draws, np.random.default_rng(0))


def test_like_in_a_highlight_increases_later_collects() -> None:
    draws, watched = sample_repeatedly("highlight_like_boost")
    like, collect = watched.offset_ms[viewing.LIKE], watched.offset_ms[viewing.COLLECT]
    k = int(draws.highlight[:, 0].argmax())
    start, end = draws.edges_ms[k, 0], draws.edges_ms[k + 1, 0]
    # Both groups watch past the highlight without a collect; they differ only in the like.
    eligible = (watched.dwell_ms > end) & ((collect < 0) | (collect >= end))
    liked, not_liked = eligible & (like >= start) & (like < end), eligible & ((like < 0) | (like >= end))
    assert min(liked.sum(), not_liked.sum()) > 1_000
    assert (collect[liked] >= 0).mean() > (collect[not_liked] >= 0).mean() + 0.05


def test_follow_before_like_increases_watch_time() -> None:
    draws, watched = sample_repeatedly("follow_retention_boost")
    like, follow = watched.offset_ms[viewing.LIKE], watched.offset_ms[viewing.FOLLOW]
    end = draws.edges_ms[2, 0]
    within = (like >= 0) & (follow >= 0) & (like < end) & (follow < end) & (watched.dwell_ms > end)
    early, late = within & (follow < like), within & (like < follow)
    assert min(early.sum(), late.sum()) > 500
    assert watched.dwell_ms[early].mean() > 1.1 * watched.dwell_ms[late].mean()


def test_mismatch_increases_glances() -> None:
    simulated, users = build_simulation(SMALL), sample_user_block(SMALL, 0)
    item = np.repeat(np.arange(SMALL.items), len(users.user_id))
    row = np.tile(np.arange(len(users.user_id)), SMALL.items)
    truth = viewing.exact_marginals(
        viewing.segment_probabilities(SMALL, simulated.base_logits, simulated.catalog.items, users, row, item)
    )
    match = users.affinity[row, simulated.catalog.items.topic[item]]
    assert truth.glance[match < 0].mean() > truth.glance[match > 1].mean() + 0.25


# The log


def test_log_is_consistent(log: dict[str, np.ndarray]) -> None:
    end_ms = int(LOG_END.timestamp() * 1000)
    same = np.diff(log["user_id"]) == 0
    gap_ms = np.diff(log["ts_ms"]) - np.round(log["dwell_s"][:-1] * 1000)
    assert np.all(np.diff(log["user_id"]) >= 0)
    assert gap_ms[same].min() >= 200
    assert log["ts_ms"].max() + 1000 * log["dwell_s"][log["ts_ms"].argmax()] <= end_ms
    assert log["ts_ms"].min() > end_ms - (SMALL.span_days + 1) * 86_400_000
    assert np.all((log["dwell_s"] >= 0) & (log["dwell_s"] <= log["duration_s"]))
    assert (log["dwell_s"] == log["duration_s"]).mean() > 0.1
    for action in ACTIONS:
        offset = log[action][occurred(log, action)]
        assert np.all((offset >= 0) & (offset <= log["dwell_s"][occurred(log, action)]))
    assert np.array_equal(log[LABEL_NAME] > 0, log["dwell_s"] >= np.minimum(18.0, log["duration_s"]))


def test_dense_logs_end_on_time(tmp_path: Path) -> None:
    simulate(str(tmp_path / "log"), replace(SMALL, users=20, span_days=1, impressions_per_user=3_000))
    table = pq.read_table(tmp_path / "log" / "impressions")
    user, ts, dwell = (table[name].to_numpy() for name in ("user_id", "ts_ms", "dwell_s"))
    assert (ts + 1000 * dwell).max() <= LOG_END.timestamp() * 1000
    assert np.all((np.diff(ts) - np.round(1000 * dwell[:-1]))[np.diff(user) == 0] >= 200)


def test_rates_and_true_probabilities_match_outcomes(log: dict[str, np.ndarray]) -> None:
    for name in (*ACTIONS, LABEL_NAME):
        truth, observed = log[f"true_{name}"], occurred(log, name)
        z = (observed.sum() - truth.sum()) / np.sqrt((truth * (1 - truth)).sum())
        assert abs(z) < 4.5, name
        assert truth.mean() == pytest.approx(getattr(SMALL, f"{name}_rate"), rel=0.15)
    assert (log["dwell_s"] < 3).mean() == pytest.approx(SMALL.glance_rate, rel=0.15)


def test_signal_depends_on_the_user_item_match(log: dict[str, np.ndarray]) -> None:
    train = log["ts_ms"] < np.quantile(log["ts_ms"], 0.8)
    for name in (*ACTIONS, LABEL_NAME):
        observed, item = occurred(log, name), log["item_id"]
        positives = np.bincount(item[train], observed[train], SMALL.items)
        impressions = np.bincount(item[train], minlength=SMALL.items)
        rate = (positives + 20 * observed[train].mean()) / (impressions + 20)
        assert 0.78 < auc(observed[~train], log[f"true_{name}"][~train]) < 0.92, name
        assert auc(observed[~train], rate[item[~train]]) < 0.70, name


def test_actions_cluster_in_highlights_of_interest(log: dict[str, np.ndarray]) -> None:
    items = build_simulation(SMALL).catalog.items
    affinity = np.concatenate([sample_user_block(SMALL, block).affinity for block in range(2)])
    item = log["item_id"]
    start, end = items.edges_ms[:-1, item] / 1000, items.edges_ms[1:, item] / 1000
    interested = affinity[log["user_id"], items.segment_topic[:, item]] > 1
    watched = np.clip(log["dwell_s"] - start, 0, end - start)
    watched[0] = 0
    actions = sum(((log[action] >= start) & (log[action] < end)).astype(int) for action in ACTIONS)
    inside, outside = interested & items.highlight[:, item], interested & ~items.highlight[:, item]
    assert actions[inside].sum() / watched[inside].sum() > 1.3 * actions[outside].sum() / watched[outside].sum()


# Output files


def test_seed_determines_the_bytes(folder: Path, tmp_path: Path) -> None:
    simulate(str(tmp_path / "again"), SMALL)
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert len(names) == 4
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    simulate(str(tmp_path / "other"), replace(SMALL, seed=1, users=100))
    assert (folder / "items.parquet").read_bytes() != (tmp_path / "other" / "items.parquet").read_bytes()


def test_rows_do_not_depend_on_file_size_or_number_of_users(folder: Path, tmp_path: Path) -> None:
    full = pq.read_table(folder / "impressions")
    simulate(str(tmp_path / "chunked"), replace(SMALL, users_per_file=1_000))
    assert len(list((tmp_path / "chunked" / "impressions").iterdir())) == 2
    assert pq.read_table(tmp_path / "chunked" / "impressions").equals(full)
    simulate(str(tmp_path / "fewer"), replace(SMALL, users=1_000))
    fewer = pq.read_table(tmp_path / "fewer" / "impressions")
    assert fewer.equals(full.slice(0, fewer.num_rows))
    assert full["user_id"][fewer.num_rows].as_py() == 1_000


def test_summary_and_simulation_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    summary = simulate(str(tmp_path / "log"), replace(SMALL, users=50))
    assert capfd.readouterr() == ("", "")
    table = pq.read_table(tmp_path / "log" / "impressions")
    simulation = yaml.safe_load((tmp_path / "log" / "simulation.yaml").read_text())
    assert summary.impressions == simulation["impressions"] == table.num_rows
    assert summary.rates["like"] * table.num_rows == pytest.approx(table.num_rows - table["like"].null_count)
    assert (
        simulation["settings"]["users"] == summary.users == pq.read_table(tmp_path / "log" / "users.parquet").num_rows
    )
    assert (
        simulation["settings"]["items"] == summary.items == pq.read_table(tmp_path / "log" / "items.parquet").num_rows
    )
    simulate(str(tmp_path / "with_progress"), replace(SMALL, users=50), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "50/50" in err


def test_single_user_and_item(tmp_path: Path) -> None:
    one = {"users": 1, "items": 1, "authors": 1, "topics": 1, "groups": 1, "impressions_per_user": 1, "span_days": 1}
    assert simulate(str(tmp_path / "log"), SimulateConfig(**one)).impressions >= 1


def test_overwrites_nothing(folder: Path, tmp_path: Path) -> None:
    before = (folder / "simulation.yaml").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        simulate(str(folder), replace(SMALL, users=10))
    assert (folder / "simulation.yaml").read_bytes() == before
    (tmp_path / "file").write_text("existing")
    for out in ("file", "file/below"):
        with pytest.raises(UserError, match="file"):
            simulate(str(tmp_path / out), replace(SMALL, users=10))
    assert (tmp_path / "file").read_text() == "existing"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    original = simulator.simulate_block

    def fails(simulated: simulator.Simulation, users: simulator.SimulatedUsers, block: int, day: int) -> object:
        if block == 1:
            raise failure
        return original(simulated, users, block, day)

    monkeypatch.setattr(simulator, "simulate_block", fails)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space" if isinstance(failure, OSError) else None):
        simulate(str(tmp_path / "deep" / "log"), SMALL)
    assert list(tmp_path.iterdir()) == []


def test_rejects_unreachable_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator, "CALIBRATION_STEPS", 1)
    with pytest.raises(ConfigError, match=r"_rate .* is not reachable"):
        build_simulation(SMALL)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("users", 0),
        ("groups", 0),
        ("seed", -1),
        ("like_rate", 0.0),
        ("glance_rate", 0.7),
        ("interest_strength", float("nan")),
    ],
)
def test_rejects_invalid_settings(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        SimulateConfig(**{setting: value})


# The source


def test_source_returns_the_standard_relation(folder: Path, log: dict[str, np.ndarray]) -> None:
    source = Simulated(str(folder))
    info = source.describe()
    connection = duckdb.connect()
    relation = connection.sql(source.impressions(connection))
    types = dict(zip(relation.columns, map(str, relation.types), strict=True))
    expected = {"user_id": "VARCHAR", "item_id": "VARCHAR", "ts_ms": "BIGINT", "dwell_s": "DOUBLE"}
    expected |= {f"at_{action}": "DOUBLE" for action in info.actions}
    expected |= {f"label_{label}": "DOUBLE" for label in info.labels}
    expected |= {f"oracle_{name}": "DOUBLE" for name in info.oracle}
    expected |= {spec.name: "DOUBLE" if spec.kind == "buckets" else "VARCHAR" for spec in info.features}
    assert types == {**expected, "drop_reason": "VARCHAR"}
    rows = connection.sql(f"SELECT * FROM ({source.impressions(connection)}) ORDER BY user_id::INT, ts_ms").fetchnumpy()
    assert np.ma.count(rows["drop_reason"]) == 0
    assert np.array_equal(rows["item_id"].astype(int), log["item_id"])
    assert np.allclose(rows["oracle_follow"], log["true_follow"])
    assert np.array_equal(~np.ma.getmaskarray(rows["at_follow"]), occurred(log, "follow"))
    assert np.allclose(rows["duration_s"], log["duration_s"])


def copy_log(folder: Path, target: Path) -> Path:
    for file in folder.rglob("*.parquet"):
        copy = target / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("missing", ["users.parquet", "items.parquet", "impressions/part-00000.parquet"])
def test_reports_missing_and_corrupted_files(folder: Path, tmp_path: Path, missing: str) -> None:
    raw = copy_log(folder, tmp_path / "raw")
    (raw / missing).write_bytes(b"not parquet")
    with pytest.raises(DataError, match=rf"{missing}: not a Parquet file"):
        Simulated(str(raw)).describe()
    (raw / missing).unlink()
    with pytest.raises(DataError, match=missing.split("/")[0]):
        Simulated(str(raw)).describe()


def test_reports_missing_and_mistyped_columns(folder: Path, tmp_path: Path) -> None:
    raw = copy_log(folder, tmp_path / "raw")
    part = raw / "impressions" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(table.drop_columns(["true_like"]), part)
    with pytest.raises(DataError, match=r"part-00000.parquet, field 'true_like': column is missing"):
        Simulated(str(raw)).describe()
    column = table.column_names.index("dwell_s")
    pq.write_table(table.set_column(column, "dwell_s", table["dwell_s"].cast("string")), part)
    with pytest.raises(DataError, match=r"field 'dwell_s': is string, expected double"):
        Simulated(str(raw)).describe()


def test_impressions_of_unknown_items_are_dropped(folder: Path, tmp_path: Path) -> None:
    raw = copy_log(folder, tmp_path / "raw")
    items = pq.read_table(raw / "items.parquet")
    pq.write_table(items.slice(0, 100), raw / "items.parquet")
    connection = duckdb.connect()
    source = Simulated(str(raw))
    query = f"SELECT count(*), count(drop_reason), min(drop_reason) FROM ({source.impressions(connection)})"
    rows, num_dropped, reason = connection.execute(query).fetchone() or (0, 0, "")
    table = pq.read_table(folder / "impressions", schema=IMPRESSION_SCHEMA)
    assert rows == table.num_rows
    assert num_dropped == int((table["item_id"].to_numpy() >= 100).sum())
    assert reason == "item not in items.parquet"
