"""Simulated items and users: videos with segments and highlights, users with interests, recommendation policy [ours].

All values are drawn as full arrays. Items use one random generator of the seed per day of birth. Users are sampled in
blocks of :data:`USERS_PER_BLOCK` with one generator per block and day of arrival. Neither depends on the number of
simulated users or days.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from a2gen_rec.config import SimulateConfig

ACTIONS = ("like", "comment", "follow", "collect", "forward")
AGE_BANDS = ("under_18", "18_24", "25_34", "35_49", "50_plus")
ACTIVITY_LEVELS = ("low", "middle", "high")
UPLOAD_TYPES = ("camera", "edited", "imported")
TABS = ("for_you", "discover")
USERS_PER_BLOCK = 1_000
MAX_SEGMENTS = 8
HOOK_DURATION_MS = 3_000
LONG_VIEW_THRESHOLD_MS = 18_000
# Users who arrive after the first day have identifiers above it.
USER_ID_STRIDE = 1_000_000_000

# Independent random streams of the seed, one per purpose.
ITEM_STREAM, GROUP_STREAM, USER_STREAM, IMPRESSION_STREAM, CALIBRATION_STREAM, VECTOR_STREAM = range(6)
LIFE_STREAM, TREND_STREAM, TURNOVER_STREAM = range(6, 9)


@dataclass(frozen=True)
class SimulatedItems:
    """All videos: ``I`` items, ``K`` = :data:`MAX_SEGMENTS`; segment arrays are segment-major.

    Attributes:
        author: (I,) int.
        topic: (I,) int, the visible category.
        upload_type: (I,) int.
        quality: (I,) float, log-odds.
        popularity: (I,) float, share of impressions that are not personalized, at birth.
        edges_ms: (K+1, I) int64, segment boundaries from 0 to the duration; absent segments have zero duration. The
            first segment is the hook with a duration of :data:`HOOK_DURATION_MS`.
        segment_topic: (K, I) int.
        highlight: (K, I) bool.
    """

    author: np.ndarray
    topic: np.ndarray
    upload_type: np.ndarray
    quality: np.ndarray
    popularity: np.ndarray
    edges_ms: np.ndarray
    segment_topic: np.ndarray
    highlight: np.ndarray

    @property
    def duration_ms(self) -> np.ndarray:
        return self.edges_ms[-1]


@dataclass(frozen=True)
class SimulatedUsers:
    """One block of users: ``U`` users, ``T`` topics, ``A`` actions.

    Attributes:
        user_id: (U,) int64.
        arrival_day: (U,) int, from 0.
        group: (U,) int, visible.
        age_band: (U,) int, visible.
        activity_level: (U,) int, visible.
        activity: (U,) float, expected number of impressions, per day if the log has several.
        affinity: (U, T) float, interest per topic; about 1.5 for the few liked topics, below 0 for the others.
        propensity: (U, A) float, log-odds per action of :data:`ACTIONS`.
        leave_propensity: (U,) float, log-odds of leaving.
    """

    user_id: np.ndarray
    arrival_day: np.ndarray
    group: np.ndarray
    age_band: np.ndarray
    activity_level: np.ndarray
    activity: np.ndarray
    affinity: np.ndarray
    propensity: np.ndarray
    leave_propensity: np.ndarray

    def take(self, rows: np.ndarray) -> "SimulatedUsers":
        """Return the users of ``rows``."""
        return SimulatedUsers(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def where(self, condition: np.ndarray, others: "SimulatedUsers") -> "SimulatedUsers":
        """Return these users where the (U,) condition holds, and ``others`` elsewhere."""
        rows = np.flatnonzero(~condition)
        columns = {field.name: getattr(self, field.name).copy() for field in fields(self)}
        for name, values in columns.items():
            values[rows] = getattr(others, name)[rows]
        return SimulatedUsers(**columns)


def concatenate_items(batches: Sequence[SimulatedItems]) -> SimulatedItems:
    """Concatenate batches of videos."""
    return SimulatedItems(
        **{
            field.name: np.concatenate([getattr(batch, field.name) for batch in batches], axis=-1)
            for field in fields(SimulatedItems)
        }
    )


def sample_item_batch(config: SimulateConfig, day: int = 0) -> SimulatedItems:
    """Sample the ``config.items`` videos of day 0, or the ``config.num_births`` videos born on a later day.

    Most videos of an author share one topic. Durations are log-normal, 5 to 180 s. Every video has a highlight.
    """
    topics = config.topics
    rng = np.random.default_rng([config.seed, ITEM_STREAM])
    count = config.items
    author = _sample_authors(config, count, rng)
    author_topic = rng.integers(topics, size=config.authors)
    if day > 0:
        rng = np.random.default_rng([config.seed, ITEM_STREAM, day])
        count = config.num_births
        author = _sample_authors(config, count, rng)
    topic = np.where(rng.random(count) < 0.8, author_topic[author], rng.integers(topics, size=count))
    quality = config.item_quality_std * rng.standard_normal(count)
    rank = rng.integers(config.items, size=count) if day > 0 else rng.permutation(count)
    popularity = (1.0 + rank) ** -config.popularity_exponent
    total_popularity = ((1.0 + np.arange(config.items)) ** -config.popularity_exponent) if day > 0 else popularity

    duration_s = np.clip(rng.lognormal(np.log(20.0), 0.7, count), 5.0, 180.0)
    duration_ms = (np.round(duration_s, 1) * 1000).round().astype(np.int64)
    num_segments = np.clip(2 + (duration_s / 8 + rng.random(count) * 2).astype(np.int64), 3, MAX_SEGMENTS)
    present = np.arange(MAX_SEGMENTS)[:, None] < num_segments
    segment_weight = np.where(present, rng.uniform(0.5, 1.5, (MAX_SEGMENTS, count)), 0.0)
    segment_weight[0] = 0.0
    segment_end = np.cumsum(segment_weight, axis=0) / segment_weight.sum(axis=0)
    edges_ms = np.zeros((MAX_SEGMENTS + 1, count), dtype=np.int64)
    edges_ms[1:] = HOOK_DURATION_MS + np.round(segment_end * (duration_ms - HOOK_DURATION_MS)).astype(np.int64)
    edges_ms[-1] = duration_ms

    is_off_topic = rng.random((MAX_SEGMENTS, count)) < 0.15
    is_off_topic[0] = False
    segment_topic = np.where(is_off_topic, rng.integers(topics, size=(MAX_SEGMENTS, count)), topic)
    highlight = rng.random((MAX_SEGMENTS, count)) < 0.15
    highlight[1 + (rng.random(count) * (num_segments - 1)).astype(np.int64), np.arange(count)] = True
    highlight[0] = False
    upload_type = np.clip(1.0 + quality / max(config.item_quality_std, 1e-9) + rng.standard_normal(count), 0, 2.99)
    return SimulatedItems(
        author=author,
        topic=topic,
        upload_type=upload_type.astype(np.int64),
        quality=quality,
        popularity=popularity / total_popularity.sum(),
        edges_ms=edges_ms,
        segment_topic=segment_topic,
        highlight=highlight & present,
    )


def _sample_authors(config: SimulateConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.minimum(rng.random(count) ** 1.5 * config.authors, config.authors - 1).astype(np.int64)


def sample_content_vectors(config: SimulateConfig, items: SimulatedItems, day: int = 0) -> np.ndarray:
    """Return (I, ``config.vectors``) float32 content vectors: noisy projections of the topic mixture and the quality.

    The mixture weighs the topics of the segments by their durations. No model input but these vectors has it.

    Args:
        config: settings.
        items: the batch of :func:`sample_item_batch` of ``day``.
        day: day of birth.
    """
    rng = np.random.default_rng([config.seed, VECTOR_STREAM])
    count = len(items.topic)
    duration_ms = np.diff(items.edges_ms, axis=0)
    content = np.zeros((count, config.topics + 1))
    np.add.at(content, (np.arange(count)[None, :], items.segment_topic), duration_ms / items.duration_ms)
    content[:, -1] = items.quality
    signal = content @ rng.standard_normal((config.topics + 1, config.vectors))
    if day > 0:
        rng = np.random.default_rng([config.seed, VECTOR_STREAM, day])
    noise = config.vector_noise * signal.std() * rng.standard_normal(signal.shape)
    return (signal + noise).astype(np.float32)


@dataclass(frozen=True)
class UserGroups:
    """Parameters that users of a group or age band share: ``G`` groups, ``B`` age bands, ``T`` topics, ``A`` actions.

    Attributes:
        topic_weight: (G, T) float, relative frequency of a topic among the interests of the group.
        age_propensity: (B, A) float, log-odds per action.
    """

    topic_weight: np.ndarray
    age_propensity: np.ndarray

    @classmethod
    def sample(cls, config: SimulateConfig) -> "UserGroups":
        rng = np.random.default_rng([config.seed, GROUP_STREAM])
        num_preferred = max(1, config.topics // 3)
        preferred = rng.random((config.groups, config.topics)).argsort(axis=1) < num_preferred
        age_propensity = rng.standard_normal((len(AGE_BANDS), len(ACTIONS)))
        return cls(np.where(preferred, 0.8 / num_preferred, 0.2 / config.topics), age_propensity)


def num_favourites(config: SimulateConfig) -> int:
    """Return the number of topics that a user likes."""
    return min(3, max(1, config.topics // 2))


def sample_user_block(config: SimulateConfig, block: int, day: int = 0) -> SimulatedUsers:
    """Sample the users of one block who arrive on a day.

    Returns:
        At most :data:`USERS_PER_BLOCK` users: all that the block can have, in the order of their seats.
    """
    groups = UserGroups.sample(config)
    # A day of 0 adds nothing to the entropy of a seed.
    rng = np.random.default_rng([config.seed, USER_STREAM, block, day])
    group = rng.integers(config.groups, size=USERS_PER_BLOCK)
    age_band = (group + rng.integers(3, size=USERS_PER_BLOCK)) % len(AGE_BANDS)
    activity = rng.gamma(2.0, 0.5, USERS_PER_BLOCK)

    # Liked topics are sampled without replacement (Gumbel top-k), mostly from the preferred topics of the group.
    perturbed_log_weight = np.log(groups.topic_weight)[group] + rng.gumbel(size=(USERS_PER_BLOCK, config.topics))
    is_liked = (-perturbed_log_weight).argsort(axis=1).argsort(axis=1) < num_favourites(config)
    noise = rng.standard_normal((USERS_PER_BLOCK, config.topics))
    affinity = np.where(is_liked, 1.5 + 0.3 * noise, -0.7 + 0.4 * noise)

    user_level = rng.standard_normal((USERS_PER_BLOCK, 1))
    user_action = rng.standard_normal((USERS_PER_BLOCK, len(ACTIONS)))
    age_propensity = groups.age_propensity[age_band]
    propensity = config.user_propensity_std * (0.65 * user_level + 0.65 * user_action + 0.35 * age_propensity)
    leave_propensity = 0.8 * config.user_propensity_std * rng.standard_normal(USERS_PER_BLOCK)

    mean_activity = config.impressions_per_user if config.days == 1 else config.impressions_per_day
    seat = np.arange(block * USERS_PER_BLOCK, (block + 1) * USERS_PER_BLOCK)
    return SimulatedUsers(
        user_id=seat + day * USER_ID_STRIDE,
        arrival_day=np.full(USERS_PER_BLOCK, day),
        group=group,
        age_band=age_band,
        activity_level=np.searchsorted([0.6, 1.3], activity),
        activity=mean_activity * activity,
        affinity=affinity,
        propensity=propensity,
        leave_propensity=leave_propensity,
    ).take(np.arange(min(USERS_PER_BLOCK, config.users - block * USERS_PER_BLOCK)))


@dataclass(frozen=True)
class RecommendationPolicy:
    """Policy that selects items by popularity, or by popularity within a topic sampled by interest.

    Attributes:
        items_by_topic: (S,) items that are shown, sorted by topic.
        popularity_cdf: (S,) cumulative popularity in this order.
        topic_start: (T,) cumulative popularity before the topic.
        topic_mass: (T,) popularity of the topic.
    """

    items_by_topic: np.ndarray
    popularity_cdf: np.ndarray
    topic_start: np.ndarray
    topic_mass: np.ndarray

    @classmethod
    def from_popularity(
        cls, shown: np.ndarray, popularity: np.ndarray, topic: np.ndarray, topics: int
    ) -> "RecommendationPolicy":
        """Return the policy over the items ``shown`` (S,) of ``popularity`` (S,), with sum 1, and ``topic`` (S,)."""
        order = topic.argsort(kind="stable")
        mass = np.bincount(topic, weights=popularity, minlength=topics)
        return cls(shown[order], np.cumsum(popularity[order]), np.cumsum(mass) - mass, mass)

    def sample_items(
        self, users: SimulatedUsers, user_row: np.ndarray, by_interest: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Sample the items of ``N`` impressions.

        Args:
            users: block of users.
            user_row: (N,) int, row of the user in ``users``.
            by_interest: (N,) bool, whether the impression is personalized.
            rng: random generator.

        Returns:
            (N,) int64 items.
        """
        weight = np.exp(1.2 * users.affinity) * (self.topic_mass > 0)
        topic_cdf = weight.cumsum(axis=1) / weight.sum(axis=1, keepdims=True)
        topic_quantile, item_quantile = rng.random((2, len(user_row)))
        topic = np.minimum((topic_cdf[user_row] <= topic_quantile[:, None]).sum(axis=1), len(self.topic_mass) - 1)
        quantile_in_topic = self.topic_start[topic] + item_quantile * self.topic_mass[topic]
        rank = self.popularity_cdf.searchsorted(np.where(by_interest, quantile_in_topic, item_quantile), side="right")
        return self.items_by_topic[np.minimum(rank, len(self.items_by_topic) - 1)]
