"""What one rank looks up in a training step: how many ids of each table, once each.

The loader looks every distinct id of a batch up once, so a table's work is the expected number of distinct values
among the batch's windows (user features) or impressions (the others). With ids drawn independently, value k with
probability p_k, that number is Σ_k 1 − (1 − p_k)^draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from a2gen_rec.config import Config, PlannerFeature, WorkloadConfig
from a2gen_rec.data.features.feedback import outcome_features
from a2gen_rec.data.features.sessions import session_features
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.embedding_tables import full_table_rows, full_tables, id_features, is_used_by

_EXACT_ROWS = 100_000
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_MOST_ROWS = 10**14  # beyond it, torch cannot count a wide table's bytes


@dataclass(frozen=True)
class TableWorkload:
    """A table to be placed, and what one rank's batch asks of it.

    Attributes:
        ids: in a batch, repetitions included.
        zipf: exponent of how often each occurs.
        dedup: whether each distinct one is looked up once.

    Raises:
        ConfigError: there are no rows, or more than can be counted.
    """

    name: str
    rows: int
    ids: float
    zipf: float
    dedup: bool

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= _MOST_ROWS:
            raise ConfigError(f"rows {self.rows} of table {self.name!r} must be at least 1 and at most 10^14")

    @cached_property
    def lookups(self) -> float:
        """Ids that one rank looks up per step."""
        return expected_unique(self.ids, self.rows, self.zipf) if self.dedup else self.ids


@dataclass(frozen=True)
class Workload:
    """The tables, and what one rank's batch is expected to hold: impressions are history and targets together."""

    tables: tuple[TableWorkload, ...]
    windows: float
    impressions: float
    targets: float

    def with_rows(self, rows: Mapping[str, int]) -> "Workload":
        """With other numbers of rows for the tables named.

        Raises:
            ConfigError: there is no such table, or it cannot have so many rows.
        """
        names = [table.name for table in self.tables]
        for name in rows:
            if name not in names:
                raise ConfigError(f"no table {name!r} to give other rows; there are {', '.join(names)}")
        resized = tuple(replace(table, rows=rows.get(table.name, table.rows)) for table in self.tables)
        return replace(self, tables=resized)


def workload_from_dataset(card: DatasetCard, config: Config) -> Workload:
    """The workload of training on a prepared dataset, as far as its card tells.

    Batches are taken as full, windows as long as the card's history and its mean number of targets, ids as
    uniform: users with a shorter history and popular items make it less, never more.
    """
    train, loader = card.splits["train"], config.loader
    targets = train.targets / max(train.windows, 1)
    length = card.max_history + targets
    impressions = min(loader.max_impressions_per_batch, loader.max_windows_per_batch * length)
    windows = max(1.0, impressions / length)
    features = {
        feature.name: PlannerFeature("user" if feature.level == "user" else "item", feature.cardinality)
        for feature in id_features(card)
    }
    whole = full_tables(card, config.model)
    return _workload(features, whole, windows, impressions, windows * targets, config)


def workload_from_features(
    features: Mapping[str, PlannerFeature], workload: WorkloadConfig, config: Config
) -> Workload:
    """The workload of data that are described instead of prepared.

    Raises:
        ConfigError: the description is not complete.
    """
    if not features:
        raise ConfigError("no tables to plan: give --data, or a --config with `features` such as configs/scale/ has")
    for name in ("windows_per_batch", "impressions_per_batch", "targets_per_batch", "num_actions"):
        if not getattr(workload, name):
            raise ConfigError(f"workload.{name} must be given (or --data, a dataset to take it from)")
    counts = (
        float(workload.windows_per_batch),
        float(workload.impressions_per_batch),
        float(workload.targets_per_batch),
    )
    made = [*session_features(levels=True), *outcome_features()]
    read = [feature for feature in made if is_used_by(config.model, feature)]
    return _workload(features, full_table_rows(workload.num_actions, read, config.model), *counts, config)


def _workload(
    features: Mapping[str, PlannerFeature],
    whole: Mapping[str, int],
    windows: float,
    impressions: float,
    targets: float,
    config: Config,
) -> Workload:
    tables = [
        TableWorkload(
            name,
            feature.rows,
            windows if feature.level == "user" else impressions,
            feature.zipf_exponent,
            config.loader.deduplicate_ids,
        )
        for name, feature in features.items()
    ]
    if clash := whole.keys() & features.keys():
        raise ConfigError(f"features: {min(clash)!r} is the name of a table of the model's own; give it another")
    tables += [TableWorkload(name, rows, float(rows), zipf=0.0, dedup=False) for name, rows in whole.items()]
    return Workload(tuple(tables), windows, impressions, targets)


def expected_unique(draws: float, rows: int, zipf: float = 0.0) -> float:
    """Expected number of distinct values among ``draws`` independent ones of ``rows``.

    Args:
        zipf: the k-th most frequent value has a probability proportional to k^-zipf.
    """
    total = _sum_over_ranks(lambda k: k**-zipf, rows)
    return _sum_over_ranks(lambda k: -np.expm1(draws * np.log1p(-np.minimum(k**-zipf / total, 1))), rows)


def _sum_over_ranks(term: Callable[[np.ndarray], np.ndarray], rows: int) -> float:
    """Σ term(k) for k = 1 … rows: the head term by term, the smooth rest by Gauss–Legendre quadrature over log k."""
    head = min(rows, _EXACT_ROWS)
    with np.errstate(divide="ignore"):  # a single value has probability 1, whose logarithm of the rest is -inf
        total = float(term(np.arange(1, head + 1, dtype=np.float64)).sum())
    if rows > head:
        low, high = np.log(head + 0.5), np.log(rows + 0.5)
        k = np.exp((low + high + (high - low) * _NODES) / 2)
        total += float((high - low) / 2 * (_WEIGHTS * term(k) * k).sum())
    return total
