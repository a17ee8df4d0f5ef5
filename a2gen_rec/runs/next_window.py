"""Window of a user's history and candidates for ranking, read from a prepared dataset."""

from dataclasses import replace

import numpy as np

from a2gen_rec.data.bags import Bags
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.data.dataset import Dataset
from a2gen_rec.data.features.sessions import session_feature_rows
from a2gen_rec.data.schema import FEEDBACK, SPLITS, UNKNOWN
from a2gen_rec.data.window_reader import read_user_windows
from a2gen_rec.ranking.window import next_timestamp


def append_candidates_now(history: WindowColumns, items: CandidateItems, card: DatasetCard) -> WindowColumns:
    """Append items as candidates to a window ``history``, one second after its last end, in the last context."""
    now = next_timestamp(history)
    return history.append_candidates(items, card, now, {}, _session(history, now, card))


def read_latest_window(dataset: Dataset, user: str) -> WindowColumns | None:
    """Read a user's last window from the latest split with any.

    Returns:
        Columns of one window; None if the user has none.

    Raises:
        DataError: A file of the dataset violates its contract.
    """
    for split in reversed(SPLITS):
        windows = read_user_windows(dataset.files(split), dataset.card, user, dataset.new_rows)
        if windows is not None:
            last = windows.ts_ms[windows.starts + windows.lengths - 1]
            return windows.take(np.array([np.argmax(last)]))
    return None


def empty_window(card: DatasetCard) -> WindowColumns:
    """Return one window of an unknown user without impressions."""
    one = np.zeros(1, np.int64)
    users = {feature.name: one for feature in card.features_at("user") if not feature.multi_valued}
    numbers = np.full((1, len(card.numbers_at("user"))), np.nan, np.float32)
    return replace(
        WindowColumns.empty(card),
        user_key=one,
        first_target=one,
        starts=one,
        lengths=one,
        user_ids=users,
        user_numbers=numbers,
        user_bags={feature.name: Bags.unknown(1) for feature in card.bags_at("user")},
    )


def _session(history: WindowColumns, now: int, card: DatasetCard) -> dict[str, int]:
    """Return session feature -> row for an impression at ``now``; sessions are cut at the window's start [ours]."""
    length = len(history.ts_ms)
    rows = session_feature_rows(
        card.features_at("session"),
        np.arange(length + 1) == 0,
        np.append(history.ts_ms, now),
        np.append(history.end_ms, now),
        np.append(history.outcome.get(FEEDBACK, np.zeros(length, np.int64)), UNKNOWN),
        card.session_gap_s,
    )
    return {name: int(values[-1]) for name, values in rows.items()}
