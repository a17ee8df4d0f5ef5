"""Workload of one rank in a training step: the number of distinct ids that it looks up in each table.

The loader deduplicates the ids of a batch. A table's workload is therefore the expected number of distinct values
among the
values of the batch's windows (user features) or impressions (other features). For independent draws with probability
p_k of value k, that number is Σ_k 1 − (1 − p_k)^draws.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from a2gen_rec.config import Config, PlannerFeature, WorkloadConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.features.feedback import outcome_features
from a2gen_rec.data.features.sessions import session_features
from a2gen_rec.data.identity import DataIdentity
from a2gen_rec.data.names import check_names
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.embedding_tables import EmbeddingTables

_EXACT_ROWS = 100_000  # head of a distribution that is summed term by term
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_MAX_ROWS = 10**14  # above, torch cannot represent the bytes of a wide table


@dataclass(frozen=True)
class TableWorkload:
    """A table and its lookups in one rank's batch.

    Attributes:
        name: Table name.
        rows: Number of rows.
        ids: Ids per batch, duplicates included.
        zipf_exponent: Exponent of the Zipf distribution of the ids; 0 is uniform.
        dedup: Whether each distinct id is looked up once.

    Raises:
        ConfigError: ``rows`` is out of range.
    """

    name: str
    rows: int
    ids: float
    zipf_exponent: float
    dedup: bool

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= _MAX_ROWS:
            raise ConfigError(f"rows {self.rows} of table {self.name!r} must be at least 1 and at most 10^14")

    @cached_property
    def lookups(self) -> float:
        """Number of ids that one rank looks up per step."""
        return expected_unique(self.ids, self.rows, self.zipf_exponent) if self.dedup else self.ids


@dataclass(frozen=True)
class Workload:
    """Tables, and the expected size of one rank's batch.

    Attributes:
        tables: Tables with their lookups.
        windows_per_batch: Windows per batch.
        impressions_per_batch: Impressions per batch, history and targets together.
        targets_per_batch: Targets per batch.
        identity: Identity of the dataset; empty for described features.
    """

    tables: tuple[TableWorkload, ...]
    windows_per_batch: float
    impressions_per_batch: float
    targets_per_batch: float
    identity: DataIdentity = field(default_factory=DataIdentity)

    def with_rows(self, rows: Mapping[str, int]) -> "Workload":
        """Return the workload with other numbers of rows for the named tables.

        Raises:
            ConfigError: A table is unknown, or its number of rows is out of range.
        """
        names = [table.name for table in self.tables]
        for name in rows:
            if name not in names:
                raise ConfigError(f"unknown table {name!r}; choose one of {', '.join(names)}")
        resized = tuple(replace(table, rows=rows.get(table.name, table.rows)) for table in self.tables)
        return replace(self, tables=resized)


def workload_from_dataset(card: DatasetCard, config: Config) -> Workload:
    """Return the workload of training on a prepared dataset, from its card.

    It is an upper bound: batches are full, windows have the maximum history and the mean number of targets, and ids
    are uniform. Shorter histories and popular items only reduce it.
    """
    train, loader = card.splits["train"], config.loader
    targets = train.targets / max(train.windows, 1)
    window_size = card.max_history + targets
    impressions = min(loader.max_impressions_per_batch, loader.max_windows_per_batch * window_size)
    windows = max(1.0, impressions / window_size)
    tables = EmbeddingTables.from_card(card, config.model)
    features = {
        feature.name: PlannerFeature(
            "user" if feature.level == "user" else "item", feature.cardinality, mean_values=feature.mean_values
        )
        for feature in tables.id_features
    }
    workload = _workload(features, tables.full_tables, windows, impressions, windows * targets, config)
    return replace(workload, identity=card.identity)


def workload_from_features(
    features: Mapping[str, PlannerFeature], workload: WorkloadConfig, config: Config
) -> Workload:
    """Return the workload of planned features, without a prepared dataset.

    Raises:
        ConfigError: The description is incomplete.
        DataError: ``prepare`` would reject the name of a feature.
    """
    if not features:
        raise ConfigError("no tables to plan: pass --data, or a --config with `features` as in configs/scale/")
    check_names(features)
    for name in ("windows_per_batch", "impressions_per_batch", "targets_per_batch", "num_actions"):
        if not getattr(workload, name):
            raise ConfigError(f"workload.{name} is required without --data")
    counts = (
        float(workload.windows_per_batch),
        float(workload.impressions_per_batch),
        float(workload.targets_per_batch),
    )
    derived = [*session_features(with_feedback=True), *outcome_features()]
    tables = EmbeddingTables.from_features(derived, workload.num_actions, config.model)
    return _workload(features, tables.full_tables, *counts, config)


def _workload(
    features: Mapping[str, PlannerFeature],
    full_rows: Mapping[str, int],
    windows: float,
    impressions: float,
    targets: float,
    config: Config,
) -> Workload:
    tables = [
        TableWorkload(
            name,
            feature.rows,
            (windows if feature.level == "user" else impressions) * feature.mean_values,
            feature.zipf_exponent,
            config.loader.deduplicate_ids,
        )
        for name, feature in features.items()
    ]
    tables += [
        TableWorkload(name, rows, float(rows), zipf_exponent=0.0, dedup=False) for name, rows in full_rows.items()
    ]
    return Workload(tuple(tables), windows, impressions, targets)


def expected_unique(draws: float, rows: int, zipf_exponent: float = 0.0) -> float:
    """Return the expected number of distinct values among independent draws.

    Args:
        draws: Number of draws.
        rows: Number of values.
        zipf_exponent: The k-th most frequent value has a probability proportional to k^-zipf_exponent.
    """
    total = _sum_over_ranks(lambda k: k**-zipf_exponent, rows)
    return _sum_over_ranks(lambda k: -np.expm1(draws * np.log1p(-np.minimum(k**-zipf_exponent / total, 1))), rows)


def _sum_over_ranks(term: Callable[[np.ndarray], np.ndarray], rows: int) -> float:
    """Return Σ term(k) for k = 1 … rows: the head exactly, the smooth tail by Gauss–Legendre quadrature over log k."""
    head = min(rows, _EXACT_ROWS)
    with np.errstate(divide="ignore"):  # a single value has probability 1; log(1 - 1) is -inf
        total = float(term(np.arange(1, head + 1, dtype=np.float64)).sum())
    if rows > head:
        low, high = np.log(head + 0.5), np.log(rows + 0.5)
        k = np.exp((low + high + (high - low) * _NODES) / 2)
        total += float((high - low) / 2 * (_WEIGHTS * term(k) * k).sum())
    return total
