"""Sections of a dataset report about pairs of actions: their order and co-occurrence."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from a2gen_rec.data.schema import EXIT
from a2gen_rec.reporting.formatting import MISSING, format_count, format_percent
from a2gen_rec.reporting.pages.dataset import charts
from a2gen_rec.reporting.pages.dataset.charts import MAX_ACTIONS, MIN_PAIR_COUNT
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics
from a2gen_rec.reporting.pages.section import Section, SectionTable


def action_order(statistics: DataStatistics) -> Section:
    """Share of impressions in which one of two actions comes first."""
    title = "Action order"
    if not statistics.has_order:
        reason = "the log has the times of fewer than two actions, so their order is unknown"
        return Section(title, f"Not available: {reason}.")
    chosen, note = most_frequent(statistics, [name for name in statistics.times if name != EXIT])
    names, inside = [statistics.card.predicted_actions[index] for index in chosen], np.ix_(chosen, chosen)
    pairs = statistics.pairs
    share, different = pairs.order()[inside], (pairs.before + pairs.before.T)[inside]
    figure = charts.pair_cells(
        "Share of impressions in which the row's action precedes the column's",
        names,
        np.where(different < MIN_PAIR_COUNT, math.nan, share),
        cell_texts(share, lambda value: f"{value:.0%}"),
    )
    rows = pair_rows(
        names,
        cell_texts(different, "{:,}".format),
        cell_texts(share, format_percent),
        cell_texts(pairs.simultaneous[inside], "{:,}".format),
    )
    caption = (
        "In impressions with both actions, the share in which the row's action precedes the column's. Cells without "
        f"color have fewer than {MIN_PAIR_COUNT} impressions.{note}"
    )
    return Section(
        title,
        "An order far from 50% is a pattern that a sequence model can learn.",
        [(figure, caption)],
        [
            SectionTable(
                ["first", "second", "different times", "in this order", "same time"],
                rows,
                "Impressions with both actions at different times, share of these in this order, and impressions with "
                "both actions at the same time.",
            )
        ],
    )


def cooccurrence(statistics: DataStatistics) -> Section:
    """Lift of two actions in one impression."""
    title = "Co-occurrence of actions"
    if len(statistics.card.predicted_actions) < 2:
        return Section(title, "Not available: the log has fewer than two actions.")
    chosen, note = most_frequent(statistics, statistics.card.predicted_actions)
    names, inside = [statistics.card.predicted_actions[index] for index in chosen], np.ix_(chosen, chosen)
    total = statistics.train.targets
    lift, both = statistics.pairs.lift(total)[inside], statistics.pairs.both[inside]
    single = both.diagonal() / total
    expected = np.outer(single, single) * total
    lifts = cell_texts(lift, lambda value: f"{value:.2f}" if value < 9.995 else f"{value:.1f}")
    # On a log scale, a lift of 0.5 is as far from 1 as a lift of 2.
    log_lift = np.log(np.where((both < MIN_PAIR_COUNT) | (lift == 0), math.nan, lift))
    figure = charts.pair_cells("Lift of two actions in one impression", names, log_lift, lifts)
    rows = pair_rows(names, cell_texts(both, "{:,}".format), cell_texts(expected, format_count), lifts)
    caption = (
        "Lift: impressions with both actions, relative to the number expected for independent actions. Cells without "
        f"color have fewer than {MIN_PAIR_COUNT} impressions.{note}"
    )
    return Section(
        title,
        "Actions with a lift above 1 have a common cause, such as an interesting video or an active user, or one "
        "leads to the other.",
        [(figure, caption)],
        [SectionTable(["action", "second action", "impressions with both", "expected", "lift"], rows)],
    )


def most_frequent(statistics: DataStatistics, names: Sequence[str]) -> tuple[list[int], str]:
    """Return the indices of the actions in a heat map, and a sentence if some are left out."""
    indices = [statistics.card.predicted_actions.index(name) for name in names]
    count = statistics.pairs.both.diagonal()
    chosen = sorted(sorted(indices, key=lambda index: -count[index])[:MAX_ACTIONS])
    note = f" The {MAX_ACTIONS} most frequent of {len(names)} actions." if len(names) > MAX_ACTIONS else ""
    return chosen, note


def pair_rows(names: Sequence[str], *columns: np.ndarray) -> list[list[str]]:
    """Return table rows of all unordered pairs, from text columns [actions, actions]."""
    pairs = combinations(range(len(names)), 2)
    return [[names[a], names[b], *(str(column[a, b]) for column in columns)] for a, b in pairs]


def cell_texts(values: np.ndarray, text: Callable[[float], str]) -> np.ndarray:
    """Return the texts of a heat map's cells, empty on the diagonal."""
    cells = np.array([[MISSING if value != value else text(value) for value in row] for row in values.tolist()], object)
    np.fill_diagonal(cells, "")
    return cells
