"""List metrics and score explanations of an ensemble as terminal tables, at most 100 columns wide."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from a2gen_rec.ranking.contributions import weight_entropy
from a2gen_rec.reporting.console.tables import HIGHLIGHT, new_table
from a2gen_rec.reporting.formatting import (
    MISSING,
    format_metric,
    format_percent,
    format_seconds,
    format_signed,
    format_weight_entropy,
)

if TYPE_CHECKING:  # tables do not need torch
    from a2gen_rec.ranking.contributions import Contribution

_WIDTH = 100
_LABEL_WIDTH = 14  # of the first column; longer identifiers are folded


class HasExplanation(Protocol):
    """A ranked candidate: raw identifier, and the contribution of each objective in the same order for all."""

    @property
    def item(self) -> str: ...
    @property
    def explanation(self) -> Sequence["Contribution"]: ...


def list_metrics_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return tables of NDCG, HR and user AUC with one row per method; the best of each column is highlighted.

    Args:
        result: ``k``, number of ``lists`` and their ``mean_length``, names ``behaviors``, the ensemble's
            ``weight_entropy``, and ``methods``: name -> ``behaviors`` (name -> ``ndcg``, ``hr``, ``uauc``, ``lists``,
            ``positives``), ``mean`` (``ndcg``, ``hr``, ``uauc``) and ``hypervolume``. A metric that is undefined is
            None.
    """
    k, mean_length = result["k"], result["mean_length"]
    candidates = MISSING if mean_length is None else f"{mean_length:.1f}"
    ndcg = f"{result['lists']:,} lists of {candidates} candidates on average · bold: best\n"
    ndcg += "lists: those with a positive and a negative; hypervolume: over the NDCG of all behaviors\n"
    ndcg += f"entropy of the ensemble's weights: {format_weight_entropy(result['weight_entropy'])}"
    title = f"session lists, {result['split']}" if "split" in result else "session lists"
    hr = f"share of lists with a positive among the first {k}; lists of {k} or fewer always count"
    uauc = "mean over users of the AUC of all their candidates"
    return [
        _metric_table(f"{title}: NDCG@{k}", ndcg, "ndcg", result),
        _metric_table(f"{title}: HR@{k}", hr, "hr", result),
        _metric_table(f"{title}: user AUC", uauc, "uauc", result),
    ]


def explanation_tables(candidates: Sequence[HasExplanation]) -> list[Table]:
    """Return the score of each candidate as a sum of contributions, and its lead over the next candidate.

    Objectives that do not fit into the width continue in another table.

    Args:
        candidates: Ranked list, best first.
    """
    if not candidates:
        return []
    digits = _num_decimals([one - other for one, other in pairwise(map(_score, candidates))])
    blocks = [_block(rank, candidates, digits) for rank in range(len(candidates))]
    objectives = candidates[0].explanation
    headers = [Text(part.objective.replace("_", "_\n") + ("" if part.higher_is_better else "↓")) for part in objectives]
    rows = [row for block in blocks for row in block]
    widths = [1 + max(_width(cell) for cell in column) for column in zip(*rows, ["", "score", *headers], strict=True)]
    available = _WIDTH - min(widths[0], _LABEL_WIDTH + 1) - widths[1]
    entropies = [weight_entropy(candidate.explanation) for candidate in candidates]
    entropy = f"mean entropy of weights: {format_weight_entropy(sum(entropies) / len(entropies))}"
    tables: list[Table] = []
    for columns in _column_groups(widths[2:], available):
        caption = f"score: sum of products · bold: largest lead\n{entropy}"
        caption += "\n↓ lower is better" if any(not objectives[k].higher_is_better for k in columns) else ""
        table = _dense_table("score contributions, continued" if tables else "score contributions", caption)
        table.add_column("", overflow="fold", max_width=_LABEL_WIDTH)
        for header in [Text("score"), *(headers[k] for k in columns)]:
            table.add_column(header, justify="right", no_wrap=True)
        for block in blocks:
            for label, score, *cells in block:
                table.add_row(label, score, *(cells[k] for k in columns))
            table.add_section()
        tables.append(table)
    return tables


def _metric_table(title: str, caption: str, metric: str, result: Mapping[str, Any]) -> Table:
    methods, behaviors = result["methods"], result["behaviors"]
    table = _dense_table(title, caption)
    table.add_column("", overflow="fold")
    rows = list(methods.values())
    columns = [("mean", [method["mean"][metric] for method in rows])]
    columns += [(name, [method["behaviors"][name][metric] for method in rows]) for name in behaviors]
    if metric == "ndcg":
        columns.append(("hyper-\nvolume", [method["hypervolume"] for method in rows]))
    for name, _ in columns:
        table.add_column(Text(name.replace("_", "_\n")), justify="right", no_wrap=True)
    cells = [_column_cells(values) for _, values in columns]
    for name, row in zip(methods, zip(*cells, strict=True), strict=True):
        table.add_row(Text(name), *row)
    if metric == "ndcg" and methods:
        table.add_section()
        for count in ("lists", "positives"):  # they depend on the labels only and are the same for all methods
            counts = [rows[0]["behaviors"][name][count] for name in behaviors]
            table.add_row(count, "", *(f"{number:,}" for number in counts), style="dim")
    return table


def _column_cells(values: Sequence[float | None]) -> list[Text]:
    """Return the cells of a column; the best displayed value is highlighted if there are at least two values."""
    texts = [MISSING if value is None else format_metric(value) for value in values]
    known = [float(text) for text in texts if text != MISSING]
    best = max(known) if len(known) > 1 else None
    return [Text(text, style=HIGHLIGHT if text != MISSING and float(text) == best else "") for text in texts]


def _block(rank: int, candidates: Sequence[HasExplanation], digits: int) -> list[list[Text]]:
    """Return a candidate's rows: label, score, and one cell per objective."""
    candidate = candidates[rank]
    parts = candidate.explanation

    def row(label: str, score: str, cells: Sequence[str], style: str = "") -> list[Text]:
        return [Text(text, style=style) for text in (label, score, *cells)]

    rows = [
        row(f"{rank + 1} {candidate.item}", "", [_format_prediction(part) for part in parts]),
        row("  transform", "", [format_signed(part.transform, digits) for part in parts], "dim"),
        row("  × weight", "", [f"{part.weight:.{digits}f}" for part in parts], "dim"),
        row(
            "  = product",
            format_signed(_score(candidate), digits),
            [format_signed(part.contribution, digits) for part in parts],
        ),
    ]
    rows[0][0].stylize("bold")
    rows[3][1].stylize("bold")
    if rank + 1 < len(candidates):
        other = candidates[rank + 1]
        margins = [a.contribution - b.contribution for a, b in zip(parts, other.explanation, strict=True)]
        margin = format_signed(_score(candidate) - _score(other), digits)
        rows.append(row(f"  lead over {rank + 2}", margin, [format_signed(value, digits) for value in margins]))
        if max(margins) > 0:
            rows[-1][2 + margins.index(max(margins))].stylize(HIGHLIGHT)
    return rows


def _score(candidate: HasExplanation) -> float:
    return sum(part.contribution for part in candidate.explanation)


def _dense_table(title: str, caption: str) -> Table:
    """Return a table with one space between columns, so that nine objectives fit."""
    table = new_table(title, caption)
    table.padding = 0
    return table


def _num_decimals(gaps: Sequence[float]) -> int:
    """Return 4 decimals for small median gaps between scores, else 3."""
    sizes = sorted(abs(gap) for gap in gaps)
    return 4 if sizes and sizes[len(sizes) // 2] < 0.02 else 3


def _column_groups(widths: Sequence[int], available: int) -> list[list[int]]:
    """Split column indices, in order, into groups no wider than ``available`` unless one column alone is wider."""
    groups: list[list[int]] = []
    remaining = 0
    for index, width in enumerate(widths):
        if not groups or width > remaining:
            groups.append([])
            remaining = available
        groups[-1].append(index)
        remaining -= width
    return groups


def _width(cell: Text | str) -> int:
    return max((cell_len(line) for line in str(cell).split("\n")), default=0)


def _format_prediction(part: "Contribution") -> str:
    if part.unit == "s":
        return format_seconds(part.prediction, decimal_below=99.95)
    return format_percent(part.prediction)
