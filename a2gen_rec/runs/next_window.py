"""What a prepared dataset has of a user and of items, as one window to rank."""

from dataclasses import replace

import numpy as np

from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.features.sessions import session_feature_rows
from a2gen_rec.data.parquet_reader import read_user_windows
from a2gen_rec.data.schema import FEEDBACK, SPLITS, UNKNOWN, DatasetCard
from a2gen_rec.ranking.window import next_timestamp


def append_candidates_now(history: WindowColumns, items: CandidateItems, card: DatasetCard) -> WindowColumns:
    """One window: all of ``history`` (one window too), then every item a second after its last end, in its context."""
    now = next_timestamp(history)
    return history.append_candidates(items, card, now, {}, _session(history, now, card))


def read_latest_window(dataset: Dataset, user: str) -> WindowColumns | None:
    """The last window of a user in the latest split that has any, as columns of one window; None without one.

    Raises:
        DataError: a file of the dataset breaks the contract.
    """
    for split in reversed(SPLITS):
        windows = read_user_windows(dataset.files(split), dataset.card, user)
        if windows is not None:
            last = windows.ts_ms[windows.starts + windows.lengths - 1]
            return windows.take(np.array([np.argmax(last)]))
    return None


def empty_window(card: DatasetCard) -> WindowColumns:
    """One window of an unknown user, without any impression."""
    one = np.zeros(1, np.int64)
    users = {feature.name: one for feature in card.features_at("user")}
    return replace(WindowColumns.empty(card), user_key=one, first_target=one, starts=one, lengths=one, user_ids=users)


def _session(history: WindowColumns, now: int, card: DatasetCard) -> dict[str, int]:
    """Session feature -> row of an impression that begins ``now``, as far as the window reaches back [ours]."""
    seen = len(history.ts_ms)
    rows = session_feature_rows(
        card.features_at("session"),
        np.arange(seen + 1) == 0,
        np.append(history.ts_ms, now),
        np.append(history.end_ms, now),
        np.append(history.outcome.get(FEEDBACK, np.zeros(seen, np.int64)), UNKNOWN),
        card.session_gap_s,
    )
    return {name: int(values[-1]) for name, values in rows.items()}
