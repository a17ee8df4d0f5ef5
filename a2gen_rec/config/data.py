"""Settings of what makes data: the simulated world, and preparation."""

from dataclasses import dataclass

from a2gen_rec.errors import ConfigError


@dataclass
class SimulateConfig:
    """A short-video world with known truth (``a2gen simulate``).

    Effects are shifts of log-odds. Base log-odds are fitted so that the rates come out as asked.

    Attributes:
        users, items: size of the world.
        groups: user groups; each has favourite topics its members tend to share.
        impressions_per_user: mean; users differ.
        days: span of the log.
        chunk_users: users per impression file, rounded up to whole thousands; changes no row.
        <action>_rate, long_view_rate: share of impressions with it.
        glance_rate: share of impressions left within the first three seconds.
        popularity: Zipf exponent of how often items are shown.
        interest_share: share of the ``for_you`` tab's exposures that follow the user's interests.
        interest: weight of the match between a user's interests and a segment's topic.
        habit: spread of the users' own inclination to each action, and of their patience.
        quality: spread of the videos' quality.
        highlight: how much more a highlight on a topic the user cares about invites actions and holds them.
        liked_highlight: a like inside a highlight raises later follows and collects by this.
        loyalty: following before liking lowers leaving afterwards by this.
        hook: weight of a mismatch in the first three seconds.
    """

    users: int = 2_000
    items: int = 1_000
    authors: int = 200
    topics: int = 12
    groups: int = 8
    impressions_per_user: int = 100
    days: int = 14
    seed: int = 0
    users_per_file: int = 2_000
    like_rate: float = 0.10
    comment_rate: float = 0.03
    follow_rate: float = 0.03
    collect_rate: float = 0.035
    forward_rate: float = 0.02
    long_view_rate: float = 0.38
    glance_rate: float = 0.28
    popularity_exponent: float = 0.8
    personalized_share: float = 0.7
    interest_strength: float = 1.0
    user_propensity_std: float = 1.0
    item_quality_std: float = 0.3
    highlight_strength: float = 1.0
    highlight_like_boost: float = 1.5
    follow_retention_boost: float = 1.5
    hook_penalty: float = 1.2

    def __post_init__(self) -> None:
        sizes = ("users", "items", "authors", "topics", "groups", "impressions_per_user", "days", "users_per_file")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed} must not be negative")
        for name in ("like_rate", "comment_rate", "follow_rate", "collect_rate", "forward_rate"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} {getattr(self, name)} must be above 0 and at most 0.5")
        if not 0 < self.glance_rate < 1 - self.long_view_rate < 1:
            raise ConfigError("glance_rate and long_view_rate must be above 0 and sum to less than 1")
        if not 0 <= self.personalized_share <= 1:
            raise ConfigError(f"interest_share {self.personalized_share} must be in [0, 1]")
        for name in (
            "popularity_exponent",
            "interest_strength",
            "user_propensity_std",
            "item_quality_std",
            "highlight_strength",
        ):
            if not 0 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [0, 10]")
        for name in ("highlight_like_boost", "follow_retention_boost", "hook_penalty"):
            if not -10 <= getattr(self, name) <= 10:
                raise ConfigError(f"{name} {getattr(self, name)} must be in [-10, 10]")


@dataclass
class PrepareConfig:
    """Raw log to dataset (``a2gen prepare``). A zero or empty value takes the source's own choice.

    Attributes:
        history: most impressions before a target that its window carries.
        max_targets: most targets of one window.
        min_count: values rarer than this in the training data share row 0 of their table.
        valid_from, test_from: split boundaries, as ISO date-times in the log's own time zone, milliseconds, or
            ``-2d``: the begin of the log's last day but one.
        valid_share, test_share: splits by share of impressions, where no boundary is given.
        partitions: files per split; windows are spread over them by a hash of the user.
        memory_gb: bound on DuckDB's memory; beyond it, it spills to disk.
        threads: DuckDB's threads; 0 takes all cores.
    """

    max_history: int = 100
    max_targets: int = 64
    min_count: int = 0
    valid_start: str = ""
    test_start: str = ""
    valid_fraction: float = 0.0
    test_fraction: float = 0.0
    num_partitions: int = 16
    memory_limit_gb: float = 2.0
    threads: int = 0
