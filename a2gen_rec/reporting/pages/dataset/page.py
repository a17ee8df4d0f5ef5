"""Statistics of a prepared dataset as one self-contained HTML page, as Markdown and as JSON."""

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from a2gen_rec.data.card import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.reporting import charts
from a2gen_rec.reporting.formatting import plural
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.dataset.sections import sections
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics, compute_statistics
from a2gen_rec.utils import paths

PAGE, MARKDOWN, STATISTICS = "data.html", "data.md", "statistics.json"


def write_dataset_report(data: str, out: str = "", progress: bool = False) -> list[str]:
    """Write ``data.html``, ``data.md`` and ``statistics.json`` of a prepared dataset and return lines that name them.

    Args:
        data: Dataset directory, local or remote.
        out: Output directory, created if absent; by default DATA-report next to ``data``.
        progress: Show a progress bar.

    Raises:
        ConfigError: ``out`` is the dataset directory or inside it.
        DataError: ``data`` is not a dataset, or a file violates the format.
        UserError: ``out`` cannot be written, or out of memory or disk space.
    """
    out = out or f"{paths.abspath(data).rstrip('/')}-report"
    if f"{_canonical_path(out)}/".startswith(f"{_canonical_path(data)}/"):
        raise ConfigError(f"--out {out} must be outside the dataset {data}")
    DatasetCard.load(data)  # before a directory is created
    paths.ensure_writable_dir(out)
    # The flat targets of a large log may exceed the system's temporary directory.
    scratch_parent = out if paths.is_local(out) else None
    with (
        tempfile.TemporaryDirectory(prefix=".statistics-", dir=scratch_parent) as scratch,
        Progress(disable=not progress) as bars,
    ):
        statistics = compute_statistics(data, Path(scratch), bars)
    card = statistics.card
    counts = f"{statistics.train.targets:,} training impressions", plural(len(card.predicted_actions), "action")
    page: dict[str, Any] = {
        "title": f"{card.name}: dataset statistics",
        "kind": "Statistics of a prepared dataset",
        "heading": card.name,
        "about": [*counts, *filter(None, (card.source.get("licence"), card.source.get("citation")))],
        "command": card.command,
    }
    parts = {"sections": sections(statistics), **page}
    contents = {
        PAGE: templates.render("sections.html.j2", charts=charts, **parts),
        MARKDOWN: templates.render("sections.md.j2", chart_path=None, is_generated=False, **parts),
        STATISTICS: json.dumps(to_json(statistics), indent=1) + "\n",
    }
    for name, text in contents.items():
        paths.write_text(paths.join(out, name), text)
    files = {"page": PAGE, "Markdown": MARKDOWN, "statistics": STATISTICS}
    return [f"{kind}: {paths.join(out, name)}" for kind, name in files.items()]


def _canonical_path(path: str) -> str:
    return os.path.realpath(path) if paths.is_local(path) else path.rstrip("/")


def to_json(statistics: DataStatistics) -> dict[str, Any]:
    """Return all statistics as plain data: counts, seconds and shares; None for undefined values."""
    card, pairs = statistics.card, statistics.pairs
    per_item, per_impression = statistics.impressions_per_item, statistics.actions_per_impression
    splits = {
        name: {
            "impressions": split.counts.targets,
            "users": split.users,
            "items": split.items,
            "first_ms": split.counts.first_ms,
            "last_ms": split.counts.last_ms,
            "new_user_impressions": split.new_user_impressions,
            "unknown_item_impressions": split.unknown_item_impressions,
            "num_actions": split.num_actions,
            "positives": split.counts.positives,
            "num_known": split.counts.num_known,
            "watch_time_s": split.watch_time.summary(),
        }
        for name, split in statistics.splits.items()
    }
    result = {
        "dataset": card.name,
        "actions": card.predicted_actions,
        "splits": splits,
        "impressions_per_user": statistics.impressions_per_user.summary(),
        "impressions_per_item": per_item.summary()
        | {"top_share": {f"{share:g}": per_item.top_share(share) for share in (0.01, 0.1)}},
        "actions_per_impression": {
            int(n): int(count) for n, count in zip(per_impression.values, per_impression.counts, strict=True)
        },
        "time_s": {name: distribution.summary() for name, distribution in statistics.times.items()},
        "relative_time": {name: distribution.summary() for name, distribution in statistics.relative_times.items()},
        "pairs": {
            "both": pairs.both.tolist(),
            "before": pairs.before.tolist(),
            "simultaneous": pairs.simultaneous.tolist(),
            "order": pairs.order().tolist(),
            "lift": pairs.lift(statistics.train.targets).tolist(),
        },
        "sequences": {
            "distinct": statistics.distinct_sequences,
            "most_frequent": [
                {"actions": [card.actions[code] for code in codes], "count": count}
                for codes, count in statistics.sequences
            ],
        },
        "by_duration": None if statistics.by_duration is None else [asdict(group) for group in statistics.by_duration],
        "gap_s": None if statistics.gaps is None else statistics.gaps.summary(),
        "impressions_per_session": None
        if statistics.impressions_per_session is None
        else statistics.impressions_per_session.summary(),
    }
    return _without_nan(result)


def _without_nan(value: Any) -> Any:
    """Replace NaN, which JSON cannot represent, with None."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
