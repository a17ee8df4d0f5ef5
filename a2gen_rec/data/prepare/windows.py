"""Cutting sorted impressions into user windows: index arithmetic on whole columns, no loop over rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec.data.columns import concat_ranges, jagged_positions
from a2gen_rec.data.schema import Feature
from a2gen_rec.data.sql import ROW_COLUMN, IntArray, is_first_of_user


@dataclass(frozen=True)
class WindowSpec:
    """What of an impression enters a window, and how windows are cut.

    Attributes:
        actions: the log's own actions in vocabulary order, without ``start`` and ``exit``.
        history: most impressions before a window's first target.
        max_targets: most targets of a window.
        rows: windows of one table that :func:`cut` yields.
    """

    features: Sequence[Feature]
    actions: Sequence[str]
    labels: Sequence[str]
    objectives: Sequence[str]
    oracle: Sequence[str]
    max_history: int
    max_targets: int
    windows_per_table: int = 512


@dataclass(frozen=True)
class WindowBounds:
    """Impressions ``begin:end`` of each window, its targets ``target:end``; int64 arrays of shape ``(windows,)``."""

    start: IntArray
    target: IntArray
    end: IntArray


def window_bounds(
    new_user: npt.NDArray[np.bool_],
    split: npt.NDArray[np.integer],
    split_index: int,
    max_history: int,
    max_targets: int,
) -> WindowBounds:
    """Where the windows of one split lie.

    Each user's impressions of the split are cut into runs of at most ``max_targets``; the up to ``history``
    impressions of the user just before a run, of whatever split, are its history.

    Args:
        new_user: ``(impressions,)`` in order of user and time; whether a user's first impression.
        split: ``(impressions,)`` split of each, non-decreasing within a user.
        wanted: the split to cut.
    """
    changes = new_user.copy()
    changes[1:] |= split[1:] != split[:-1]
    run_begin = np.flatnonzero(changes)
    run_end = np.append(run_begin[1:], len(split))
    chosen = split[run_begin] == split_index
    run_begin, run_end = run_begin[chosen], run_end[chosen]

    windows = -(-(run_end - run_begin) // max_targets)
    target = np.repeat(run_begin, windows) + max_targets * jagged_positions(windows)[1]
    end = np.minimum(target + max_targets, np.repeat(run_end, windows))
    user_begin = np.flatnonzero(new_user)
    user_of_target = np.searchsorted(user_begin, target, side="right") - 1
    begin = np.maximum(user_begin[user_of_target], target - max_history)
    return WindowBounds(begin, target, end)


def action_lists(
    times: npt.NDArray[np.float32], occurred: npt.NDArray[np.bool_], dwell_s: pa.Array
) -> tuple[pa.Array, pa.Array]:
    """Action codes and offsets of each impression, as list arrays: start, timed, untimed, exit.

    Args:
        times: ``(impressions, actions)`` seconds since begin, NaN when not recorded.
        happened: ``(impressions, actions)`` whether the action happened at all.
        dwell_s: ``(impressions,)`` offset of ``exit``, NaN when not recorded.

    Returns:
        ``list<int8>`` and ``list<float>`` arrays of the same shape.
    """
    impressions, actions = occurred.shape
    # NaN sorts last: actions that did not happen go behind those of unknown time; stable keeps vocabulary order.
    place = np.where(occurred, np.where(np.isnan(times), np.inf, times), np.nan)
    order = np.argsort(place, axis=1, kind="stable")
    count = occurred.sum(axis=1)

    codes = np.zeros((impressions, actions + 2), np.int8)
    offsets = np.zeros((impressions, actions + 2), np.float32)
    codes[:, 1:-1] = order + 1
    offsets[:, 1:-1] = np.take_along_axis(times, order, axis=1)
    every = np.arange(impressions)
    codes[every, count + 1] = actions + 1
    offsets[every, count + 1] = dwell_s.to_numpy(zero_copy_only=False)

    real = np.arange(actions + 2) < (count + 2)[:, None]
    ends = pa.array(np.append(0, np.cumsum(count + 2)).astype(np.int32))
    return (
        pa.ListArray.from_arrays(ends, pa.array(codes[real])),
        pa.ListArray.from_arrays(ends, pa.array(offsets[real])),
    )


def build_windows(impressions: pa.Table, spec: WindowSpec, split_index: int) -> Iterator[pa.Table]:
    """Tables of at most ``layout.rows`` windows of one split (``schema.py`` tells their columns).

    Args:
        impressions: sorted by user, time and item, with the columns ``user_id``, ``user_key``, ``ts_ms``,
            ``dwell_s``, ``split``, ``at_*``, ``label_*``, ``objective_*``, ``oracle_*`` and ``row_<feature>``.
        wanted: the split's index in ``schema.SPLITS``.
    """
    if not impressions.num_rows:
        return
    impressions = impressions.combine_chunks()
    split = impressions["split"].to_numpy()
    found = window_bounds(is_first_of_user(impressions), split, split_index, spec.max_history, spec.max_targets)
    for first in range(0, len(found.target), spec.windows_per_table):
        part = slice(first, first + spec.windows_per_table)
        yield windows_table(impressions, spec, WindowBounds(found.start[part], found.target[part], found.end[part]))


def windows_table(impressions: pa.Table, spec: WindowSpec, bounds: WindowBounds) -> pa.Table:
    """The windows ``at`` their bounds, one row each; user features are those of the first target."""
    lengths = bounds.end - bounds.start
    index = concat_ranges(bounds.start, lengths)
    inside = impressions.take(pa.array(index)).combine_chunks()
    users = impressions.select(
        ["user_id", "user_key", *(ROW_COLUMN + x.name for x in spec.features if x.level == "user")]
    ).take(pa.array(bounds.target))
    ends = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))

    def column(name: str) -> pa.Array:
        return inside[name].chunk(0)

    def listed(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(ends, values)

    def known(name: str) -> pa.Array:
        return listed(pc.fill_null(column(name), float("nan")))

    at_columns = [column(f"at_{name}") for name in spec.actions]
    shape = (len(index), len(spec.actions))
    times = np.empty(shape, np.float32)
    happened = np.empty(shape, bool)
    for place, values in enumerate(at_columns):
        times[:, place] = values.to_numpy(zero_copy_only=False)
        happened[:, place] = values.is_valid().to_numpy(zero_copy_only=False)
    codes, offsets = action_lists(times, happened, column("dwell_s"))

    named: dict[str, pa.Array | pa.ChunkedArray] = {"user": users["user_id"], "user_key": users["user_key"]}
    for feature in spec.features:
        raw = ROW_COLUMN + feature.name
        named[feature.name] = users[raw] if feature.level == "user" else listed(column(raw))
    named |= {"ts_ms": listed(column("ts_ms")), "dwell_s": listed(column("dwell_s"))}
    named |= {"action": listed(codes), "action_offset_s": listed(offsets)}
    named |= {f"label_{name}": known(f"label_{name}") for name in spec.labels}
    named |= {f"objective_{name}": known(f"objective_{name}") for name in spec.objectives}
    named |= {f"oracle_{name}": known(f"oracle_{name}") for name in spec.oracle}
    named["first_target"] = pa.array((bounds.target - bounds.start).astype(np.int32))
    return pa.table(named)
