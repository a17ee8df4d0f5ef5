"""Settings of backtests (``a2gen backtest``)."""

from dataclasses import dataclass, field
from typing import Literal

from a2gen_rec.config.checks import NON_NEGATIVE, POSITIVE, check_fields
from a2gen_rec.errors import ConfigError

Policy = Literal["frozen", "retrain", "warm", "replay"]
POLICIES: tuple[Policy, ...] = ("frozen", "retrain", "warm", "replay")


@dataclass
class BacktestConfig:
    """Training policies of a backtest (`a2gen backtest`)."""

    policies: list[Policy] = field(default_factory=lambda: list(POLICIES))
    """Policies to compare. ``frozen`` trains once; ``retrain`` trains from scratch every ``retrain_interval_days``;
    ``warm`` continues with each day; ``replay`` does so with some windows of the day before."""
    window_days: int = 0
    """Number of days that a training from scratch reads; 0 reads all earlier days."""
    retrain_interval_days: int = 1
    """Days between trainings of ``retrain``."""
    warm_epochs: int = 1
    """Passes over each day of ``warm`` and ``replay``."""
    replay_share: float = 0.5
    """Windows of the day before that ``replay`` reads, as a share of those of the day."""

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError(f"policies {self.policies} must be one or more different policies")
        check_fields("backtest", self, *POSITIVE, "retrain_interval_days", "warm_epochs", "replay_share")
        check_fields("backtest", self, *NON_NEGATIVE, "window_days")
