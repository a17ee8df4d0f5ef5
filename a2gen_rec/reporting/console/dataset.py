"""A dataset card as terminal tables."""

from rich.table import Table

from a2gen_rec.data.schema import EXIT, FEEDBACK_LEVELS, SPLITS, DatasetCard
from a2gen_rec.reporting.console.tables import new_numeric_table
from a2gen_rec.reporting.formatting import MISSING, format_utc


def summary_tables(card: DatasetCard) -> list[Table | str]:
    """Return rows read and dropped, splits, positives per action, feedback levels, and features."""
    return [rows_table(card), splits_table(card), actions_table(card), feedback_table(card), features_table(card)]


def rows_table(card: DatasetCard) -> Table:
    kept = sum(split.targets for split in card.splits.values())
    table = new_numeric_table(f"{card.name}: rows", "rows", "count")
    table.add_row("read", f"{kept + sum(card.dropped_rows.values()):,}")
    for reason, count in card.dropped_rows.items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
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


def features_table(card: DatasetCard) -> Table:
    table = new_numeric_table("features", "feature", "level", "kind", "rows")
    for feature in card.features:
        table.add_row(feature.name, feature.level, feature.kind, f"{feature.cardinality:,}")
    return table
