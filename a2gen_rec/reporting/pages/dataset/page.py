"""A prepared dataset's statistics as one HTML page that needs nothing else, as Markdown and as JSON."""

import json
import math
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress

from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.reporting import charts
from a2gen_rec.reporting.pages import templates
from a2gen_rec.reporting.pages.dataset.sections import sections
from a2gen_rec.reporting.pages.dataset.statistics import DataStatistics, compute_statistics
from a2gen_rec.utils import paths

PAGE, MARKDOWN, NUMBERS = "data.html", "data.md", "statistics.json"


def write_dataset_report(data: str, out: str = "", progress: bool = False) -> list[str]:
    """Write ``data.html``, ``data.md`` and ``statistics.json`` of a prepared dataset; returns lines that name them.

    Args:
        data: the dataset's folder, local or remote.
        out: folder to write to, made where it is not there; by default beside ``data``, named DATA-report.
        progress: show a bar.

    Raises:
        ConfigError: ``out`` is the dataset's folder or in it.
        DataError: ``data`` is not a dataset, or a file of it breaks the contract.
        UserError: ``out`` cannot be written, or memory or disk ran out.
    """
    out = out or f"{paths.abspath(data).rstrip('/')}-report"
    if f"{_complete_path(out)}/".startswith(f"{_complete_path(data)}/"):
        raise ConfigError(f"--out {out} must lie outside the dataset {data}")
    DatasetCard.load(data)  # before a folder is made
    paths.ensure_writable_dir(out)
    # What is flat of a long log may be too much for the system's temporary folder.
    beside = out if paths.is_local(out) else None
    with (
        tempfile.TemporaryDirectory(prefix=".counting-", dir=beside) as scratch,
        Progress(disable=not progress) as bars,
    ):
        found = compute_statistics(data, Path(scratch), bars)
    shown = sections(found)
    values: dict[str, Any] = {"card": found.card, "found": found, "sections": shown, "charts": charts}
    written = {
        PAGE: templates.render("dataset/page.html.j2", **values),
        MARKDOWN: templates.render("dataset/page.md.j2", **values),
        NUMBERS: json.dumps(to_json(found), indent=1) + "\n",
    }
    for name, text in written.items():
        paths.write_text(paths.join(out, name), text)
    named = {"page": PAGE, "Markdown": MARKDOWN, "numbers": NUMBERS}
    return [f"{kind}: {paths.join(out, name)}" for kind, name in named.items()]


def _complete_path(path: str) -> str:
    return os.path.realpath(path) if paths.is_local(path) else path.rstrip("/")


def to_json(found: DataStatistics) -> dict[str, Any]:
    """All statistics as plain data; counts, seconds and shares, None where there is nothing to count."""
    card, pairs = found.card, found.pairs
    splits = {
        name: {
            "impressions": split.counts.targets,
            "users": split.users,
            "items": split.items,
            "first_ms": split.counts.first_ms,
            "last_ms": split.counts.last_ms,
            "by_new_users": split.new_users,
            "of_unknown_items": split.unknown_items,
            "actions": split.action_counts,
            "positives": split.counts.positives,
            "known": split.counts.num_known,
            "watch_s": split.watch.summary(),
        }
        for name, split in found.splits.items()
    }
    result = {
        "dataset": card.name,
        "actions": card.predicted_actions,
        "splits": splits,
        "per_user": found.per_user.summary(),
        "per_item": found.per_item.summary()
        | {"share_of_top": {f"{share:g}": found.per_item.top_share(share) for share in (0.01, 0.1)}},
        "actions_per_impression": {
            int(n): int(count) for n, count in zip(found.per_impression.value, found.per_impression.count, strict=True)
        },
        "time_s": {name: counted.summary() for name, counted in found.times.items()},
        "share_of_watch_time": {name: counted.summary() for name, counted in found.positions.items()},
        "pairs": {
            "both": pairs.both.tolist(),
            "before": pairs.before.tolist(),
            "at_the_same_moment": pairs.together.tolist(),
            "order": pairs.order().tolist(),
            "lift": pairs.lift(found.train.targets).tolist(),
        },
        "sequences": {
            "distinct": found.distinct_sequences,
            "most_frequent": [
                {"actions": [card.actions[code] for code in codes], "count": count} for codes, count in found.sequences
            ],
        },
        "lengths": None if found.lengths is None else [asdict(group) for group in found.lengths],
        "gap_s": None if found.gaps is None else found.gaps.summary(),
        "impressions_per_session": None if found.sessions is None else found.sessions.summary(),
    }
    return _plain(result)


def _plain(value: Any) -> Any:
    """Without NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
