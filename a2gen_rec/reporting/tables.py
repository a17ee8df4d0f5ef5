"""Results as tables for the terminal, at most 100 columns wide where names allow it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # a table needs no torch
    from a2gen_rec.serving.rank import Candidate, Ranking

UNKNOWN = "–"
BETTER = "bold green"


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of an evaluation (its keys: ``training.evaluate.evaluate``): actions, and times where logs record any.

    Values better than a trivial reference stand out: those of actions and labels than the item's smoothed rate on
    training data, those of times than the median of the training data.
    """
    tables = [_actions_table(result)]
    if result["time"]:
        tables.append(_times_table(result))
    return tables


def ranking_table(ranking: "Ranking") -> Table:
    """The candidates of a ranking, each with its most probable timeline."""
    shown = ranking.candidates
    names = list(shown[0].probability) if shown else []
    watched = any(candidate.expected_watch_s is not None for candidate in shown)
    table = titled_table(f"user {ranking.user}: best {len(shown):,} of {ranking.ranked:,} candidates", _about(ranking))
    table.add_column("#", justify="right")
    table.add_column("item", overflow="fold")
    for name in [*names, "watch"] if watched else names:
        header = Text(name.replace("_", "_\n"), style="underline" if name == ranking.by else "")
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("timeline", overflow="fold")
    for place, candidate in enumerate(shown, start=1):
        row = [_percent(candidate.probability[name]) for name in names]
        if watched:
            row.append(_seconds(candidate.expected_watch_s))
        table.add_row(str(place), _item(candidate), *row, _timeline(candidate))
    return table


def _actions_table(result: Mapping[str, Any]) -> Table:
    reference = result["reference"]["item_rate"]
    oracle = result["reference"].get("oracle", {})
    table = titled_table(f"actions and labels: {result['split']}, {result['targets']:,} targets", _summary(result))
    table.add_column("", no_wrap=True)
    headers = ["posi-\ntives", "AUC", "item-rate\nAUC"]
    headers += ["oracle\nAUC", "gap\nclosed"] if oracle else []
    for header in [*headers, "GAUC", "NE", "calib-\nration"]:
        table.add_column(header, justify="right")
    for name, found in result["actions"].items():
        trivial, best = reference.get(name, {}), oracle.get(name, {})
        cells: list[Text | str] = [f"{found['positives']:,}", _against(found, trivial, "auc", more_is_better=True)]
        cells.append(_number(trivial.get("auc"), 4))
        if oracle:
            closed = gap_closed(found["auc"], trivial.get("auc"), best.get("auc"))
            cells += [_number(best.get("auc"), 4), UNKNOWN if closed is None else f"{closed:.0%}"]
        cells.append(_against(found, trivial, "gauc", more_is_better=True))
        cells.append(_against(found, trivial, "ne", more_is_better=False))
        table.add_row(Text(name), *cells, _number(found["calibration"], 3))
    return table


def _times_table(result: Mapping[str, Any]) -> Table:
    median = result["reference"].get("median_time", {})
    table = titled_table("times: mean absolute error", "bold: better than the training median")
    table.add_column("", no_wrap=True)
    headers = ["count", "log1p s", "median's\nlog1p s", "seconds", "median's\nseconds"]
    for header in headers:
        table.add_column(header, justify="right")
    for name, found in result["time"].items():
        trivial = median.get(name, {})
        table.add_row(
            Text(name),
            f"{found['count']:,}",
            _against(found, trivial, "mae_log", more_is_better=False),
            _number(trivial.get("mae_log"), 4),
            _against(found, trivial, "mae_s", more_is_better=False, digits=2),
            _number(trivial.get("mae_s"), 2),
        )
    return table


def gap_closed(model: float | None, trivial: float | None, oracle: float | None) -> float | None:
    """Share of the way from the trivial reference to the oracle that the model has gone; None without a way to go."""
    if model is None or trivial is None or oracle is None or oracle <= trivial:
        return None
    return (model - trivial) / (oracle - trivial)


def _summary(result: Mapping[str, Any]) -> str:
    unexplored = result["unexplored_probability"]
    return (
        f"loss {result['loss']['total']:.4f} · order violations {result['order_violations']:.2%}\n"
        f"unexplored probability: mean {unexplored['mean']:.1e}, max {unexplored['max']:.1e}\n"
        "bold: better than the item's rate on training data"
    )


def _about(ranking: "Ranking") -> str:
    by = "expected watch time" if ranking.by == "watch" else f"probability of {ranking.by}"
    history = f"{ranking.history:,} past impressions"
    if not ranking.user_known:
        history = "user not in the dataset: no history"
    unknown = f"\n? not in the dataset: {ranking.unknown_items:,} candidates" if ranking.unknown_items else ""
    return f"by {by} · {history}{unknown}"


def _item(candidate: "Candidate") -> Text:
    return Text(candidate.item) if candidate.known else Text.assemble(candidate.item, (" ?", "bold yellow"))


def _timeline(candidate: "Candidate") -> Text:
    steps = [name if time is None else f"{name}@{_offset(time)}" for name, time in candidate.timeline]
    return Text.assemble(" → ".join(steps), (f" ({candidate.timeline_probability:.0%})", "dim"))


def _offset(seconds: float) -> str:
    return "0" if seconds == 0 else _seconds(seconds)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.1 else f"{probability:.2%}"


def _number(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def _against(
    found: Mapping[str, float | None],
    trivial: Mapping[str, float | None],
    metric: str,
    more_is_better: bool,
    digits: int = 4,
) -> Text:
    """A metric, standing out where it is better than the reference's."""
    value, other = found[metric], trivial.get(metric)
    better = value is not None and other is not None and (value > other if more_is_better else value < other)
    return Text(_number(value, digits), style=BETTER if better else "")


def titled_table(title: str, caption: str = "") -> Table:
    """An empty table; names in ``title`` and ``caption`` are taken as they are, not as markup."""
    return Table(
        title=Text(f"\n{title}", style="bold"),
        title_justify="left",
        caption=Text(caption, style="dim") if caption else None,
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
