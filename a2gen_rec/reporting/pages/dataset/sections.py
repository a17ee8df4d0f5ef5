"""Sections of a dataset report: text, tables and charts."""

import math
from collections.abc import Callable

from a2gen_rec.data.inputs import Number
from a2gen_rec.data.schema import EXIT
from a2gen_rec.reporting.formatting import (
    MISSING,
    format_count,
    format_duration,
    format_percent,
    format_range,
    format_utc,
)
from a2gen_rec.reporting.pages.dataset import charts
from a2gen_rec.reporting.pages.dataset.charts import positive_rate
from a2gen_rec.reporting.pages.dataset.pair_sections import action_order, cooccurrence
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics
from a2gen_rec.reporting.pages.dataset.value_counts import ValueCounts
from a2gen_rec.reporting.pages.section import Section, SectionTable

SUMMARY_COLUMNS = ("count", "mean", "10%", "median", "90%", "99%", "max")


def sections(statistics: DataStatistics) -> list[Section]:
    """Return all sections in order. A section without data states the reason in one sentence."""
    return [
        splits(statistics),
        inputs(statistics),
        action_rates(statistics),
        activity(statistics),
        action_times(statistics),
        action_order(statistics),
        cooccurrence(statistics),
        sequences(statistics),
        skip_rates(statistics),
        sessions(statistics),
    ]


def inputs(statistics: DataStatistics) -> Section:
    """Model inputs: tables of features, standardization of numbers, and shares of missing values."""
    card = statistics.card
    missing = card.quality.missing_share if card.quality is not None else {}
    rows = []
    for each in card.inputs:
        share = format_percent(missing[each.name]) if each.name in missing else MISSING
        size, scale, kind = MISSING, MISSING, str(each.kind)
        if isinstance(each, Number):
            scale = f"{each.transform}, {each.mean:.4g} ± {each.std:.4g}"
        else:
            size = f"{each.cardinality:,}"
            if each.multi_valued:
                kind += f", {each.mean_values:.2f} values on average"
        rows.append([each.name, each.level, kind, size, scale, share])
    for vector in card.vectors:
        scale = f"root mean square {vector.rms:.4g}"
        rows.append([vector.name, vector.level, f"vector of width {vector.width}", MISSING, scale, MISSING])
    columns = ["input", "level", "kind", "rows", "transform, mean ± std", "missing"]
    text = (
        "Inputs of the models. A feature has a table of embeddings. A number is standardized on training data. A "
        "vector is never trained."
    )
    table = SectionTable(columns, rows, text_columns=("level", "kind", "transform, mean ± std"))
    return Section("Inputs", text, tables=[table])


def splits(statistics: DataStatistics) -> Section:
    """Sizes of the splits, and shares of new users and unknown items."""
    rows = []
    for name, split in statistics.splits.items():
        counts = split.counts
        if not counts.targets:
            rows.append([name, "0", *[MISSING] * 7])
            continue
        rows.append(
            [
                name,
                f"{counts.targets:,}",
                f"{split.users:,}",
                f"{split.items:,}",
                format_time(statistics, counts.first_ms),
                format_time(statistics, counts.last_ms),
                MISSING if name == "train" else format_percent(split.new_user_impressions / counts.targets),
                format_percent(split.unknown_item_impressions / counts.targets),
                f"{split.num_actions / counts.targets:.3f}",
            ]
        )
    columns = ["split", "impressions", "users", "items", "first", "last", "new users", "unknown items"]
    caption = (
        "New users: share of impressions of users without training impressions. Unknown items: share of impressions of "
        "items that are absent from or too rare in the training data; these items are not counted in the column items."
    )
    zone = (
        "Times are in UTC."
        if statistics.card.has_calendar_time
        else "Times start at an arbitrary origin, because the log has no calendar time."
    )
    return Section(
        "Splits",
        f"{zone} The following sections describe the training split unless stated otherwise.",
        tables=[SectionTable([*columns, "actions per impression"], rows, caption)],
    )


def format_time(statistics: DataStatistics, ms: int | None) -> str:
    """Return a time in UTC, or as a duration since the origin if the log has no calendar time."""
    if ms is None:
        return MISSING
    return format_utc(ms) if statistics.card.has_calendar_time else format_duration(ms / 1000)


def action_rates(statistics: DataStatistics) -> Section:
    """Rates of actions, labels and objectives in each split."""
    card = statistics.card
    title = "Action rates"
    names = [*card.predicted_actions, *card.labels, *card.objectives]
    if not names:
        return Section(title, "Not available: the log has no actions, labels or objectives.")
    kinds = dict.fromkeys(card.predicted_actions, "action") | dict.fromkeys(card.labels, "label")
    rows = []
    for name in names:
        rates = [positive_rate(split, name) for split in statistics.splits.values()]
        counts = [f"{split.counts.positives[name]:,}" for split in statistics.splits.values()]
        cells = [cell for pair in zip(counts, map(format_percent, rates), strict=True) for cell in pair]
        rows.append([name, kinds.get(name, "objective"), *cells, relative_change(rates[-1], rates[0])])
    watch = [split.watch_time for split in statistics.splits.values()]
    if any(distribution.total for distribution in watch):
        cells = [
            cell for distribution in watch for cell in (f"{distribution.total:,}", format_duration(distribution.median))
        ]
        rows.append(["median watch time", "time", *cells, relative_change(watch[-1].median, watch[0].median)])
    columns = ["", "kind", *(cell for name in statistics.splits for cell in (name, "rate")), "test / train"]
    return Section(
        title,
        "Impressions with each action, label and objective, and the drift from the training split to the later splits. "
        "Metrics of an action with a few hundred positives are unreliable.",
        [
            (
                charts.rate_charts(statistics.splits, names),
                "Bars: training split. Markers: other splits; absent without positives.",
            )
        ],
        [SectionTable(columns, rows, "Positives, and their share of the impressions with a known value.")],
    )


def relative_change(value: float, other: float) -> str:
    return f"{value / other:.2f}" if other and not math.isnan(value / other) else MISSING


def activity(statistics: DataStatistics) -> Section:
    """Impressions per user and item, actions per impression."""
    per_item, per_impression = statistics.impressions_per_item, statistics.actions_per_impression
    distributions = {
        "impressions per user": statistics.impressions_per_user,
        "impressions per item": per_item,
        "actions per impression": per_impression,
    }
    rows = [[name, *summary_cells(distribution, format_count)] for name, distribution in distributions.items()]
    top = {share: per_item.top_share(share) for share in (0.01, 0.1)}
    with_action = 1 - per_impression.counts[per_impression.values == 0].sum() / per_impression.total
    text = (
        f"{format_percent(with_action)} of the impressions have an action. The most frequent 10% of the items account "
        f"for {format_percent(top[0.1])} of the impressions, the most frequent 1% for {format_percent(top[0.01])}."
        if per_item.total
        else f"{format_percent(with_action)} of the impressions have an action. All items are unknown."
    )
    caption = (
        "Left: users by their number of impressions; the line is the median. Middle: share of all impressions of the "
        "most frequent items. Right: impressions by their number of actions (log scale)."
    )
    figures = [(charts.activity_charts(statistics), caption)] if per_item.total else []
    return Section("Activity", text, figures, [SectionTable(["", *SUMMARY_COLUMNS], rows)])


def summary_cells(distribution: ValueCounts, text: Callable[[float], str]) -> list[str]:
    """Return the cells of ``SUMMARY_COLUMNS``."""
    upper = map(distribution.quantile, (0.9, 0.99, 1.0))
    values = [distribution.mean, distribution.quantile(0.1), distribution.median, *upper]
    return [f"{distribution.total:,}", *(MISSING if math.isnan(value) else text(value) for value in values)]


def action_times(statistics: DataStatistics) -> Section:
    """Times of actions in seconds, and as a share of the watch time."""
    title = "Action times"
    times, relative = statistics.times, statistics.relative_times
    if not times:
        return Section(title, "Not available: the log has neither times of actions nor watch times.")
    labeled = {name if name != EXIT else "exit (watch time)": distribution for name, distribution in times.items()}
    medians = {name: relative[name].median for name in relative}
    rows = [
        [
            label,
            *summary_cells(distribution, format_duration),
            *([format_percent(medians.get(name, math.nan))] if medians else []),
        ]
        for (label, distribution), name in zip(labeled.items(), times, strict=True)
    ]
    figures = [
        (
            charts.time_charts(labeled),
            "Distribution of the time of each action; equal areas are equal shares of the action's occurrences. The "
            "line is the median. Times below the axis are in the first bar.",
        )
    ]
    text = "Seconds from the start of the impression to the action."
    if relative:
        figures.append((charts.position_chart(relative), "Times as a share of the watch time; the line is the median."))
    elif set(times) == {EXIT}:
        text += " The log has watch times only; the times of other actions are unknown."
    else:
        text += " The log has no watch times, so times cannot be expressed as a share of them."
    untimed = [name for name in statistics.card.predicted_actions if name not in times]
    if untimed and set(times) != {EXIT}:
        text += f" Without a recorded time: {', '.join(untimed)}."
    columns = ["", *SUMMARY_COLUMNS, *(["median, % of watch time"] if medians else [])]
    return Section(title, text, figures, [SectionTable(columns, rows)])


def sequences(statistics: DataStatistics) -> Section:
    """Most frequent sequences of actions."""
    total = statistics.train.targets
    kind, separator = ("sequences", " → ") if statistics.has_order else ("combinations", " + ")
    rows = []
    cumulative = 0
    for codes, count in statistics.sequences:
        cumulative += count
        actions = separator.join(statistics.card.actions[code] for code in codes) or "none"
        rows.append([actions, f"{count:,}", format_percent(count / total), format_percent(cumulative / total)])
    text = (
        f"{statistics.distinct_sequences:,} distinct {kind} of actions occur. The {len(rows)} most frequent cover "
        f"{format_percent(cumulative / total)} of the impressions."
    )
    if not statistics.has_order:
        text += " The log does not record their order."
    elif set(statistics.card.predicted_actions) - set(statistics.times):
        text += " Actions without a recorded time are at the end."
    return Section(
        f"Most frequent {kind}",
        text,
        tables=[SectionTable(["actions", "impressions", "share", "cumulative share"], rows)],
    )


def skip_rates(statistics: DataStatistics) -> Section:
    """Glances and complete views by video duration."""
    title = "Glances and complete views"
    feedback, groups = statistics.card.feedback, statistics.by_duration
    if groups is None:
        missing = "video durations" if feedback is not None else "watch times"
        note = "" if feedback is None else " The overall glance rate is in section Action rates."
        return Section(title, f"Not available: the log has no {missing}.{note}")
    if not groups:
        return Section(title, "Not available: no video has a known duration.")
    rows = [
        [
            format_range(group.from_s, group.to_s),
            f"{group.targets:,}",
            *(format_percent(share) for share in (group.glance, group.effective, group.complete)),
        ]
        for group in groups
    ]
    glance_s = feedback.glance_s if feedback else 0
    return Section(
        title,
        f"Glance: watched for less than {glance_s:g} seconds. Effective: watched at least as long as the median of "
        "videos of that duration, or to the end. Complete: watched to the end, without explicit negative feedback.",
        [(charts.duration_chart(groups), "The groups have about equal numbers of impressions.")],
        [SectionTable(["duration, s", "impressions", "glance", "effective", "complete"], rows)],
    )


def sessions(statistics: DataStatistics) -> Section:
    """Gaps between impressions, and impressions per session."""
    title = "Sessions"
    gaps, per_session = statistics.gaps, statistics.impressions_per_session
    if gaps is None or per_session is None:
        return Section(title, "Not available: the log has the order of a user's impressions, but not their times.")
    session_gap_s = statistics.card.session_gap_s
    rows = [
        ["gap between impressions", *summary_cells(gaps, format_duration)],
        ["impressions per session", *summary_cells(per_session, format_count)],
    ]
    caption = (
        "Left: time between the starts of a user's consecutive impressions. Right: impressions per session. Solid "
        "lines are medians."
    )
    return Section(
        title,
        f"A session ends if the next impression starts more than {format_duration(session_gap_s)} later, and at the "
        "end of the training split.",
        [(charts.session_charts(gaps, per_session, session_gap_s), caption)],
        [SectionTable(["", *SUMMARY_COLUMNS], rows)],
    )
