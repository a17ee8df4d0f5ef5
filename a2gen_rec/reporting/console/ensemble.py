"""What an ensemble achieves, and why it orders as it does, as tables for the terminal, at most 100 columns wide."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from a2gen_rec.reporting.console.evaluation import HIGHLIGHT, MISSING, new_table

if TYPE_CHECKING:  # a table needs no torch
    from a2gen_rec.ranking.contributions import Contribution

_WIDTH = 100
_LABEL = 14  # width of the first column; longer identifiers are folded


class HasExplanation(Protocol):
    """A candidate as ranked: raw identifier, score, and each objective's part in it, the same objectives for all."""

    @property
    def item(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def explanation(self) -> Sequence["Contribution"]: ...


def list_metrics_tables(result: Mapping[str, Any]) -> list[Table]:
    """Tables of NDCG, HR and user AUC, a row per method, the best of each column standing out.

    Args:
        result: ``k``, number of ``lists`` and their ``mean_length``, names ``behaviours``, and ``methods``: name ->
            ``behaviours`` (name -> ``ndcg``, ``hr``, ``uauc``, ``lists``, ``positives``), ``mean`` (``ndcg``, ``hr``,
            ``uauc``) and ``hypervolume``. Metrics may be None: not measured.
    """
    k, length = result["k"], result["mean_length"]
    about = MISSING if length is None else f"{length:.1f}"
    ndcg = f"{result['lists']:,} lists of {about} candidates on average · bold: best\n"
    ndcg += "lists: those with a positive and a negative; hypervolume: of all behaviours' NDCG"
    of = f"session lists, {result['split']}" if "split" in result else "session lists"
    hr = f"lists with a positive among the first {k}: all lists of {k} or fewer, whatever the order"
    uauc = "mean over users of the AUC of all their candidates"
    return [
        _metric_table(f"{of}: NDCG@{k}", ndcg, "ndcg", result),
        _metric_table(f"{of}: HR@{k}", hr, "hr", result),
        _metric_table(f"{of}: user AUC", uauc, "uauc", result),
    ]


def explanation_tables(candidates: Sequence[HasExplanation]) -> list[Table]:
    """Why each candidate is above the next: its objectives' shares of the score, one below the other and added up.

    Objectives that do not fit beside each other go on in a further table.

    Args:
        candidates: best first.
    """
    if not candidates:
        return []
    digits = _digits([one.score - other.score for one, other in pairwise(candidates)])
    blocks = [_block(place, candidates, digits) for place in range(len(candidates))]
    first = candidates[0].explanation
    headers = [
        Text(each.objective.replace("_", "_\n") + ("↓" if each.higher_is_better == "less" else "")) for each in first
    ]
    rows = [row for block in blocks for row in block]
    widths = [1 + max(_width(cell) for cell in column) for column in zip(*rows, ["", "score", *headers], strict=True)]
    room = _WIDTH - min(widths[0], _LABEL + 1) - widths[1]
    tables: list[Table] = []
    for columns in _fitting(widths[2:], room):
        caption = "score: sum of shares · bold: what puts it ahead most"
        caption += " · ↓ less is better" if any(first[k].higher_is_better == "less" for k in columns) else ""
        table = _dense_table("why this order, continued" if tables else "why this order", caption)
        table.add_column("", overflow="fold", max_width=_LABEL)
        for header in [Text("score"), *(headers[k] for k in columns)]:
            table.add_column(header, justify="right", no_wrap=True)
        for block in blocks:
            for label, score, *cells in block:
                table.add_row(label, score, *(cells[k] for k in columns))
            table.add_section()
        tables.append(table)
    return tables


def _metric_table(title: str, caption: str, metric: str, result: Mapping[str, Any]) -> Table:
    methods, behaviours = result["methods"], result["behaviours"]
    table = _dense_table(title, caption)
    table.add_column("", overflow="fold")
    found = list(methods.values())
    columns = [("mean", [each["mean"][metric] for each in found])]
    columns += [(name, [each["behaviours"][name][metric] for each in found]) for name in behaviours]
    if metric == "ndcg":
        columns.append(("hyper-\nvolume", [each["hypervolume"] for each in found]))
    for name, _ in columns:
        table.add_column(Text(name.replace("_", "_\n")), justify="right", no_wrap=True)
    cells = [_best(values) for _, values in columns]
    for name, row in zip(methods, zip(*cells, strict=True), strict=True):
        table.add_row(Text(name), *row)
    if metric == "ndcg" and methods:
        table.add_section()
        for count in ("lists", "positives"):  # of the labels alone: the same for all methods
            counts = [found[0]["behaviours"][name][count] for name in behaviours]
            table.add_row(count, "", *(f"{each:,}" for each in counts), style="dim")
    return table


def _best(values: Sequence[float | None]) -> list[Text]:
    """A column's cells; what is shown as the best stands out, unless there is nothing to compare it with."""
    shown = [MISSING if value is None else _format_4(value) for value in values]
    measured = [float(text) for text in shown if text != MISSING]
    best = max(measured) if len(measured) > 1 else None
    return [Text(text, style=HIGHLIGHT if text != MISSING and float(text) == best else "") for text in shown]


def _format_4(value: float) -> str:
    """Four decimals, or two digits of what is too small for them, such as the hypervolume of many behaviours."""
    return f"{value:.4f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def _block(place: int, candidates: Sequence[HasExplanation], digits: int) -> list[list[Text]]:
    """A candidate's rows: label, score, and a cell per objective."""
    candidate = candidates[place]
    parts = candidate.explanation

    def row(label: str, score: str, cells: Sequence[str], style: str = "") -> list[Text]:
        return [Text(text, style=style) for text in (label, score, *cells)]

    rows = [
        row(f"{place + 1} {candidate.item}", "", [_predicted(each) for each in parts]),
        row("  transform", "", [_signed(each.transform, digits) for each in parts], "dim"),
        row("  × weight", "", [f"{each.weight:.{digits}f}" for each in parts], "dim"),
        row("  = share", _signed(candidate.score, digits), [_signed(each.contribution, digits) for each in parts]),
    ]
    rows[0][0].stylize("bold")
    rows[3][1].stylize("bold")
    if place + 1 < len(candidates):
        below = candidates[place + 1]
        ahead = [one.contribution - other.contribution for one, other in zip(parts, below.explanation, strict=True)]
        gap = _signed(candidate.score - below.score, digits)
        rows.append(row(f"  ahead of {place + 2}", gap, [_signed(each, digits) for each in ahead]))
        if max(ahead) > 0:
            rows[-1][2 + ahead.index(max(ahead))].stylize(HIGHLIGHT)
    return rows


def _dense_table(title: str, caption: str) -> Table:
    """One blank between columns, so that nine objectives fit."""
    table = new_table(title, caption)
    table.padding = 0
    return table


def _digits(gaps: Sequence[float]) -> int:
    """Decimals, 3 or 4: candidates are often close to each other."""
    apart = sorted(abs(gap) for gap in gaps)
    return 4 if apart and apart[len(apart) // 2] < 0.02 else 3


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Places of columns in order, in groups no wider than ``room`` where single columns allow it."""
    groups: list[list[int]] = []
    left = 0
    for place, width in enumerate(widths):
        if not groups or width > left:
            groups.append([])
            left = room
        groups[-1].append(place)
        left -= width
    return groups


def _width(cell: Text | str) -> int:
    return max((cell_len(line) for line in str(cell).split("\n")), default=0)


def _signed(number: float, digits: int) -> str:
    """Zero has no sign, also where rounding made it."""
    text = f"{number:+.{digits}f}"
    return text if float(text) else f"{0:.{digits}f}"


def _predicted(part: "Contribution") -> str:
    if part.unit == "s":
        return f"{part.prediction:.1f}s" if part.prediction < 99.95 else f"{part.prediction:.0f}s"
    percent = 100 * part.prediction
    return f"{percent:.1f}%" if percent >= 9.995 else f"{percent:.2g}%"
