"""Encoded user histories: the state that a server keeps per user between requests."""

from dataclasses import dataclass, replace

import numpy as np

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.features.sessions import session_feature_rows, session_positions
from a2gen_rec.data.schema import FEEDBACK, UNKNOWN


@dataclass(frozen=True)
class EncodedHistory:
    """Encoded impressions of one user, oldest first: immutable, made by ``Ranker.encode``, valid for that model only.

    Only the most recent impressions that the model can use are kept, so the size stays bounded however often a caller
    appends.

    Attributes:
        columns: One window per impression, without user features.
        items: Raw item identifiers.
        state_keys: Key of each impression's action-level state; equal keys mean equal states, across users too.
        session_positions: [impressions] int64 position in the session, from 1.
    """

    columns: WindowColumns
    items: list[str]
    state_keys: list[bytes]
    session_positions: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ts_ms(self) -> np.ndarray:
        """[impressions] int64 start times."""
        return self.columns.ts_ms

    @property
    def end_ms(self) -> np.ndarray:
        """[impressions] int64 end times, as far as known."""
        return self.columns.end_ms

    @property
    def impression_keys(self) -> list[tuple[int, str]]:
        """Unique, sortable key of each impression: start time and item."""
        return list(zip(self.ts_ms.tolist(), self.items, strict=True))

    def take(self, indices: list[int]) -> "EncodedHistory":
        """Return a selection of the impressions, in the given order."""
        rows = np.array(indices, np.int64)
        items, state_keys = [self.items[index] for index in indices], [self.state_keys[index] for index in indices]
        return EncodedHistory(self.columns.take(rows), items, state_keys, self.session_positions[rows])

    def up_to(self, now_ms: int) -> "EncodedHistory":
        """Return the impressions that started at or before ``now_ms``."""
        count = int(np.searchsorted(self.ts_ms, now_ms, side="right"))
        return self if count == len(self) else self.take(list(range(count)))


def merge_histories(
    previous: EncodedHistory, new: EncodedHistory, card: DatasetCard, max_history: int
) -> EncodedHistory:
    """Merge two histories in order of time; new impressions replace previous ones with the same key.

    Args:
        previous: History so far.
        new: Impressions to add; their positions and session rows are ignored.
        card: Dataset card.
        max_history: Number of most recent impressions to keep. If ``previous`` is full, older new ones are dropped.
    """
    previous_keys, new_keys = previous.impression_keys, new.impression_keys
    if len(previous_keys) >= max_history:
        new = new.take([index for index, key in enumerate(new_keys) if key >= previous_keys[0]])
        new_keys = new.impression_keys
    replaced = set(new_keys)
    kept = previous.take([index for index, key in enumerate(previous_keys) if key not in replaced])
    keys = kept.impression_keys + new_keys
    merged = EncodedHistory(
        WindowColumns.concat([kept.columns, new.columns]),
        kept.items + new.items,
        kept.state_keys + new.state_keys,
        np.concatenate([kept.session_positions, new.session_positions]),
    ).take(sorted(range(len(keys)), key=keys.__getitem__))
    continues = bool(previous_keys) and merged.impression_keys[0] == previous_keys[0]
    history = _with_sessions(merged, previous if continues else None, card)
    count = len(history)
    return history.take(list(range(count - max_history, count))) if count > max_history else history


def session_features_at(history: EncodedHistory, now_ms: int, card: DatasetCard) -> dict[str, int]:
    """Return the row of each session feature for an impression that starts at ``now_ms``, after all of ``history``."""
    num_past = min(len(history), 1)  # session features depend only on the last impression and its session position
    columns, last = history.columns, slice(len(history) - num_past, len(history))
    rows = session_feature_rows(
        card.features_at("session"),
        np.full(num_past + 1, not num_past),
        np.append(columns.ts_ms[last], now_ms),
        np.append(columns.end_ms[last], now_ms),
        np.append(_feedback_levels(columns)[last], UNKNOWN),
        card.session_gap_s,
        int(history.session_positions[-1]) if num_past else 1,
    )
    return {name: int(values[-1]) for name, values in rows.items()}


def _with_sessions(history: EncodedHistory, previous: EncodedHistory | None, card: DatasetCard) -> EncodedHistory:
    """Return the history with its session rows and positions.

    Args:
        history: Merged history.
        previous: History with the same first impression, whose session rows and position are kept; None to start anew.
        card: Dataset card.
    """
    columns, first_position = history.columns, 1 if previous is None else int(previous.session_positions[0])
    new_user = np.zeros(len(history), bool)
    new_user[:1] = previous is None
    times = (columns.ts_ms, columns.end_ms, _feedback_levels(columns))
    session = session_feature_rows(card.features_at("session"), new_user, *times, card.session_gap_s, first_position)
    if previous is not None:  # the impression before the first one is no longer available
        for name, rows in session.items():
            rows[0] = previous.columns.session[name][0]
    positions = session_positions(new_user, columns.ts_ms, card.session_gap_s, first_position)
    return replace(history, columns=replace(columns, session=session), session_positions=positions)


def _feedback_levels(columns: WindowColumns) -> np.ndarray:
    return columns.outcome.get(FEEDBACK, np.full(len(columns.ts_ms), UNKNOWN))
