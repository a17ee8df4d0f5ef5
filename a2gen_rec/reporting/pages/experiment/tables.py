"""Tables of an experiment report, for HTML, Markdown and the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.table import Table as TerminalTable
from rich.text import Text

from a2gen_rec.experiments.comparison import Comparison, MetricsRow, ModelResult
from a2gen_rec.experiments.differences import MIN_USERS, Difference, MeanStd
from a2gen_rec.experiments.item_subsets import ItemSubset, SubsetRow
from a2gen_rec.experiments.resampling import MIN_COUNT
from a2gen_rec.reporting.console.tables import HIGHLIGHT, new_table
from a2gen_rec.reporting.formatting import MISSING, format_decimals, format_signed

BEST_MARK = "*"
"""Mark of a difference whose interval excludes 0."""
_MAX_COLUMNS = 20  # in the table of a gradient boosted model's columns
SortKey = Callable[[float], float]
"""Key that is smallest for the best value."""


def highest(value: float) -> float:
    return -value


def lowest(value: float) -> float:
    return value


def closest_to_one(value: float) -> float:
    return abs(math.log(value)) if value > 0 else math.inf


@dataclass(frozen=True)
class Cell:
    """A cell with smaller text below; ``best`` marks the best value of its column."""

    text: str
    subtext: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A row; ``is_reference`` marks rows of baselines and counts, not of models."""

    name: str
    cells: list[Cell]
    is_reference: bool = False


@dataclass(frozen=True)
class ComparisonTable:
    """A table with a note below; ``text_columns`` hold text, the other columns numbers."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""
    text_columns: tuple[str, ...] = field(default=())


def dataset_tables(comparison: Comparison) -> list[ComparisonTable]:
    """Return the main tables: overview, AUC and time errors per action, and ablations."""
    tables = [overview(comparison), outcomes(comparison, "auc", "AUC", highest)]
    if comparison.timed:
        tables.append(times(comparison, "mae_log", "Time MAE, log1p s", 4))
    if any(model.ablation_of for model in comparison.models):
        tables.append(ablations(comparison))
    return tables + [item_subset(comparison, subset) for subset in comparison.subsets]


def further_tables(comparison: Comparison) -> list[ComparisonTable]:
    """Return the tables of further metrics and of cost."""
    entropy = "Log loss divided by the log loss of the constant prediction at the split's base rate; lower is better."
    tables = [
        outcomes(comparison, "gauc", "GAUC", highest, "Mean AUC over users, weighted by their impressions."),
        outcomes(comparison, "ne", "Normalized entropy", lowest, entropy),
        outcomes(
            comparison,
            "calibration",
            "Calibration",
            closest_to_one,
            "Predicted divided by observed positives; 1 is best.",
            3,
        ),
    ]
    if comparison.timed:
        tables.append(times(comparison, "mae_s", "Time MAE, seconds", 2))
    if any(model.times_given_prefix for model in comparison.full_models):
        tables.append(conditional_times(comparison))
    tables += [importance(model) for model in comparison.full_models if model.importance]
    return [*tables, costs(comparison)]


def overview(comparison: Comparison) -> ComparisonTable:
    """Return means over actions with intervals, and differences to the reference model."""
    models: Sequence[MetricsRow] = comparison.full_models
    rows = [*models, *comparison.references]
    reference = models[0].name if models else ""
    columns = [("mean AUC", _column(models, rows, lambda row: row.auc, highest, 4, "auc_interval"))]
    several = len(models) > 1
    if several:
        columns.append((f"AUC difference to {reference}", [_difference_cell(row, "auc") for row in rows]))
    if comparison.timed:
        mae = _column(models, rows, lambda row: row.mae_log, lowest, 4, "mae_interval")
        columns.append(("mean time MAE, log1p s", mae))
        if several:
            columns.append((f"MAE difference to {reference}", [_difference_cell(row, "mae") for row in rows]))
    seeds = max((len(model.seeds) for model in comparison.full_models), default=1)
    note = (f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "One seed") + ". Bold: best model."
    note += f" {_averaged(comparison)}"
    note += f" Second line: 95% intervals over {comparison.num_resamples:,} resamples of the {comparison.users:,} users"
    note += ", paired for differences" if several else ""
    note += ", with the error of the mean over seeds (Welch's t)" if seeds > 1 else ""
    note += f"; {BEST_MARK}: the interval excludes 0. {_reliability(comparison.full_models)}" if several else "."
    return _table("Overview", columns, rows, len(models), note)


def outcomes(
    comparison: Comparison, metric: str, title: str, sort_key: SortKey, note: str = "", digits: int = 4
) -> ComparisonTable:
    """Return a metric for each outcome."""
    models: Sequence[MetricsRow] = comparison.full_models
    # A constant prediction has no ranking, but is the baseline of entropy and calibration.
    rows = [*models, *(row for row in comparison.references if row.outcomes and _has(row, metric))]
    columns = [
        (name, _column(models, rows, lambda row, name=name: row.outcomes.get(name, {}).get(metric), sort_key, digits))  # type: ignore[misc]
        for name in comparison.scored
    ]
    table = _table(title, columns, rows, len(models), note)
    counts = [Cell(f"{comparison.positives[name]:,}") for name in comparison.scored]
    return ComparisonTable(table.title, table.columns, [*table.rows, Row("positives", counts, True)], table.note)


def times(comparison: Comparison, metric: str, title: str, digits: int) -> ComparisonTable:
    """Return the mean absolute error for each timed action."""
    models: Sequence[MetricsRow] = comparison.full_models
    rows = [*models, *(row for row in comparison.references if any(_all(row.times, metric)))]
    columns = [
        (name, _column(models, rows, lambda row, name=name: row.times.get(name, {}).get(metric), lowest, digits))  # type: ignore[misc]
        for name in comparison.timed
    ]
    several = len(comparison.timed) > 1
    if several:
        columns.insert(0, ("mean", _column(models, rows, lambda row: getattr(row, metric), lowest, digits)))
    table = _table(title, columns, rows, len(models), "Over impressions in which the action occurred at a known time.")
    counts = [Cell("")] * several + [Cell(f"{count:,}") for count in comparison.timed.values()]
    return ComparisonTable(table.title, table.columns, [*table.rows, Row("known times", counts, True)], table.note)


def _conditional_mae(row: MetricsRow, name: str) -> MeanStd | None:
    return row.times_given_prefix.get(name, {}).get("mae_log")


def conditional_times(comparison: Comparison) -> ComparisonTable:
    """Return time errors given the preceding actions. No value is marked best, because only generators use them."""
    models: Sequence[MetricsRow] = comparison.models
    columns = [
        (name, _column([], models, lambda row, name=name: _conditional_mae(row, name), lowest, 4))  # type: ignore[misc]
        for name in comparison.timed
    ]
    note = (
        "Error of the next action's time, given the preceding actions and their times. Models without a generator do "
        "not use them; their values are those of the unconditional prediction."
    )
    return _table("Time MAE given the preceding actions, log1p s", columns, models, len(models), note)


def ablations(comparison: Comparison) -> ComparisonTable:
    """Return the changes and results of each ablation."""
    full_names = {model.ablation_of for model in comparison.models if model.ablation_of}
    models = [model for model in comparison.models if model.name in full_names or model.ablation_of]
    columns = [("mean AUC", [Cell(_mean_std_text(model.auc, 4)) for model in models])]
    columns.append(
        ("AUC difference", [_difference_cell(model, "auc") if model.ablation_of else Cell("") for model in models])
    )
    if comparison.timed:
        columns.append(("mean time MAE, log1p s", [Cell(_mean_std_text(model.mae_log, 4)) for model in models]))
        columns.append(
            ("MAE difference", [_difference_cell(model, "mae") if model.ablation_of else Cell("") for model in models])
        )
    columns.append(("change", [Cell(_change(comparison, model)) for model in models]))
    note = (
        f"Each ablation has the tuned settings of its full model; differences are to the full model. {BEST_MARK}: the "
        f"interval excludes 0. {_reliability(models)}"
    )
    return _table("Ablations", columns, models, len(models), note, ("change",))


def item_subset(comparison: Comparison, subset: ItemSubset) -> ComparisonTable:
    """Return means over the impressions of new or of known items."""
    models = comparison.models
    columns = [
        ("mean AUC", [Cell(_mean_std_text(row.auc, 4)) for row in subset.rows]),
        ("AUC difference", [_difference_cell(row, "auc") for row in subset.rows]),
    ]
    if comparison.timed:
        columns.append(("mean time MAE, log1p s", [Cell(_mean_std_text(row.mae_log, 4)) for row in subset.rows]))
        columns.append(("MAE difference", [_difference_cell(row, "mae") for row in subset.rows]))
    kind = "not among the training items" if subset.is_new else "among the training items"
    note = (
        f"{subset.targets:,} of {comparison.targets:,} test impressions: their item is {kind}. Means are over "
        f"{', '.join(subset.averaged.outcomes)}. Differences are to {models[0].name}, of ablations to the full model."
    )
    return _table("New items" if subset.is_new else "Known items", columns, models, len(models), note)


def importance(model: ModelResult) -> ComparisonTable:
    """Return the columns of a gradient boosted model with the largest gain."""
    top = list(model.importance.items())[:_MAX_COLUMNS]
    note = (
        f"Share of the gain of all splits, mean over outcomes and seeds; the {len(top)} largest of "
        f"{len(model.importance)} columns with a split."
    )
    rows = [Row(name, [Cell(f"{share:.1%}")]) for name, share in top]
    return ComparisonTable(f"Columns of {model.name} by gain", ["share of gain"], rows, note)


def costs(comparison: Comparison) -> ComparisonTable:
    """Return parameters and training speed of models and ablations."""
    rows = comparison.models
    speeds = [MISSING if row.targets_per_s is None else f"{row.targets_per_s:,.0f}" for row in rows]
    columns = [
        ("table parameters", [Cell(f"{row.parameters['tables']:,}") for row in rows]),
        ("dense parameters", [Cell(f"{row.parameters['dense']:,}") for row in rows]),
        ("training targets/s", [Cell(speed) for speed in speeds]),
        ("training, s", [Cell(MISSING if row.seconds is None else f"{row.seconds:,.0f}") for row in rows]),
    ]
    note = (
        "Speed of the fastest seed, and median time of the runs that were not resumed. Concurrent runs and other load "
        "on the machine slow training down, so these are orders of magnitude."
    )
    return _table("Cost", columns, rows, len(rows), note)


def best_settings_table(best_settings: dict[str, dict[str, dict[str, object]]]) -> ComparisonTable | None:
    """Return the tuned settings by dataset and model; None without tuning."""
    rows = [
        Row(f"{dataset} · {model}", [Cell(", ".join(f"{name} {value}" for name, value in settings.items()))])
        for dataset, models in best_settings.items()
        for model, settings in models.items()
        if settings
    ]
    return ComparisonTable("Best settings", ["settings"], rows, text_columns=("settings",)) if rows else None


def summary_table(comparison: Comparison) -> TerminalTable:
    """Return the overview for the terminal, without intervals."""
    table = new_table(
        f"{comparison.dataset}: test, {comparison.targets:,} targets",
        f"{BEST_MARK}: the 95% interval over at least {MIN_USERS} users excludes 0"
        if len(comparison.models) > 1
        else "",
    )
    table_data = overview(comparison)
    table.add_column("", overflow="fold")
    for name in table_data.columns:
        table.add_column(Text(name.replace(", ", ",\n")), justify="right")
    for row in table_data.rows:
        table.add_row(Text(row.name), *(Text(cell.text, style=HIGHLIGHT if cell.best else "") for cell in row.cells))
    return table


def _table(
    title: str,
    columns: Sequence[tuple[str, Sequence[Cell]]],
    rows: Sequence[MetricsRow],
    num_models: int,
    note: str,
    text_columns: tuple[str, ...] = (),
) -> ComparisonTable:
    """Return a table from its columns; rows after the first ``num_models`` are references."""
    max_seeds = max((len(row.seeds) for row in rows if isinstance(row, ModelResult)), default=0)
    lines = []
    for index, row in enumerate(rows):
        seeds = len(row.seeds) if isinstance(row, ModelResult) else max_seeds
        name = row.name if seeds == max_seeds else f"{row.name} ({seeds} of {max_seeds} seeds)"
        lines.append(Row(name, [cells[index] for _, cells in columns], is_reference=index >= num_models))
    return ComparisonTable(title, [name for name, _ in columns], lines, note, text_columns)


def _column(
    models: Sequence[MetricsRow],
    rows: Sequence[MetricsRow],
    value: Callable[[MetricsRow], MeanStd | None],
    sort_key: SortKey,
    digits: int,
    interval: str = "",
) -> list[Cell]:
    """Return a metric of all rows, with the attribute ``interval`` or else the standard deviation as subtext.

    With at least two models, all models that display the best value are marked.
    """
    values = [value(row) for row in rows]
    keys = [
        math.nan if known is None else sort_key(float(f"{known.mean:.{digits}f}")) for known in values[: len(models)]
    ]
    best_key = min((key for key in keys if key == key), default=math.nan)
    cells = []
    for index, (row, known) in enumerate(zip(rows, values, strict=True)):
        best = len(models) > 1 and index < len(models) and keys[index] == best_key
        if interval:
            bounds = getattr(row, interval, None)
            subtext = "" if bounds is None else f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
            cells.append(Cell(_mean_std_text(known, digits), subtext, best))
        else:
            text, _, deviation = _mean_std_text(known, digits).partition(" ")
            cells.append(Cell(text, deviation, best))
    return cells


def _averaged(comparison: Comparison) -> str:
    """Describe the outcomes that means include."""
    text = "Means are over actions and labels" + (", of times over timed actions" if comparison.timed else "")
    if left := comparison.averaged.left_out:
        text += f", without {', '.join(left)} (fewer than {MIN_COUNT} occurrences in the test split)"
    return f"{text}."


def _mean_std_text(value: MeanStd | None, digits: int) -> str:
    if value is None:
        return MISSING
    return format_decimals(value.mean, digits) + ("" if value.std is None else f" ± {value.std:.{digits}f}")


def _difference_cell(row: MetricsRow | SubsetRow, metric: str) -> Cell:
    difference: Difference | None = getattr(row, f"{metric}_difference", None)
    if difference is None:
        return Cell("")
    mark = BEST_MARK if difference.significant else ""
    interval = f"{_signed(difference.low)} to {_signed(difference.high)}"
    p = f", p {'≤' if difference.p_is_bound else '='} {difference.p:.3f}" if difference.testable else ""
    return Cell(_signed(difference.value) + mark, interval + p)


def _reliability(models: Sequence[ModelResult]) -> str:
    """Describe how far intervals of differences can be trusted."""
    differences = [difference for model in models for difference in (model.auc_difference, model.mae_difference)]
    text = (
        "Intervals are too narrow over few users: between equal models, they exclude 0 in 5% of cases with many, and "
        "in 7% to 10% with 20 users."
    )
    if any(difference is not None and not difference.testable for difference in differences):
        text += f" Differences over fewer than {MIN_USERS} users of an outcome have no {BEST_MARK} and no p-value."
    return text


def _signed(value: float) -> str:
    return format_signed(value, 4, minus="−")


def _change(comparison: Comparison, model: ModelResult) -> str:
    """Return the settings in which an ablation differs from its full model."""
    full_model = comparison.model(model.ablation_of)
    full_overrides = full_model.overrides if full_model is not None else {}
    return ", ".join(
        f"{name} {value}"
        for name, value in model.overrides.items()
        if model.ablation_of and full_overrides.get(name) != value
    )


def _has(row: MetricsRow, metric: str) -> bool:
    known = [value.mean for value in _all(row.outcomes, metric)]
    return bool(known) and not (metric in ("auc", "gauc") and all(value == 0.5 for value in known))


def _all(rows: dict[str, dict[str, MeanStd | None]], metric: str) -> list[MeanStd]:
    return [value for metrics in rows.values() if (value := metrics.get(metric)) is not None]
