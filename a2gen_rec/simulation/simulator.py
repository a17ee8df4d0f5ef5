"""Simulated logs with known true probabilities, as Parquet files [ours].

::

    users.parquet                visible user features
    items.parquet                visible video features
    vectors.parquet              content vectors of videos, if any
    impressions/part-*.parquet   outcomes and their true probabilities
    simulation.yaml              settings, effects and resulting rates

Users are simulated in blocks of :data:`~a2gen_rec.simulation.population.USERS_PER_BLOCK`, each with its own random
generator. Memory is bounded, and a seed gives the same bytes again. ``users_per_file`` changes no row. A larger number
of users leaves full blocks unchanged.
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
from a2gen_rec.simulation.population import (
    ACTIONS,
    ACTIVITY_LEVELS,
    AGE_BANDS,
    CALIBRATION_STREAM,
    HOOK_DURATION_MS,
    IMPRESSION_STREAM,
    TABS,
    UPLOAD_TYPES,
    USERS_PER_BLOCK,
    RecommendationPolicy,
    SimulatedItems,
    SimulatedUsers,
    sample_content_vectors,
    sample_item_catalog,
    sample_user_block,
)
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

SIMULATION_FILE = "simulation.yaml"
VECTORS_FILE = "vectors.parquet"
LABEL_NAME = "long_view"
LOG_END = datetime(2024, 3, 15, tzinfo=UTC)
DAY_MS = 86_400_000
SESSION_LENGTH = 12
FOR_YOU_FRACTION = 0.75
# Relative traffic per hour of day.
HOUR_WEIGHTS = (5, 3, 2, 1, 1, 2, 4, 7, 8, 8, 9, 10, 13, 11, 9, 9, 10, 11, 13, 15, 18, 18, 14, 9)
# Impressions per chunk: small enough for the processor cache.
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

EFFECTS = """\
Segments on topics of interest to the user increase actions and watch time.
Highlights on such topics increase both further: actions cluster there.
A like inside a highlight increases the probability of a later follow and collect.
A follow before any like increases the remaining watch time.
An interest mismatch in the first three seconds increases leaving.
Users differ in action propensity and leave propensity; age bands differ in action propensity.
A user's group is correlated with the interests; the category is the main topic of the video's segments.
The for_you tab selects items by interest and popularity, discover by popularity only.
Items may recur for a user; there is no other drift or repetition over time.
"""


@dataclass(frozen=True)
class SimulationSummary:
    """Summary of a simulated log.

    Attributes:
        impressions: number of impressions.
        users: number of users.
        items: number of items.
        rates: share of impressions per action, ``long_view`` and ``glance`` (under 3 s).
        seconds: duration of the simulation.
    """

    impressions: int
    users: int
    items: int
    rates: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """Parts of the simulation that are shared by all users.

    Attributes:
        config: settings.
        items: all videos.
        policy: recommendation policy.
        base_logits: calibrated base log-odds.
    """

    config: SimulateConfig
    items: SimulatedItems
    policy: RecommendationPolicy
    base_logits: viewing.BaseLogits


def build_simulation(config: SimulateConfig) -> Simulation:
    """Sample the items and calibrate the base log-odds to the configured rates.

    The calibration is a damped fixed-point iteration on the exact probabilities of a sample of impressions.

    Raises:
        ConfigError: a rate is not reachable.
    """
    items = sample_item_catalog(config)
    policy = RecommendationPolicy.from_items(items, config.topics)
    users = sample_user_block(replace(config, users=USERS_PER_BLOCK), 0)
    rng = np.random.default_rng([config.seed, CALIBRATION_STREAM])
    user_row = rng.choice(len(users.user_id), CALIBRATION_SAMPLE, p=users.activity / users.activity.sum())
    item = policy.sample_items(
        users, user_row, rng.random(CALIBRATION_SAMPLE) < FOR_YOU_FRACTION * config.personalized_share, rng
    )

    rates = np.array([getattr(config, f"{name}_rate") for name in (*ACTIONS, "glance", LABEL_NAME)])
    parameters = np.array([*_log_odds(rates[:-2] / 3), -1.0, -1.5])
    for _ in range(CALIBRATION_STEPS):
        marginals = viewing.exact_marginals(
            viewing.segment_probabilities(config, _base_logits(parameters), items, users, user_row, item)
        )
        simulated_rates = np.array(
            [*marginals.action.mean(axis=1), marginals.glance.mean(), marginals.long_view.mean()]
        )
        error = _log_odds(rates) - _log_odds(simulated_rates)
        if np.abs(error).max() < 1e-3:
            break
        # A higher leave rate decreases the long-view rate.
        parameters += 0.5 * error * np.array([1.0] * (len(ACTIONS) + 1) + [-1.0])
    worst = int(np.abs(error).argmax())
    if not abs(error[worst]) < 0.02:
        name = (*ACTIONS, "glance", LABEL_NAME)[worst]
        raise ConfigError(
            f"{name}_rate {rates[worst]} is not reachable with these settings (got {simulated_rates[worst]:.3f})"
        )
    return Simulation(config, items, policy, _base_logits(parameters))


def _base_logits(values: np.ndarray) -> viewing.BaseLogits:
    return viewing.BaseLogits(action=values[:-2], glance=float(values[-2]), leave=float(values[-1]))


def _log_odds(rate: np.ndarray) -> np.ndarray:
    return np.log(rate) - np.log1p(-rate)


def _session_times(
    is_session_start: np.ndarray, user: np.ndarray, duration_ms: np.ndarray, days: int, rng: np.random.Generator
) -> np.ndarray:
    """Return start times in ms: the session's start or the end of the previous impression, whichever is later.

    Args:
        is_session_start: (N,) bool, first impression of a session.
        user: (N,) int, sorted, from 0.
        duration_ms: (N,) int64, time until the next impression of the same session can start.
        days: span of the log.
        rng: random generator.
    """
    hour_cdf = np.cumsum(HOUR_WEIGHTS) / np.sum(HOUR_WEIGHTS)
    num_sessions = int(is_session_start.sum())
    hour = np.minimum(hour_cdf.searchsorted(rng.random(num_sessions)), 23)
    start = rng.integers(days, size=num_sessions) * DAY_MS + hour * (DAY_MS // 24)
    start += rng.integers(DAY_MS // 24, size=num_sessions)
    # A time offset per user, longer than any log, keeps sorting and running maxima within the user.
    user_stride = days * DAY_MS + int(np.max(np.bincount(user, weights=duration_ms)))
    start = np.sort(start + user[is_session_start] * user_stride)
    elapsed = duration_ms.cumsum() - duration_ms
    earliest = np.full(len(user), np.iinfo(np.int64).min)
    earliest[is_session_start] = start - elapsed[is_session_start]
    start_ms = np.maximum.accumulate(earliest) + elapsed - user * user_stride
    # A log that exceeds its end is shifted to an earlier start.
    span = np.zeros(user[-1] + 1, dtype=np.int64)
    np.maximum.at(span, user, start_ms + duration_ms)
    end_ms = int(LOG_END.timestamp() * 1000)
    return end_ms - days * DAY_MS + start_ms - np.maximum(span - days * DAY_MS, 0)[user]


def simulate_block(simulated: Simulation, users: SimulatedUsers, block: int) -> pa.Table:
    """Simulate all impressions of a block of users, sorted by user and time; columns as in :func:`simulate`."""
    config, rng = simulated.config, np.random.default_rng([simulated.config.seed, IMPRESSION_STREAM, block])
    count = np.maximum(rng.poisson(users.activity), 1)
    user_row = np.repeat(np.arange(len(count)), count)
    is_session_start = rng.random(len(user_row)) < 1 / SESSION_LENGTH
    is_session_start[count.cumsum() - count] = True
    tab = (rng.random(int(is_session_start.sum())) >= FOR_YOU_FRACTION).astype(np.int8)[is_session_start.cumsum() - 1]
    by_interest = (tab == 0) & (rng.random(len(user_row)) < config.personalized_share)

    item = np.empty(len(user_row), dtype=np.int64)
    dwell_ms = np.empty(len(user_row), dtype=np.int64)
    offset_ms = np.empty((len(ACTIONS), len(user_row)), dtype=np.int64)
    true_action = np.empty((len(ACTIONS), len(user_row)))
    true_long_view = np.empty(len(user_row))
    for start in range(0, len(user_row), PAIRS_PER_CHUNK):
        part = slice(start, start + PAIRS_PER_CHUNK)
        item[part] = simulated.policy.sample_items(users, user_row[part], by_interest[part], rng)
        probabilities = viewing.segment_probabilities(
            config, simulated.base_logits, simulated.items, users, user_row[part], item[part]
        )
        marginals = viewing.exact_marginals(probabilities)
        views = viewing.sample_views(probabilities, rng)
        dwell_ms[part], offset_ms[:, part] = views.dwell_ms, views.offset_ms
        true_action[:, part], true_long_view[part] = marginals.action, marginals.long_view

    gap_ms = rng.integers(200, 2_000, size=len(user_row))
    ts_ms = _session_times(is_session_start, user_row, dwell_ms + gap_ms, config.days, rng)
    long_view = dwell_ms >= viewing.long_view_threshold_ms(simulated.items.duration_ms[item])
    action_s = [pa.array(ms / 1000.0, mask=ms < 0) for ms in offset_ms]
    return pa.Table.from_arrays(
        [
            *map(pa.array, (users.user_id[user_row], item, ts_ms, dwell_ms / 1000.0)),
            _decode(TABS, tab),
            *action_s,
            *map(pa.array, (long_view.astype(np.int8), *true_action, true_long_view)),
        ],
        schema=IMPRESSION_SCHEMA,
    )


def _decode(names: tuple[str, ...], codes: np.ndarray) -> pa.Array:
    return pa.array(names).take(pa.array(codes))


def _user_table(users: SimulatedUsers) -> pa.Table:
    return pa.Table.from_arrays(
        [
            *map(pa.array, (users.user_id, users.group)),
            _decode(AGE_BANDS, users.age_band),
            _decode(ACTIVITY_LEVELS, users.activity_level),
        ],
        schema=USER_SCHEMA,
    )


def _item_table(items: SimulatedItems) -> pa.Table:
    return pa.Table.from_arrays(
        [
            *map(pa.array, (np.arange(len(items.topic)), items.author, items.topic)),
            _decode(UPLOAD_TYPES, items.upload_type),
            pa.array(items.duration_ms / 1000.0),
        ],
        schema=ITEM_SCHEMA,
    )


def _write_log(directory: Path, simulated: Simulation, advance: Callable[[int], object]) -> dict[str, int]:
    """Write the Parquet files of a log; return the counts of impressions and outcomes."""
    config = simulated.config
    (directory / "impressions").mkdir()
    pq.write_table(_item_table(simulated.items), directory / "items.parquet", compression="zstd")
    if config.vectors:
        vectors = sample_content_vectors(config, simulated.items)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), config.vectors)
        table = pa.table({"item_id": np.arange(len(vectors)), "vector": values})
        pq.write_table(table, directory / VECTORS_FILE, compression="zstd")
    counts: Counter[str] = Counter()
    num_blocks = math.ceil(config.users / USERS_PER_BLOCK)
    blocks_per_part = math.ceil(config.users_per_file / USERS_PER_BLOCK)
    with pq.ParquetWriter(directory / "users.parquet", USER_SCHEMA, compression="zstd") as users_file:
        for part, first_block in enumerate(range(0, num_blocks, blocks_per_part)):
            file = directory / "impressions" / f"part-{part:05d}.parquet"
            with pq.ParquetWriter(file, IMPRESSION_SCHEMA, compression="zstd") as impressions_file:
                for block in range(first_block, min(first_block + blocks_per_part, num_blocks)):
                    users = sample_user_block(config, block)
                    table = simulate_block(simulated, users, block)
                    users_file.write_table(_user_table(users))
                    impressions_file.write_table(table)
                    counts["impressions"] += table.num_rows
                    counts.update({action: table.num_rows - table[action].null_count for action in ACTIONS})
                    counts[LABEL_NAME] += pc.sum(table[LABEL_NAME]).as_py()
                    counts["glance"] += pc.sum(pc.less(table["dwell_s"], HOOK_DURATION_MS / 1000)).as_py()
                    advance(len(users.user_id))
    return dict(counts)


def _simulation_yaml(simulated: Simulation, counts: dict[str, int], rates: dict[str, float]) -> str:
    base = simulated.base_logits
    start = LOG_END - timedelta(days=simulated.config.days)
    return yaml.safe_dump(
        {
            "settings": asdict(simulated.config),
            "period": [start.isoformat(), LOG_END.isoformat()],
            "users": simulated.config.users,
            "items": simulated.config.items,
            "impressions": counts["impressions"],
            "rates": {name: round(rate, 6) for name, rate in rates.items()},
            "base_log_odds": {
                **{action: round(float(value), 6) for action, value in zip(ACTIONS, base.action, strict=True)},
                "glance": round(base.glance, 6),
                "leave": round(base.leave, 6),
            },
            "long_view": "watched at least min(18 s, duration)",
            "effects": EFFECTS.splitlines(),
        },
        sort_keys=False,
        width=120,
    )


def simulate(out: str, config: SimulateConfig, progress: bool = False) -> SimulationSummary:
    """Simulate a log and write it to the directory ``out``, which must be absent or empty.

    ``impressions/part-*.parquet``, sorted by user and time: ``user_id``, ``item_id``, ``ts_ms`` (start), ``dwell_s``,
    ``tab``, one column per action (seconds since the start; NULL if it did not occur), ``long_view`` (0 or 1, watched
    at least min(18 s, duration)), and ``true_<name>``, the exact probability of each action and of ``long_view``
    given user and video. ``out`` appears only when complete.

    Args:
        out: output directory.
        config: settings.
        progress: show a progress bar on stderr.

    Raises:
        UserError: ``out`` is not empty or not writable.
        ConfigError: a configured rate is not reachable.
    """
    started = time.monotonic()
    require_empty_dir(out)
    simulated = build_simulation(config)
    progress_bar = Progress(
        TextColumn("simulating users"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    try:
        with atomic_output_dir(out) as directory, progress_bar:
            task = progress_bar.add_task("", total=config.users)
            counts = _write_log(directory, simulated, partial(progress_bar.advance, task))
            rates = {name: counts[name] / counts["impressions"] for name in (*ACTIONS, LABEL_NAME, "glance")}
            paths.write_text(str(directory / SIMULATION_FILE), _simulation_yaml(simulated, counts, rates))
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror or error})") from error
    seconds = time.monotonic() - started
    return SimulationSummary(counts["impressions"], config.users, config.items, rates, seconds)
