"""How fast is the factorized attention of many contexts over one sequence, and how much memory does it use?

Three implementations of mean-pooled context-aware attention, forward and backward. Their outputs and gradients are
compared before timing:

- factorized: three matrix products, no attention matrix per context (``ContextAwareAttention.pool``);
- reference: one n × n attention matrix per context;
- SDPA: torch's ``scaled_dot_product_attention`` with the queries of every (context, position), then pooling.

Peak memory counts live tensors during forward and backward. Its growth exponents are the least-squares fit of log peak
on log T and log n.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from harness import CellValue, Goal, Report, ReportTable, Timing, interleave, main
from peak_memory import peak_bytes
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from a2gen_rec.errors import ConfigError
from a2gen_rec.nn.attention import AttentionConfig, ContextAwareAttention
from a2gen_rec.utils.distributed import DistributedContext

VARIANTS = ("factorized", "SDPA", "reference")
GIB, MIB = 2**30, 2**20
_LIVE_MATRICES = 4
"""Maximum number of attention matrices per context that the reference holds at once."""


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        histories: lengths n of the sequence.
        contexts: numbers T of contexts.
        dim: width of tokens and contexts, and total width of the heads.
        heads: number of attention heads.
        max_reference_gib: maximum memory of the reference; it is skipped for larger sizes.
        repeats: timed runs of each variant.
        seed: random seed.
    """

    histories: list[int] = field(default_factory=lambda: [50, 100, 200, 500])
    contexts: list[int] = field(default_factory=lambda: [16, 64, 250, 1000])
    dim: int = 32
    heads: int = 4
    max_reference_gib: float = 4.0
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = {"histories": min(self.histories, default=0), "contexts": min(self.contexts, default=0)}
        sizes |= {"heads": self.heads, "dim": self.dim, "repeats": self.repeats}
        for name, minimum in sizes.items():
            if minimum < 1:
                raise ConfigError(f"{name} must be at least 1")
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} must be a multiple of heads {self.heads}")


QUICK = {"histories": [50, 100, 200], "contexts": [100, 400], "max_reference_gib": 0.5}


@dataclass
class Measurement:
    """Results for T contexts over n positions; skipped variants are absent."""

    contexts: int
    history: int
    forward: dict[str, Timing]
    forward_backward: dict[str, Timing]
    peak: dict[str, int]
    flops: int


class Workload:
    """One sequence and T contexts. Each context attends to a prefix, like the targets of a user window."""

    def __init__(self, attention: ContextAwareAttention, contexts: int, history: int, device: torch.device) -> None:
        self.attention = attention
        dim = attention.dim
        self.x = torch.randn(1, history, dim, device=device, requires_grad=True)
        self.context = torch.randn(1, contexts, dim, device=device, requires_grad=True)
        visible = torch.randint(1, history + 1, (1, contexts, 1), device=device)
        self.mask = torch.arange(history, device=device) < visible
        self.gradient = torch.randn(1, contexts, dim, device=device)

    def forward(self, variant: str) -> Tensor:
        if variant == "SDPA":
            return pool_with_sdpa(self.attention, self.x, self.context, self.mask)
        return self.attention.pool(self.x, self.context, self.mask, impl=variant)  # type: ignore[arg-type]

    def forward_backward(self, variant: str) -> list[Tensor]:
        """Return the output and all gradients."""
        leaves = [self.x, self.context, *self.attention.parameters()]
        out = self.forward(variant)
        out.backward(self.gradient)
        results = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        for leaf in leaves:
            leaf.grad = None
        return results


def pool_with_sdpa(attention: ContextAwareAttention, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """Compute ``attention.pool`` by SDPA: n queries per context, attention, mean over the visible positions.

    Args:
        attention: attention module.
        x: [1, n, dim] tokens.
        context: [1, T, dim] contexts.
        mask: [1, T, n] bool, with a visible position in every row.

    Returns:
        [1, T, dim]
    """
    hidden, projection = attention.sequence(x), attention.project_context(context)

    def split_heads(values: Tensor) -> Tensor:
        """[..., n, dim] -> [..., heads, n, d_head]"""
        return values.unflatten(-1, (attention.heads, -1)).transpose(-2, -3)

    query = split_heads(attention.query_sequence(hidden) / attention.d_head**0.5 + projection.query[0, :, None])
    key, value = (split_heads(layer(hidden)).expand_as(query) for layer in (attention.key, attention.value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[0, :, None, None], scale=1.0)
    visible = mask[0, :, None, :, None].to(x.dtype)
    pooled = (attended * visible).sum(-2) / visible.sum(-2)
    return attention.output((pooled * projection.gate[0, :, :, None]).flatten(1))[None] + projection.context


def measure(settings: Settings, process: DistributedContext) -> Report:
    torch.manual_seed(settings.seed)
    attention = ContextAwareAttention(settings.dim, settings.dim, AttentionConfig(settings.dim, settings.heads)).to(
        process.device
    )
    measurements = [
        measure_size(attention, contexts, history, settings, process.device)
        for contexts in settings.contexts
        for history in settings.histories
    ]
    matmul = matmul_flops_per_s(process.device)
    exponents = {variant: growth_exponents(measurements, variant) for variant in VARIANTS}
    full_size = measurements[-1]
    metrics = {
        "peak_mib_factorized": full_size.peak["factorized"] / MIB,
        "ratio_vs_sdpa": full_size.forward_backward["SDPA"].median / full_size.forward_backward["factorized"].median,
        "matmul_gflops_per_s": matmul / 1e9,
        "matmul_share": full_size.flops / full_size.forward_backward["factorized"].median / matmul,
    }
    with_reference = [size for size in measurements if "reference" in size.forward_backward]
    if with_reference:
        last = with_reference[-1]
        metrics["ratio_vs_reference"] = (
            last.forward_backward["reference"].median / last.forward_backward["factorized"].median
        )
        metrics["memory_ratio_vs_reference"] = last.peak["reference"] / last.peak["factorized"]
    for variant, powers in exponents.items():
        if powers is not None:
            name = variant.lower()
            metrics |= {f"peak_exponent_t_{name}": powers[0], f"peak_exponent_n_{name}": powers[1]}
    tables = [
        time_table("Forward, ms", measurements, lambda size: size.forward),
        time_table("Forward and backward, ms", measurements, lambda size: size.forward_backward),
        memory_table(measurements, matmul, exponents, settings),
    ]
    return Report(tables, memory_goals(exponents), metrics)


def measure_size(
    attention: ContextAwareAttention, contexts: int, history: int, settings: Settings, device: torch.device
) -> Measurement:
    workload = Workload(attention, contexts, history, device)
    reference_bytes = _LIVE_MATRICES * 4 * settings.heads * contexts * history**2
    variants = [
        variant for variant in VARIANTS if variant != "reference" or reference_bytes <= settings.max_reference_gib * GIB
    ]
    check_variants(workload, variants)
    peak = {variant: peak_bytes(partial(workload.forward_backward, variant), device) for variant in variants}
    with FlopCounterMode(display=False) as counter:
        workload.forward_backward("factorized")
    runs = {variant: partial(workload.forward_backward, variant) for variant in variants}
    both = interleave(runs, settings.repeats, 1, device)
    with torch.no_grad():
        runs_forward = {variant: partial(workload.forward, variant) for variant in variants}
        forward = interleave(runs_forward, settings.repeats, 1, device)
    return Measurement(contexts, history, forward, both, peak, counter.get_total_flops())


def check_variants(workload: Workload, variants: list[str]) -> None:
    """Check that outputs and gradients of all variants are equal up to rounding."""
    expected = workload.forward_backward(variants[-1])
    for variant in variants[:-1]:
        for index, (actual, value) in enumerate(zip(workload.forward_backward(variant), expected, strict=True)):
            tensor = f"gradient {index}" if index else "output"
            check_close(actual, value, f"{variant} and {variants[-1]} differ in the {tensor}")


def check_close(actual: Tensor, expected: Tensor, name: str) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * scale, msg=lambda reason: f"{name}: {reason}")


def matmul_flops_per_s(device: torch.device, size: int = 2048) -> float:
    """Return the FLOP/s of one large matrix product, an upper bound for any code made of matrix products."""
    a, b = torch.randn(2, size, size, device=device)
    timing = interleave({"matmul": lambda: a @ b}, repeats=7, device=device)["matmul"]
    return 2 * size**3 / timing.p10


def growth_exponents(measurements: list[Measurement], variant: str) -> tuple[float, float] | None:
    """Return the exponents of T and n in the growth of the peak, or None if the sizes do not determine them.

    Uses only sizes with T of at least 2 n: with fewer contexts, the shared n × n logits dominate.
    """
    large = [size for size in measurements if variant in size.peak and size.contexts >= 2 * size.history]
    if not large:
        return None
    sizes = torch.tensor([[size.contexts, size.history] for size in large], dtype=torch.float64).log()
    terms = torch.cat([sizes, torch.ones(len(large), 1, dtype=torch.float64)], dim=1)
    if torch.linalg.matrix_rank(terms) < 3:
        return None
    peaks = torch.tensor([[size.peak[variant]] for size in large], dtype=torch.float64).log()
    exponent_t, exponent_n, _ = torch.linalg.lstsq(terms, peaks).solution[:, 0].tolist()
    return exponent_t, exponent_n


def time_table(
    title: str, measurements: list[Measurement], timings: Callable[[Measurement], dict[str, Timing]]
) -> ReportTable:
    columns = ["T", "n"] + [name for variant in VARIANTS for name in (variant, "p10", "p90")]
    rows: list[list[CellValue]] = []
    for size in measurements:
        row: list[CellValue] = [size.contexts, size.history]
        for variant in VARIANTS:
            timing = timings(size).get(variant)
            values = [None] * 3 if timing is None else [timing.median, timing.p10, timing.p90]
            row += [None if value is None else 1000 * value for value in values]
        rows.append(row)
    return ReportTable(f"{title}: T contexts over n positions, median, p10 and p90", columns, rows)


def memory_table(
    measurements: list[Measurement], matmul: float, exponents: dict[str, tuple[float, float] | None], settings: Settings
) -> ReportTable:
    columns = ["T", "n", *(f"{variant} MiB" for variant in VARIANTS), "× SDPA", "× reference", "GFLOP/s", "% of matmul"]
    rows: list[list[CellValue]] = []
    for size in measurements:
        medians = {variant: timing.median for variant, timing in size.forward_backward.items()}
        factorized = medians["factorized"]
        peaks = [size.peak[variant] / MIB if variant in size.peak else None for variant in VARIANTS]
        ratios = [medians[variant] / factorized if variant in medians else None for variant in VARIANTS[1:]]
        speed = size.flops / factorized
        rows.append([size.contexts, size.history, *peaks, *ratios, speed / 1e9, 100 * speed / matmul])
    powers = [f"{variant} T^{pair[0]:.2f} · n^{pair[1]:.2f}" for variant, pair in exponents.items() if pair is not None]
    note = (
        f"×: speed of the factorized variant relative to the other. GFLOP/s: its matrix products over its total time; "
        f"one large matrix product reaches {matmul / 1e9:,.0f} GFLOP/s. –: the reference would need more than "
        f"{settings.max_reference_gib:g} GiB."
    )
    if powers:
        note += f" Growth of the peak for T of at least 2 n: {', '.join(powers)}."
    return ReportTable(
        "Forward and backward: peak memory, speed-up, share of matrix-product speed", columns, rows, note
    )


def memory_goals(exponents: dict[str, tuple[float, float] | None]) -> list[Goal]:
    factorized, reference = exponents["factorized"], exponents["reference"]
    if factorized is None or reference is None:
        return []
    met = abs(factorized[0] - 1) < 0.25 and abs(factorized[1] - 1) < 0.25
    return [
        Goal(
            "attention memory grows as T·n, not T·n²",
            "exponents 1 and 1, within 0.25",
            f"T^{factorized[0]:.2f} · n^{factorized[1]:.2f}; reference T^{reference[0]:.2f} · n^{reference[1]:.2f}",
            met,
        )
    ]


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
