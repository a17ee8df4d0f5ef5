"""A dataset card as terminal tables."""

import time
from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.schema import EXIT, FEEDBACK_LEVELS, SPLITS, DataQuality
from a2gen_rec.reporting.console.tables import new_numeric_table
from a2gen_rec.reporting.formatting import MISSING, format_utc

YEAR_2000_MS = 946_684_800_000
MAX_DUPLICATE_SHARE = 0.05
MAX_ENTITY_SHARE, MIN_DOMINANCE = 0.05, 3.0
"""Share of impressions, and its ratio to the mean share, above which one user or item is conspicuous."""
MAX_MISSING_SHARE = 0.95


def summary_tables(card: DatasetCard) -> list[Table | str | Text]:
    """Return rows read and dropped, splits, positives per action, feedback levels, features, and warnings."""
    kept = sum(split.targets for split in card.splits.values())
    tables: list[Table | str | Text] = [
        rows_table(card.name, kept, card.dropped_rows),
        splits_table(card),
        actions_table(card),
        feedback_table(card),
        features_table(card),
    ]
    if card.is_increment:
        tables.append(vocabularies_table(card))
    return [*tables, *(Text(f"warning: {line}") for line in warnings(card, time.time()))]


def warnings(card: DatasetCard, now_s: float) -> list[str]:
    """Return one line for every sign of a mistake in the log or its spec.

    Args:
        card: dataset card.
        now_s: current time in seconds since 1970.
    """
    lines = []
    times = [ms for split in card.splits.values() for ms in (split.first_ms, split.last_ms) if ms is not None]
    if card.has_calendar_time and times:
        if min(times) < YEAR_2000_MS:
            lines.append(f"the first impression starts at {format_utc(min(times))}: check time_unit")
        if max(times) > 1000 * now_s:
            lines.append(f"the last impression starts at {format_utc(max(times))}, after now: check time_unit")
    kept = sum(split.targets for split in card.splits.values())
    duplicates = card.dropped_rows.get("duplicate", 0)
    if duplicates > MAX_DUPLICATE_SHARE * (kept + duplicates):
        share = duplicates / (kept + duplicates)
        lines.append(f"{share:.1%} of the usable rows are duplicates (same user, item and time)")
    for name in [*card.predicted_actions, *card.labels]:
        empty = [split for split in SPLITS if card.splits[split].targets and not card.splits[split].positives[name]]
        if empty:
            lines.append(f"{name} has no positives in {' and '.join(empty)}")
    for name, rows in card.vocabularies.items() if card.is_increment else ():
        if rows.waiting:
            remedy = "grow the table by --capacity, or retire values by --ttl-days"
            lines.append(f"{name}: {rows.waiting:,} values have no row, as no row is free: {remedy}")
    return lines if card.quality is None else lines + quality_warnings(card, card.quality)


def quality_warnings(card: DatasetCard, quality: DataQuality) -> list[str]:
    """Return the warnings of measurements over all impressions."""
    lines = []
    for kind, entity in (("user", quality.most_frequent_user), ("item", quality.most_frequent_item)):
        # Among few entities, a large share is natural.
        if entity.share > MAX_ENTITY_SHARE and entity.share * entity.distinct > MIN_DOMINANCE:
            lines.append(f"{kind} {entity.id!r} has {entity.share:.1%} of all impressions: is it a placeholder?")
    for name, share in quality.missing_share.items():
        if share > MAX_MISSING_SHARE:
            lines.append(f"feature {name} is missing in {share:.1%} of all impressions")
    if quality.median_duration_s is not None:
        for name, seconds in card.median_time_s.items():
            if seconds > quality.median_duration_s:
                lines.append(
                    f"the median time of {name}, {seconds:.4g} s, exceeds the median duration of videos, "
                    f"{quality.median_duration_s:.4g} s: check duration_unit"
                )
    return lines


def rows_table(name: str, kept: int, dropped: Mapping[str, int]) -> Table:
    table = new_numeric_table(f"{name}: rows", "rows", "count")
    table.add_row("read", f"{kept + sum(dropped.values()):,}")
    for reason, count in dropped.items():
        table.add_row(Text(f"dropped: {reason}"), f"{count:,}")
    table.add_row("kept as impressions", f"{kept:,}")
    return table


def splits_table(card: DatasetCard) -> Table:
    table = new_numeric_table("splits", "split", "windows", "targets", "first (UTC)", "last (UTC)")
    for name in SPLITS:
        split = card.splits[name]
        first, last = format_time(card, split.first_ms), format_time(card, split.last_ms)
        table.add_row(name, f"{split.windows:,}", f"{split.targets:,}", first, last)
    return table


def format_time(card: DatasetCard, ms: int | None) -> str:
    return MISSING if ms is None or not card.has_calendar_time else format_utc(ms)


def actions_table(card: DatasetCard) -> Table:
    table = new_numeric_table("positives", "action, label or objective", *SPLITS, "base rate", "median time")
    for name in [*card.predicted_actions, *card.labels, *card.objectives]:
        counts = [f"{card.splits[split].positives[name]:,}" for split in SPLITS]
        table.add_row(name, *counts, f"{card.base_rate[name]:.2%}", format_median(card, name))
    table.add_row(EXIT, *[MISSING] * (len(SPLITS) + 1), format_median(card, EXIT))
    return table


def format_median(card: DatasetCard, action: str) -> str:
    return f"{card.median_time_s[action]:.4g} s" if action in card.median_time_s else MISSING


def feedback_table(card: DatasetCard) -> Table | str:
    """Return the share of each split's targets at each feedback level, or the reason for their absence."""
    if card.feedback is None:
        return "no feedback levels and no objectives: the log records no watch times\n"
    table = new_numeric_table("feedback levels", "level", *SPLITS)
    splits = [card.splits[name] for name in SPLITS]
    for level in FEEDBACK_LEVELS:
        if any(split.feedback[level] for split in splits):
            shares = (f"{split.feedback[level] / split.targets:.2%}" if split.targets else MISSING for split in splits)
            table.add_row(level, *shares)
    return table


def vocabularies_table(card: DatasetCard) -> Table:
    """Return the use of the rows of vocabularies after an increment."""
    columns = ("rows", "values", "admitted", "on reused rows", "retired", "waiting")
    table = new_numeric_table("vocabularies of the increment", "feature", *columns)
    cardinality = {feature.name: feature.cardinality for feature in card.features}
    for name, rows in card.vocabularies.items():
        counts = (cardinality[name], rows.values, rows.admitted, rows.reused, rows.retired, rows.waiting)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def features_table(card: DatasetCard) -> Table:
    table = new_numeric_table("features", "feature", "level", "kind", "rows")
    for feature in card.features:
        kind = f"{feature.kind}, list" if feature.multi_valued else feature.kind
        table.add_row(feature.name, feature.level, kind, f"{feature.cardinality:,}")
    for number in card.numbers:
        table.add_row(number.name, number.level, number.kind, MISSING)
    for vector in card.vectors:
        table.add_row(vector.name, vector.level, f"{vector.kind} of width {vector.width}", MISSING)
    return table
