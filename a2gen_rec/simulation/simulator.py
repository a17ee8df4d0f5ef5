"""Simulation of impressions and logs [ours].

Users are simulated in blocks of :data:`~a2gen_rec.simulation.population.USERS_PER_BLOCK`, each with its own random
generator per day. Memory is bounded, and a seed gives the same bytes again. ``users_per_file`` changes no row. A larger
number of users leaves full blocks unchanged, a larger number of days leaves earlier days unchanged.
"""

import math
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from a2gen_rec.config import SimulateConfig
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.simulation import log_files, viewing
from a2gen_rec.simulation.log_files import DAY_MS, IMPRESSION_SCHEMA, LABEL_NAME
from a2gen_rec.simulation.population import (
    ACTIONS,
    CALIBRATION_STREAM,
    IMPRESSION_STREAM,
    USERS_PER_BLOCK,
    SimulatedUsers,
    sample_user_block,
)
from a2gen_rec.simulation.world import Catalog, block_days, build_catalog
from a2gen_rec.utils import paths
from a2gen_rec.utils.atomic_dir import atomic_output_dir, require_empty_dir

SESSION_LENGTH = 12
FOR_YOU_FRACTION = 0.75
# Relative traffic per hour of day.
HOUR_WEIGHTS = (5, 3, 2, 1, 1, 2, 4, 7, 8, 8, 9, 10, 13, 11, 9, 9, 10, 11, 13, 15, 18, 18, 14, 9)
# Impressions per chunk: small enough for the processor cache.
PAIRS_PER_CHUNK = 8_192
CALIBRATION_SAMPLE = 8_192
CALIBRATION_STEPS = 100


@dataclass(frozen=True)
class SimulationSummary:
    """Summary of a simulated log.

    Attributes:
        impressions: number of impressions.
        users: number of users on all days.
        items: number of items on all days.
        rates: share of impressions per action, ``long_view`` and ``glance`` (under 3 s).
        days: folders of the days; empty for a static log.
        seconds: duration of the simulation.
    """

    impressions: int
    users: int
    items: int
    rates: dict[str, float]
    days: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """Parts of the simulation that are shared by all users.

    Attributes:
        config: settings.
        catalog: all videos, and the recommendation policy of each day.
        base_logits: calibrated base log-odds.
    """

    config: SimulateConfig
    catalog: Catalog
    base_logits: viewing.BaseLogits


def build_simulation(config: SimulateConfig) -> Simulation:
    """Sample the items and calibrate the base log-odds to the configured rates.

    The calibration is a damped fixed-point iteration on the exact probabilities of a sample of the first day's
    impressions.

    Raises:
        ConfigError: a rate is not reachable.
    """
    catalog = build_catalog(config)
    users = sample_user_block(replace(config, users=USERS_PER_BLOCK), 0)
    rng = np.random.default_rng([config.seed, CALIBRATION_STREAM])
    user_row = rng.choice(len(users.user_id), CALIBRATION_SAMPLE, p=users.activity / users.activity.sum())
    item = catalog.policies[0].sample_items(
        users, user_row, rng.random(CALIBRATION_SAMPLE) < FOR_YOU_FRACTION * config.personalized_share, rng
    )

    rates = np.array([getattr(config, f"{name}_rate") for name in (*ACTIONS, "glance", LABEL_NAME)])
    parameters = np.array([*_log_odds(rates[:-2] / 3), -1.0, -1.5])
    for _ in range(CALIBRATION_STEPS):
        marginals = viewing.exact_marginals(
            viewing.segment_probabilities(config, _base_logits(parameters), catalog.items, users, user_row, item)
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
    return Simulation(config, catalog, _base_logits(parameters))


def _base_logits(values: np.ndarray) -> viewing.BaseLogits:
    return viewing.BaseLogits(action=values[:-2], glance=float(values[-2]), leave=float(values[-1]))


def _log_odds(rate: np.ndarray) -> np.ndarray:
    return np.log(rate) - np.log1p(-rate)


def _session_times(
    is_session_start: np.ndarray, user: np.ndarray, duration_ms: np.ndarray, days: int, rng: np.random.Generator
) -> np.ndarray:
    """Return start times in ms since the start of the log or day.

    An impression starts at the session's start or the end of the previous impression, whichever is later.

    Args:
        is_session_start: (N,) bool, first impression of a session.
        user: (N,) int, sorted, at least 0.
        duration_ms: (N,) int64, time until the next impression of the same session can start.
        days: span in days.
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
    return start_ms - np.maximum(span - days * DAY_MS, 0)[user]


def simulate_block(simulated: Simulation, users: SimulatedUsers, block: int, day: int = 0) -> pa.Table:
    """Simulate the impressions of a block of users on a day, or of a static log.

    Returns:
        Columns as in :func:`simulate`, sorted by user and time.
    """
    config, items, policy = simulated.config, simulated.catalog.items, simulated.catalog.policies[day]
    rng = np.random.default_rng([config.seed, IMPRESSION_STREAM, block, day])
    # Everyone has an impression on the day of arrival.
    count = np.maximum(rng.poisson(users.activity), users.arrival_day == day)
    if not count.any():
        return IMPRESSION_SCHEMA.empty_table()
    user_row = np.repeat(np.arange(len(count)), count)
    is_session_start = rng.random(len(user_row)) < 1 / SESSION_LENGTH
    is_session_start[(count.cumsum() - count)[count > 0]] = True
    tab = (rng.random(int(is_session_start.sum())) >= FOR_YOU_FRACTION).astype(np.int8)[is_session_start.cumsum() - 1]
    by_interest = (tab == 0) & (rng.random(len(user_row)) < config.personalized_share)

    item = np.empty(len(user_row), dtype=np.int64)
    dwell_ms = np.empty(len(user_row), dtype=np.int64)
    offset_ms = np.empty((len(ACTIONS), len(user_row)), dtype=np.int64)
    true_probabilities = np.empty((len(ACTIONS) + 1, len(user_row)))
    for start in range(0, len(user_row), PAIRS_PER_CHUNK):
        part = slice(start, start + PAIRS_PER_CHUNK)
        item[part] = policy.sample_items(users, user_row[part], by_interest[part], rng)
        probabilities = viewing.segment_probabilities(
            config, simulated.base_logits, items, users, user_row[part], item[part]
        )
        marginals = viewing.exact_marginals(probabilities)
        views = viewing.sample_views(probabilities, rng)
        dwell_ms[part], offset_ms[:, part] = views.dwell_ms, views.offset_ms
        true_probabilities[:-1, part], true_probabilities[-1, part] = marginals.action, marginals.long_view

    gap_ms = rng.integers(200, 2_000, size=len(user_row))
    begin, end = log_files.day_period(config, day)
    elapsed_ms = _session_times(is_session_start, user_row, dwell_ms + gap_ms, (end - begin).days, rng)
    table = log_files.impression_table(
        user_id=users.user_id[user_row],
        item=item,
        ts_ms=int(begin.timestamp() * 1000) + elapsed_ms,
        tab=tab,
        duration_ms=items.duration_ms[item],
        views=viewing.SampledViews(dwell_ms, offset_ms),
        true_probabilities=true_probabilities,
    )
    # A user's impressions of one day that exceed 24 hours would begin on an earlier day.
    return table.filter(pa.array(elapsed_ms >= 0)) if config.days > 1 and elapsed_ms.min() < 0 else table


def _write_log(directory: Path, simulated: Simulation, advance: Callable[[int], object]) -> list[Counter[str]]:
    """Write the Parquet files of a log.

    Returns:
        Counts of each day, as in :func:`a2gen_rec.simulation.log_files.simulation_yaml`.
    """
    config, catalog = simulated.config, simulated.catalog
    folders = [directory / name for name in log_files.day_names(config)]
    vectors = log_files.content_vectors(config)
    for day, folder in enumerate(folders):
        (folder / log_files.IMPRESSIONS_DIR).mkdir(parents=True)
        log_files.write_items(folder, config, catalog, day, vectors)
    counts: list[Counter[str]] = [Counter() for _ in folders]
    num_blocks = math.ceil(config.users / USERS_PER_BLOCK)
    blocks_per_part = math.ceil(config.users_per_file / USERS_PER_BLOCK)

    def open_files(stack: ExitStack, name: str, schema: pa.Schema) -> list[pq.ParquetWriter]:
        writers = (pq.ParquetWriter(folder / name, schema, compression="zstd") for folder in folders)
        return [stack.enter_context(writer) for writer in writers]

    with ExitStack() as log_stack:
        user_files = open_files(log_stack, log_files.USERS_FILE, log_files.user_schema(config))
        for part, first_block in enumerate(range(0, num_blocks, blocks_per_part)):
            with ExitStack() as part_stack:
                name = f"{log_files.IMPRESSIONS_DIR}/part-{part:05d}.parquet"
                impression_files = open_files(part_stack, name, IMPRESSION_SCHEMA)
                for block in range(first_block, min(first_block + blocks_per_part, num_blocks)):
                    for day, users in enumerate(block_days(config, catalog, block)):
                        table = simulate_block(simulated, users, block, day)
                        user_files[day].write_table(log_files.user_table(config, users))
                        impression_files[day].write_table(table)
                        counts[day] += log_files.count_outcomes(table)
                        counts[day]["users"] += len(users.user_id)
                        counts[day]["new_users"] += int((users.arrival_day == day).sum())
                        advance(len(users.user_id))
    return counts


def simulate(out: str, config: SimulateConfig, progress: bool = False) -> SimulationSummary:
    """Simulate a log and write it to the directory ``out``, which must be absent or empty.

    ``impressions/part-*.parquet``, sorted by user and time: ``user_id``, ``item_id``, ``ts_ms`` (start), ``dwell_s``,
    ``tab``, one column per action (seconds since the start; NULL if it did not occur), ``long_view`` (0 or 1, watched
    at least min(18 s, duration)), and ``true_<name>``, the exact probability of each action and of ``long_view``
    given user and video on that day. ``out`` appears only when complete. See :mod:`a2gen_rec.simulation.log_files` for
    the folders of days and the other files.

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
        TextColumn("simulating users" if config.days == 1 else "simulating days of users"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    try:
        with atomic_output_dir(out) as directory, progress_bar:
            task = progress_bar.add_task("", total=config.users * config.days)
            counts = _write_log(directory, simulated, partial(progress_bar.advance, task))
            text = log_files.simulation_yaml(config, simulated.catalog, simulated.base_logits, counts)
            paths.write_text(str(directory / log_files.SIMULATION_FILE), text)
    except OSError as error:
        raise UserError(f"{out}: cannot write ({error.strerror or error})") from error
    total = sum(counts, Counter())
    return SimulationSummary(
        impressions=total["impressions"],
        users=total["new_users"],
        items=len(simulated.catalog.birth_day),
        rates=log_files.outcome_rates(total),
        days=tuple(filter(None, log_files.day_names(config))),
        seconds=time.monotonic() - started,
    )
