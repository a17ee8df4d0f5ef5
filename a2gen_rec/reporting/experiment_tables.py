"""The numbers of an experiment's report as tables, for a page, for Markdown and for the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as TerminalTable
from rich.text import Text

from a2gen_rec.reporting.comparison import Comparison, Difference, Measured, ModelResult, Spread
from a2gen_rec.reporting.tables import BETTER, UNKNOWN, titled_table

MARK = "*"
"""Of a difference whose interval leaves out 0."""
Better = Callable[[float], float]
"""What is least for the best value."""


def more(value: float) -> float:
    return -value


def less(value: float) -> float:
    return value


def nearest_1(value: float) -> float:
    return abs(math.log(value)) if value > 0 else math.inf


@dataclass(frozen=True)
class Cell:
    """What stands in a table; ``best`` of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A line; ``aside`` if it is no model's: a reference, or counts."""

    name: str
    cells: list[Cell]
    aside: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns, and a note below; ``words``: columns of words, the others hold numbers."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""
    words: tuple[str, ...] = field(default=())


def dataset_tables(comparison: Comparison) -> list[Table]:
    """What to look at first: all at a glance, AUC and times action by action, and the ablations."""
    tables = [overview(comparison), outcomes(comparison, "auc", "AUC", more)]
    if comparison.timed:
        tables.append(times(comparison, "mae_log", "Time MAE, log1p s", 4))
    if any(model.of for model in comparison.models):
        tables.append(ablations(comparison))
    return tables


def further_tables(comparison: Comparison) -> list[Table]:
    """The other metrics, and what models cost."""
    entropy = "Log loss over that of the constant prediction at the split's own rate: below 1 is better than that."
    tables = [
        outcomes(comparison, "gauc", "GAUC", more, "Mean of users' AUCs, weighted by their impressions."),
        outcomes(comparison, "ne", "Normalised entropy", less, entropy),
        outcomes(
            comparison, "calibration", "Calibration", nearest_1, "Predicted over observed positives: best at 1.", 3
        ),
    ]
    if comparison.timed:
        tables.append(times(comparison, "mae_s", "Time MAE, seconds", 2))
    return [*tables, costs(comparison)]


def overview(comparison: Comparison) -> Table:
    """Means over actions, with intervals and differences to the reference."""
    shown: Sequence[Measured] = comparison.whole
    rows = [*shown, *comparison.references]
    reference = shown[0].name if shown else ""
    columns = [("mean AUC", _column(shown, rows, lambda row: row.auc, more, 4))]
    columns.append(("95 % interval", [_interval(row, "auc") for row in rows]))
    several = len(shown) > 1
    if several:
        columns.append((f"less {reference}", [_difference_cell(row, "auc") for row in rows]))
    if comparison.timed:
        columns.append(("mean time MAE, log1p s", _column(shown, rows, lambda row: row.mae_log, less, 4)))
        if several:
            columns.append((f"less {reference} ", [_difference_cell(row, "mae") for row in rows]))
        columns.append(("mean time MAE, s", _column(shown, rows, lambda row: row.mae_s, less, 2)))
    seeds = max((len(model.seeds) for model in comparison.whole), default=1)
    note = (f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed") + ". Bold: best model."
    note += " Means are over actions and labels"
    note += ", of times over actions that the log times." if comparison.timed else "."
    note += f" Intervals: 95 % over {comparison.resamples:,} resamples of the {comparison.users:,} users"
    note += f", the same ones for both models of a difference; {MARK}: it leaves out 0." if several else "."
    return _table("At a glance", columns, rows, len(shown), note)


def outcomes(comparison: Comparison, metric: str, title: str, better: Better, note: str = "", digits: int = 4) -> Table:
    """A metric of every outcome."""
    shown: Sequence[Measured] = comparison.whole
    # A constant ranks nothing, but is what entropy and calibration are against.
    rows = [*shown, *(row for row in comparison.references if row.outcomes and _has(row, metric))]
    columns = [
        (name, _column(shown, rows, lambda row, name=name: row.outcomes.get(name, {}).get(metric), better, digits))  # type: ignore[misc]
        for name in comparison.scored
    ]
    table = _table(title, columns, rows, len(shown), note)
    counts = [Cell(f"{comparison.positives[name]:,}") for name in comparison.scored]
    return Table(table.title, table.columns, [*table.rows, Row("positives", counts, True)], table.note)


def times(comparison: Comparison, metric: str, title: str, digits: int) -> Table:
    """Mean absolute error of every timed action."""
    shown: Sequence[Measured] = comparison.whole
    rows = [*shown, *(row for row in comparison.references if any(_all(row.times, metric)))]
    columns = [
        (name, _column(shown, rows, lambda row, name=name: row.times.get(name, {}).get(metric), less, digits))  # type: ignore[misc]
        for name in comparison.timed
    ]
    table = _table(title, columns, rows, len(shown), "Of impressions in which the action happened at a known time.")
    counts = [Cell(f"{count:,}") for count in comparison.timed.values()]
    return Table(table.title, table.columns, [*table.rows, Row("known times", counts, True)], table.note)


def ablations(comparison: Comparison) -> Table:
    """What each ablation changes and costs."""
    rows = [model for model in comparison.models if model.of]
    whole = {name for model in rows if (name := model.of)}
    shown = [model for model in comparison.models if model.name in whole or model.of]
    columns = [("change", [Cell(_change(comparison, model)) for model in shown])]
    columns.append(("mean AUC", [_spread_cell(model.auc, 4) for model in shown]))
    columns.append(("difference", [_difference_cell(model, "auc") if model.of else Cell("") for model in shown]))
    if comparison.timed:
        columns.append(("mean time MAE, log1p s", [_spread_cell(model.mae_log, 4) for model in shown]))
        columns.append(("difference ", [_difference_cell(model, "mae") if model.of else Cell("") for model in shown]))
    note = f"Each with the tuned settings of its model, and its difference to it. {MARK}: the interval leaves out 0."
    return _table("Ablations", columns, shown, len(shown), note, ("change",))


def costs(comparison: Comparison) -> Table:
    """Parameters and training speed, of models and ablations."""
    rows = comparison.models
    speeds = [UNKNOWN if row.targets_per_s is None else f"{row.targets_per_s:,.0f}" for row in rows]
    columns = [
        ("parameters in tables", [Cell(f"{row.parameters['tables']:,}") for row in rows]),
        ("dense parameters", [Cell(f"{row.parameters['dense']:,}") for row in rows]),
        ("training targets/s", [Cell(speed) for speed in speeds]),
        ("training, s", [Cell(f"{row.seconds:,.0f}") for row in rows]),
    ]
    return _table("Cost", columns, rows, len(rows), "Medians over seeds. Of runs side by side, speeds are lower.")


def chosen_table(chosen: dict[str, dict[str, dict[str, object]]]) -> Table | None:
    """What tuning chose, by dataset and model; None where nothing was tuned."""
    rows = [
        Row(f"{dataset} · {model}", [Cell(", ".join(f"{name} {value}" for name, value in settings.items()))])
        for dataset, models in chosen.items()
        for model, settings in models.items()
        if settings
    ]
    return Table("Chosen settings", ["settings"], rows, words=("settings",)) if rows else None


def summary_table(comparison: Comparison) -> TerminalTable:
    """The short form for the terminal."""
    table = titled_table(
        f"{comparison.dataset}: test, {comparison.targets:,} targets",
        f"95 % intervals over users; {MARK}: it leaves out 0" if len(comparison.models) > 1 else "",
    )
    whole = overview(comparison)
    table.add_column("", overflow="fold")
    kept = [place for place, name in enumerate(whole.columns) if name != "95 % interval"]
    for place in kept:
        table.add_column(Text(whole.columns[place].strip().replace(", ", ",\n")), justify="right")
    for row in whole.rows:
        # Of a difference, the value and its mark: the page has the interval.
        cells = [(row.cells[place].text, row.cells[place].best) for place in kept]
        short = [(text.split(" [")[0] + (MARK if text.endswith(MARK) else ""), best) for text, best in cells]
        table.add_row(Text(row.name), *(Text(text, style=BETTER if best else "") for text, best in short))
    return table


def _table(
    title: str,
    columns: Sequence[tuple[str, Sequence[Cell]]],
    rows: Sequence[Measured],
    models: int,
    note: str,
    words: tuple[str, ...] = (),
) -> Table:
    """Of columns; rows after the first ``models`` are references."""
    lines = [
        Row(row.name, [cells[place] for _, cells in columns], aside=place >= models) for place, row in enumerate(rows)
    ]
    return Table(title, [name for name, _ in columns], lines, note, words)


def _column(
    models: Sequence[Measured],
    rows: Sequence[Measured],
    value: Callable[[Measured], Spread | None],
    better: Better,
    digits: int,
) -> list[Cell]:
    """A metric of all rows; the best of the models stands out, all that look alike, if there is more than one."""
    cells = [_spread_cell(value(row), digits) for row in rows]
    shown = {
        text: better(float(text)) for row in models if (found := value(row)) for text in [f"{found.mean:.{digits}f}"]
    }
    least = min(shown.values(), default=math.nan)
    if len(models) < 2:
        return cells
    return [
        Cell(cell.text, place < len(models) and shown.get(cell.text.split(" ")[0], math.inf) == least)
        for place, cell in enumerate(cells)
    ]


def _spread_cell(value: Spread | None, digits: int) -> Cell:
    if value is None:
        return Cell(UNKNOWN)
    deviation = "" if value.std is None else f" ± {value.std:.{digits}f}"
    return Cell(f"{value.mean:.{digits}f}{deviation}")


def _interval(row: Measured, metric: str) -> Cell:
    found = getattr(row, f"{metric}_interval", None)
    return Cell("" if found is None else f"{found[0]:.4f} to {found[1]:.4f}")


def _difference_cell(row: Measured, metric: str) -> Cell:
    found: Difference | None = getattr(row, f"{metric}_difference", None)
    if found is None:
        return Cell("")
    around = f"[{_signed(found.low)}, {_signed(found.high)}]"
    return Cell(f"{_signed(found.value)} {around} p {found.p:.3f}{MARK if found.significant else ''}")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _change(comparison: Comparison, model: ModelResult) -> str:
    """What an ablation's settings differ in from its model's."""
    whole = comparison.of_name(model.of)
    of = whole.overrides if whole is not None else {}
    return ", ".join(f"{name} {value}" for name, value in model.overrides.items() if model.of and of.get(name) != value)


def _has(row: Measured, metric: str) -> bool:
    known = [value.mean for value in _all(row.outcomes, metric)]
    return bool(known) and not (metric in ("auc", "gauc") and all(value == 0.5 for value in known))


def _all(rows: dict[str, dict[str, Spread | None]], metric: str) -> list[Spread]:
    return [value for found in rows.values() if (value := found.get(metric)) is not None]
