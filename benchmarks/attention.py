"""How fast and how small is the factorized attention of many contexts over one sequence?

The same mean-pooled context-aware attention in three forms, forward and backward, whose results and gradients are
compared before any is timed:

- factorized: three matrix products, no attention matrix per context (``ContextAwareAttention.pooled``);
- direct: one n × n attention matrix per context;
- SDPA: torch's ``scaled_dot_product_attention`` with the queries of every (context, position), pooled afterwards.

Peak memory is that of tensors alive at once during forward and backward. How it grows is the least-squares fit of
log peak on log T and log n.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from harness import Goal, Report, ReportTable, Timing, interleave, main
from rss import peak_bytes
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn.attention import ContextAwareAttention
from a2gen_rec.utils.distributed import DistributedContext

FORMS = ("factorized", "SDPA", "direct")
GIB, MIB = 2**30, 2**20
_MATRICES = 4
"""Attention matrices of every context that the direct form holds at once, at the most."""


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        histories: positions n of the sequence; contexts: T of them ask it.
        dim: width of tokens, contexts and heads together.
        direct_gib: cells where the direct form would need more are measured without it.
    """

    histories: list[int] = field(default_factory=lambda: [50, 100, 200, 500])
    contexts: list[int] = field(default_factory=lambda: [16, 64, 250, 1000])
    dim: int = 32
    heads: int = 4
    direct_gib: float = 4.0
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"histories": min(self.histories, default=0), "contexts": min(self.contexts, default=0)}
        sizes |= {"heads": self.heads, "dim": self.dim, "repeats": self.repeats}
        for name, least in sizes.items():
            if least < 1:
                raise ConfigError(f"{name} must be at least 1")
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} must be a multiple of heads {self.heads}")


QUICK = {"histories": [50, 100, 200], "contexts": [100, 400], "direct_gib": 0.5}


@dataclass
class Cell:
    """What was measured with T contexts over n positions; forms that were left out are absent."""

    contexts: int
    history: int
    forward: dict[str, Timing]
    both: dict[str, Timing]
    peak: dict[str, int]
    flops: int


class Work:
    """One sequence, asked by T contexts; each sees a beginning of it, as the targets of a user window do."""

    def __init__(self, attention: ContextAwareAttention, contexts: int, history: int, device: torch.device) -> None:
        self.attention = attention
        dim = attention.dim
        self.x = torch.randn(1, history, dim, device=device, requires_grad=True)
        self.context = torch.randn(1, contexts, dim, device=device, requires_grad=True)
        seen = torch.randint(1, history + 1, (1, contexts, 1), device=device)
        self.mask = torch.arange(history, device=device) < seen
        self.gradient = torch.randn(1, contexts, dim, device=device)

    def forward(self, form: str) -> Tensor:
        if form == "SDPA":
            return pooled_by_sdpa(self.attention, self.x, self.context, self.mask)
        return self.attention.pool(self.x, self.context, self.mask, form=form)  # type: ignore[arg-type]

    def both(self, form: str) -> list[Tensor]:
        """Output and gradients."""
        leaves = [self.x, self.context, *self.attention.parameters()]
        out = self.forward(form)
        out.backward(self.gradient)
        found = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        for leaf in leaves:
            leaf.grad = None
        return found


def pooled_by_sdpa(attention: ContextAwareAttention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """``attention.pooled`` the usual way: n queries per context, attention, mean over the visible positions.

    Args:
        x: [1, n, dim]; context: [1, T, dim]; mask: [1, T, n] bool, something visible in every row.

    Returns:
        [1, T, dim]
    """
    s, asked = attention.sequence(x), attention.project_context(context)

    def heads(values: Tensor) -> Tensor:
        """[..., n, dim] -> [..., heads, n, d_head]"""
        return values.unflatten(-1, (attention.heads, -1)).transpose(-2, -3)

    query = heads(attention.query_sequence(s) / attention.d_head**0.5 + asked.query[0, :, None])
    key, value = (heads(layer(s)).expand_as(query) for layer in (attention.key, attention.value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[0, :, None, None], scale=1.0)
    seen = mask[0, :, None, :, None].to(x.dtype)
    pooled = (attended * seen).sum(-2) / seen.sum(-2)
    return attention.output((pooled * asked.gate[0, :, :, None]).flatten(1))[None] + asked.context


def measure(settings: Settings, process: DistributedContext) -> Report:
    torch.manual_seed(settings.seed)
    attention = ContextAwareAttention(settings.dim, settings.dim, settings.dim, settings.heads).to(process.device)
    cells = [
        measure_cell(attention, contexts, history, settings, process.device)
        for contexts in settings.contexts
        for history in settings.histories
    ]
    matmul = matmul_flops_per_s(process.device)
    exponents = {form: growth(cells, form) for form in FORMS}
    largest = cells[-1]
    figures = {
        "peak_mib_factorized": largest.peak["factorized"] / MIB,
        "ratio_vs_sdpa": largest.both["SDPA"].median / largest.both["factorized"].median,
        "matmul_gflops_per_s": matmul / 1e9,
        "matmul_share": largest.flops / largest.both["factorized"].median / matmul,
    }
    slow = [cell for cell in cells if "direct" in cell.both]
    if slow:
        last = slow[-1]
        figures["ratio_vs_direct"] = last.both["direct"].median / last.both["factorized"].median
        figures["memory_ratio_vs_direct"] = last.peak["direct"] / last.peak["factorized"]
    for form, powers in exponents.items():
        if powers is not None:
            figures |= {f"peak_power_of_t_{form.lower()}": powers[0], f"peak_power_of_n_{form.lower()}": powers[1]}
    tables = [
        times("Forward, ms", cells, lambda cell: cell.forward),
        times("Forward and backward, ms", cells, lambda cell: cell.both),
        memory_table(cells, matmul, exponents, settings),
    ]
    return Report(tables, targets(exponents), figures)


def measure_cell(
    attention: ContextAwareAttention, contexts: int, history: int, settings: Settings, device: torch.device
) -> Cell:
    work = Work(attention, contexts, history, device)
    needed = _MATRICES * 4 * settings.heads * contexts * history**2
    forms = [form for form in FORMS if form != "direct" or needed <= settings.direct_gib * GIB]
    check(work, forms)
    peak = {form: peak_bytes(partial(work.both, form), device) for form in forms}
    with FlopCounterMode(display=False) as counter:
        work.both("factorized")
    both = interleave({form: partial(work.both, form) for form in forms}, settings.repeats, 1, device)
    with torch.no_grad():
        forward = interleave({form: partial(work.forward, form) for form in forms}, settings.repeats, 1, device)
    return Cell(contexts, history, forward, both, peak, counter.get_total_flops())


def check(work: Work, forms: list[str]) -> None:
    """Outputs and gradients of all forms are equal but for rounding."""
    wanted = work.both(forms[-1])
    for form in forms[:-1]:
        for place, (found, value) in enumerate(zip(work.both(form), wanted, strict=True)):
            what = f"gradient {place}" if place else "output"
            check_close(found, value, f"{form} and {forms[-1]} differ in the {what}")


def check_close(found: Tensor, wanted: Tensor, what: str) -> None:
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * scale, msg=lambda why: f"{what}: {why}")


def matmul_flops_per_s(device: torch.device, size: int = 2048) -> float:
    """What the machine does in one large matrix product, the bound of anything made of matrix products."""
    a, b = torch.randn(2, size, size, device=device)
    timing = interleave({"matmul": lambda: a @ b}, repeats=7, device=device)["matmul"]
    return 2 * size**3 / timing.p10


def growth(cells: list[Cell], form: str) -> tuple[float, float] | None:
    """Powers of T and of n that the peak grows with; None where the sizes do not tell.

    Only where T is at least 2 n: with fewer contexts, the n × n logits that all of them share lead.
    """
    found = [cell for cell in cells if form in cell.peak and cell.contexts >= 2 * cell.history]
    if not found:
        return None
    sizes = torch.tensor([[cell.contexts, cell.history] for cell in found], dtype=torch.float64).log()
    terms = torch.cat([sizes, torch.ones(len(found), 1, dtype=torch.float64)], dim=1)
    if torch.linalg.matrix_rank(terms) < 3:
        return None
    peaks = torch.tensor([[cell.peak[form]] for cell in found], dtype=torch.float64).log()
    of_t, of_n, _ = torch.linalg.lstsq(terms, peaks).solution[:, 0].tolist()
    return of_t, of_n


def times(title: str, cells: list[Cell], of: Callable[[Cell], dict[str, Timing]]) -> ReportTable:
    columns = ["T", "n"] + [name for form in FORMS for name in (form, "p10", "p90")]
    rows: list[list[str | int | float | None]] = []
    for cell in cells:
        row: list[str | int | float | None] = [cell.contexts, cell.history]
        for form in FORMS:
            timing = of(cell).get(form)
            values = [None] * 3 if timing is None else [timing.median, timing.p10, timing.p90]
            row += [None if value is None else 1000 * value for value in values]
        rows.append(row)
    return ReportTable(f"{title}: T contexts over n positions, median and percentiles", columns, rows)


def memory_table(
    cells: list[Cell], matmul: float, exponents: dict[str, tuple[float, float] | None], settings: Settings
) -> ReportTable:
    columns = ["T", "n", *(f"{form} MiB" for form in FORMS), "× SDPA", "× direct", "GFLOP/s", "% of matmul"]
    rows: list[list[str | int | float | None]] = []
    for cell in cells:
        own = cell.both["factorized"].median
        peaks = [cell.peak[form] / MIB if form in cell.peak else None for form in FORMS]
        faster = [cell.both[form].median / own if form in cell.both else None for form in FORMS[1:]]
        speed = cell.flops / own
        rows.append([cell.contexts, cell.history, *peaks, *faster, speed / 1e9, 100 * speed / matmul])
    powers = [f"{form} T^{of[0]:.2f} · n^{of[1]:.2f}" for form, of in exponents.items() if of is not None]
    note = (
        f"×: how many times faster the factorized form is. GFLOP/s: its matrix products over its whole time, beside "
        f"{matmul / 1e9:,.0f} GFLOP/s of one large matrix product. –: the direct form would need more than "
        f"{settings.direct_gib:g} GiB."
    )
    if powers:
        note += f" Peaks where T is at least 2 n grow as {', '.join(powers)}."
    return ReportTable("Forward and backward: peak memory, speed-up, share of the roofline", columns, rows, note)


def targets(exponents: dict[str, tuple[float, float] | None]) -> list[Goal]:
    own, direct = exponents["factorized"], exponents["direct"]
    if own is None or direct is None:
        return []
    met = abs(own[0] - 1) < 0.25 and abs(own[1] - 1) < 0.25
    return [
        Goal(
            "attention memory grows as T·n, not T·n²",
            "powers 1 and 1, to 0.25",
            f"T^{own[0]:.2f} · n^{own[1]:.2f}; direct form T^{direct[0]:.2f} · n^{direct[1]:.2f}",
            met,
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
