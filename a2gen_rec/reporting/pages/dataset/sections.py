"""The report of a dataset as sections of tables and charts, the same for a page and for Markdown."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import combinations

import numpy as np
from matplotlib.figure import Figure

from a2gen_rec.data.schema import EXIT
from a2gen_rec.reporting.formatting import format_count as few_digits
from a2gen_rec.reporting.pages.dataset import charts
from a2gen_rec.reporting.pages.dataset.charts import FEW_VALUES, MAX_ACTIONS, percent, rate_bars, span
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts

EMPTY = "–"
SPREAD = ("count", "mean", "10%", "median", "90%", "99%", "most")


@dataclass(frozen=True)
class ReportTable:
    """Cells as text; the first column names the rows, ``words`` are others that are no numbers."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""
    words: tuple[str, ...] = ("kind", "then", "and")


@dataclass(frozen=True)
class Section:
    """One question. ``text`` says what to see, or why there is nothing to show; charts come with their captions."""

    title: str
    text: str
    charts: list[tuple[Figure, str]] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)


def sections(found: DataStatistics) -> list[Section]:
    """All of the report, in order; what the log does not tell is said in a sentence."""
    return [
        splits(found),
        action_rates(found),
        activity(found),
        action_times(found),
        action_order(found),
        cooccurrence(found),
        sequences(found),
        skip_rates(found),
        sessions(found),
    ]


def splits(found: DataStatistics) -> Section:
    """Sizes of the splits, and what of the later ones is new."""
    rows = []
    for name, split in found.splits.items():
        counts = split.counts
        if not counts.targets:
            rows.append([name, "0", *[EMPTY] * 7])
            continue
        rows.append(
            [
                name,
                f"{counts.targets:,}",
                f"{split.users:,}",
                f"{split.items:,}",
                format_time(found, counts.first_ms),
                format_time(found, counts.last_ms),
                EMPTY if name == "train" else percent(split.new_users / counts.targets),
                percent(split.unknown_items / counts.targets),
                f"{split.action_counts / counts.targets:.3f}",
            ]
        )
    columns = ["split", "impressions", "users", "items", "first", "last", "by new users", "of unknown items"]
    caption = (
        "By new users: impressions of users without training impressions. Of unknown items: items that are not, or too "
        "rarely, in the training data; they are not counted among the items."
    )
    when = (
        "Times are UTC."
        if found.card.has_calendar_time
        else "Times count from an arbitrary moment: the log has no calendar."
    )
    return Section(
        "Splits",
        f"{when} All that follows is of the training split, unless it says otherwise.",
        tables=[ReportTable([*columns, "actions per impression"], rows, caption)],
    )


def format_time(found: DataStatistics, ms: int | None) -> str:
    """A begin, in UTC, or in days and hours where the log has no calendar."""
    if ms is None:
        return EMPTY
    if found.card.has_calendar_time:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")
    return seconds(ms / 1000)


def action_rates(found: DataStatistics) -> Section:
    """Rates of actions, labels and objectives, per split."""
    card = found.card
    names = [*card.predicted_actions, *card.labels, *card.objectives]
    if not names:
        return Section("What users do", "Left out: the log has no actions, labels or objectives.")
    kinds = dict.fromkeys(card.predicted_actions, "action") | dict.fromkeys(card.labels, "label")
    rows = []
    for name in names:
        each = [rate_bars(split, name) for split in found.splits.values()]
        counts = [f"{split.counts.positives[name]:,}" for split in found.splits.values()]
        cells = [cell for pair in zip(counts, map(percent, each), strict=True) for cell in pair]
        rows.append([name, kinds.get(name, "objective"), *cells, relative_change(each[-1], each[0])])
    watch = [split.watch for split in found.splits.values()]
    if any(counted.total for counted in watch):
        cells = [cell for counted in watch for cell in (f"{counted.total:,}", seconds(counted.median))]
        rows.append(["median watch time", "time", *cells, relative_change(watch[-1].median, watch[0].median)])
    columns = ["", "kind", *(cell for name in found.splits for cell in (name, "")), "test / train"]
    return Section(
        "What users do",
        "How many impressions have each action, label and objective, and how far the later splits have drifted from "
        "what is trained on. An action with a few hundred positives can hardly be measured.",
        [
            (
                charts.rate_charts(found.splits, names),
                "Bars: training. Marks: the other splits; none where nothing happened.",
            )
        ],
        [ReportTable(columns, rows, "Counts of positives, and their share of the impressions where it is known.")],
    )


def relative_change(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other and not math.isnan(value / other) else EMPTY


def activity(found: DataStatistics) -> Section:
    """Impressions per user and item, actions per impression."""
    named = {
        "impressions of a user": found.per_user,
        "impressions of an item": found.per_item,
        "actions of an impression": found.per_impression,
    }
    rows = [[name, *spread(counted, few_digits)] for name, counted in named.items()]
    top = {share: found.per_item.top_share(share) for share in (0.01, 0.1)}
    some = 1 - found.per_impression.count[found.per_impression.value == 0].sum() / found.per_impression.total
    text = (
        f"{percent(some)} of the impressions have an action. The most shown tenth of the items has {percent(top[0.1])} "
        f"of the impressions, the most shown hundredth {percent(top[0.01])}."
        if found.per_item.total
        else f"{percent(some)} of the impressions have an action. All items are unknown."
    )
    caption = (
        "Left: how many users have how many impressions; the line is the median. Middle: the share of all impressions "
        "that the most shown items have. Right: impressions by the number of actions inside, logarithmic."
    )
    shown = [(charts.activity_charts(found), caption)] if found.per_item.total else []
    return Section("How much of it", text, shown, [ReportTable(["", *SPREAD], rows)])


def spread(counted: ValueCounts, text: Callable[[float], str]) -> list[str]:
    """Cells of ``SPREAD``."""
    values = [counted.mean, counted.quantile(0.1), counted.median, *map(counted.quantile, (0.9, 0.99, 1.0))]
    return [f"{counted.total:,}", *(EMPTY if math.isnan(value) else text(value) for value in values)]


def action_times(found: DataStatistics) -> Section:
    """Times of actions in seconds, and as a share of the time watched."""
    title = "When they do it"
    if not found.times:
        return Section(title, "Left out: the log records neither when actions happen nor how long videos are watched.")
    named = {name if name != EXIT else "exit (watch time)": counted for name, counted in found.times.items()}
    parts = {name: found.positions[name].median for name in found.positions}
    rows = [
        [shown, *spread(counted, seconds), *([percent(parts.get(name, math.nan))] if parts else [])]
        for (shown, counted), name in zip(named.items(), found.times, strict=True)
    ]
    shown = [
        (
            charts.time_charts(named),
            "How often each action happens how late; equal areas are equal shares of the action's own number. The line "
            "is the median. Times too short for the axis stand in the first bar.",
        )
    ]
    text = "Seconds from the begin of the impression to the action."
    if found.positions:
        shown.append(
            (charts.position_chart(found.positions), "The same as a share of the time watched; the line is the median.")
        )
    elif set(found.times) == {EXIT}:
        text += " The log records watch times alone: when other actions happen is not known."
    else:
        text += " The log records no watch times, so there are no shares of them."
    untold = [name for name in found.card.predicted_actions if name not in found.times]
    if untold and set(found.times) != {EXIT}:
        text += f" Without a recorded time: {', '.join(untold)}."
    return Section(
        title, text, shown, [ReportTable(["", *SPREAD, *(["median, of watch time"] if parts else [])], rows)]
    )


def most_frequent(found: DataStatistics, names: Sequence[str]) -> tuple[list[int], str]:
    """Places of those actions that a heat map shows, and a sentence where they are not all."""
    places = [found.card.predicted_actions.index(name) for name in names]
    count = found.pairs.both.diagonal()
    chosen = sorted(sorted(places, key=lambda place: -count[place])[:MAX_ACTIONS])
    return chosen, f" Of {len(names)} actions the {MAX_ACTIONS} most frequent." if len(names) > MAX_ACTIONS else ""


def with_timed_note(names: Sequence[str], *columns: np.ndarray) -> list[list[str]]:
    """Rows of a table of unordered pairs, from texts [actions, actions]."""
    pairs = combinations(range(len(names)), 2)
    return [[names[a], names[b], *(str(column[a, b]) for column in columns)] for a, b in pairs]


def texts(values: np.ndarray, text: Callable[[float], str]) -> np.ndarray:
    """Cells of a heat map, none on its diagonal."""
    cells = np.array([[EMPTY if value != value else text(value) for value in row] for row in values.tolist()], object)
    np.fill_diagonal(cells, "")
    return cells


def action_order(found: DataStatistics) -> Section:
    """Which of two actions comes first."""
    title = "In which order"
    if not found.ordered:
        why = "the log does not tell the times of two actions or more, and so not their order"
        return Section(title, f"Left out: {why}.")
    chosen, some = most_frequent(found, [name for name in found.times if name != EXIT])
    names, inside = [found.card.predicted_actions[place] for place in chosen], np.ix_(chosen, chosen)
    share, differ = found.pairs.order()[inside], (found.pairs.before + found.pairs.before.T)[inside]
    figure = charts.pair_cells(
        "Share of impressions in which the row's action comes before the column's",
        names,
        np.where(differ < FEW_VALUES, math.nan, share),
        texts(share, lambda value: f"{value:.0%}"),
    )
    rows = with_timed_note(
        names, texts(differ, "{:,}".format), texts(share, percent), texts(found.pairs.together[inside], "{:,}".format)
    )
    caption = (
        "In impressions with both actions, how often the row's comes before the column's. Cells without a tone are of "
        f"fewer than {FEW_VALUES} impressions.{some}"
    )
    return Section(
        title,
        "Far from 50%, the order of two actions is a habit that a model of sequences can learn.",
        [(figure, caption)],
        [
            ReportTable(
                ["first", "then", "at different times", "in this order", "at the same moment"],
                rows,
                "Impressions with both actions at different times; in this order: their share; and with both at once.",
            )
        ],
    )


def cooccurrence(found: DataStatistics) -> Section:
    """How much likelier two actions are in one impression than by chance."""
    title = "Which go together"
    if len(found.card.predicted_actions) < 2:
        return Section(title, "Left out: it takes two actions.")
    chosen, some = most_frequent(found, found.card.predicted_actions)
    names, inside = [found.card.predicted_actions[place] for place in chosen], np.ix_(chosen, chosen)
    lift, both = found.pairs.lift(found.train.targets)[inside], found.pairs.both[inside]
    single = both.diagonal() / found.train.targets
    chance = np.outer(single, single) * found.train.targets
    lifts = texts(lift, lambda value: f"{value:.2f}" if value < 9.995 else f"{value:.1f}")
    # A lift of one half is as far from chance as one of two.
    toned = np.log(np.where((both < FEW_VALUES) | (lift == 0), math.nan, lift))
    figure = charts.pair_cells("How many times likelier two actions are together than by chance", names, toned, lifts)
    rows = with_timed_note(names, texts(both, "{:,}".format), texts(chance, few_digits), lifts)
    caption = (
        "Lift: impressions with both actions, over what there would be if neither knew of the other; 1 is chance. "
        f"Cells without a tone are of fewer than {FEW_VALUES} impressions.{some}"
    )
    return Section(
        title,
        "Above 1, two actions share a cause, such as an interesting video or an active user, or one leads to the "
        "other.",
        [(figure, caption)],
        [ReportTable(["", "and", "impressions with both", "by chance", "lift"], rows)],
    )


def sequences(found: DataStatistics) -> Section:
    """The most frequent sequences of actions."""
    total = found.train.targets
    what, joint = ("sequences", " → ") if found.ordered else ("combinations", " + ")
    rows = []
    covered = 0
    for codes, count in found.sequences:
        covered += count
        text = joint.join(found.card.actions[code] for code in codes) or "none"
        rows.append([text, f"{count:,}", percent(count / total), percent(covered / total)])
    text = (
        f"{found.distinct_sequences:,} {what} of actions occur; the {len(rows)} below make {percent(covered / total)} "
        "of the impressions."
    )
    if not found.ordered:
        text += " The log does not tell in which order."
    elif set(found.card.predicted_actions) - set(found.times):
        text += " Actions without a recorded time stand at the end."
    return Section(
        f"Most frequent {what}",
        text,
        tables=[ReportTable(["actions", "impressions", "share", "and those above"], rows)],
    )


def skip_rates(found: DataStatistics) -> Section:
    """Glances and complete views by length of the video."""
    title = "What is skipped"
    if found.lengths is None:
        why = "how long videos are" if found.card.feedback is not None else "how long videos are watched"
        rest = "" if found.card.feedback is None else " The share of glances in all is among the objectives above."
        return Section(title, f"Left out: the log does not tell {why}.{rest}")
    if not found.lengths:
        return Section(title, "Left out: no video's length is known.")
    rows = [
        [
            span(group),
            f"{group.targets:,}",
            *(percent(share) for share in (group.glance, group.effective, group.complete)),
        ]
        for group in found.lengths
    ]
    glance = found.card.feedback.glance_s if found.card.feedback else 0
    return Section(
        title,
        f"Glance: watched for less than {glance:g} seconds. Effective: as long as the median of videos of that length, "
        "or to the end. Complete: to the end, unless there was explicit negative feedback.",
        [(charts.duration_chart(found.lengths), "Groups hold about equally many impressions.")],
        [ReportTable(["length, s", "impressions", "glance", "effective", "complete"], rows)],
    )


def sessions(found: DataStatistics) -> Section:
    """Gaps and session lengths."""
    title = "Sessions"
    if found.gaps is None or found.sessions is None:
        return Section(title, "Left out: the log tells the order of a user's impressions, not the time between them.")
    gap = found.card.session_gap_s
    rows = [
        ["gap between impressions", *spread(found.gaps, seconds)],
        ["impressions of a session", *spread(found.sessions, few_digits)],
    ]
    caption = (
        "Left: time between the begins of a user's successive impressions. Right: impressions per session. Solid lines "
        "are medians."
    )
    return Section(
        title,
        f"A session ends where the next impression begins more than {seconds(gap)} later, and with the training split.",
        [(charts.session_charts(found.gaps, found.sessions, gap), caption)],
        [ReportTable(["", *SPREAD], rows)],
    )


def seconds(value: float) -> str:
    """A duration in three digits of a fitting unit: 0.21 s, 47 s, 7.63 h, 2.42 d."""
    if math.isnan(value):
        return EMPTY
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} s"
