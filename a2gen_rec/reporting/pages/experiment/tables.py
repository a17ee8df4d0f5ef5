"""The numbers of an experiment's report as tables, for a page, for Markdown and for the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as TerminalTable
from rich.text import Text

from a2gen_rec.experiments.comparison import MIN_COUNT, Comparison, Difference, MeanStd, MetricsRow, ModelResult
from a2gen_rec.reporting.console.tables import HIGHLIGHT, new_table
from a2gen_rec.reporting.formatting import MISSING

BEST_MARK = "*"
"""Of a difference whose interval leaves out 0."""
BestOf = Callable[[float], float]
"""What is least for the best value."""


def highest(value: float) -> float:
    return -value


def lowest(value: float) -> float:
    return value


def closest_to_one(value: float) -> float:
    return abs(math.log(value)) if value > 0 else math.inf


@dataclass(frozen=True)
class Cell:
    """What stands in a table, and smaller below it; ``best`` of its column."""

    text: str
    subtext: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A line; ``aside`` if it is no model's: a reference, or counts."""

    name: str
    cells: list[Cell]
    is_reference: bool = False


@dataclass(frozen=True)
class ReportTable:
    """Rows under columns, and a note below; ``words``: columns of words, the others hold numbers."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""
    text_columns: tuple[str, ...] = field(default=())


def dataset_tables(comparison: Comparison) -> list[ReportTable]:
    """What to look at first: all at a glance, AUC and times action by action, and the ablations."""
    tables = [overview(comparison), outcomes(comparison, "auc", "AUC", highest)]
    if comparison.timed:
        tables.append(times(comparison, "mae_log", "Time MAE, log1p s", 4))
    if any(model.ablation_of for model in comparison.models):
        tables.append(ablations(comparison))
    return tables


def further_tables(comparison: Comparison) -> list[ReportTable]:
    """The other metrics, and what models cost."""
    entropy = "Log loss over that of the constant prediction at the split's own rate: below 1 is better than that."
    tables = [
        outcomes(comparison, "gauc", "GAUC", highest, "Mean of users' AUCs, weighted by their impressions."),
        outcomes(comparison, "ne", "Normalised entropy", lowest, entropy),
        outcomes(
            comparison, "calibration", "Calibration", closest_to_one, "Predicted over observed positives: best at 1.", 3
        ),
    ]
    if comparison.timed:
        tables.append(times(comparison, "mae_s", "Time MAE, seconds", 2))
    if any(model.times_given_prefix for model in comparison.full_models):
        tables.append(next_times(comparison))
    return [*tables, costs(comparison)]


def overview(comparison: Comparison) -> ReportTable:
    """Means over actions, with intervals and differences to the reference."""
    shown: Sequence[MetricsRow] = comparison.full_models
    rows = [*shown, *comparison.references]
    reference = shown[0].name if shown else ""
    columns = [("mean AUC", _column(shown, rows, lambda row: row.auc, highest, 4, "auc_interval"))]
    several = len(shown) > 1
    if several:
        columns.append((f"AUC difference to {reference}", [_difference_cell(row, "auc") for row in rows]))
    if comparison.timed:
        mae = _column(shown, rows, lambda row: row.mae_log, lowest, 4, "mae_interval")
        columns.append(("mean time MAE, log1p s", mae))
        if several:
            columns.append((f"MAE difference to {reference}", [_difference_cell(row, "mae") for row in rows]))
    seeds = max((len(model.seeds) for model in comparison.full_models), default=1)
    note = (f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed") + ". Bold: best model."
    note += f" {_averaged(comparison)}"
    note += f" Below: 95 % intervals over {comparison.num_resamples:,} resamples of the {comparison.users:,} users"
    note += ", the same ones for both models of a difference" if several else ""
    note += ", and of the seeds" if seeds > 1 else ""
    note += f"; {BEST_MARK}: the interval leaves out 0." if several else "."
    return _table("At a glance", columns, rows, len(shown), note)


def outcomes(
    comparison: Comparison, metric: str, title: str, better: BestOf, note: str = "", digits: int = 4
) -> ReportTable:
    """A metric of every outcome."""
    shown: Sequence[MetricsRow] = comparison.full_models
    # A constant ranks nothing, but is what entropy and calibration are against.
    rows = [*shown, *(row for row in comparison.references if row.outcomes and _has(row, metric))]
    columns = [
        (name, _column(shown, rows, lambda row, name=name: row.outcomes.get(name, {}).get(metric), better, digits))  # type: ignore[misc]
        for name in comparison.scored
    ]
    table = _table(title, columns, rows, len(shown), note)
    counts = [Cell(f"{comparison.positives[name]:,}") for name in comparison.scored]
    return ReportTable(table.title, table.columns, [*table.rows, Row("positives", counts, True)], table.note)


def times(comparison: Comparison, metric: str, title: str, digits: int) -> ReportTable:
    """Mean absolute error of every timed action."""
    shown: Sequence[MetricsRow] = comparison.full_models
    rows = [*shown, *(row for row in comparison.references if any(_all(row.times, metric)))]
    columns = [
        (name, _column(shown, rows, lambda row, name=name: row.times.get(name, {}).get(metric), lowest, digits))  # type: ignore[misc]
        for name in comparison.timed
    ]
    several = len(comparison.timed) > 1
    if several:
        columns.insert(0, ("mean", _column(shown, rows, lambda row: getattr(row, metric), lowest, digits)))
    table = _table(title, columns, rows, len(shown), "Of impressions in which the action happened at a known time.")
    counts = [Cell("")] * several + [Cell(f"{count:,}") for count in comparison.timed.values()]
    return ReportTable(table.title, table.columns, [*table.rows, Row("known times", counts, True)], table.note)


def _mae_given_prefix(row: MetricsRow, name: str) -> MeanStd | None:
    return row.times_given_prefix.get(name, {}).get("mae_log")


def next_times(comparison: Comparison) -> ReportTable:
    """The error of times when the steps before an action are known: no contest, as only generators read them."""
    shown: Sequence[MetricsRow] = comparison.models
    columns = [
        (name, _column([], shown, lambda row, name=name: _mae_given_prefix(row, name), lowest, 4))  # type: ignore[misc]
        for name in comparison.timed
    ]
    note = (
        "Of the next action, by a generator that is told the steps before it and their times. Models without one read "
        "no steps, and stand here by what they said in advance."
    )
    return _table("Time MAE given the steps before, log1p s", columns, shown, len(shown), note)


def ablations(comparison: Comparison) -> ReportTable:
    """What each ablation changes and costs."""
    rows = [model for model in comparison.models if model.ablation_of]
    whole = {name for model in rows if (name := model.ablation_of)}
    shown = [model for model in comparison.models if model.name in whole or model.ablation_of]
    columns = [("mean AUC", [Cell(_spread_text(model.auc, 4)) for model in shown])]
    columns.append(
        ("AUC difference", [_difference_cell(model, "auc") if model.ablation_of else Cell("") for model in shown])
    )
    if comparison.timed:
        columns.append(("mean time MAE, log1p s", [Cell(_spread_text(model.mae_log, 4)) for model in shown]))
        columns.append(
            ("MAE difference", [_difference_cell(model, "mae") if model.ablation_of else Cell("") for model in shown])
        )
    columns.append(("change", [Cell(_change(comparison, model)) for model in shown]))
    note = (
        f"Each with the tuned settings of its model, and its difference to it. {BEST_MARK}: the interval leaves out 0, "
        "which it does by chance in one of twenty."
    )
    return _table("Ablations", columns, shown, len(shown), note, ("change",))


def costs(comparison: Comparison) -> ReportTable:
    """Parameters and training speed, of models and ablations."""
    rows = comparison.models
    speeds = [MISSING if row.targets_per_s is None else f"{row.targets_per_s:,.0f}" for row in rows]
    columns = [
        ("parameters in tables", [Cell(f"{row.parameters['tables']:,}") for row in rows]),
        ("dense parameters", [Cell(f"{row.parameters['dense']:,}") for row in rows]),
        ("training targets/s", [Cell(speed) for speed in speeds]),
        ("training, s", [Cell(MISSING if row.seconds is None else f"{row.seconds:,.0f}") for row in rows]),
    ]
    note = (
        "Speed of the fastest seed, and the median time of those that trained in one go. Runs side by side, and "
        "whatever else the machine did, slow each other down: these are orders of magnitude."
    )
    return _table("Cost", columns, rows, len(rows), note)


def chosen_table(chosen: dict[str, dict[str, dict[str, object]]]) -> ReportTable | None:
    """What tuning chose, by dataset and model; None where nothing was tuned."""
    rows = [
        Row(f"{dataset} · {model}", [Cell(", ".join(f"{name} {value}" for name, value in settings.items()))])
        for dataset, models in chosen.items()
        for model, settings in models.items()
        if settings
    ]
    return ReportTable("Chosen settings", ["settings"], rows, text_columns=("settings",)) if rows else None


def summary_table(comparison: Comparison) -> TerminalTable:
    """The short form for the terminal."""
    table = new_table(
        f"{comparison.dataset}: test, {comparison.targets:,} targets",
        f"95 % intervals over users; {BEST_MARK}: it leaves out 0" if len(comparison.models) > 1 else "",
    )
    whole = overview(comparison)
    table.add_column("", overflow="fold")
    for name in whole.columns:
        table.add_column(Text(name.replace(", ", ",\n")), justify="right")
    for row in whole.rows:  # without intervals, which the page has
        table.add_row(Text(row.name), *(Text(cell.text, style=HIGHLIGHT if cell.best else "") for cell in row.cells))
    return table


def _table(
    title: str,
    columns: Sequence[tuple[str, Sequence[Cell]]],
    rows: Sequence[MetricsRow],
    models: int,
    note: str,
    words: tuple[str, ...] = (),
) -> ReportTable:
    """Of columns; rows after the first ``models`` are references."""
    most = max((len(row.seeds) for row in rows if isinstance(row, ModelResult)), default=0)
    lines = []
    for place, row in enumerate(rows):
        seeds = len(row.seeds) if isinstance(row, ModelResult) else most
        name = row.name if seeds == most else f"{row.name} ({seeds} of {most} seeds)"
        lines.append(Row(name, [cells[place] for _, cells in columns], is_reference=place >= models))
    return ReportTable(title, [name for name, _ in columns], lines, note, words)


def _column(
    models: Sequence[MetricsRow],
    rows: Sequence[MetricsRow],
    value: Callable[[MetricsRow], MeanStd | None],
    better: BestOf,
    digits: int,
    interval: str = "",
) -> list[Cell]:
    """A metric of all rows, below it the attribute ``interval``, or else the deviation.

    The best of the models stands out, all that look alike, if there is more than one.
    """
    values = [value(row) for row in rows]
    shown = [
        math.nan if found is None else better(float(f"{found.mean:.{digits}f}")) for found in values[: len(models)]
    ]
    least = min((each for each in shown if each == each), default=math.nan)
    cells = []
    for place, (row, found) in enumerate(zip(rows, values, strict=True)):
        best = len(models) > 1 and place < len(models) and shown[place] == least
        if interval:
            around = getattr(row, interval, None)
            below = "" if around is None else f"{around[0]:.{digits}f} to {around[1]:.{digits}f}"
            cells.append(Cell(_spread_text(found, digits), below, best))
        else:
            text, _, deviation = _spread_text(found, digits).partition(" ")
            cells.append(Cell(text, deviation, best))
    return cells


def _averaged(comparison: Comparison) -> str:
    """What the means are over, in words."""
    told = "Means are over actions and labels" + (", of times over timed actions" if comparison.timed else "")
    if left := comparison.averaged.left_out:
        told += f", without {', '.join(left)}, of which the test split has fewer than {MIN_COUNT}"
    return f"{told}."


def _spread_text(value: MeanStd | None, digits: int) -> str:
    if value is None:
        return MISSING
    return f"{value.mean:.{digits}f}" + ("" if value.std is None else f" ± {value.std:.{digits}f}")


def _difference_cell(row: MetricsRow, metric: str) -> Cell:
    found: Difference | None = getattr(row, f"{metric}_difference", None)
    if found is None:
        return Cell("")
    mark = BEST_MARK if found.significant else ""
    p = f"p {'≤' if found.p_is_bound else '='} {found.p:.3f}"
    return Cell(_signed(found.value) + mark, f"{_signed(found.low)} to {_signed(found.high)}, {p}")


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _change(comparison: Comparison, model: ModelResult) -> str:
    """What an ablation's settings differ in from its model's."""
    whole = comparison.model(model.ablation_of)
    of = whole.overrides if whole is not None else {}
    return ", ".join(
        f"{name} {value}" for name, value in model.overrides.items() if model.ablation_of and of.get(name) != value
    )


def _has(row: MetricsRow, metric: str) -> bool:
    known = [value.mean for value in _all(row.outcomes, metric)]
    return bool(known) and not (metric in ("auc", "gauc") and all(value == 0.5 for value in known))


def _all(rows: dict[str, dict[str, MeanStd | None]], metric: str) -> list[MeanStd]:
    return [value for found in rows.values() if (value := found.get(metric)) is not None]
