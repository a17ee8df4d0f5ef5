"""What a prepared dataset has of a user and of items, as one window to rank."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec import paths
from a2gen_rec.data.columns import WindowColumns, feature_rows, read_table, read_user, take_windows
from a2gen_rec.data.schema import FEEDBACK, ITEM, ITEM_STATISTICS, SPLITS, UNKNOWN, DatasetCard
from a2gen_rec.data.sessions import session_rows
from a2gen_rec.errors import DataError
from a2gen_rec.serving.rank import Items, moment_after, no_impressions, with_candidates

ITEMS = "items.parquet"


def next_window(history: WindowColumns, items: Items, card: DatasetCard) -> WindowColumns:
    """One window: all of ``history`` (one window too), then every item a second after its last end, in its context."""
    now = moment_after(history)
    return with_candidates(history, items, card, now, {}, _session(history, now, card))


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


def no_history(card: DatasetCard) -> WindowColumns:
    """One window of an unknown user, without any impression."""
    one = np.zeros(1, np.int64)
    users = {feature.name: one for feature in card.at_level("user")}
    return replace(no_impressions(card), user_key=one, first_target=one, starts=one, lengths=one, user_ids=users)


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


def _session(history: WindowColumns, now: int, card: DatasetCard) -> dict[str, int]:
    """Session feature -> row of an impression that begins ``now``, as far as the window reaches back [ours]."""
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
        feature_rows(table[feature.name], feature, file)
    return table
