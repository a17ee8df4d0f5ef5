"""Shapes of the charts of a sharding plan; the page template writes them as SVG.

Horizontal positions are in percent of the chart's width, so that it fills any screen while its text keeps its size.
Vertical positions are in pixels from the top.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from a2gen_rec.reporting.formatting import format_bytes, format_ms, format_share, plural, strip_zeros
from a2gen_rec.reporting.plan_summary import fullest_rank, imbalance, memory_kinds
from a2gen_rec.sharding.report import Cost, PlanReport, TablePlan

HEIGHT = 180.0  # pixels, of charts with a vertical axis
MAX_SEPARATE_RANKS = 64  # up to this number each rank has a bar; above, equal neighbours share one, without gaps
SINGLE_POINT = 64  # with more ranks per shard, a bar is thinner than a line and gets an outline
MAX_LABELED_RANKS = 16  # up to this number a cell of the placement map has space for its bytes
BYTE_CLASSES = [
    10**6,
    10**7,
    10**8,
    10**9,
    10**10,
]  # upper bounds of the placement map's colors; the last class is open
COST_PARTS = ["forward_compute", "forward_comms", "backward_compute", "backward_comms", "prefetch"]


@dataclass(frozen=True)
class Bar:
    """A rectangle; ``style`` is its CSS class, ``title`` its tooltip, ``text`` its label."""

    x: float
    width: float
    style: str
    title: str
    y: float = 0.0
    height: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Tick:
    """A tick label of an axis."""

    position: float
    text: str


@dataclass(frozen=True)
class BarRow:
    """A row of bars with a name on the left and a note on the right."""

    name: str
    bars: list[Bar]
    note: str
    summary: str


@dataclass(frozen=True)
class MemoryChart:
    """For each rank a bar of the free memory, and in front of it a bar of the used memory."""

    kind: str
    bars: list[Bar]
    ticks: list[Tick]
    summary: str


@dataclass(frozen=True)
class Dot:
    """A point of a curve."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Curve:
    """Values over the number of ranks, in ascending order."""

    name: str
    style: str
    dots: list[Dot]

    @property
    def lines(self) -> list[tuple[Dot, Dot]]:
        """Pairs of consecutive dots."""
        return list(pairwise(self.dots))


@dataclass(frozen=True)
class SweepChart:
    """Curves over the number of ranks, with a cross where the tables do not fit."""

    title: str
    curves: list[Curve]
    crosses: list[Dot]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str


def memory_chart(report: PlanReport, kind: str) -> MemoryChart:
    """Return the memory of each rank; ``kind`` is ``hbm`` or ``ddr``."""
    used = [getattr(rank, kind) for rank in report.ranks]
    free = [getattr(rank, f"{kind}_free") for rank in report.ranks]
    top = max([*used, *free])
    bars = []
    for first, last, (used_bytes, free_bytes) in _runs(list(zip(used, free, strict=True))):
        x, width = _span(first, last, report.world_size)
        title = (
            f"{_ranks_text(first, last)}: {format_bytes(used_bytes)} of {format_bytes(free_bytes)}, "
            f"{format_share(used_bytes, free_bytes)}"
        )
        for value, style in ((free_bytes, "free"), (used_bytes, "used")):
            bars.append(Bar(x, width, style, title, HEIGHT * (1 - value / top), HEIGHT * value / top))
    fullest = fullest_rank(report, kind).rank
    description = (
        f"{kind.upper()}: rank {fullest} is fullest with {format_bytes(used[fullest])} of "
        f"{format_bytes(free[fullest])}, {imbalance(used):.2f} times the mean"
    )
    ticks = [Tick(HEIGHT * (1 - end / top), strip_zeros(format_bytes(end))) for end in _axis(top)]
    return MemoryChart(kind.upper(), bars, ticks, description)


def rank_ticks(world_size: int) -> list[Tick]:
    """Return rank numbers for the axis below the bars, at most 16."""
    step = 2 ** max(0, math.ceil(math.log2(world_size / 16)))
    return [Tick((rank + 0.5) / world_size * 100, str(rank)) for rank in range(0, world_size, step)]


def placement_row(plan: TablePlan, world_size: int) -> BarRow:
    """Return a table's bytes on each rank."""
    rank_bytes = [0] * world_size
    for shard in plan.shards:
        rank_bytes[shard.rank] += shard.hbm + shard.ddr
    bars = []
    for first, last, size in _runs(rank_bytes):
        if size:
            x, width = _span(first, last, world_size)
            style = f"q{sum(size > end for end in BYTE_CLASSES)}"
            style += " lone" if len(plan.shards) * SINGLE_POINT < world_size else ""
            title = f"{plan.name}, {_ranks_text(first, last)}: {format_bytes(size)}{'' if first == last else ' each'}"
            bars.append(Bar(x, width, style, title, text=format_bytes(size) if world_size <= MAX_LABELED_RANKS else ""))
    placement = f"{plan.chosen.sharding}, {plural(plan.chosen.ranks, 'rank')}"
    return BarRow(
        plan.name, bars, placement, f"{plan.name}: {placement}, at most {format_bytes(max(rank_bytes))} on a rank"
    )


def byte_classes() -> dict[str, str]:
    """Return the placement map's colors: CSS class -> meaning."""
    ends = [f"up to {strip_zeros(format_bytes(end))}" for end in BYTE_CLASSES]
    return {f"q{index}": text for index, text in enumerate([*ends, "more"])}


def time_rows(report: PlanReport) -> list[BarRow]:
    """Return the milliseconds of each table's slowest shard and of the slowest rank, by cost part."""
    costs = [(plan.name, plan.chosen.cost) for plan in report.tables]
    if costs:
        costs.append(("slowest rank", report.cost))
    max_ms = max((cost.total for _, cost in costs), default=0.0) or 1.0
    return [_time_row(name, cost, max_ms) for name, cost in costs]


def cost_legend(report: PlanReport) -> dict[str, str]:
    """Return the cost parts that are present in the plan: CSS class -> name."""
    costs = [plan.chosen.cost for plan in report.tables]
    return {part: part.replace("_", " ") for part in COST_PARTS if any(getattr(cost, part) for cost in costs)}


def sweep_charts(reports: Sequence[PlanReport]) -> list[SweepChart]:
    """Return memory per rank and time per step over the number of ranks; ``reports`` are sorted by that number."""
    fitting = [report for report in reports if report.fits]
    memory: list[tuple[str, str, dict[int, float]]] = []
    for kind in memory_kinds(*fitting):
        for name, style, field in (("fullest rank", kind, kind), ("free", f"{kind} limit", f"{kind}_free")):
            values = {report.world_size: getattr(fullest_rank(report, kind), field) for report in fitting}
            memory.append((f"{kind.upper()}, {name}", style, values))
    time = [("estimated ms per step", "time", {report.world_size: report.cost.total for report in fitting})]
    return [
        _sweep_chart("Memory per rank", memory, reports, format_bytes),
        _sweep_chart("Estimated ms per step", time, reports, format_ms),
    ]


def _sweep_chart(
    title: str,
    curves: Sequence[tuple[str, str, Mapping[int, float]]],
    reports: Sequence[PlanReport],
    text: Callable[[float], str],
) -> SweepChart:
    positions = _log_positions([report.world_size for report in reports])
    top = 1.1 * max((value for *_, values in curves for value in values.values()), default=0.0) or 1.0
    lines = []
    for name, style, values in curves:
        titles = {ranks: f"{name}, {plural(ranks, 'rank')}: {text(value)}" for ranks, value in values.items()}
        dots = [Dot(positions[ranks], HEIGHT * (1 - value / top), titles[ranks]) for ranks, value in values.items()]
        lines.append(Curve(name, style, dots))
    crosses = [
        Dot(positions[report.world_size], HEIGHT, f"{plural(report.world_size, 'rank')}: does not fit")
        for report in reports
        if not report.fits
    ]
    descriptions = [
        f"{name}: {', '.join(f'{ranks} ranks {text(value)}' for ranks, value in values.items())}"
        for name, _, values in curves
    ]
    return SweepChart(
        title,
        lines,
        crosses,
        [Tick(x, str(ranks)) for ranks, x in positions.items()],
        [Tick(HEIGHT * (1 - end / top), strip_zeros(text(end))) for end in _axis(top)],
        "; ".join([*descriptions, *(cross.title for cross in crosses)]),
    )


def _time_row(name: str, cost: Cost, max_ms: float) -> BarRow:
    bars, x = [], 0.0
    for part in COST_PARTS:
        ms = getattr(cost, part)
        width = ms / max_ms * 100
        if ms:
            bars.append(Bar(x, width, part, f"{name}, {part.replace('_', ' ')}: {format_ms(ms)} ms"))
        x += width
    return BarRow(name, bars, format_ms(cost.total), f"{name}: {format_ms(cost.total)} ms per step")


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """Return (first rank, last rank, value) of the bars to draw."""
    if len(values) <= MAX_SEPARATE_RANKS:
        return [(rank, rank, value) for rank, value in enumerate(values)]
    runs = []
    for value, run in groupby(enumerate(values), key=lambda pair: pair[1]):
        ranks = [rank for rank, _ in run]
        runs.append((ranks[0], ranks[-1], value))
    return runs


def _span(first: int, last: int, world_size: int) -> tuple[float, float]:
    """Return left end and width of a bar."""
    gap = 8.0 / world_size if world_size <= MAX_SEPARATE_RANKS else 0.0
    return first / world_size * 100 + gap / 2, (last - first + 1) / world_size * 100 - gap


def _ranks_text(first: int, last: int) -> str:
    return f"rank {first}" if first == last else f"ranks {first}–{last}"


def _axis(max_value: float) -> list[float]:
    """Return round tick values from 0 to at most ``max_value``."""
    if max_value <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(max_value / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= max_value / 5)
    return [step * index for index in range(math.floor(max_value / step) + 1)]


def _log_positions(numbers: Sequence[int]) -> dict[int, float]:
    """Return number -> percent on a logarithmic axis with margins at both ends."""
    if not numbers:
        return {}
    low, high = math.log(min(numbers)), math.log(max(numbers))
    return {number: 4 + 92 * ((math.log(number) - low) / (high - low) if high > low else 0.5) for number in numbers}
