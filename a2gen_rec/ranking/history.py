"""A user's past as the model reads it: what a server keeps of a user between requests."""

from dataclasses import dataclass, replace

import numpy as np

from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.features.sessions import session_feature_rows, session_positions
from a2gen_rec.data.schema import FEEDBACK, UNKNOWN, DatasetCard


@dataclass(frozen=True)
class EncodedHistory:
    """Encoded impressions of one user, oldest first: made by ``Ranker.encode``, immutable, of use to that model only.

    Only the last impressions that the model may see are kept, so that a caller may append for ever.

    Attributes:
        columns: a window for each impression, without the user.
        items: raw identifiers.
        states: name each impression's action-level state: equal ones have equal states, whoever's they are.
        position: [impressions] int64 place in the session, from 1.
    """

    columns: WindowColumns
    items: list[str]
    states: list[bytes]
    session_positions: np.ndarray

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ts_ms(self) -> np.ndarray:
        """[impressions] int64 begins."""
        return self.columns.ts_ms

    @property
    def end_ms(self) -> np.ndarray:
        """[impressions] int64 ends, as far as is known."""
        return self.columns.end_ms

    @property
    def keys(self) -> list[tuple[int, str]]:
        """What tells impressions of a user apart, and orders them: begin and item."""
        return list(zip(self.ts_ms.tolist(), self.items, strict=True))

    def take(self, places: list[int]) -> "EncodedHistory":
        """Some of the impressions, in the given order."""
        at = np.array(places, np.int64)
        items, states = [self.items[place] for place in places], [self.states[place] for place in places]
        return EncodedHistory(self.columns.take(at), items, states, self.session_positions[at])

    def up_to(self, now_ms: int) -> "EncodedHistory":
        """What had begun by then."""
        seen = int(np.searchsorted(self.ts_ms, now_ms, side="right"))
        return self if seen == len(self) else self.take(list(range(seen)))


def merge_histories(before: EncodedHistory, made: EncodedHistory, card: DatasetCard, keep: int) -> EncodedHistory:
    """``before`` and impressions that have just been made (their positions and session rows aside), in order of time.

    Args:
        keep: most impressions to keep, the last ones; those made that are older than a full ``before`` are left out.
    """
    old, new = before.keys, made.keys
    if len(old) >= keep:
        made = made.take([place for place, key in enumerate(new) if key >= old[0]])
        new = made.keys
    replaced = set(new)
    kept = before.take([place for place, key in enumerate(old) if key not in replaced])
    keys = kept.keys + new
    both = EncodedHistory(
        WindowColumns.concat([kept.columns, made.columns]),
        kept.items + made.items,
        kept.states + made.states,
        np.concatenate([kept.session_positions, made.session_positions]),
    ).take(sorted(range(len(keys)), key=keys.__getitem__))
    goes_on = bool(old) and both.keys[0] == old[0]
    ended = _with_sessions(both, before if goes_on else None, card)
    return ended.take(list(range(len(ended) - keep, len(ended)))) if len(ended) > keep else ended


def session_features_at(history: EncodedHistory, now_ms: int, card: DatasetCard) -> dict[str, int]:
    """Session feature -> row of an impression that begins ``now_ms``, after all of ``history``."""
    seen = min(len(history), 1)  # nothing of the past matters but the last impression, and its place in the session
    columns, last = history.columns, slice(len(history) - seen, len(history))
    rows = session_feature_rows(
        card.features_at("session"),
        np.full(seen + 1, not seen),
        np.append(columns.ts_ms[last], now_ms),
        np.append(columns.end_ms[last], now_ms),
        np.append(_levels(columns)[last], UNKNOWN),
        card.session_gap_s,
        int(history.session_positions[-1]) if seen else 1,
    )
    return {name: int(values[-1]) for name, values in rows.items()}


def _with_sessions(history: EncodedHistory, before: EncodedHistory | None, card: DatasetCard) -> EncodedHistory:
    """The history with its session rows and positions; ``before``: what it goes on from, its first impression's."""
    columns, first_position = history.columns, 1 if before is None else int(before.session_positions[0])
    new_user = np.zeros(len(history), bool)
    new_user[:1] = before is None
    times = (columns.ts_ms, columns.end_ms, _levels(columns))
    session = session_feature_rows(card.features_at("session"), new_user, *times, card.session_gap_s, first_position)
    if before is not None:  # what came before the first one is no longer here
        for name, rows in session.items():
            rows[0] = before.columns.session[name][0]
    positions = session_positions(new_user, columns.ts_ms, card.session_gap_s, first_position)
    return replace(history, columns=replace(columns, session=session), session_positions=positions)


def _levels(columns: WindowColumns) -> np.ndarray:
    return columns.outcome.get(FEEDBACK, np.full(len(columns.ts_ms), UNKNOWN))
