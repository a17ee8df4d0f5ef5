"""Results as tables for the terminal, at most 100 columns wide where names allow it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from a2gen_rec.data.schema import WATCH_TIME

if TYPE_CHECKING:  # a table needs no torch
    from a2gen_rec.ranking.types import RankedList, ScoredCandidate

MISSING = "–"
HIGHLIGHT = "bold green"
MAX_SIDE_BY_SIDE = 7
"""Outcomes, or outcomes and a score, that fit beside a timeline."""

# What is measured: title, key, digits, whether more is better.
_OF_SCORE = [("AUC", "auc", 4, True)]
_OF_TIME = [
    ("rank correlation", "rank_correlation", 4, True),
    ("MAE, log1p s", "mae_log", 4, False),
    ("MAE, seconds", "mae_s", 2, False),
]


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of an evaluation (its keys: ``training.evaluate.evaluate``).

    Actions always; objectives, times, watch time beside objectives, and videos by length where there is any.

    Values better than a trivial reference stand out: those of actions and labels than the item's smoothed rate on
    training data, those of times than the median of the training data. So does the better of generator and head.
    """
    tables = [_actions_table(result)]
    if result["objectives"]:
        tables.append(_objectives_table(result["objectives"]))
    if result["time"]:
        tables.append(_times_table(result))
    if result["shared_ground"]:
        tables.append(_shared_ground_table(result["shared_ground"]))
    if result["lengths"]:
        tables.append(_lengths_table(result["lengths"]))
    return tables


def export_table(metrics: Mapping[str, Any]) -> Table:
    """What an export costs: AUC of the run and of the exported model (its keys: ``training.export.compared``)."""
    loss = metrics["loss"]
    caption = f"loss {loss['original']:.5f}, exported {loss['exported']:.5f}"
    if any(auc["within"] is None for auc in metrics["auc"].values()):
        caption += f"\n*: fewer than {metrics['least']} positives or negatives, which the tolerance is not asked of"
    table = new_table(f"exported model: {metrics['split']}, {metrics['targets']:,} targets", caption)
    table.add_column("", no_wrap=True)
    for header in ("positives", "AUC", "exported\nAUC", "change"):
        table.add_column(header, justify="right")
    for name, auc in metrics["auc"].items():
        was, now = auc["original"], auc["exported"]
        change = MISSING if was is None or now is None else f"{now - was:+.5f}"
        mark = " *" if auc["within"] is None else ""
        table.add_row(Text(name + mark), f"{auc['positives']:,}", _number(was, 4), _number(now, 4), change)
    return table


def ranking_tables(ranking: "RankedList") -> list[Table]:
    """The candidates of a ranking, each with its most probable timeline if the model generates any.

    Of many outcomes, all but the one ranked by are in a table of their own: beside them, no room would be left for
    timelines.
    """
    shown = ranking.candidates
    names = list(shown[0].probability) if shown else []
    beside = (
        names
        if len(names) + (ranking.by == "ensemble") <= MAX_SIDE_BY_SIDE
        else [name for name in names if name == ranking.by]
    )
    best = f"user {ranking.user}: best {len(shown):,} of {ranking.num_candidates:,} candidates"
    tables = [_candidates_table(ranking, beside, new_table(best, _about(ranking)), whole=True)]
    if names != beside:
        tables.append(_candidates_table(ranking, names, new_table("probabilities"), whole=False))
    return tables


def _candidates_table(ranking: "RankedList", names: Sequence[str], table: Table, whole: bool) -> Table:
    """The table filled with the outcomes ``names`` of the candidates and, of the ``whole``, all else."""
    fused = whole and ranking.by == "ensemble"
    watched = whole and any(candidate.expected_watch_s is not None for candidate in ranking.candidates)
    by = "score" if fused else ranking.by
    table.add_column("#", justify="right")
    table.add_column("item", overflow="fold")
    for name in [*(["score"] if fused else []), *names, *(["watch"] if watched else [])]:
        header = Text(name.replace("_", "_\n"), style="underline" if name == by else "")
        table.add_column(header, justify="right", no_wrap=True)
    timelines = whole and any(candidate.timeline for candidate in ranking.candidates)
    if timelines:
        table.add_column("timeline", overflow="fold")
    for place, candidate in enumerate(ranking.candidates, start=1):
        row: list[Text | str] = [f"{candidate.score:+.4f}"] if fused else []
        row += [_percent(candidate.probability[name]) for name in names]
        row += [_seconds(candidate.expected_watch_s)] if watched else []
        row += [_timeline(candidate)] if timelines else []
        table.add_row(str(place), _item(candidate), *row)
    return table


def _actions_table(result: Mapping[str, Any]) -> Table:
    reference = result["reference"]["item_rate"]
    oracle = result["reference"].get("oracle", {})
    table = new_table(f"actions and labels: {result['split']}, {result['targets']:,} targets", _summary(result))
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
            cells += [_number(best.get("auc"), 4), MISSING if closed is None else f"{closed:.0%}"]
        cells.append(_against(found, trivial, "gauc", more_is_better=True))
        cells.append(_against(found, trivial, "ne", more_is_better=False))
        table.add_row(Text(name), *cells, _number(found["calibration"], 3))
    return table


def _times_table(result: Mapping[str, Any]) -> Table:
    median = result["reference"].get("median_time", {})
    caption = "bold: better than the training median\nnext: given the steps before"
    table = new_table("times: mean absolute error", caption)
    table.add_column("", no_wrap=True)
    headers = ["count", "log1p s", "next,\nlog1p s", "median's\nlog1p s", "seconds", "median's\nseconds"]
    for header in headers:
        table.add_column(header, justify="right")
    for name, found in result["time"].items():
        trivial = median.get(name, {})
        table.add_row(
            Text(name),
            f"{found['count']:,}",
            _against(found, trivial, "mae_log", more_is_better=False),
            _against(result["next_time"][name], trivial, "mae_log", more_is_better=False),
            _number(trivial.get("mae_log"), 4),
            _against(found, trivial, "mae_s", more_is_better=False, digits=2),
            _number(trivial.get("mae_s"), 2),
        )
    return table


def _objectives_table(objectives: Mapping[str, Any]) -> Table:
    table = new_table("objectives")
    table.add_column("", no_wrap=True)
    for header in ("posi-\ntives", "AUC", "GAUC", "NE", "calib-\nration"):
        table.add_column(header, justify="right")
    for name, found in objectives.items():
        measured = (_number(found[metric], 4) for metric in ("auc", "gauc", "ne"))
        table.add_row(Text(name), f"{found['positives']:,}", *measured, _number(found["calibration"], 3))
    return table


def _shared_ground_table(ground: Mapping[str, Any]) -> Table:
    """Watch time and objectives, a row per measure; the head's only where it predicts them."""
    both = any("head" in found for found in ground.values())
    caption = "generator: as expected of its sequences and tower"
    if both:
        caption += "\nagreement: rank correlation of the two\nbold: the better of the two"
    table = new_table("watch time and objectives", caption)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ["generator", "head", "agreement"] if both else ["generator"]:
        table.add_column(header, justify="right")
    for name, found in ground.items():
        agreement = _number(found.get("agreement"), 4)
        for measure in _OF_TIME if name == WATCH_TIME else _OF_SCORE:
            cells = _side_by_side(found, *measure[1:], both)
            table.add_row(Text(name), measure[0], *cells, *([agreement] if both else []))
            name = agreement = ""  # once is enough
    return table


def _lengths_table(groups: Sequence[Mapping[str, Any]]) -> Table:
    """Glances and watch time per group of videos of similar length."""
    both = any("head" in group["watch_time"] for group in groups)
    glances = any("glance" in group for group in groups)
    table = new_table("by length of the video", "bold: the better of generator and head" if both else "")
    headers = ["length", "targets"]
    headers += ["glances", "glance\nAUC", *(["head's\nAUC"] if both else [])] if glances else []
    headers += ["watch MAE\nlog1p s", *(["head's\nlog1p s"] if both else [])]
    headers += ["watch MAE\nseconds", *(["head's\nseconds"] if both else [])]
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for group in groups:
        cells: list[Text | str] = [_length(group["from_s"], group["to_s"]), f"{group['targets']:,}"]
        if glances:
            glance = group["glance"]
            cells.append(MISSING if glance["rate"] is None else f"{glance['rate']:.1%}")
            cells += _side_by_side(glance, "auc", 4, True, both)
        for metric, digits in (("mae_log", 4), ("mae_s", 2)):
            cells += _side_by_side(group["watch_time"], metric, digits, False, both)
        table.add_row(*cells)
    return table


def _side_by_side(
    found: Mapping[str, Any], metric: str, digits: int, more_is_better: bool, both: bool
) -> list[Text | str]:
    """A metric of the generator and, if ``both`` are shown, of the head; the better stands out."""
    generator, head = found["generator"], found.get("head", {metric: None})
    cells: list[Text | str] = [_against(generator, head, metric, more_is_better, digits)]
    return [*cells, _against(head, generator, metric, more_is_better, digits)] if both else cells


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


def _about(ranking: "RankedList") -> str:
    whole = {"watch": "expected watch time", "ensemble": "ensemble score"}
    by = whole.get(ranking.by, f"probability of {ranking.by}") + (", least first" if ranking.ascending else "")
    history = f"{ranking.history_length:,} past impressions"
    if not ranking.user_known:
        history = "user not in the dataset: no history"
    unknown = f"\n? not in the dataset: {ranking.unknown_items:,} candidates" if ranking.unknown_items else ""
    return f"by {by} · {history}{unknown}"


def _item(candidate: "ScoredCandidate") -> Text:
    return Text(candidate.item) if candidate.known else Text.assemble(candidate.item, (" ?", "bold yellow"))


def _timeline(candidate: "ScoredCandidate") -> Text:
    steps = [name if time is None else f"{name}@{_offset(time)}" for name, time in candidate.timeline]
    return Text.assemble(" → ".join(steps), (f" ({candidate.timeline_probability:.0%})", "dim"))


def _offset(seconds: float) -> str:
    return "0" if seconds == 0 else _seconds(seconds)


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"


def _percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.1 else f"{probability:.2%}"


def _length(from_s: float | None, to_s: float | None) -> str:
    """A range of lengths, whose ends are at least the first and less than the second."""
    if from_s is None:
        return "all" if to_s is None else f"< {_short(to_s)} s"
    return f"≥ {_short(from_s)} s" if to_s is None else f"{_short(from_s)}–{_short(to_s)} s"


def _short(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:,.0f}"


def _number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}"


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
    return Text(_number(value, digits), style=HIGHLIGHT if better else "")


def new_table(title: str, caption: str = "") -> Table:
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
