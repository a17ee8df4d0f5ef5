"""A user's past and the candidates of a request as one window.

The window's targets are alternatives for one moment, so the history is read once and the factorised attention
(METHODS §2.1) answers for every candidate together.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from a2gen_rec import paths
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.schema import UNKNOWN, DatasetCard
from a2gen_rec.errors import UserError


@dataclass(frozen=True)
class Items:
    """Items to rank: raw identifiers ``raw`` and ``known``, [items]; item feature -> [items] table ``rows``."""

    raw: list[str]
    known: np.ndarray
    rows: dict[str, np.ndarray]


def read_candidates(file: str) -> list[str]:
    """Raw item identifiers of a file, one a line, each once, in order.

    Raises:
        UserError: the file cannot be read or has no identifier.
    """
    names = (line.strip() for line in paths.read_text(file).splitlines())
    found = list(dict.fromkeys(name for name in names if name))
    if not found:
        raise UserError(f"{file}: no candidates; put one raw item identifier on each line")
    return found


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
        session={feature.name: none for feature in card.at_level("session")},
        outcome={feature.name: none for feature in card.at_level("outcome")},
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
    items: Items,
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
    seen, count = len(history.ts_ms), len(items.raw)

    def then(past: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([past, np.full((count, *past.shape[1:]), value, past.dtype)])

    item = {name: np.concatenate([history.impression_ids[name], rows]) for name, rows in items.rows.items()}
    shown = {
        feature.name: then(
            history.impression_ids[feature.name],
            context.get(feature.name, history.impression_ids[feature.name][-1] if seen else 0),
        )
        for feature in card.at_level("context")
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


def moment_after(history: WindowColumns) -> int:
    """A second after the last end of one window's impressions; now, without any."""
    return int(history.end_ms.max()) + 1000 if len(history.ts_ms) else clock_ms()


def clock_ms() -> int:
    """Now, milliseconds since 1970."""
    return int(time.time() * 1000)
