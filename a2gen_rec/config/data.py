"""Settings of data generation: simulation and preparation."""

import math
from dataclasses import dataclass

from a2gen_rec.errors import ConfigError

SOURCE_NAMES = ("kuairand", "jd", "rec_tmall", "tenrec", "simulated", "generic")
"""Kinds of raw logs that can be prepared."""
MAX_SIMULATED_DAYS = 366
"""Maximum number of days of a simulated log: two files per day are open at once."""


@dataclass
class SimulateConfig:
    """Simulated short-video log with known probabilities (``a2gen simulate``).

    Effects are shifts of log-odds. Base log-odds are fitted to the configured rates.
    """

    users: int = 2_000
    """Number of users; in a log of several days, the number on each day."""
    items: int = 1_000
    """Number of videos; in a log of several days, the mean number on a day."""
    authors: int = 200
    """Number of authors."""
    topics: int = 12
    """Number of topics."""
    groups: int = 8
    """Number of user groups; members of a group tend to share favourite topics."""
    impressions_per_user: int = 100
    """Mean number of impressions per user in a static log; users differ."""
    span_days: int = 14
    """Time span of a static log in days."""
    days: int = 1
    """Number of days. Above 1, videos, tastes and users change every midnight, and each day has its own folder. 1 gives
    a static log, to which the settings per day do not apply."""
    impressions_per_day: float = 8.0
    """Mean number of impressions per user and day; users differ."""
    births_per_day: float = 0.05
    """Number of videos born per day as a fraction of ``items``. The same fraction of the videos retires."""
    popularity_half_life: float = 3.0
    """Half-life of a video's popularity in days."""
    topic_drift: float = 0.15
    """Standard deviation of the daily change of a topic's log popularity."""
    taste_drift: float = 0.1
    """Probability per day that a user trades one of three favourite topics for another one."""
    new_users_per_day: float = 0.03
    """Fraction of users who leave per day; as many new users arrive."""
    seed: int = 0
    """Random seed of the simulation."""
    users_per_file: int = 2_000
    """Number of users per impression file, rounded up to whole thousands; does not change any row."""
    like_rate: float = 0.10
    """Fraction of impressions with a like."""
    comment_rate: float = 0.03
    """Fraction of impressions with a comment."""
    follow_rate: float = 0.03
    """Fraction of impressions with a follow."""
    collect_rate: float = 0.035
    """Fraction of impressions with a collect."""
    forward_rate: float = 0.02
    """Fraction of impressions with a forward."""
    long_view_rate: float = 0.38
    """Fraction of impressions with a long view."""
    glance_rate: float = 0.28
    """Fraction of impressions left within the first three seconds."""
    popularity_exponent: float = 0.8
    """Zipf exponent of item exposure."""
    personalized_share: float = 0.7
    """Fraction of the ``for_you`` tab's exposures that follow the user's interests."""
    interest_strength: float = 1.0
    """Effect of the match between a user's interests and a segment's topic."""
    user_propensity_std: float = 1.0
    """Standard deviation of the users' propensity to each action, and of their patience."""
    item_quality_std: float = 0.3
    """Standard deviation of the videos' quality."""
    highlight_strength: float = 1.0
    """Effect of a highlight on a topic of interest, on actions and on retention."""
    highlight_like_boost: float = 1.5
    """Effect of a like inside a highlight on later follows and collects."""
    follow_retention_boost: float = 1.5
    """Effect of a follow before a like: lowers the probability of leaving afterwards."""
    hook_penalty: float = 1.2
    """Effect of a topic mismatch in the first three seconds."""
    vectors: int = 0
    """Width of the videos' content vectors: noisy projections of topics and quality; 0 for none."""
    vector_noise: float = 0.5
    """Standard deviation of the noise of content vectors, relative to their signal."""

    def __post_init__(self) -> None:
        sizes = ("users", "items", "authors", "topics", "groups", "impressions_per_user", "users_per_file")
        for name in (*sizes, "span_days", "days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("vectors", "vector_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 0")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed {self.seed} must be from 0 to 2^32 - 1")
        if self.days > MAX_SIMULATED_DAYS:
            raise ConfigError(f"days {self.days} must be at most {MAX_SIMULATED_DAYS}")
        if not 0 < self.impressions_per_day < math.inf:
            raise ConfigError(f"impressions_per_day {self.impressions_per_day} must be above 0")
        if not self.popularity_half_life > 0:
            raise ConfigError(f"popularity_half_life {self.popularity_half_life} must be above 0")
        for name in ("births_per_day", "taste_drift", "new_users_per_day"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [0, 1]")
        for name in ("like_rate", "comment_rate", "follow_rate", "collect_rate", "forward_rate"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0 and at most 0.5")
        if not 0 < self.glance_rate < 1 - self.long_view_rate < 1:
            raise ConfigError("glance_rate and long_view_rate must be above 0 and sum to less than 1")
        if not 0 <= self.personalized_share <= 1:
            raise ConfigError(f"personalized_share {self.personalized_share} must be in [0, 1]")
        for name in (
            "popularity_exponent",
            "interest_strength",
            "user_propensity_std",
            "item_quality_std",
            "highlight_strength",
            "topic_drift",
        ):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [0, 10]")
        for name in ("highlight_like_boost", "follow_retention_boost", "hook_penalty"):
            if not -10 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [-10, 10]")

    @property
    def num_births(self) -> int:
        """Number of videos born on each day after the first."""
        return round(self.births_per_day * self.items)


@dataclass
class PrepareConfig:
    """Preparation of a dataset from a raw log (``a2gen prepare``). Zero or empty values use the source's default."""

    start: str = ""
    """Start of the part of the log that is read: an ISO datetime in the log's time zone, or a millisecond timestamp.
    Earlier impressions are ignored."""
    end: str = ""
    """End of the part of the log that is read, in the format of ``start``; impressions from then on are ignored."""
    max_history: int = 100
    """Maximum number of history impressions per window."""
    max_targets: int = 64
    """Maximum number of targets per window."""
    min_count: int = 0
    """Minimum frequency of a value in the training data; rarer values share row 0 of their table."""
    valid_start: str = ""
    """Start of the validation split: an ISO datetime in the log's time zone, a millisecond timestamp, or ``-2d``, the
    start of the log's second-to-last day."""
    test_start: str = ""
    """Start of the test split, in the format of ``valid_start``."""
    valid_fraction: float = 0.0
    """Fraction of impressions in the validation split, if no boundary is given."""
    test_fraction: float = 0.0
    """Fraction of impressions in the test split, if no boundary is given."""
    train_only: bool = False
    """Put all impressions into the training split, as increments do by default."""
    statistics: bool = True
    """Compute statistics of the values of item features: impressions, rates and mean times before the target's day."""
    capacity: float = 0.0
    """Table rows per value of a vocabulary, at least 1. Above 1, rows stay free for values of later increments. In an
    increment, tables without a free row for each new value grow to it; 0 keeps their size."""
    ttl_days: float = 0.0
    """Days after which an increment retires what was not seen: values of vocabularies lose their row, users their
    history, items their features. 0 retires nothing."""
    max_late_share: float = 0.1
    """Maximum share of an increment's rows that do not start after the end of its base; they are dropped."""
    carry: bool = True
    """Write what increments of the dataset need: counts, latest impressions of users, features of items."""
    num_partitions: int = 16
    """Number of files per split; windows are partitioned by a hash of the user."""
    memory_limit_gb: float = 2.0
    """Memory limit of DuckDB in GB; it spills to disk beyond it."""
    threads: int = 0
    """Number of DuckDB threads; 0 uses all cores."""

    def __post_init__(self) -> None:
        minimums = {"max_history": 0, "max_targets": 1, "min_count": 0, "num_partitions": 1, "threads": 0}
        for name, minimum in minimums.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least {minimum}")
        if self.capacity and not 1 <= self.capacity <= 100:
            raise ConfigError(f"capacity {self.capacity} must be 0, or from 1 to 100")
        if not 0 <= self.ttl_days < math.inf:
            raise ConfigError(f"ttl_days {self.ttl_days} must be at least 0")
        if not 0 <= self.max_late_share <= 1:
            raise ConfigError(f"max_late_share {self.max_late_share} must be from 0 to 1")
        if self.memory_limit_gb <= 0:
            raise ConfigError(f"memory_limit_gb {self.memory_limit_gb} must be positive")
