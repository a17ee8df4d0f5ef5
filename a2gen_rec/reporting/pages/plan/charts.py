"""The shapes of a sharding plan's drawings, for a page to write as SVG.

Horizontal positions are percent of a drawing's width, so that it fills any screen while its text keeps its size;
vertical ones are pixels from the top.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from a2gen_rec.reporting import formatting as figures
from a2gen_rec.reporting.formatting import format_bytes, format_ms
from a2gen_rec.sharding.report import Cost, PlanReport, TablePlan

HEIGHT = 180.0  # of drawings with a vertical axis
RANKS_APART = 64  # up to here each rank has its own bar; above, equal neighbours are one, without gaps
SINGLE_POINT = 64  # of so many ranks, one alone is thinner than a line: it gets an outline
RANKS_NAMED = 16  # up to here a cell of the placement map has room for its bytes
BYTE_CLASSES = [10**6, 10**7, 10**8, 10**9, 10**10]  # upper ends of the placement map's colours; the last is open
COST_PARTS = ["forward_compute", "forward_comms", "backward_compute", "backward_comms", "prefetch"]


@dataclass(frozen=True)
class Bar:
    """A rectangle; ``style`` is its CSS class, ``title`` its tooltip, ``text`` stands in it."""

    x: float
    width: float
    style: str
    title: str
    y: float = 0.0
    height: float = 0.0
    text: str = ""


@dataclass(frozen=True)
class Tick:
    """A label of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Row:
    """A line of bars: its name before it, a note behind it."""

    name: str
    bars: list[Bar]
    note: str
    summary: str


@dataclass(frozen=True)
class MemoryChart:
    """For each rank a bar of what is free, and in front of it what its tables take."""

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
    """Values over the number of ranks, from left to right."""

    name: str
    style: str
    dots: list[Dot]

    @property
    def lines(self) -> list[tuple[Dot, Dot]]:
        """Each dot with the next."""
        return list(pairwise(self.dots))


@dataclass(frozen=True)
class SweepChart:
    """Curves over the number of ranks, with a cross at each number on which the tables do not fit."""

    title: str
    curves: list[Curve]
    crosses: list[Dot]
    across: list[Tick]
    up: list[Tick]
    summary: str


def memory_chart(report: PlanReport, kind: str) -> MemoryChart:
    """Memory of each rank; ``kind`` is ``hbm`` or ``ddr``."""
    used = [getattr(rank, kind) for rank in report.ranks]
    free = [getattr(rank, f"{kind}_free") for rank in report.ranks]
    top = max([*used, *free])
    bars = []
    for first, last, (taken, has) in _runs(list(zip(used, free, strict=True))):
        x, width = _span(first, last, report.world)
        title = (
            f"{_ranks(first, last)}: {format_bytes(taken)} of {format_bytes(has)}, {figures.format_share(taken, has)}"
        )
        for value, style in ((has, "free"), (taken, "used")):
            bars.append(Bar(x, width, style, title, HEIGHT * (1 - value / top), HEIGHT * value / top))
    fullest = figures.fullest(report, kind).rank
    summary = (
        f"{kind.upper()}: rank {fullest} is fullest with {format_bytes(used[fullest])} of {format_bytes(free[fullest])}, "
        f"{figures.imbalance(used):.2f} times the mean"
    )
    ticks = [Tick(HEIGHT * (1 - end / top), _short(format_bytes(end))) for end in _axis(top)]
    return MemoryChart(kind.upper(), bars, ticks, summary)


def rank_ticks(world: int) -> list[Tick]:
    """Numbers under the bars of some ranks."""
    step = 2 ** max(0, math.ceil(math.log2(world / 16)))
    return [Tick((rank + 0.5) / world * 100, str(rank)) for rank in range(0, world, step)]


def placement_svg(plan: TablePlan, world: int) -> Row:
    """A table's bytes on each rank."""
    held = [0] * world
    for shard in plan.shards:
        held[shard.rank] += shard.hbm + shard.ddr
    bars = []
    for first, last, taken in _runs(held):
        if taken:
            x, width = _span(first, last, world)
            style = f"q{sum(taken > end for end in BYTE_CLASSES)}{' lone' if len(plan.shards) * SINGLE_POINT < world else ''}"
            title = f"{plan.name}, {_ranks(first, last)}: {format_bytes(taken)}{'' if first == last else ' each'}"
            bars.append(Bar(x, width, style, title, text=format_bytes(taken) if world <= RANKS_NAMED else ""))
    where = f"{plan.chosen.sharding}, {figures.plural(plan.chosen.ranks, 'rank')}"
    return Row(plan.name, bars, where, f"{plan.name}: {where}, at most {format_bytes(max(held))} on one")


def byte_classes() -> dict[str, str]:
    """The placement map's colours, CSS class -> meaning."""
    ends = [f"up to {_short(format_bytes(end))}" for end in BYTE_CLASSES]
    return {f"q{place}": text for place, text in enumerate([*ends, "more"])}


def time_bars(report: PlanReport) -> list[Row]:
    """Milliseconds of each table's slowest shard and of the slowest rank, part by part."""
    costs = [(plan.name, plan.chosen.cost) for plan in report.tables]
    if costs:
        costs.append(("slowest rank", report.cost))
    longest = max((cost.total for _, cost in costs), default=0.0) or 1.0
    return [_time(name, cost, longest) for name, cost in costs]


def cost_legend(report: PlanReport) -> dict[str, str]:
    """The parts of the time that the plan has, CSS class -> name."""
    costs = [plan.chosen.cost for plan in report.tables]
    return {part: part.replace("_", " ") for part in COST_PARTS if any(getattr(cost, part) for cost in costs)}


def sweep_charts(reports: Sequence[PlanReport]) -> list[SweepChart]:
    """Memory per rank and time per step over the number of ranks; ``reports`` in that number's order."""
    fitting = [report for report in reports if report.fits]
    memory: list[tuple[str, str, dict[int, float]]] = []
    for kind in figures.memory_kinds(*fitting):
        for name, style, field in (("fullest rank", kind, kind), ("free", f"{kind} limit", f"{kind}_free")):
            values = {report.world: getattr(figures.fullest(report, kind), field) for report in fitting}
            memory.append((f"{kind.upper()}, {name}", style, values))
    time = [("estimated ms per step", "time", {report.world: report.cost.total for report in fitting})]
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
    across = _log_positions([report.world for report in reports])
    top = 1.1 * max((value for *_, values in curves for value in values.values()), default=0.0) or 1.0
    drawn = []
    for name, style, values in curves:
        titles = {world: f"{name}, {figures.plural(world, 'rank')}: {text(value)}" for world, value in values.items()}
        dots = [Dot(across[world], HEIGHT * (1 - value / top), titles[world]) for world, value in values.items()]
        drawn.append(Curve(name, style, dots))
    crosses = [
        Dot(across[report.world], HEIGHT, f"{figures.plural(report.world, 'rank')}: does not fit")
        for report in reports
        if not report.fits
    ]
    said = [f"{name}: {', '.join(f'{w} ranks {text(v)}' for w, v in values.items())}" for name, _, values in curves]
    return SweepChart(
        title,
        drawn,
        crosses,
        [Tick(x, str(world)) for world, x in across.items()],
        [Tick(HEIGHT * (1 - end / top), _short(text(end))) for end in _axis(top)],
        "; ".join([*said, *(cross.title for cross in crosses)]),
    )


def _time(name: str, cost: Cost, longest: float) -> Row:
    bars, x = [], 0.0
    for part in COST_PARTS:
        taken = getattr(cost, part)
        width = taken / longest * 100
        if taken:
            bars.append(Bar(x, width, part, f"{name}, {part.replace('_', ' ')}: {format_ms(taken)} ms"))
        x += width
    return Row(name, bars, format_ms(cost.total), f"{name}: {format_ms(cost.total)} ms per step")


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """(first rank, last rank, value) of the bars to draw."""
    if len(values) <= RANKS_APART:
        return [(rank, rank, value) for rank, value in enumerate(values)]
    runs = []
    for value, run in groupby(enumerate(values), key=lambda numbered: numbered[1]):
        ranks = [rank for rank, _ in run]
        runs.append((ranks[0], ranks[-1], value))
    return runs


def _span(first: int, last: int, world: int) -> tuple[float, float]:
    """Left end and width."""
    gap = 8.0 / world if world <= RANKS_APART else 0.0
    return first / world * 100 + gap / 2, (last - first + 1) / world * 100 - gap


def _ranks(first: int, last: int) -> str:
    return f"rank {first}" if first == last else f"ranks {first}–{last}"


def _axis(most: float) -> list[float]:
    """Round values from 0 up to ``most``."""
    if most <= 0:
        return [0.0]
    power = 10.0 ** math.floor(math.log10(most / 3))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= most / 5)
    return [step * place for place in range(math.floor(most / step) + 1)]


def _short(text: str) -> str:
    """A size or a number without zeros at the end: 50 GB, not 50.0 GB."""
    number, *unit = text.split()
    return " ".join([f"{float(number.replace(',', '')):g}", *unit]) if number[0].isdigit() else text


def _log_positions(numbers: Sequence[int]) -> dict[int, float]:
    """Number -> percent, logarithmic, with room at both ends."""
    if not numbers:
        return {}
    low, high = math.log(min(numbers)), math.log(max(numbers))
    return {number: 4 + 92 * ((math.log(number) - low) / (high - low) if high > low else 0.5) for number in numbers}
