"""Small logs for replays through ranking and serving: a briefly trained run and the raw impressions.

A log is created once per test session, by the first of pytest-xdist's processes that needs it. Tests get copies.
"""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.prepare.pipeline import prepare
from a2gen_rec.ranking.types import Impression
from a2gen_rec.simulation.simulator import simulate
from a2gen_rec.training.entrypoint import train
from tests.helpers.cards import small_config
from tests.helpers.shared import locked

SPEC = {
    "kind": "impressions",
    "utc_offset_hours": 5.5,
    "columns": {"user": "user", "item": "item", "time": "ts", "dwell_s": "dwell"},
    "actions": {"like": {"flag": "like"}, "comment": {"offset_s": "comment"}, "hate": {"flag": "hate"}},
    "features": [
        {"name": "user_id", "level": "user", "kind": "hash", "size": 20},
        {"name": "city", "level": "user", "size": 3},
        {"name": "item_id", "level": "item", "kind": "hash", "size": 40},
        {"name": "shop", "level": "item", "kind": "hash", "size": 9},
        {"name": "length", "level": "item", "kind": "buckets", "size": 4},
        {"name": "tab", "level": "context", "min_count": 2},
        {"name": "speed", "level": "context", "kind": "buckets", "edges": [1, 2]},
        {"name": "network", "level": "context", "kind": "hash", "size": 5},
        {"name": "age", "level": "user", "kind": "number"},
        {"name": "views", "level": "item", "kind": "number"},
        {"name": "battery", "level": "context", "kind": "number"},
        {"name": "hobbies", "level": "user", "multi_valued": True, "delimiter": "|"},
        {"name": "tags", "level": "item", "multi_valued": True, "weights": "tag_weights"},
        {"name": "topics", "level": "item", "kind": "hash", "size": 6, "multi_valued": True},
        {"name": "moods", "level": "context", "multi_valued": True, "min_count": 2},
    ],
    "vectors": [{"name": "content", "width": 4, "file": "v.parquet", "item": "id"}],
    "duration_feature": "length",
    "negative_actions": ["hate"],
    "split": {"valid_fraction": 0.15, "test_fraction": 0.2},
}


ITEM_FEATURES = ("shop", "length", "views", "tags", "topics")


@dataclass(frozen=True)
class Log:
    """A dataset, a run and raw impressions.

    Attributes:
        data: dataset directory.
        run: run directory.
        impressions: user -> raw impressions sorted by time and item.
    """

    data: str
    run: str
    impressions: dict[str, list[Impression]]


def hashed_log(folder: Path) -> Log:
    """Create a log with edge cases in an empty or new directory.

    Identifiers share rows, the time zone has half hours, actions lack times, categories are numbers, and values are
    missing or unknown. Impressions start simultaneously, overlap, or have unknown watch times.
    """
    return _copy_shared(folder, "hashed", _create_hashed_log)


def simulated_log(folder: Path) -> Log:
    """Create a simulated log, in which all actions have times, in an empty or new directory."""
    return _copy_shared(folder, "simulated", _create_simulated_log)


def _copy_shared(folder: Path, name: str, create: Callable[[Path], Log]) -> Log:
    """Copy a log into ``folder`` after creating it if no process of the session has."""
    with locked(f"{name}-log") as shared:
        pickled = shared.with_suffix(".pickle")
        if not pickled.exists():
            pickled.write_bytes(pickle.dumps(create(shared).impressions))
    shutil.copytree(shared, folder, dirs_exist_ok=True)
    for file in (folder / "run").rglob("*"):
        if file.suffix in (".yaml", ".json"):  # the run names its dataset
            file.write_text(file.read_text().replace(str(shared), str(folder)))
    return Log(str(folder / "data"), str(folder / "run"), pickle.loads(pickled.read_bytes()))


def _create_hashed_log(folder: Path) -> Log:
    rng = np.random.default_rng(0)
    count, items = 700, 60
    item, user = rng.integers(0, items, count), rng.integers(0, 25, count)
    shop, duration = rng.integers(0, 12, items), np.where(rng.random(items) < 0.2, np.nan, rng.uniform(2, 60, items))
    dwell = np.where(rng.random(count) < 0.15, np.nan, rng.exponential(15, count))
    comment = np.where(rng.random(count) < 0.2, rng.uniform(0, 20, count), np.nan)
    columns = {
        "user": [f"u{number}" for number in user],
        "item": [f"i{number}" for number in item],
        "ts": 10**12 + np.cumsum(rng.choice([0, 900, 20_000, 900_000, 4_000_000], count, p=[0.1, 0.3, 0.3, 0.2, 0.1])),
        "dwell": dwell,
        "like": (rng.random(count) < 0.3).astype(int),
        "comment": pa.array(comment, from_pandas=True),
        "hate": (rng.random(count) < 0.1).astype(int),
        "city": [f"c{number % 5}" for number in user],
        "shop": [None if shop[number] == 0 else f"s{shop[number]}" for number in item],
        "length": pa.array(duration[item], from_pandas=True),
        "tab": [int(tab) if tab < 40 else None for tab in rng.geometric(0.2, count)],
        "speed": rng.choice([0.5, 1.0, 1.5, 3.0], count),
        "network": rng.choice(["wifi", "4g", "5g"], count),
        "age": [None if number % 6 == 0 else 20 + number for number in user],
        "views": [None if number % 7 == 0 else float(number**3) for number in item],
        "hobbies": [("|".join(f"h{k}" for k in range(number % 4)) or None) for number in user],
        "tags": [[f"t{k}" for k in range(number % 5)] for number in item],
        "tag_weights": [[0.5 + k for k in range(number % 5)] for number in item],
        "topics": [None if number % 8 == 0 else [number % 3, 10 + number % 4] for number in item],
        "moods": [[f"m{k}" for k in rng.integers(0, 9, size)] for size in rng.integers(0, 4, count)],
        "battery": pa.array(np.where(rng.random(count) < 0.2, np.nan, rng.uniform(0, 1, count)), from_pandas=True),
    }
    (folder / "raw").mkdir(parents=True)
    table = pa.table(columns)
    pq.write_table(table, folder / "raw" / "log.parquet")
    vectors = np.random.default_rng(1).normal(size=(50, 4)).tolist()  # ten items have none
    pq.write_table(
        pa.table({"id": [f"i{number}" for number in range(50)], "content": vectors}), folder / "raw" / "v.parquet"
    )
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    config = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, max_history=9, max_targets=3)
    prepare("generic", str(folder / "raw"), str(folder / "data"), config, str(folder / "spec.yaml"))
    raw: dict[str, dict[tuple, Impression]] = {}
    for row in table.to_pylist():
        flags = [(name, None) for name in ("like", "hate") if row[name]]
        actions = [*flags, *([("comment", row["comment"])] if row["comment"] is not None else [])]
        watch = None if np.isnan(row["dwell"]) else row["dwell"]
        features = {name: row[name] for name in ("tab", "speed", "network", "battery", "moods")}
        if row["ts"] % 2:  # passed explicitly instead of read from the item index
            features |= {name: row[name] for name in ITEM_FEATURES if name != "tags"}
            features["tags"] = dict(zip(row["tags"], row["tag_weights"], strict=True))
        impression = Impression(row["item"], row["ts"], watch, actions, features)
        raw.setdefault(row["user"], {})[impression.ts_ms, impression.item] = impression
    return _train_run(folder, {user: [rows[key] for key in sorted(rows)] for user, rows in raw.items()})


def _create_simulated_log(folder: Path) -> Log:
    config = SimulateConfig(users=30, items=60, authors=12, impressions_per_user=40, seed=1, vectors=6)
    simulate(str(folder / "raw"), config)
    config = PrepareConfig(num_partitions=2, threads=1, memory_limit_gb=0.5, max_history=12, max_targets=5)
    card = prepare("simulated", str(folder / "raw"), str(folder / "data"), config)
    action_columns = ", ".join(f'"{name}"' for name in card.predicted_actions)
    columns = f"user_id, item_id, ts_ms, dwell_s, tab, long_view, {action_columns}"
    query = f"SELECT {columns} FROM '{folder}/raw/impressions/*.parquet'"
    rows = sorted(duckdb.sql(query).fetchall(), key=lambda row: str(row[1]))
    raw: dict[str, list[Impression]] = {}
    for user, item, ts_ms, dwell, tab, long_view, *times in rows:
        actions = [(name, time) for name, time in zip(card.predicted_actions, times, strict=True) if time is not None]
        labels = {"long_view": bool(long_view)}
        raw.setdefault(str(user), []).append(Impression(str(item), ts_ms, dwell, actions, {"tab": tab}, labels))
    ordered = {user: sorted(past, key=lambda impression: impression.ts_ms) for user, past in raw.items()}
    return _train_run(folder, ordered)


def _train_run(folder: Path, impressions: dict[str, list[Impression]]) -> Log:
    """Train far from the symmetric initial values, so that every input affects the predictions."""
    config = small_config(feedback_encoding="dual_view_full", session_features=True, predict_objectives=True)
    config.train.max_steps, config.loader.prefetch, config.train.log_interval = 6, False, 0
    config.optim.dense_lr, config.optim.sparse_lr, config.evaluate.max_unexplored_mass = 0.03, 0.3, 0.0
    config.loader.max_impressions_per_batch = 300
    train(config, str(folder / "data"), str(folder / "run"))
    return Log(str(folder / "data"), str(folder / "run"), impressions)
