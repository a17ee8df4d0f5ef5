"""Parquet row groups of user windows as flat numpy columns, checked against the dataset card.

An Arrow list column is a jagged tensor (offsets and values), so decoding copies whole buffers and never loops over
rows. Everything that breaks the contract is found here, with file, row and field, before any model sees it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from a2gen_rec.data.schema import UNKNOWN, DatasetCard


@dataclass(frozen=True)
class WindowColumns:
    """Windows as flat arrays.

    Attributes:
        user_key, first_target, starts, lengths: [windows] int64; ``starts`` into the impressions.
        user_ids: user feature -> [windows]; impression_ids: item or context feature -> [impressions].
        session, outcome: session or outcome feature -> [impressions].
        ts_ms, end_ms: [impressions] int64; labels, objectives, oracle: [impressions, names] float32.
        action_starts, action_lengths: [impressions] int64 into the tokens.
        action: [tokens] int64; offset_s: [tokens] float32.
    """

    user_key: np.ndarray
    first_target: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    user_ids: dict[str, np.ndarray]
    impression_ids: dict[str, np.ndarray]
    session: dict[str, np.ndarray]
    outcome: dict[str, np.ndarray]
    ts_ms: np.ndarray
    end_ms: np.ndarray
    labels: np.ndarray
    objectives: np.ndarray
    oracle: np.ndarray
    action_starts: np.ndarray
    action_lengths: np.ndarray
    action: np.ndarray
    offset_s: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def concat_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``[starts[0] .. starts[0]+lengths[0]-1, starts[1] .. ]`` as one int64 array."""
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(starts - before, lengths)


def jagged_positions(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sequence, place within it) of every token, given lengths [sequences]. Both [tokens], int64."""
    return np.repeat(np.arange(len(lengths)), lengths), concat_ranges(np.zeros_like(lengths), lengths)


def take_windows(columns: WindowColumns, rows: np.ndarray) -> WindowColumns:
    """Some windows of ``columns``, as columns of their own."""
    lengths = columns.lengths[rows]
    flat = concat_ranges(columns.starts[rows], lengths)
    action_lengths = columns.action_lengths[flat]
    tokens = concat_ranges(columns.action_starts[flat], action_lengths)
    return WindowColumns(
        user_key=columns.user_key[rows],
        first_target=columns.first_target[rows],
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        user_ids={name: values[rows] for name, values in columns.user_ids.items()},
        impression_ids={name: values[flat] for name, values in columns.impression_ids.items()},
        session={name: values[flat] for name, values in columns.session.items()},
        outcome={name: values[flat] for name, values in columns.outcome.items()},
        ts_ms=columns.ts_ms[flat],
        end_ms=columns.end_ms[flat],
        labels=columns.labels[flat],
        objectives=columns.objectives[flat],
        oracle=columns.oracle[flat],
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=columns.action[tokens],
        offset_s=columns.offset_s[tokens],
    )


def concatenate(parts: list[WindowColumns]) -> WindowColumns:
    """Windows of at least one part, one after another."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def join_each(name: str) -> dict[str, np.ndarray]:
        each = [getattr(part, name) for part in parts]
        return {key: np.concatenate([values[key] for values in each]) for key in each[0]}

    lengths, action_lengths = join("lengths"), join("action_lengths")
    return WindowColumns(
        user_key=join("user_key"),
        first_target=join("first_target"),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        user_ids=join_each("user_ids"),
        impression_ids=join_each("impression_ids"),
        session=join_each("session"),
        outcome=join_each("outcome"),
        ts_ms=join("ts_ms"),
        end_ms=join("end_ms"),
        labels=join("labels"),
        objectives=join("objectives"),
        oracle=join("oracle"),
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=join("action"),
        offset_s=join("offset_s"),
    )


@dataclass(frozen=True)
class CandidateItems:
    """Items to rank: raw identifiers ``raw`` and ``known``, [items]; item feature -> [items] table ``rows``."""

    ids: list[str]
    is_known: np.ndarray
    rows: dict[str, np.ndarray]


def no_impressions(card: DatasetCard) -> WindowColumns:
    """No window at all; features in the card's order, as the loader has them."""
    none = np.zeros(0, np.int64)
    return WindowColumns(
        user_key=none,
        first_target=none,
        starts=none,
        lengths=none,
        user_ids={},
        impression_ids={feature.name: none for feature in card.features if feature.level in ("item", "context")},
        session={feature.name: none for feature in card.features_at("session")},
        outcome={feature.name: none for feature in card.features_at("outcome")},
        ts_ms=none,
        end_ms=none,
        labels=np.zeros((0, len(card.labels)), np.float32),
        objectives=np.zeros((0, len(card.objectives)), np.float32),
        oracle=np.zeros((0, 0), np.float32),
        action_starts=none,
        action_lengths=none,
        action=none,
        offset_s=np.zeros(0, np.float32),
    )


def with_candidates(
    history: WindowColumns,
    items: CandidateItems,
    card: DatasetCard,
    now_ms: int,
    context: Mapping[str, int],
    session: Mapping[str, int],
) -> WindowColumns:
    """One window: all of ``history`` (one window too), then every item at one moment.

    What the user would do is not known: a placeholder stands for it, which no prediction reads.

    Args:
        now_ms: the moment; session: feature -> row, as of then.
        context: feature -> row of the moment; those left out are of the last impression, row 0 without any [ours].
    """
    seen, count = len(history.ts_ms), len(items.ids)

    def then(past: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([past, np.full((count, *past.shape[1:]), value, past.dtype)])

    item = {name: np.concatenate([history.impression_ids[name], rows]) for name, rows in items.rows.items()}
    shown = {
        feature.name: then(
            history.impression_ids[feature.name],
            context.get(feature.name, history.impression_ids[feature.name][-1] if seen else 0),
        )
        for feature in card.features_at("context")
    }
    action_lengths = then(history.action_lengths, 2)
    return replace(
        history,
        first_target=np.array([seen]),
        starts=np.zeros(1, np.int64),
        lengths=np.array([seen + count]),
        impression_ids=item | shown,
        session={name: then(history.session[name], row) for name, row in session.items()},
        outcome={name: then(rows, UNKNOWN) for name, rows in history.outcome.items()},
        ts_ms=then(history.ts_ms, now_ms),
        end_ms=then(history.end_ms, now_ms),
        labels=then(history.labels, np.nan),
        objectives=then(history.objectives, np.nan),
        oracle=then(history.oracle, np.nan),
        action_starts=np.cumsum(action_lengths) - action_lengths,
        action_lengths=action_lengths,
        action=np.concatenate([history.action, np.tile([0, len(card.actions) - 1], count)]),
        offset_s=np.concatenate([history.offset_s, np.tile(np.array([0, np.nan], np.float32), count)]),
    )
