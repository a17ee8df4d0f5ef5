"""Simulated logs with known truth: the world, watched by its users, as Parquet files [ours].

::

    users.parquet                what a platform knows of its users
    items.parquet                what it knows of its videos
    impressions/part-*.parquet   what happened, and the true probability that it would
    world.yaml                   the settings, the effects and the rates that came out

Users are simulated in blocks of :data:`~a2gen_rec.simulation.world.BLOCK`, each with its own random generator: memory
is bounded, a seed gives the same bytes again, ``chunk_users`` changes no row, and a larger number of users leaves the
blocks that were full as they are.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from a2gen_rec.config import SimulateConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation import viewing
from a2gen_rec.simulation.world import (
    ACTIONS,
    ACTIVITY_LEVELS,
    AGE_BANDS,
    FIT_STREAM,
    HOOK_DURATION_MS,
    IMPRESSION_STREAM,
    TABS,
    UPLOAD_TYPES,
    USERS_PER_BLOCK,
    Items,
    RecommendationPolicy,
    Users,
    make_items,
    make_users,
)
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

WORLD_FILE = "world.yaml"
LABEL_NAME = "long_view"
EPOCH_END_MS = datetime(2024, 3, 15, tzinfo=UTC)
DAY_MS = 86_400_000
SESSION_LENGTH = 12
FOR_YOU_FRACTION = 0.75
# Relative traffic per hour of the day.
HOUR_WEIGHTS = (5, 3, 2, 1, 1, 2, 4, 7, 8, 8, 9, 10, 13, 11, 9, 9, 10, 11, 13, 15, 18, 18, 14, 9)
# Impressions worked on together: small enough for the processor's cache.
PAIRS_PER_CHUNK = 8_192
CALIBRATION_SAMPLE = 8_192
CALIBRATION_STEPS = 100

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

EFFECT_PARAMETERS = """\
Segments on topics the user is interested in invite more actions and hold the user longer.
Highlights on such topics do so more: actions cluster there.
A like inside a highlight raises the chance of a later follow and of a later collect.
A follow before any like makes the user watch longer from then on.
A mismatch in the first three seconds makes the user skip.
Users differ in habit (each action) and patience; age bands differ in habit.
A user's group hints at the interests, the category is the main topic of the video's segments.
The for_you tab shows items by interest and popularity, discover by popularity alone.
Items may be shown to a user more than once; nothing else drifts or repeats over time.
"""


@dataclass(frozen=True)
class SimulationSummary:
    """What was written; ``rates``: share of impressions per action, ``long_view`` and ``glance`` (under 3 s)."""

    impressions: int
    users: int
    items: int
    rates: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class SimulatedWorld:
    """Everything of the world that is the same for all users."""

    config: SimulateConfig
    items: Items
    policy: RecommendationPolicy
    base: viewing.BaseLogits


def make_world(config: SimulateConfig) -> SimulatedWorld:
    """Draw the items and fit the base log-odds to the rates asked for.

    The fit is a damped fixed-point iteration on the exact probabilities of a sample of impressions.

    Raises:
        ConfigError: a rate cannot be reached.
    """
    items = make_items(config)
    policy = RecommendationPolicy.of(items, config.topics)
    users = make_users(replace(config, users=USERS_PER_BLOCK), 0)
    rng = np.random.default_rng([config.seed, FIT_STREAM])
    row = rng.choice(len(users.user_id), CALIBRATION_SAMPLE, p=users.activity / users.activity.sum())
    item = policy.draw(users, row, rng.random(CALIBRATION_SAMPLE) < FOR_YOU_FRACTION * config.personalized_share, rng)

    rates = np.array([getattr(config, f"{name}_rate") for name in (*ACTIONS, "glance", LABEL_NAME)])
    base = np.array([*_log_odds(rates[:-2] / 3), -1.0, -1.5])
    for _ in range(CALIBRATION_STEPS):
        truth = viewing.exact_marginals(
            viewing.segment_probabilities(config, _calibrate_base_logits(base), items, users, row, item)
        )
        found = np.array([*truth.action.mean(axis=1), truth.glance.mean(), truth.long_view.mean()])
        error = _log_odds(rates) - _log_odds(found)
        if np.abs(error).max() < 1e-3:
            break
        # More leaving makes fewer long views.
        base += 0.5 * error * np.array([1.0] * (len(ACTIONS) + 1) + [-1.0])
    worst = int(np.abs(error).argmax())
    if not abs(error[worst]) < 0.02:
        name = (*ACTIONS, "glance", LABEL_NAME)[worst]
        raise ConfigError(f"{name}_rate {rates[worst]} cannot be reached in this world (came to {found[worst]:.3f})")
    return SimulatedWorld(config, items, policy, _calibrate_base_logits(base))


def _calibrate_base_logits(values: np.ndarray) -> viewing.BaseLogits:
    return viewing.BaseLogits(action=values[:-2], glance=float(values[-2]), leave=float(values[-1]))


def _log_odds(rate: np.ndarray) -> np.ndarray:
    return np.log(rate) - np.log1p(-rate)


def _session_times(
    first: np.ndarray, user: np.ndarray, lasts_ms: np.ndarray, days: int, rng: np.random.Generator
) -> np.ndarray:
    """Begin of each impression, ms: at its session's start, or when the one before it is over, if that is later.

    Args:
        first: (N,) bool, first impression of a session; user: (N,) int, sorted, 0 and on;
        lasts_ms: (N,) int64, time until the same session's next impression can begin.
    """
    hour_share = np.cumsum(HOUR_WEIGHTS) / np.sum(HOUR_WEIGHTS)
    sessions = int(first.sum())
    hour = np.minimum(hour_share.searchsorted(rng.random(sessions)), 23)
    start = rng.integers(days, size=sessions) * DAY_MS + hour * (DAY_MS // 24)
    start += rng.integers(DAY_MS // 24, size=sessions)
    # One stretch of time per user, longer than any log, makes sorting and running maxima keep to the user.
    stretch = days * DAY_MS + int(np.bincount(user, weights=lasts_ms).max())
    start = np.sort(start + user[first] * stretch)
    elapsed = lasts_ms.cumsum() - lasts_ms
    earliest = np.full(len(user), np.iinfo(np.int64).min)
    earliest[first] = start - elapsed[first]
    begin = np.maximum.accumulate(earliest) + elapsed - user * stretch
    # A log that would run past its end begins earlier instead.
    span = np.zeros(user[-1] + 1, dtype=np.int64)
    np.maximum.at(span, user, begin + lasts_ms)
    end_ms = int(EPOCH_END_MS.timestamp() * 1000)
    return end_ms - days * DAY_MS + begin - np.maximum(span - days * DAY_MS, 0)[user]


def simulate_block(world: SimulatedWorld, users: Users, block: int) -> pa.Table:
    """All impressions of one block of users, by user and time; see :func:`simulate` for the columns."""
    config, rng = world.config, np.random.default_rng([world.config.seed, IMPRESSION_STREAM, block])
    count = np.maximum(rng.poisson(users.activity), 1)
    row = np.repeat(np.arange(len(count)), count)
    first = rng.random(len(row)) < 1 / SESSION_LENGTH
    first[count.cumsum() - count] = True
    tab = (rng.random(int(first.sum())) >= FOR_YOU_FRACTION).astype(np.int8)[first.cumsum() - 1]
    by_interest = (tab == 0) & (rng.random(len(row)) < config.personalized_share)

    item = np.empty(len(row), dtype=np.int64)
    dwell_ms = np.empty(len(row), dtype=np.int64)
    offset_ms = np.empty((len(ACTIONS), len(row)), dtype=np.int64)
    true_action = np.empty((len(ACTIONS), len(row)))
    true_view = np.empty(len(row))
    for begin in range(0, len(row), PAIRS_PER_CHUNK):
        part = slice(begin, begin + PAIRS_PER_CHUNK)
        item[part] = world.policy.draw(users, row[part], by_interest[part], rng)
        draws = viewing.segment_probabilities(config, world.base, world.items, users, row[part], item[part])
        truth = viewing.exact_marginals(draws)
        watched = viewing.sample_views(draws, rng)
        dwell_ms[part], offset_ms[:, part] = watched.dwell_ms, watched.offset_ms
        true_action[:, part], true_view[part] = truth.action, truth.long_view

    gap_ms = rng.integers(200, 2_000, size=len(row))
    ts_ms = _session_times(first, row, dwell_ms + gap_ms, config.days, rng)
    long_view = dwell_ms >= viewing.long_view_threshold_ms(world.items.duration_ms[item])
    action_s = [pa.array(ms / 1000.0, mask=ms < 0) for ms in offset_ms]
    return pa.Table.from_arrays(
        [
            *map(pa.array, (users.user_id[row], item, ts_ms, dwell_ms / 1000.0)),
            _named(TABS, tab),
            *action_s,
            *map(pa.array, (long_view.astype(np.int8), *true_action, true_view)),
        ],
        schema=IMPRESSION_SCHEMA,
    )


def _named(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
    return pa.array(names).take(pa.array(codes))


def _user_table(users: Users) -> pa.Table:
    return pa.Table.from_arrays(
        [
            *map(pa.array, (users.user_id, users.group)),
            _named(AGE_BANDS, users.age_band),
            _named(ACTIVITY_LEVELS, users.activity_level),
        ],
        schema=USER_SCHEMA,
    )


def _item_table(items: Items) -> pa.Table:
    return pa.Table.from_arrays(
        [
            *map(pa.array, (np.arange(len(items.topic)), items.author, items.topic)),
            _named(UPLOAD_TYPES, items.upload_type),
            pa.array(items.duration_ms / 1000.0),
        ],
        schema=ITEM_SCHEMA,
    )


def _write(folder: Path, world: SimulatedWorld, advance: Callable[[int], object]) -> dict[str, int]:
    """Write all files of a log; counts of impressions and of what happened in them."""
    config = world.config
    (folder / "impressions").mkdir()
    pq.write_table(_item_table(world.items), folder / "items.parquet", compression="zstd")
    counts: Counter[str] = Counter()
    blocks = math.ceil(config.users / USERS_PER_BLOCK)
    blocks_per_part = math.ceil(config.users_per_file / USERS_PER_BLOCK)
    with pq.ParquetWriter(folder / "users.parquet", USER_SCHEMA, compression="zstd") as users_file:
        for part, begin in enumerate(range(0, blocks, blocks_per_part)):
            file = folder / "impressions" / f"part-{part:05d}.parquet"
            with pq.ParquetWriter(file, IMPRESSION_SCHEMA, compression="zstd") as impressions_file:
                for block in range(begin, min(begin + blocks_per_part, blocks)):
                    users = make_users(config, block)
                    table = simulate_block(world, users, block)
                    users_file.write_table(_user_table(users))
                    impressions_file.write_table(table)
                    counts["impressions"] += table.num_rows
                    counts.update({action: table.num_rows - table[action].null_count for action in ACTIONS})
                    counts[LABEL_NAME] += pc.sum(table[LABEL_NAME]).as_py()
                    counts["glance"] += pc.sum(pc.less(table["dwell_s"], HOOK_DURATION_MS / 1000)).as_py()
                    advance(len(users.user_id))
    return dict(counts)


def _describe(world: SimulatedWorld, counts: dict[str, int], rates: dict[str, float]) -> str:
    base = world.base
    begin = EPOCH_END_MS - timedelta(days=world.config.days)
    return yaml.safe_dump(
        {
            "settings": asdict(world.config),
            "period": [begin.isoformat(), EPOCH_END_MS.isoformat()],
            "users": world.config.users,
            "items": world.config.items,
            "impressions": counts["impressions"],
            "rates": {name: round(rate, 6) for name, rate in rates.items()},
            "base_log_odds": {
                **{action: round(float(value), 6) for action, value in zip(ACTIONS, base.action, strict=True)},
                "glance": round(base.glance, 6),
                "leave": round(base.leave, 6),
            },
            "long_view": "watched at least min(18 s, duration)",
            "effects": EFFECT_PARAMETERS.splitlines(),
        },
        sort_keys=False,
        width=120,
    )


def simulate(out: str, config: SimulateConfig, progress: bool = False) -> SimulationSummary:
    """Simulate a log and write it to the folder ``out``, which must be absent or empty.

    ``impressions/part-*.parquet``, by user and time: ``user_id``, ``item_id``, ``ts_ms`` (begin), ``dwell_s``,
    ``tab``, one column per action (seconds since the begin; NULL: did not happen), ``long_view`` (0 or 1, watched
    at least min(18 s, duration)), and ``true_<name>``, the exact probability of each action and of ``long_view``
    given user and video. The files appear in ``out`` all at once, or not at all.

    Args:
        progress: show a progress bar on the standard error stream.

    Raises:
        UserError: ``out`` is not empty or cannot be written.
        ConfigError: the rates asked for cannot be reached.
    """
    started = time.monotonic()
    require_empty_dir(out)
    world = make_world(config)
    bar = Progress(
        TextColumn("simulating users"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    try:
        with atomic_output_dir(out) as folder, bar:
            task = bar.add_task("", total=config.users)
            counts = _write(folder, world, partial(bar.advance, task))
            rates = {name: counts[name] / counts["impressions"] for name in (*ACTIONS, LABEL_NAME, "glance")}
            paths.write_text(str(folder / WORLD_FILE), _describe(world, counts, rates))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    seconds = time.monotonic() - started
    return SimulationSummary(counts["impressions"], config.users, config.items, rates, seconds)
