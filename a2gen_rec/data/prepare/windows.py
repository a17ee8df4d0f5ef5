"""Construction of user windows from sorted impressions by index arithmetic, without a loop over rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from a2gen_rec.data.bag_sql import WEIGHTS_COLUMN
from a2gen_rec.data.columns import concat_ranges, jagged_positions
from a2gen_rec.data.inputs import Number
from a2gen_rec.data.schema import ITEM_INDEX, STATISTICS_COLUMN, Feature, Input
from a2gen_rec.data.sql import ROW_COLUMN, IntArray, is_first_of_user


@dataclass(frozen=True)
class WindowSpec:
    """Contents and limits of windows.

    Attributes:
        features: features of all levels.
        actions: actions in vocabulary order, without ``start`` and ``exit``.
        labels: impression labels.
        objectives: objectives.
        oracle: actions and labels with a true probability.
        max_history: maximum impressions before a window's first target.
        max_targets: maximum targets per window.
        windows_per_table: windows per table of :func:`build_windows`.
        numbers: numbers of all levels.
        has_vectors: whether impressions have the row of their item.
    """

    features: Sequence[Feature]
    actions: Sequence[str]
    labels: Sequence[str]
    objectives: Sequence[str]
    oracle: Sequence[str]
    max_history: int
    max_targets: int
    windows_per_table: int = 512
    numbers: Sequence[Number] = ()
    has_vectors: bool = False


@dataclass(frozen=True)
class WindowBounds:
    """Impression ranges of windows; int64 arrays of shape ``(windows,)``.

    Attributes:
        start: first impression.
        target: first target.
        end: end of the window, exclusive.
    """

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
    """Return the bounds of the windows of one split.

    Each user's impressions of the split are divided into runs of at most ``max_targets``. The history of a run is the
    user's previous ``max_history`` impressions of any split.

    Args:
        new_user: ``(impressions,)`` sorted by user and time; whether each is its user's first impression.
        split: ``(impressions,)`` split of each, non-decreasing within a user.
        split_index: index of the split in ``schema.SPLITS``.
        max_history: maximum impressions before the first target.
        max_targets: maximum targets per window.
    """
    is_run_start = new_user.copy()
    is_run_start[1:] |= split[1:] != split[:-1]
    run_start = np.flatnonzero(is_run_start)
    run_end = np.append(run_start[1:], len(split))
    selected = split[run_start] == split_index
    run_start, run_end = run_start[selected], run_end[selected]

    windows = -(-(run_end - run_start) // max_targets)
    target = np.repeat(run_start, windows) + max_targets * jagged_positions(windows)[1]
    end = np.minimum(target + max_targets, np.repeat(run_end, windows))
    user_start = np.flatnonzero(new_user)
    target_user = np.searchsorted(user_start, target, side="right") - 1
    start = np.maximum(user_start[target_user], target - max_history)
    return WindowBounds(start, target, end)


def action_lists(
    times: npt.NDArray[np.float32], occurred: npt.NDArray[np.bool_], dwell_s: pa.Array
) -> tuple[pa.Array, pa.Array]:
    """Return action codes and offsets of each impression as list arrays: start, timed, untimed, exit.

    Args:
        times: ``(impressions, actions)`` seconds since the start, NaN if not recorded.
        occurred: ``(impressions, actions)`` whether the action occurred.
        dwell_s: ``(impressions,)`` offset of ``exit``, NaN if not recorded.

    Returns:
        ``list<int8>`` and ``list<float>`` arrays of the same shape.
    """
    impressions, actions = occurred.shape
    # NaN sorts last: absent actions follow actions with unknown time. A stable sort keeps vocabulary order.
    sort_key = np.where(occurred, np.where(np.isnan(times), np.inf, times), np.nan)
    order = np.argsort(sort_key, axis=1, kind="stable")
    count = occurred.sum(axis=1)

    codes = np.zeros((impressions, actions + 2), np.int8)
    offsets = np.zeros((impressions, actions + 2), np.float32)
    codes[:, 1:-1] = order + 1
    offsets[:, 1:-1] = np.take_along_axis(times, order, axis=1)
    rows = np.arange(impressions)
    codes[rows, count + 1] = actions + 1
    offsets[rows, count + 1] = dwell_s.to_numpy(zero_copy_only=False)

    is_token = np.arange(actions + 2) < (count + 2)[:, None]
    ends = pa.array(np.append(0, np.cumsum(count + 2)).astype(np.int32))
    return (
        pa.ListArray.from_arrays(ends, pa.array(codes[is_token])),
        pa.ListArray.from_arrays(ends, pa.array(offsets[is_token])),
    )


def build_windows(impressions: pa.Table, spec: WindowSpec, split_index: int) -> Iterator[pa.Table]:
    """Yield tables of at most ``spec.windows_per_table`` windows of one split (columns: see ``schema.py``).

    Args:
        impressions: impressions sorted by user, time and item, with the columns ``user_id``, ``user_key``, ``ts_ms``,
            ``dwell_s``, ``split``, ``at_*``, ``label_*``, ``objective_*``, ``oracle_*`` and ``row of <feature>``.
        spec: contents and limits of the windows.
        split_index: index of the split in ``schema.SPLITS``.
    """
    if not impressions.num_rows:
        return
    impressions = impressions.combine_chunks()
    split = impressions["split"].to_numpy()
    bounds = window_bounds(is_first_of_user(impressions), split, split_index, spec.max_history, spec.max_targets)
    for first in range(0, len(bounds.target), spec.windows_per_table):
        part = slice(first, first + spec.windows_per_table)
        yield windows_table(impressions, spec, WindowBounds(bounds.start[part], bounds.target[part], bounds.end[part]))


def windows_table(impressions: pa.Table, spec: WindowSpec, bounds: WindowBounds) -> pa.Table:
    """Return one row per window; user features are those of the first target."""
    lengths = bounds.end - bounds.start
    index = concat_ranges(bounds.start, lengths)
    has_statistics = STATISTICS_COLUMN in impressions.column_names
    without_statistics = impressions.drop_columns([STATISTICS_COLUMN]) if has_statistics else impressions
    window_impressions = without_statistics.take(pa.array(index)).combine_chunks()
    inputs: list[Input] = [*spec.features, *spec.numbers]
    names = [(each.level, each.name) for each in inputs]
    names += [("item", ITEM_INDEX)] if spec.has_vectors else []
    names += [(x.level, WEIGHTS_COLUMN + x.name) for x in spec.features if x.weighted]
    users = impressions.select(
        ["user_id", "user_key", *(ROW_COLUMN + name for level, name in names if level == "user")]
    ).take(pa.array(bounds.target))
    ends = pa.array(np.append(0, np.cumsum(lengths)).astype(np.int32))

    def column(name: str) -> pa.Array:
        return window_impressions[name].chunk(0)

    def to_list(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(ends, values)

    def with_nan(name: str) -> pa.Array:
        return to_list(pc.fill_null(column(name), float("nan")))

    at_columns = [column(f"at_{name}") for name in spec.actions]
    shape = (len(index), len(spec.actions))
    times = np.empty(shape, np.float32)
    occurred = np.empty(shape, bool)
    for code, values in enumerate(at_columns):
        times[:, code] = values.to_numpy(zero_copy_only=False)
        occurred[:, code] = values.is_valid().to_numpy(zero_copy_only=False)
    codes, offsets = action_lists(times, occurred, column("dwell_s"))

    columns: dict[str, pa.Array | pa.ChunkedArray] = {"user": users["user_id"], "user_key": users["user_key"]}
    for level, name in names:
        columns[name] = users[ROW_COLUMN + name] if level == "user" else to_list(column(ROW_COLUMN + name))
    columns |= {"ts_ms": to_list(column("ts_ms")), "dwell_s": to_list(column("dwell_s"))}
    columns |= {"action": to_list(codes), "action_offset_s": to_list(offsets)}
    columns |= {f"label_{name}": with_nan(f"label_{name}") for name in spec.labels}
    columns |= {f"objective_{name}": with_nan(f"objective_{name}") for name in spec.objectives}
    columns |= {f"oracle_{name}": with_nan(f"oracle_{name}") for name in spec.oracle}
    columns["first_target"] = pa.array((bounds.target - bounds.start).astype(np.int32))
    if has_statistics:
        targets = bounds.end - bounds.target
        values = impressions[STATISTICS_COLUMN].take(pa.array(concat_ranges(bounds.target, targets))).combine_chunks()
        width = values.type.list_size
        ends = pa.array(np.append(0, np.cumsum(targets * width)).astype(np.int32))
        columns[STATISTICS_COLUMN] = pa.ListArray.from_arrays(ends, values.flatten())
    return pa.table(columns)
