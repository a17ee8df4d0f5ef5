"""Evaluation results as terminal tables, at most 100 columns wide where names allow it."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from a2gen_rec.data.schema import WATCH_TIME
from a2gen_rec.reporting.console.tables import HIGHLIGHT, new_metrics_table, new_table
from a2gen_rec.reporting.formatting import MISSING, format_decimals, format_range, format_weight_entropy

MAX_OUTCOME_ROWS = 15
MAX_TIME_ROWS = 8
"""Row limits of the summary: with titles, headers and captions it has at most 40 lines."""

# Metrics as (title, key, digits, higher is better).
_SCORE_METRICS = [("AUC", "auc", 4, True)]
_TIME_METRICS = [
    ("rank correlation", "rank_correlation", 4, True),
    ("MAE, log1p s", "mae_log", 4, False),
    ("MAE, seconds", "mae_s", 2, False),
]


def evaluation_summary_tables(result: Mapping[str, Any]) -> list[Table | Text]:
    """Return the summary of an evaluation: at most 40 lines of 100 columns.

    One table has actions, labels and objectives, one has times next to their baselines, and one line has the NDCG of
    the ensemble. Outcomes with few positives are left out first. Values better than their baseline are highlighted,
    as in :func:`evaluation_tables`.

    Args:
        result: Result of ``runs.evaluate.evaluate_run``; ``lists`` may be missing or empty.
    """
    parts: list[Table | Text] = [_outcomes_summary(result)]
    if result["time"]:
        parts.append(_times_summary(result))
    if lists := result.get("lists"):
        parts.append(_ensemble_summary(lists))
    return parts


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return all tables of an evaluation (keys: ``evaluation.evaluate.evaluate``).

    Actions and labels are always present. The oracle, objectives, times, generator against head, and groups of videos
    by duration are present if the result has them.

    Values better than a trivial baseline are highlighted. The baseline of actions and labels is the item's smoothed
    rate in training data, that of times the median of the training data. The better of generator and head is
    highlighted too.
    """
    tables = [_actions_table(result)]
    if result["reference"].get("oracle"):
        tables.append(_oracle_table(result))
    if result["objectives"]:
        tables.append(_objectives_table(result["objectives"]))
    if result["time"]:
        tables.append(_times_table(result))
    if result["generator_vs_head"]:
        tables.append(_generator_vs_head_table(result["generator_vs_head"]))
    if result["by_duration"]:
        tables += _durations_tables(result["by_duration"])
    if len(result["subsets"]) > 1:
        tables.append(_subsets_table(result["subsets"]))
    return tables


def export_table(metrics: Mapping[str, Any]) -> Table:
    """Return the AUC of a run and of its exported model (keys: ``runs.export.compare_auc``)."""
    loss = metrics["loss"]
    caption = f"loss {loss['original']:.5f}, exported {loss['exported']:.5f}"
    if any(auc["within_tolerance"] is None for auc in metrics["auc"].values()):
        caption += f"\n*: fewer than {metrics['min_positives']} positives or negatives; exempt from the tolerance"
    title = f"exported model: {metrics['split']}, {metrics['targets']:,} targets"
    table = new_metrics_table(title, caption, "positives", "AUC", "exported\nAUC", "change")
    for name, auc in metrics["auc"].items():
        original, exported = auc["original"], auc["exported"]
        change = MISSING if original is None or exported is None else f"{exported - original:+.5f}"
        mark = " *" if auc["within_tolerance"] is None else ""
        cells = [format_decimals(original, 4), format_decimals(exported, 4), change]
        table.add_row(Text(name + mark), f"{auc['positives']:,}", *cells)
    return table


def gap_closed(model: float | None, baseline: float | None, oracle: float | None) -> float | None:
    """Return the share of the gap between baseline and oracle that the model closes; None if there is no gap."""
    if model is None or baseline is None or oracle is None or oracle <= baseline:
        return None
    return (model - baseline) / (oracle - baseline)


def _subsets_table(subsets: Mapping[str, Any]) -> Table:
    """Return mean metrics on new and known users and items."""
    title = "targets of new and known users and items"
    caption = "new: without a table row"
    table = new_metrics_table(title, caption, "targets", "mean AUC", "mean MAE,\nlog1p s")
    for name, metrics in subsets.items():
        means = (_mean_known(metrics["actions"], "auc"), _mean_known(metrics["time"], "mae_log"))
        table.add_row(Text(name), f"{metrics['targets']:,}", *(format_decimals(mean, 4) for mean in means))
    return table


def _mean_known(rows: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    known = [row[metric] for row in rows.values() if row[metric] is not None]
    return sum(known) / len(known) if known else None


def _outcomes_summary(result: Mapping[str, Any]) -> Table:
    baseline = result["reference"]["item_rate"]
    outcomes = {**result["actions"], **result["objectives"]}
    rows = _most_frequent(outcomes, "positives", MAX_OUTCOME_ROWS)
    caption = "bold: better than the item's rate in training data"
    if len(rows) < len(outcomes):
        caption += f"\n{len(rows)} of {len(outcomes)} outcomes, those with most positives"
    title = f"{result['split']}: {result['targets']:,} targets, loss {result['loss']['total']:.4f}"
    table = new_metrics_table(title, caption, "positives", "AUC", "GAUC", "normalized\nentropy", "calibration")
    last_action = [name for name in rows if name in result["actions"]][-1:]
    for name in rows:
        metrics, reference = outcomes[name], baseline.get(name, {})
        table.add_row(
            Text(name),
            f"{metrics['positives']:,}",
            _compared(metrics, reference, "auc", higher_is_better=True),
            _compared(metrics, reference, "gauc", higher_is_better=True),
            _compared(metrics, reference, "ne", higher_is_better=False),
            format_decimals(metrics["calibration"], 3),
        )
        if [name] == last_action and name != rows[-1]:
            table.add_section()
    return table


def _times_summary(result: Mapping[str, Any]) -> Table:
    median, times = result["reference"].get("median_time", {}), result["time"]
    rows = _most_frequent(times, "count", MAX_TIME_ROWS)
    caption = "bold: better than the median of the training data"
    if len(rows) < len(times):
        caption += f"\n{len(rows)} of {len(times)} actions, the most frequent"
    headers = ("count", "MAE,\nlog1p s", "median's\nMAE", "MAE,\nseconds", "median's\nMAE")
    table = new_metrics_table("times: mean absolute error (MAE)", caption, *headers)
    for name in rows:
        metrics, reference = times[name], median.get(name, {})
        table.add_row(
            Text(name),
            f"{metrics['count']:,}",
            _compared(metrics, reference, "mae_log", higher_is_better=False),
            format_decimals(reference.get("mae_log"), 4),
            _compared(metrics, reference, "mae_s", higher_is_better=False, digits=2),
            format_decimals(reference.get("mae_s"), 2),
        )
    return table


def _ensemble_summary(lists: Mapping[str, Any]) -> Text:
    """Return the mean NDCG of the first method, the ensemble, and of the best other one, and its weights' entropy."""
    (ensemble, metrics), *others = lists["methods"].items()
    ndcg = metrics["mean"]["ndcg"]
    line = Text(f"\nensemble: NDCG@{lists['k']} ")
    known = [(name, other["mean"]["ndcg"]) for name, other in others if other["mean"]["ndcg"] is not None]
    best = max(known, key=lambda pair: pair[1], default=None)
    is_better = ndcg is not None and best is not None and ndcg > best[1]
    line.append(f"{format_decimals(ndcg, 4)} ({ensemble})", style=HIGHLIGHT if is_better else "")
    if best is not None:
        line.append(f" · best alternative: {best[1]:.4f} ({best[0]})")
    line.append(f" · {lists['lists']:,} lists", style="dim")
    entropy = f"mean entropy of weights: {format_weight_entropy(lists['weight_entropy'])}"
    line.append(f"\n{entropy}", style="dim")
    return line


def _most_frequent(metrics: Mapping[str, Mapping[str, Any]], count: str, max_rows: int) -> list[str]:
    """Return the names with the largest counts, in their original order."""
    kept = sorted(metrics, key=lambda name: -metrics[name][count])[:max_rows]
    return [name for name in metrics if name in kept]


def _actions_table(result: Mapping[str, Any]) -> Table:
    item_rate = result["reference"]["item_rate"]
    title = f"actions and labels: {result['split']}, {result['targets']:,} targets"
    headers = ("positives", "AUC", "item-rate\nAUC", "GAUC", "NE", "calibration")
    table = new_metrics_table(title, _caption(result), *headers)
    for name, metrics in result["actions"].items():
        baseline = item_rate.get(name, {})
        table.add_row(
            Text(name),
            f"{metrics['positives']:,}",
            _compared(metrics, baseline, "auc", higher_is_better=True),
            format_decimals(baseline.get("auc"), 4),
            _compared(metrics, baseline, "gauc", higher_is_better=True),
            _compared(metrics, baseline, "ne", higher_is_better=False),
            format_decimals(metrics["calibration"], 3),
        )
    return table


def _oracle_table(result: Mapping[str, Any]) -> Table:
    """Return the AUC next to that of the true probabilities of a simulated log."""
    item_rate, oracle = result["reference"]["item_rate"], result["reference"]["oracle"]
    caption = "gap closed: share of the distance from the item's rate to the oracle"
    table = new_metrics_table("oracle: true probabilities", caption, "item-rate AUC", "AUC", "oracle AUC", "gap closed")
    for name, metrics in result["actions"].items():
        aucs = [item_rate.get(name, {}).get("auc"), metrics["auc"], oracle.get(name, {}).get("auc")]
        closed = gap_closed(aucs[1], aucs[0], aucs[2])
        cells = [*(format_decimals(auc, 4) for auc in aucs), MISSING if closed is None else f"{closed:.0%}"]
        table.add_row(Text(name), *cells)
    return table


def _caption(result: Mapping[str, Any]) -> str:
    unexplored = result["unexplored_mass"]
    return (
        f"loss {result['loss']['total']:.4f} · order violations {result['order_violations']:.2%}\n"
        f"unexplored mass: mean {unexplored['mean']:.1e}, max {unexplored['max']:.1e}\n"
        "bold: better than the item's rate in training data"
    )


def _objectives_table(objectives: Mapping[str, Any]) -> Table:
    table = new_metrics_table("objectives", "", "positives", "AUC", "GAUC", "NE", "calibration")
    for name, metrics in objectives.items():
        cells = (format_decimals(metrics[metric], 4) for metric in ("auc", "gauc", "ne"))
        table.add_row(Text(name), f"{metrics['positives']:,}", *cells, format_decimals(metrics["calibration"], 3))
    return table


def _times_table(result: Mapping[str, Any]) -> Table:
    median = result["reference"].get("median_time", {})
    caption = "bold: better than the training median\nnext: given the preceding actions"
    headers = ("count", "log1p s", "next,\nlog1p s", "median's\nlog1p s", "seconds", "median's\nseconds")
    table = new_metrics_table("times: mean absolute error", caption, *headers)
    for name, metrics in result["time"].items():
        baseline = median.get(name, {})
        table.add_row(
            Text(name),
            f"{metrics['count']:,}",
            _compared(metrics, baseline, "mae_log", higher_is_better=False),
            _compared(result["time_given_prefix"][name], baseline, "mae_log", higher_is_better=False),
            format_decimals(baseline.get("mae_log"), 4),
            _compared(metrics, baseline, "mae_s", higher_is_better=False, digits=2),
            format_decimals(baseline.get("mae_s"), 2),
        )
    return table


def _generator_vs_head_table(comparisons: Mapping[str, Any]) -> Table:
    """Return watch time and objectives, one row per metric; the head's column only if the model has the head."""
    has_head = any("head" in metrics for metrics in comparisons.values())
    caption = "generator: expectation over its sequences and occurrence predictions"
    if has_head:
        caption += "\nagreement: rank correlation of both predictions\nbold: the better of the two"
    table = new_table("watch time and objectives", caption)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ["generator", "head", "agreement"] if has_head else ["generator"]:
        table.add_column(header, justify="right")
    for name, metrics in comparisons.items():
        agreement = format_decimals(metrics.get("agreement"), 4)
        for metric in _TIME_METRICS if name == WATCH_TIME else _SCORE_METRICS:
            cells = _side_by_side(metrics, *metric[1:], has_head)
            table.add_row(Text(name), metric[0], *cells, *([agreement] if has_head else []))
            name = agreement = ""  # only in the first row
    return table


def _durations_tables(groups: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return glances, if known, and watch time per group of videos of similar duration."""
    has_head = any("head" in group["watch_time"] for group in groups)
    caption = "bold: the better of generator and head" if has_head else ""
    named_groups = [(format_range(group["from_s"], group["to_s"], " s"), group) for group in groups]
    tables = []
    if any("glance" in group for group in groups):
        headers = ["targets", "glances", "AUC", *(["head's AUC"] if has_head else [])]
        tables.append(new_metrics_table("glances by video duration", caption, *headers))
        for name, group in named_groups:
            glance = group["glance"]
            rate = MISSING if glance["rate"] is None else f"{glance['rate']:.1%}"
            cells = _side_by_side(glance, "auc", 4, True, has_head)
            tables[-1].add_row(name, f"{group['targets']:,}", rate, *cells)
    headers = ["targets", "MAE,\nlog1p s", *(["head's MAE,\nlog1p s"] if has_head else [])]
    headers += ["MAE,\nseconds", *(["head's MAE,\nseconds"] if has_head else [])]
    tables.append(new_metrics_table("watch time by video duration", caption, *headers))
    for name, group in named_groups:
        watch_time = group["watch_time"]
        cells = _side_by_side(watch_time, "mae_log", 4, False, has_head)
        cells += _side_by_side(watch_time, "mae_s", 2, False, has_head)
        tables[-1].add_row(name, f"{group['targets']:,}", *cells)
    return tables


def _side_by_side(
    metrics: Mapping[str, Any], metric: str, digits: int, higher_is_better: bool, has_head: bool
) -> list[Text | str]:
    """Return a metric of the generator and, if ``has_head``, of the head; the better one is highlighted."""
    generator, head = metrics["generator"], metrics.get("head", {metric: None})
    cells: list[Text | str] = [_compared(generator, head, metric, higher_is_better, digits)]
    return [*cells, _compared(head, generator, metric, higher_is_better, digits)] if has_head else cells


def _compared(
    metrics: Mapping[str, float | None],
    reference: Mapping[str, float | None],
    metric: str,
    higher_is_better: bool,
    digits: int = 4,
) -> Text:
    """Return a metric, highlighted if it is better than the reference's."""
    value, other = metrics[metric], reference.get(metric)
    is_better = value is not None and other is not None and (value > other if higher_is_better else value < other)
    return Text(format_decimals(value, digits), style=HIGHLIGHT if is_better else "")
