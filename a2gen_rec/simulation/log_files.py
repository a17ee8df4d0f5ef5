"""Parquet and YAML files of a simulated log [ours].

A static log has one folder::

    users.parquet                visible user features
    items.parquet                visible video features
    vectors.parquet              content vectors of videos, if any
    impressions/part-*.parquet   outcomes and their true probabilities
    simulation.yaml              settings, effects and resulting rates

A log of several days has these files, except ``simulation.yaml``, in one folder per day, such as ``2024-03-01``. The
folder of a day is a log by itself: its users and videos are those of the day.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from a2gen_rec.config import SimulateConfig
from a2gen_rec.simulation import viewing
from a2gen_rec.simulation.population import (
    ACTIONS,
    ACTIVITY_LEVELS,
    AGE_BANDS,
    HOOK_DURATION_MS,
    TABS,
    UPLOAD_TYPES,
    SimulatedUsers,
    sample_content_vectors,
    sample_item_batch,
)
from a2gen_rec.simulation.world import Catalog

SIMULATION_FILE = "simulation.yaml"
USERS_FILE, ITEMS_FILE, VECTORS_FILE = "users.parquet", "items.parquet", "vectors.parquet"
IMPRESSIONS_DIR = "impressions"
LABEL_NAME = "long_view"
RATE_NAMES = (*ACTIONS, LABEL_NAME, "glance")
LOG_END = datetime(2024, 3, 15, tzinfo=UTC)
"""End of a static log."""
FIRST_DAY = datetime(2024, 3, 1, tzinfo=UTC)
"""Start of a log of several days."""
DAY_MS = 86_400_000

USER_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "group": pa.int64(),
        "age_band": pa.string(),
        "activity_level": pa.string(),
    }
)
ITEM_SCHEMA = pa.schema(
    {
        "item_id": pa.int64(),
        "author_id": pa.int64(),
        "category": pa.int64(),
        "upload_type": pa.string(),
        "duration_s": pa.float64(),
    }
)
IMPRESSION_SCHEMA = pa.schema(
    {
        "user_id": pa.int64(),
        "item_id": pa.int64(),
        "ts_ms": pa.int64(),
        "dwell_s": pa.float64(),
        "tab": pa.string(),
        **{action: pa.float64() for action in ACTIONS},
        LABEL_NAME: pa.int8(),
        **{f"true_{name}": pa.float64() for name in (*ACTIONS, LABEL_NAME)},
    }
)


EFFECTS = (
    "Segments on topics of interest to the user increase actions and watch time.",
    "Highlights on such topics increase both further: actions cluster there.",
    "A like inside a highlight increases the probability of a later follow and collect.",
    "A follow before any like increases the remaining watch time.",
    "An interest mismatch in the first three seconds increases leaving.",
    "Users differ in action propensity and leave propensity; age bands differ in action propensity.",
    "A user's group is correlated with the interests; the category is the main topic of the video's segments.",
    "The for_you tab selects items by interest and popularity, discover by popularity only.",
)
STATIC_EFFECTS = ("Items may recur for a user; there is no other drift or repetition over time.",)
DAILY_EFFECTS = (
    "Items may recur for a user.",
    "Videos are born and retire at midnight; the popularity of a video halves every half-life.",
    "The popularity of topics follows a mean-reverting random walk, one step per day.",
    "Users trade favourite topics; new favourites follow the user's group and the popularity of topics.",
    "Some users leave at midnight, and as many new users arrive.",
)


def day_names(config: SimulateConfig) -> list[str]:
    """Return the folders of the days of a log, such as ``2024-03-01``; one empty name for a static log."""
    if config.days == 1:
        return [""]
    return [(FIRST_DAY + timedelta(days=day)).date().isoformat() for day in range(config.days)]


def day_period(config: SimulateConfig, day: int) -> tuple[datetime, datetime]:
    """Return the start and end of a day, or of a static log."""
    if config.days == 1:
        return LOG_END - timedelta(days=config.span_days), LOG_END
    return FIRST_DAY + timedelta(days=day), FIRST_DAY + timedelta(days=day + 1)


def impression_table(
    user_id: np.ndarray,
    item: np.ndarray,
    ts_ms: np.ndarray,
    tab: np.ndarray,
    duration_ms: np.ndarray,
    views: viewing.SampledViews,
    true_probabilities: np.ndarray,
) -> pa.Table:
    """Return the table of ``N`` impressions.

    Args:
        user_id: (N,) int64.
        item: (N,) int64.
        ts_ms: (N,) int64, start.
        tab: (N,) int.
        duration_ms: (N,) int64, duration of the video.
        views: outcomes.
        true_probabilities: (A + 1, N) float, of each action and of the long view.
    """
    long_view = views.dwell_ms >= viewing.long_view_threshold_ms(duration_ms)
    action_s = [pa.array(ms / 1000.0, mask=ms < 0) for ms in views.offset_ms]
    return pa.Table.from_arrays(
        [
            *map(pa.array, (user_id, item, ts_ms, views.dwell_ms / 1000.0)),
            _decode(TABS, tab),
            *action_s,
            *map(pa.array, (long_view.astype(np.int8), *true_probabilities)),
        ],
        schema=IMPRESSION_SCHEMA,
    )


def _decode(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
    return pa.array(names).take(pa.array(codes))


def user_schema(config: SimulateConfig) -> pa.Schema:
    """Return the columns of users, with the day of arrival (from 0) in a log of several days."""
    return USER_SCHEMA if config.days == 1 else USER_SCHEMA.append(pa.field("arrival_day", pa.int64()))


def user_table(config: SimulateConfig, users: SimulatedUsers) -> pa.Table:
    columns = [
        *map(pa.array, (users.user_id, users.group)),
        _decode(AGE_BANDS, users.age_band),
        _decode(ACTIVITY_LEVELS, users.activity_level),
        pa.array(users.arrival_day),
    ]
    schema = user_schema(config)
    return pa.Table.from_arrays(columns[: len(schema)], schema=schema)


def write_items(folder: Path, config: SimulateConfig, catalog: Catalog, day: int, vectors: np.ndarray) -> None:
    """Write the videos of a day and their ``vectors`` (I, W), if any.

    Videos have the day of birth in a log of several days.
    """
    shown, items = catalog.shown(day), catalog.items
    columns = [
        *map(pa.array, (shown, items.author[shown], items.topic[shown])),
        _decode(UPLOAD_TYPES, items.upload_type[shown]),
        *map(pa.array, (items.duration_ms[shown] / 1000.0, catalog.birth_day[shown])),
    ]
    schema = ITEM_SCHEMA if config.days == 1 else ITEM_SCHEMA.append(pa.field("birth_day", pa.int64()))
    table = pa.Table.from_arrays(columns[: len(schema)], schema=schema)
    pq.write_table(table, folder / ITEMS_FILE, compression="zstd")
    if config.vectors:
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors[shown].ravel()), config.vectors)
        pq.write_table(pa.table({"item_id": shown, "vector": values}), folder / VECTORS_FILE, compression="zstd")


def content_vectors(config: SimulateConfig) -> np.ndarray:
    """Return the (I, ``config.vectors``) content vectors of the videos of all days."""
    if not config.vectors:
        return np.empty((0, 0), dtype=np.float32)
    days = range(config.days if config.num_births else 1)
    return np.concatenate([sample_content_vectors(config, sample_item_batch(config, day), day) for day in days])


def count_outcomes(table: pa.Table) -> Counter[str]:
    """Return the number of impressions, and of those with each outcome of :data:`RATE_NAMES`."""
    counts = Counter({action: table.num_rows - table[action].null_count for action in ACTIONS})
    counts["impressions"] = table.num_rows
    counts[LABEL_NAME] = pc.sum(table[LABEL_NAME]).as_py() or 0
    counts["glance"] = pc.sum(pc.less(table["dwell_s"], HOOK_DURATION_MS / 1000)).as_py() or 0
    return counts


def outcome_rates(counts: Counter[str]) -> dict[str, float]:
    """Return the share of impressions with each outcome."""
    return {name: counts[name] / max(counts["impressions"], 1) for name in RATE_NAMES}


def simulation_yaml(
    config: SimulateConfig, catalog: Catalog, base: viewing.BaseLogits, day_counts: Sequence[Counter[str]]
) -> str:
    """Return the text of ``simulation.yaml``.

    Args:
        config: settings.
        catalog: videos of all days.
        base: calibrated base log-odds.
        day_counts: per day, the counts of :func:`count_outcomes`, ``users`` and ``new_users``.
    """
    total = sum(day_counts, Counter())
    start, end = day_period(config, 0)[0], day_period(config, config.days - 1)[1]
    content = {
        "settings": asdict(config),
        "period": [start.isoformat(), end.isoformat()],
        "users": total["new_users"],
        "items": len(catalog.birth_day),
        "impressions": total["impressions"],
        "rates": {name: round(rate, 6) for name, rate in outcome_rates(total).items()},
        "base_log_odds": {
            **{action: round(float(value), 6) for action, value in zip(ACTIONS, base.action, strict=True)},
            "glance": round(base.glance, 6),
            "leave": round(base.leave, 6),
        },
        "long_view": "watched at least min(18 s, duration)",
        "effects": [*EFFECTS, *(STATIC_EFFECTS if config.days == 1 else DAILY_EFFECTS)],
    }
    if config.days > 1:
        content["days"] = [
            {
                "day": name,
                "users": counts["users"],
                "new_users": counts["new_users"],
                "items": len(catalog.shown(day)),
                "new_items": int((catalog.birth_day == day).sum()),
                "impressions": counts["impressions"],
            }
            for day, (name, counts) in enumerate(zip(day_names(config), day_counts, strict=True))
        ]
    return yaml.safe_dump(content, sort_keys=False, width=120)
