"""Simulated items and users: videos with segments and highlights, users with interests, recommendation policy [ours].

All values are drawn as full arrays. Items use one random generator of the seed. Users are sampled in blocks of
:data:`USERS_PER_BLOCK` with separate generators: a user does not depend on the number of simulated users.
"""

from dataclasses import dataclass

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

# Independent random streams of the seed, one per purpose.
ITEM_STREAM, GROUP_STREAM, USER_STREAM, IMPRESSION_STREAM, CALIBRATION_STREAM, VECTOR_STREAM = range(6)


@dataclass(frozen=True)
class SimulatedItems:
    """All videos: ``I`` items, ``K`` = :data:`MAX_SEGMENTS`; segment arrays are segment-major.

    Attributes:
        author: (I,) int.
        topic: (I,) int, the visible category.
        upload_type: (I,) int.
        quality: (I,) float, log-odds.
        popularity: (I,) float, share of impressions that are not personalized.
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
        group: (U,) int, visible.
        age_band: (U,) int, visible.
        activity_level: (U,) int, visible.
        activity: (U,) float, expected number of impressions.
        affinity: (U, T) float, interest per topic; about 1.5 for the few liked topics, below 0 for the others.
        propensity: (U, A) float, log-odds per action of :data:`ACTIONS`.
        leave_propensity: (U,) float, log-odds of leaving.
    """

    user_id: np.ndarray
    group: np.ndarray
    age_band: np.ndarray
    activity_level: np.ndarray
    activity: np.ndarray
    affinity: np.ndarray
    propensity: np.ndarray
    leave_propensity: np.ndarray


def sample_item_catalog(config: SimulateConfig) -> SimulatedItems:
    """Sample all videos.

    Most videos of an author share one topic. Durations are log-normal, 5 to 180 s. Every video has a highlight.
    """
    rng = np.random.default_rng([config.seed, ITEM_STREAM])
    count, topics = config.items, config.topics
    author = np.minimum(rng.random(count) ** 1.5 * config.authors, config.authors - 1).astype(np.int64)
    author_topic = rng.integers(topics, size=config.authors)
    topic = np.where(rng.random(count) < 0.8, author_topic[author], rng.integers(topics, size=count))
    quality = config.item_quality_std * rng.standard_normal(count)
    popularity = (1.0 + rng.permutation(count)) ** -config.popularity_exponent

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
        popularity=popularity / popularity.sum(),
        edges_ms=edges_ms,
        segment_topic=segment_topic,
        highlight=highlight & present,
    )


def sample_content_vectors(config: SimulateConfig, items: SimulatedItems) -> np.ndarray:
    """Return (I, ``config.vectors``) float32 content vectors: noisy projections of the topic mixture and the quality.

    The mixture weighs the topics of the segments by their durations. No model input but these vectors has it.
    """
    rng = np.random.default_rng([config.seed, VECTOR_STREAM])
    count = len(items.topic)
    duration_ms = np.diff(items.edges_ms, axis=0)
    content = np.zeros((count, config.topics + 1))
    np.add.at(content, (np.arange(count)[None, :], items.segment_topic), duration_ms / items.duration_ms)
    content[:, -1] = items.quality
    signal = content @ rng.standard_normal((config.topics + 1, config.vectors))
    noise = config.vector_noise * signal.std() * rng.standard_normal(signal.shape)
    return (signal + noise).astype(np.float32)


def sample_user_block(config: SimulateConfig, block: int) -> SimulatedUsers:
    """Sample the users of one block: at most :data:`USERS_PER_BLOCK` users from ``block * USERS_PER_BLOCK``."""
    rng = np.random.default_rng([config.seed, GROUP_STREAM])
    num_preferred = max(1, config.topics // 3)
    preferred = rng.random((config.groups, config.topics)).argsort(axis=1) < num_preferred
    age_propensity = rng.standard_normal((len(AGE_BANDS), len(ACTIONS)))

    rng = np.random.default_rng([config.seed, USER_STREAM, block])
    group = rng.integers(config.groups, size=USERS_PER_BLOCK)
    age_band = (group + rng.integers(3, size=USERS_PER_BLOCK)) % len(AGE_BANDS)
    activity = rng.gamma(2.0, 0.5, USERS_PER_BLOCK)

    # Liked topics are sampled without replacement (Gumbel top-k), mostly from the preferred topics of the group.
    weight = np.where(preferred[group], 0.8 / num_preferred, 0.2 / config.topics)
    perturbed_log_weight = np.log(weight) + rng.gumbel(size=(USERS_PER_BLOCK, config.topics))
    is_liked = (-perturbed_log_weight).argsort(axis=1).argsort(axis=1) < min(3, max(1, config.topics // 2))
    noise = rng.standard_normal((USERS_PER_BLOCK, config.topics))
    affinity = np.where(is_liked, 1.5 + 0.3 * noise, -0.7 + 0.4 * noise)

    user_level = rng.standard_normal((USERS_PER_BLOCK, 1))
    user_action = rng.standard_normal((USERS_PER_BLOCK, len(ACTIONS)))
    propensity = config.user_propensity_std * (0.65 * user_level + 0.65 * user_action + 0.35 * age_propensity[age_band])
    leave_propensity = 0.8 * config.user_propensity_std * rng.standard_normal(USERS_PER_BLOCK)

    rows = slice(0, min(USERS_PER_BLOCK, config.users - block * USERS_PER_BLOCK))
    return SimulatedUsers(
        user_id=np.arange(block * USERS_PER_BLOCK, (block + 1) * USERS_PER_BLOCK)[rows],
        group=group[rows],
        age_band=age_band[rows],
        activity_level=np.searchsorted([0.6, 1.3], activity)[rows],
        activity=config.impressions_per_user * activity[rows],
        affinity=affinity[rows],
        propensity=propensity[rows],
        leave_propensity=leave_propensity[rows],
    )


@dataclass(frozen=True)
class RecommendationPolicy:
    """Policy that selects items by popularity, or by popularity within a topic sampled by interest.

    Attributes:
        items_by_topic: (I,) items sorted by topic.
        popularity_cdf: (I,) cumulative popularity in this order.
        topic_start: (T,) cumulative popularity before the topic.
        topic_mass: (T,) popularity of the topic.
    """

    items_by_topic: np.ndarray
    popularity_cdf: np.ndarray
    topic_start: np.ndarray
    topic_mass: np.ndarray

    @classmethod
    def from_items(cls, items: SimulatedItems, topics: int) -> "RecommendationPolicy":
        order = items.topic.argsort(kind="stable")
        mass = np.bincount(items.topic, weights=items.popularity, minlength=topics)
        return cls(order, np.cumsum(items.popularity[order]), np.cumsum(mass) - mass, mass)

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
