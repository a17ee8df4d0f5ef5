"""A user's past and the candidates of a request as one window, and where a dataset has both.

The window's targets are alternatives for one moment, so the history is read once and the factorised attention
(METHODS §2.1) answers for every candidate together.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec import paths
from a2gen_rec.data.columns import WindowColumns, read_table, read_user, take_windows
from a2gen_rec.data.schema import FEEDBACK, ITEM, ITEM_STATISTICS, SPLITS, UNKNOWN, DatasetCard
from a2gen_rec.data.sessions import session_rows
from a2gen_rec.errors import DataError, UserError

ITEMS = "items.parquet"


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


def find_items(data: str, card: DatasetCard, raw: Sequence[str]) -> Items:
    """Table rows of raw item identifiers; row 0 of every item feature for those the dataset does not have.

    Raises:
        DataError: ``items.parquet`` is not there or breaks its contract.
    """
    wanted = pa.array(raw, pa.string())
    table = _read_items(data, card, pc.field("item").isin(wanted))
    place = pc.index_in(wanted, table["item"].combine_chunks())
    known = place.is_valid().to_numpy(zero_copy_only=False)
    at = place.filter(place.is_valid()).to_numpy()
    rows = {}
    for feature in card.at_level("item"):
        rows[feature.name] = np.zeros(len(raw), np.int64)
        rows[feature.name][known] = table[feature.name].to_numpy()[at]
    return Items(list(raw), known, rows)


def popular_items(data: str, card: DatasetCard, count: int) -> Items:
    """The ``count`` items shown most in training, most shown first.

    Raises:
        DataError: ``item_statistics.parquet`` or ``items.parquet`` is not there or breaks its contract.
    """
    file = paths.join(data, ITEM_STATISTICS)
    shown = read_table(file, [ITEM, "impressions"], pc.field(ITEM) > 0)  # row 0 is many items, not one
    most = shown.sort_by([("impressions", "descending"), (ITEM, "ascending")])[ITEM].combine_chunks()[:count]
    table = _read_items(data, card, pc.field(ITEM).isin(most))
    # Hashed items may share a row: they keep their order in the file.
    order = np.argsort(pc.index_in(table[ITEM].combine_chunks(), most).to_numpy(), kind="stable")[:count]
    if not len(order):
        raise DataError("no item with training impressions to rank by default; give --candidates", file=file)
    table = table.take(order)
    rows = {feature.name: table[feature.name].to_numpy() for feature in card.at_level("item")}
    return Items(table["item"].to_pylist(), np.ones(len(order), bool), rows)


def latest_window(data: str, card: DatasetCard, user: str) -> WindowColumns | None:
    """The last window of a user in the latest split that has any, as columns of one window; None without one.

    Raises:
        DataError: a file of the dataset breaks the contract.
    """
    for split in reversed(SPLITS):
        folder = paths.join(data, split)
        files = [paths.join(folder, name) for name in paths.listdir(folder) if name.endswith(".parquet")]
        windows = read_user(files, card, user)
        if windows is not None:
            last = windows.ts_ms[windows.starts + windows.lengths - 1]
            return take_windows(windows, np.array([np.argmax(last)]))
    return None


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


def no_history(card: DatasetCard) -> WindowColumns:
    """One window of an unknown user, without any impression."""
    one = np.zeros(1, np.int64)
    users = {feature.name: one for feature in card.at_level("user")}
    return replace(no_impressions(card), user_key=one, first_target=one, starts=one, lengths=one, user_ids=users)


def with_candidates(
    history: WindowColumns,
    items: Items,
    card: DatasetCard,
    now_ms: int | None = None,
    context: Mapping[str, int] | None = None,
    session: Mapping[str, int] | None = None,
) -> WindowColumns:
    """One window: all of ``history`` (one window too), then every item at one moment.

    What the user would do is not known: a placeholder stands for it, which no prediction reads.

    Args:
        now_ms: the moment; by default as :func:`moment_after` has it.
        context: feature -> row of the moment; those left out are of the last impression, row 0 without any [ours].
        session: feature -> row of the moment; by default as far as the window reaches back [ours].
    """
    seen, count = len(history.ts_ms), len(items.raw)
    now = now_ms if now_ms is not None else moment_after(history)
    given = context or {}

    def then(past: np.ndarray, value: object) -> np.ndarray:
        return np.concatenate([past, np.broadcast_to(np.asarray(value, past.dtype), (count, *past.shape[1:]))])

    item = {name: np.concatenate([history.impression_ids[name], rows]) for name, rows in items.rows.items()}
    shown = {
        feature.name: then(
            history.impression_ids[feature.name],
            given.get(feature.name, history.impression_ids[feature.name][-1] if seen else 0),
        )
        for feature in card.at_level("context")
    }
    session = _session(history, now, card) if session is None else session
    action_lengths = then(history.action_lengths, 2)
    return replace(
        history,
        first_target=np.array([seen]),
        starts=np.zeros(1, np.int64),
        lengths=np.array([seen + count]),
        impression_ids=item | shown,
        session={name: then(history.session[name], row) for name, row in session.items()},
        outcome={name: then(rows, UNKNOWN) for name, rows in history.outcome.items()},
        ts_ms=then(history.ts_ms, now),
        end_ms=then(history.end_ms, now),
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


def _session(history: WindowColumns, now: int, card: DatasetCard) -> dict[str, int]:
    """Session feature -> row of an impression that begins ``now``, after ``history`` (one window)."""
    seen = len(history.ts_ms)
    rows = session_rows(
        card.at_level("session"),
        np.arange(seen + 1) == 0,
        np.append(history.ts_ms, now),
        np.append(history.end_ms, now),
        np.append(history.outcome.get(FEEDBACK, np.zeros(seen, np.int64)), UNKNOWN),
        card.session_gap_s,
    )
    return {name: int(values[-1]) for name, values in rows.items()}


def _read_items(data: str, card: DatasetCard, rows: pc.Expression) -> pa.Table:
    """Rows of ``items.parquet``, their ids checked against the card."""
    file = paths.join(data, ITEMS)
    features = card.at_level("item")
    table = read_table(file, ["item", *(feature.name for feature in features)], rows)
    for feature in features:
        ids = table[feature.name]
        if not pa.types.is_integer(ids.type):
            raise DataError(f"is {ids.type}, not an integer", file=file, field=feature.name)
        values = ids.to_numpy()
        if ids.null_count or ((values < 0) | (values >= feature.cardinality)).any():
            raise DataError(f"id is not in [0, {feature.cardinality})", file=file, field=feature.name)
    return table
