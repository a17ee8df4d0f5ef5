"""Simulated datasets for benchmarks, and variations of their windows."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.parquet_reader import read_columns, read_row_groups
from a2gen_rec.data.schema import ITEM_ID, DatasetCard
from a2gen_rec.errors import ConfigError

_SCATTER = 2_654_435_761
"""A prime larger than any table, so that multiplying by it permutes the rows."""


def simulated(
    folder: str | Path,
    users: int,
    items: int,
    impressions_per_user: int,
    history: int = 100,
    max_targets: int = 64,
    seed: int = 0,
) -> str:
    """A dataset of a simulated log, in the new folder ``folder``, which is returned."""
    # DuckDB reports leaks at the end of every process that multiprocessing starts: those need none of this.
    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.simulation.simulator import simulate

    world = SimulateConfig(
        users=users,
        items=items,
        authors=max(1, items // 5),
        impressions_per_user=impressions_per_user,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        log = str(Path(scratch, "log"))
        simulate(log, world)
        prepare("simulated", log, str(folder), PrepareConfig(max_history=history, max_targets=max_targets))
    return str(folder)


def zipf_ids(rows: int, count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Ids whose frequencies fall as rank^-exponent, drawn from the continuous law between rank 1 and ``rows + 1``.

    The ranks are scattered over the table, as hashing scatters them: neighbours would share cache lines.

    Args:
        exponent: above 0 and not 1.

    Returns:
        [count] int64 in [0, rows).
    """
    power = 1 - exponent
    rank = (1 + rng.random(count) * ((rows + 1) ** power - 1)) ** (1 / power)
    return np.minimum(rank.astype(np.int64) - 1, rows - 1) * _SCATTER % rows


@dataclass
class World:
    """Windows of a dataset, each with as many targets and at least as much history."""

    card: DatasetCard
    columns: WindowColumns

    @classmethod
    def read(cls, dataset: str, windows: int, history: int, seed: int) -> "World":
        """So many full training windows, drawn at random.

        Raises:
            ConfigError: the dataset has not as many with that history.
        """
        card = DatasetCard.load(dataset)
        columns = read_columns(read_row_groups(sorted(map(str, Path(dataset, "train").iterdir()))), card)
        targets = columns.lengths - columns.first_target
        full = np.flatnonzero((columns.first_target > history) & (targets == card.max_targets))
        if len(full) < windows:
            raise ConfigError(
                f"{len(full)} of the simulated windows have {history} impressions of history and "
                f"{card.max_targets} targets, {windows} are needed; raise users or impressions_per_user"
            )
        return cls(card, columns.take(np.random.default_rng(seed).permutation(full)[:windows]))

    def with_history(self, history: int) -> "World":
        """The same targets with less history: so many impressions, and the one that the oldest one's gap needs."""
        columns = self.columns
        cut = np.maximum(columns.first_target - history - 1, 0)
        shorter = replace(
            columns,
            starts=columns.starts + cut,
            lengths=columns.lengths - cut,
            first_target=columns.first_target - cut,
        )
        return World(self.card, shorter)

    def with_items(self, rows: int, exponent: float, seed: int) -> "World":
        """The same windows with items of a table of so many rows, their frequencies those of :func:`zipf_ids`."""
        ids = self.columns.impression_ids
        drawn = zipf_ids(rows, len(ids[ITEM_ID]), exponent, np.random.default_rng([seed, rows]))
        features = [replace(part, cardinality=rows) if part.name == ITEM_ID else part for part in self.card.features]
        columns = replace(self.columns, impression_ids={**ids, ITEM_ID: drawn})
        return World(replace(self.card, features=features), columns)
