"""Changes of the simulated world from day to day [ours].

All changes happen at midnight, UTC:

- **videos**: ``num_births`` videos are born. Each video retires at the same expected rate, so the catalog is stationary
  from the first day on. The popularity of a video halves every half-life. The popularity of a topic, shared by its
  videos, follows a mean-reverting random walk.
- **users**: each user leaves with a constant probability, and a new user takes the seat. Each user who stays trades one
  of the favourite topics for another with a constant probability: a random walk over sets of topics. New favourites
  follow the preferences of the user's group and the popularity of topics.

Every change has its own generator per day (and block of users): a day does not depend on the number of days.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from a2gen_rec.config import SimulateConfig
from a2gen_rec.simulation.population import (
    LIFE_STREAM,
    TREND_STREAM,
    TURNOVER_STREAM,
    USERS_PER_BLOCK,
    RecommendationPolicy,
    SimulatedItems,
    SimulatedUsers,
    UserGroups,
    concatenate_items,
    num_favourites,
    sample_item_batch,
    sample_user_block,
)

# Share of a topic's log popularity that is left a day later: trends last about 20 days, and their spread is bounded.
TREND_PERSISTENCE = 0.95
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Catalog:
    """Videos of all days: ``I`` items in the order of their births, ``T`` topics.

    Attributes:
        items: all videos; ``item_id`` is the index.
        birth_day: (I,) int64, first day on which the video is shown; below 0 for a video older than the log.
        retirement_day: (I,) int64, first day on which the video is no longer shown.
        trends: per day (T,) float, log popularity of the topics.
        policies: recommendation policy per day.
    """

    items: SimulatedItems
    birth_day: np.ndarray
    retirement_day: np.ndarray
    trends: tuple[np.ndarray, ...]
    policies: tuple[RecommendationPolicy, ...]

    def shown(self, day: int) -> np.ndarray:
        """Return the (S,) videos that are shown on ``day``, ascending."""
        return _shown(self.birth_day, self.retirement_day, day)


def _shown(birth_day: np.ndarray, retirement_day: np.ndarray, day: int) -> np.ndarray:
    return np.flatnonzero((birth_day <= day) & (day < retirement_day))


def build_catalog(config: SimulateConfig) -> Catalog:
    """Sample the videos, the popularity of topics and the recommendation policies of all days.

    Memory is proportional to the videos of all days, and 16 bytes per video and day on which it is shown.
    """
    items = concatenate_items([sample_item_batch(config, day) for day in range(config.days)])
    birth_day, retirement_day = (np.concatenate(days) for days in zip(*_lives(config), strict=True))
    trends = _topic_trends(config)
    policies = []
    for day in range(config.days):
        shown = _shown(birth_day, retirement_day, day)
        topic, popularity = items.topic[shown], items.popularity[shown]
        if config.days > 1:
            age = day - birth_day[shown]
            # Ages are relative to the youngest video, which keeps a short half-life from an underflow of all.
            popularity = popularity * np.exp2((age.min() - age) / config.popularity_half_life)
            popularity *= np.exp(trends[day])[topic]
            popularity /= popularity.sum()
        policies.append(RecommendationPolicy.from_popularity(shown, popularity, topic, config.topics))
    return Catalog(items, birth_day, retirement_day, trends, tuple(policies))


def _lives(config: SimulateConfig) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the days of birth and retirement of the batch of videos of each day.

    Lifetimes and the ages at the start are geometric, the stationary distribution of a catalog of constant size.
    """
    retirement_rate = config.num_births / config.items
    if config.days == 1 or config.num_births == 0:
        yield np.zeros(config.items, dtype=np.int64), np.full(config.items, NEVER)
        for _ in range(1, config.days):
            yield np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        return
    for day in range(config.days):
        rng = np.random.default_rng([config.seed, LIFE_STREAM, day])
        count = config.num_births if day > 0 else config.items
        age = rng.geometric(retirement_rate, count) - 1 if day == 0 else np.zeros(count, dtype=np.int64)
        yield day - age, day + rng.geometric(retirement_rate, count)


def _topic_trends(config: SimulateConfig) -> tuple[np.ndarray, ...]:
    """Return the (T,) log popularity of topics per day: 0 in a static log."""
    if config.days == 1:
        return (np.zeros(config.topics),)
    trends: list[np.ndarray] = []
    for day in range(config.days):
        rng = np.random.default_rng([config.seed, TREND_STREAM, day])
        change = config.topic_drift * rng.standard_normal(config.topics)
        trends.append(TREND_PERSISTENCE * trends[-1] + change if trends else change / np.sqrt(1 - TREND_PERSISTENCE**2))
    return tuple(trends)


def block_days(config: SimulateConfig, catalog: Catalog, block: int) -> Iterator[SimulatedUsers]:
    """Yield the users of one block on each day."""
    full = replace(config, users=(block + 1) * USERS_PER_BLOCK)
    seats = np.arange(min(USERS_PER_BLOCK, config.users - block * USERS_PER_BLOCK))
    users = sample_user_block(full, block)
    topic_weight = UserGroups.sample(config).topic_weight
    yield users.take(seats)
    for day in range(1, config.days):
        rng = np.random.default_rng([config.seed, TURNOVER_STREAM, block, day])
        weight = topic_weight[users.group] * np.exp(catalog.trends[day])
        users = replace(users, affinity=_trade_favourites(config, users.affinity, weight, rng))
        stays = rng.random(USERS_PER_BLOCK) >= config.new_users_per_day
        users = users.where(stays, sample_user_block(full, block, day))
        yield users.take(seats)


def _trade_favourites(
    config: SimulateConfig, affinity: np.ndarray, weight: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the affinities (U, T) after trades, each of a favourite with a topic sampled by ``weight`` (U, T).

    A trade swaps two affinities: their distribution over users stays the same.
    """
    users, topics = affinity.shape
    count = num_favourites(config)
    trades = np.flatnonzero(rng.random(users) < config.taste_drift)
    favourite = rng.integers(count, size=users)
    perturbed_log_weight = np.log(weight) + rng.gumbel(size=(users, topics))
    if count == topics:
        return affinity
    by_affinity = (-affinity).argsort(axis=1)
    np.put_along_axis(perturbed_log_weight, by_affinity[:, :count], -np.inf, axis=1)
    old, new = by_affinity[np.arange(users), favourite][trades], perturbed_log_weight.argmax(axis=1)[trades]
    traded = affinity.copy()
    traded[trades, old], traded[trades, new] = affinity[trades, new], affinity[trades, old]
    return traded
