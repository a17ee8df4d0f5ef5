"""First impressions of a log as terminal tables (``a2gen prepare --sample``)."""

import math
from datetime import UTC, datetime
from typing import Any

from rich.table import Table
from rich.text import Text

from a2gen_rec.data.names import IDENTIFIERS
from a2gen_rec.data.prepare.sample import LogSample
from a2gen_rec.data.time_zone import TimeZone
from a2gen_rec.reporting.console.dataset import rows_table
from a2gen_rec.reporting.console.tables import new_table
from a2gen_rec.reporting.formatting import MISSING


def sample_tables(sample: LogSample) -> list[Table | Text]:
    """Return the counts of rows, the impressions with a legend, and their features."""
    tables: list[Table | Text] = [
        rows_table(sample.info.name, sample.kept, sample.dropped),
        _impressions_table(sample),
        Text(_legend(sample), style="dim"),
    ]
    others = (*IDENTIFIERS, sample.info.duration_feature)
    names = [feature.name for feature in sample.columns.features if feature.name not in others]
    return [*tables, _features_table(sample, names)] if names else tables


def _impressions_table(sample: LogSample) -> Table:
    info = sample.info
    table = new_table(f"the first {len(sample.impressions):,} impressions in the order of time")
    table.add_column("#", justify="right")
    table.add_column("user", overflow="fold")
    table.add_column("item", overflow="fold")
    table.add_column("time (UTC)" if info.has_calendar_time else "time (ms)", justify="right", overflow="fold")
    table.add_column("watch", justify="right", no_wrap=True)
    if info.duration_feature:
        table.add_column("duration", justify="right", no_wrap=True)
    if info.actions:
        table.add_column("actions", overflow="fold")
    if info.labels:
        table.add_column("labels", overflow="fold")
    for number, row in enumerate(sample.impressions, start=1):
        cells = [str(number), row["user_id"], row["item_id"], _time(row["ts_ms"], info.has_calendar_time)]
        cells.append(_seconds(row["dwell_s"]))
        cells += [_seconds(row[info.duration_feature])] if info.duration_feature else []
        cells += [_actions(row, info.actions)] if info.actions else []
        cells += [_labels(row, info.labels)] if info.labels else []
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _features_table(sample: LogSample, names: list[str]) -> Table:
    table = new_table("their features")
    table.add_column("#", justify="right")
    table.add_column("feature=value", overflow="fold")
    for number, row in enumerate(sample.impressions, start=1):
        values = [f"{name}={_value(row[name])}" for name in names]
        table.add_row(str(number), Text(" · ".join(values)))
    return table


def _legend(sample: LogSample) -> str:
    info = sample.info
    parts = [f"time zone of the log: {_zone(info.time_zone)}"] * info.has_calendar_time
    parts += ["action@seconds since the start, or @? at an unknown time"] * bool(info.actions)
    return "\n".join([*parts, f"{MISSING}: not recorded"])


def _zone(zone: TimeZone) -> str:
    hours = f"{zone.utc_offset_hours:+g}" if zone.utc_offset_hours else ""
    return zone.name or f"UTC{hours}"


def _time(ms: int, has_calendar: bool) -> str:
    if not has_calendar:
        return f"{ms:,}"
    time = datetime.fromtimestamp(ms // 1000, UTC)
    milliseconds = f".{ms % 1000:03d}" if ms % 1000 else ""
    return f"{time:%Y-%m-%d %H:%M:%S}{milliseconds}"


def _seconds(value: float | None) -> str:
    return MISSING if value is None or math.isnan(value) else f"{value:.4g} s"


def _actions(row: dict[str, Any], actions: tuple[str, ...]) -> str:
    times = {name: row[f"at_{name}"] for name in actions if row[f"at_{name}"] is not None}
    ordered = sorted(times, key=lambda name: (math.isnan(times[name]), times[name]))
    return ", ".join(f"{name}@{'?' if math.isnan(times[name]) else f'{times[name]:.4g}'}" for name in ordered)


def _labels(row: dict[str, Any], labels: tuple[str, ...]) -> str:
    known = {name: row[f"label_{name}"] for name in labels if row[f"label_{name}"] is not None}
    return ", ".join(f"{name}={value:g}" for name, value in known.items())


def _list(values: list[dict[str, Any]]) -> str:
    """Return the values of a multi-valued feature, with weights other than 1."""
    texts = (x["value"] if x["weight"] == 1 else f"{x['value']}:{x['weight']:g}" for x in values)
    return f"[{', '.join(texts)}]"


def _value(value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, list):
        return _list(value)
    if isinstance(value, float):
        return MISSING if math.isnan(value) else f"{value:.6g}"
    return str(value)
