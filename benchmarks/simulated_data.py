"""Simulated datasets for benchmarks, and modified versions of their windows."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch.distributed as dist

from a2gen_rec.config import PrepareConfig, SimulateConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import ITEM_ID
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import ConfigError
from a2gen_rec.utils.distributed import DistributedContext

_SCATTER = 2_654_435_761
"""Prime larger than any table; multiplication by it permutes the rows."""


def make_dataset(
    folder: str | Path,
    users: int,
    items: int,
    impressions_per_user: int,
    history: int = 100,
    max_targets: int = 64,
    seed: int = 0,
) -> str:
    """Simulate a log, prepare a dataset from it in the new directory ``folder``, and return ``folder``."""
    # Imported here: DuckDB reports leaks at exit of multiprocessing children, which never call this function.
    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.simulation.simulator import simulate

    config = SimulateConfig(
        users=users,
        items=items,
        authors=max(1, items // 5),
        impressions_per_user=impressions_per_user,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as scratch:
        log = str(Path(scratch, "log"))
        simulate(log, config)
        prepare("simulated", log, str(folder), PrepareConfig(max_history=history, max_targets=max_targets))
    return str(folder)


@contextmanager
def shared_full_history_dataset(
    process: DistributedContext, users: int, items: int, impressions_per_user: int, history: int, seed: int
) -> Iterator[str]:
    """Provide a simulated dataset whose training targets have full histories; rank 0 creates it for all ranks.

    Raises:
        ConfigError: too few windows have ``history`` impressions of history.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "data"))
        if process.is_main:
            make_dataset(folder, users, items, impressions_per_user, history, seed=seed)
            kept = [keep_full_histories(file, history) for file in Path(folder, "train").glob("*.parquet")]
            if sum(kept) < 8 * process.world_size:
                raise ConfigError(
                    f"impressions_per_user {impressions_per_user} or users {users} is too small for "
                    f"histories of {history}"
                )
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        yield shared[0]
        dist.barrier()


def keep_full_histories(file: Path, history: int) -> int:
    """Keep the windows of a file whose targets have ``history`` impressions before them; return their number."""
    windows = pq.read_table(file, filters=pc.field("first_target") >= history)
    file.unlink()
    if windows.num_rows:
        pq.write_table(windows, file, row_group_size=64)
    return windows.num_rows


def zipf_ids(rows: int, count: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Draw ids with frequency proportional to rank^-exponent, from the continuous law between rank 1 and ``rows + 1``.

    Ranks are scattered over the table as by hashing: adjacent rows would share cache lines.

    Args:
        rows: rows of the table.
        count: number of ids.
        exponent: Zipf exponent, above 0 and not 1.
        rng: random number generator.

    Returns:
        [count] int64 in [0, rows).
    """
    power = 1 - exponent
    rank = (1 + rng.random(count) * ((rows + 1) ** power - 1)) ** (1 / power)
    return np.minimum(rank.astype(np.int64) - 1, rows - 1) * _SCATTER % rows


@dataclass
class WindowSample:
    """Windows of a dataset with equal numbers of targets and a minimum history."""

    card: DatasetCard
    columns: WindowColumns

    @classmethod
    def from_dataset(cls, dataset: str, windows: int, history: int, seed: int) -> "WindowSample":
        """Draw ``windows`` full training windows at random.

        Raises:
            ConfigError: the dataset has too few windows with ``history`` impressions of history.
        """
        card = DatasetCard.load(dataset)
        columns = read_columns(read_row_groups(sorted(map(str, Path(dataset, "train").iterdir()))), card)
        targets = columns.lengths - columns.first_target
        full = np.flatnonzero((columns.first_target > history) & (targets == card.max_targets))
        if len(full) < windows:
            raise ConfigError(
                f"only {len(full)} simulated windows have {history} impressions of history and "
                f"{card.max_targets} targets, but {windows} are required; raise users or impressions_per_user"
            )
        return cls(card, columns.take(np.random.default_rng(seed).permutation(full)[:windows]))

    def with_history(self, max_history: int) -> "WindowSample":
        """Keep the targets but only ``max_history`` impressions of history, and one more for the oldest gap."""
        columns = self.columns
        dropped = np.maximum(columns.first_target - max_history - 1, 0)
        truncated = replace(
            columns,
            starts=columns.starts + dropped,
            lengths=columns.lengths - dropped,
            first_target=columns.first_target - dropped,
        )
        return WindowSample(self.card, truncated)

    def with_items(self, rows: int, exponent: float, seed: int) -> "WindowSample":
        """Replace the items by ids of :func:`zipf_ids` from a table with ``rows`` rows."""
        ids = self.columns.impression_ids
        drawn = zipf_ids(rows, len(ids[ITEM_ID]), exponent, np.random.default_rng([seed, rows]))
        features = [
            replace(feature, cardinality=rows) if feature.name == ITEM_ID else feature for feature in self.card.features
        ]
        columns = replace(self.columns, impression_ids={**ids, ITEM_ID: drawn})
        return WindowSample(replace(self.card, features=features), columns)
