"""How many target impressions per second does training process, and how much does each optimization contribute?

Two implementations of the same data and mathematics: user windows with factorized attention on sharded tables, as in
`a2gen train`, and a pointwise reference with one padded history per target (benchmarks/reference). Every target has a
full history. Losses and gradients are compared before timing. Then all variants train in turn, round by round, on the
same number of targets per round. Each turn starts with a few untimed steps, so that batches prefetched during the other
variants' turns do not count.

Stages are timed on a step without overlap, with the graph detached where looked-up rows enter the dense part. The
embedding stage includes the lookups, their backward pass and, if fused, the tables' update.
"""

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from harness import CellValue, Goal, Report, ReportTable, main
from optimizations import FULL, REFERENCE, VARIANTS, Optimizations, Variant, WindowTraining, full_state_dict
from reference.comparison import check_loss, gradients, randomize_zeros, relative_error
from reference.examples import build_examples, window_targets
from reference.pointwise import PointwiseA2Gen, reference_loss, to_reference_names
from reference.trainer import PointwiseTraining
from simulated_data import shared_full_history_dataset
from stages import STAGES, Stopwatch
from torch import Tensor

from a2gen_rec.config import Config, LoaderConfig, ModelConfig
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.models.factory import build_model
from a2gen_rec.utils.distributed import DistributedContext

WARMUP_STEPS = 6
"""Untimed steps of each turn: the number of batches that a loader and a pipeline prefetch."""

STAGE_ROUNDS = 3
"""Alternations of the two variants in the timing of stages."""

LOSS_TOLERANCE, GRADIENT_TOLERANCE, BF16_LOSS_TOLERANCE = 1e-5, 1e-4, 1e-2


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        history: history impressions of every target.
        dim: width of the model.
        num_heads: attention heads of the model.
        users: simulated users.
        items: simulated items.
        impressions_per_user: simulated impressions of each user.
        max_impressions: maximum impressions of a batch of windows.
        max_reference_attention_impressions: the same with the reference attention.
        batch_targets: targets of a batch of the pointwise reference.
        targets: minimum targets per variant and round.
        repeats: timed rounds, after one untimed round.
        compile: whether to measure torch.compile, which takes a minute or two to compile.
        seed: random seed.
    """

    history: int = 100
    dim: int = 32
    num_heads: int = 4
    users: int = 400
    items: int = 20_000
    impressions_per_user: int = 300
    max_impressions: int = 4096
    max_reference_attention_impressions: int = 256
    batch_targets: int = 64
    targets: int = 6144
    repeats: int = 5
    compile: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("seed", "compile") and value < 1:
                raise ConfigError(f"{name} {value} must be at least 1")


QUICK = {"users": 150, "targets": 1024, "repeats": 2, "compile": False}


COMPILE_NOTE = (
    " torch.compile applies to the item level only. The other levels process one piece per length of action sequences "
    "and would be recompiled for every new set of lengths."
)


@dataclass
class RoundResult:
    """Targets and seconds of one round of training, and the seconds of waiting for data."""

    targets: int
    seconds: float
    wait_s: float


@dataclass
class MeasuredVariant:
    """Results of a variant. ``difference`` is the relative difference of its loss from that of the reference."""

    variant: Variant
    training: PointwiseTraining | WindowTraining
    difference: float
    lookups_per_target: float
    rounds: list[RoundResult] = field(default_factory=list)

    def rate(self, q: float = 50) -> float:
        """Return targets per second, the ``q``-th percentile over rounds."""
        return float(np.percentile([result.targets / result.seconds for result in self.rounds], q))

    @property
    def wait_fraction(self) -> float:
        """Fraction of training time spent waiting for data."""
        return sum(result.wait_s for result in self.rounds) / sum(result.seconds for result in self.rounds)


@dataclass(frozen=True)
class BenchmarkContext:
    """Data and settings of all variants. Losses and gradients are compared on the windows ``rows`` of ``sample``."""

    data: str
    card: DatasetCard
    config: Config
    process: DistributedContext
    settings: Settings
    sample: WindowColumns
    rows: np.ndarray

    def window_training(self, optimizations: Optimizations, weights: dict[str, Tensor] | None = None) -> WindowTraining:
        """Build the training on windows with some optimizations."""
        impressions = (
            self.settings.max_impressions
            if optimizations.factorized
            else self.settings.max_reference_attention_impressions
        )
        config = replace(self.config, loader=LoaderConfig(max_impressions_per_batch=impressions))
        return WindowTraining(self.data, self.card, config, self.process, optimizations, weights)

    def pointwise_training(self) -> PointwiseTraining:
        """Build the training of the pointwise reference."""
        return PointwiseTraining(self.data, self.card, self.config, self.process, self.settings.batch_targets)


def measure(settings: Settings, process: DistributedContext) -> Report:
    # The reference has neither an occurrence head nor statistics.
    model = ModelConfig(
        dim=settings.dim,
        num_heads=settings.num_heads,
        max_history=settings.history,
        occurrence_head=False,
        statistics=False,
    )
    with shared_full_history_dataset(
        process, settings.users, settings.items, settings.impressions_per_user, settings.history, settings.seed
    ) as data:
        card = DatasetCard.load(data)
        files = sorted(str(file) for file in Path(data, "train").glob("*.parquet"))
        sample = read_columns(read_row_groups(files)[:1], card)
        context = BenchmarkContext(
            data, card, Config(model=model), process, settings, sample, np.arange(min(3, len(sample)))
        )
        gradient_difference = max_gradient_difference(context)
        measured = prepare_variants(context)
        try:
            train_interleaved(measured, settings, process.device)
            stages = time_stages(context)
        finally:
            for variant in measured:
                variant.training.close()
    return make_report(measured, stages, gradient_difference)


def max_gradient_difference(context: BenchmarkContext) -> float:
    """Return the maximum difference of a gradient between A2Gen and the reference, relative to its largest entry.

    Raises:
        UserError: the difference is too large, or the losses differ.
    """
    card, config, device = context.card, context.config, context.process.device
    torch.manual_seed(config.train.seed)
    model = build_model(card, config, device).to(device)
    randomize_zeros(model)
    batch = collate(
        context.sample,
        context.rows,
        EmbeddingTables.from_card(card, config.model).full_tables,
        bucket_overhead=config.loader.bucket_overhead_tokens,
    ).to(device)
    loss, _ = Loss(config.loss)(model(batch), batch)
    loss.backward()
    reference = PointwiseA2Gen(card, config.model).to(device)
    reference.load_state_dict(to_reference_names(model.state_dict()))
    targets = window_targets(context.sample, context.rows)
    examples = build_examples(context.sample, *targets, config.model.max_history).to(device)
    expected = reference_loss(reference(examples), examples, config.loss)
    expected.backward()
    check_loss("A2Gen", loss.item(), expected.item(), LOSS_TOLERANCE)
    actual, expected_gradients = to_reference_names(gradients(model)), gradients(reference)
    difference = max(relative_error(actual[name], gradient) for name, gradient in expected_gradients.items())
    if not difference <= GRADIENT_TOLERANCE:
        raise UserError(f"A2Gen: gradients differ from the reference by a relative {difference:.1e}; nothing was timed")
    return difference


def prepare_variants(context: BenchmarkContext) -> list[MeasuredVariant]:
    """Build all variants with the same initial weights and compare their losses with the reference."""
    seeded = context.window_training(Optimizations(prefetch=False))
    torch.manual_seed(context.config.train.seed)
    randomize_zeros(seeded.model.ranker)
    weights = full_state_dict(seeded.model, context.process)
    measured: list[MeasuredVariant] = []
    expected = math.nan
    for variant in VARIANTS:
        optimizations = variant.optimizations
        if optimizations is None:
            training: PointwiseTraining | WindowTraining = context.pointwise_training()
            training.model.load_state_dict(to_reference_names(weights))
            loss = expected = training.loss(context.sample, context.rows)
        else:
            if optimizations.compile_item_level and not context.settings.compile:
                continue
            training = context.window_training(optimizations, weights)
            loss = training.loss(context.sample, context.rows)
        tolerance = BF16_LOSS_TOLERANCE if optimizations is not None and optimizations.bf16 else LOSS_TOLERANCE
        difference = check_loss(variant.name, loss, expected, tolerance)
        measured.append(MeasuredVariant(variant, training, difference, training.lookups_per_target(32)))
    return measured


def train_interleaved(measured: list[MeasuredVariant], settings: Settings, device: torch.device) -> None:
    """Train every variant once per round; the first round is not timed."""
    for round_index in range(1 + settings.repeats):
        for variant in measured:
            result = train_round(variant.training, settings.targets, device)
            if round_index:
                variant.rounds.append(result)


def train_round(training: PointwiseTraining | WindowTraining, targets: int, device: torch.device) -> RoundResult:
    """Train on at least ``targets`` targets."""
    for _ in range(WARMUP_STEPS):
        training.step()
    synchronize(device)
    start, wait_s, done = time.perf_counter(), training.wait_s, 0
    while done < targets:
        done += training.step()
    synchronize(device)
    return RoundResult(done, time.perf_counter() - start, training.wait_s - wait_s)


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_stages(context: BenchmarkContext) -> dict[str, dict[str, float]]:
    """Return variant -> stage -> milliseconds per 1,000 targets, of interleaved steps without overlap."""
    variants: dict[str, PointwiseTraining | WindowTraining] = {
        "reference": context.pointwise_training(),
        "A2Gen": context.window_training(Optimizations()),
    }
    seconds = {name: dict.fromkeys(STAGES, 0.0) for name in variants}
    done = dict.fromkeys(variants, 0)
    try:
        for round_index in range(1 + STAGE_ROUNDS):
            for name, training in variants.items():
                watch = Stopwatch(context.process.device)
                targets = 0
                while targets < context.settings.targets // STAGE_ROUNDS:
                    targets += training.staged_step(watch)
                if round_index:
                    done[name] += targets
                    for stage in STAGES:
                        seconds[name][stage] += watch.seconds[stage]
    finally:
        for training in variants.values():
            training.close()
    return {
        name: {stage: 1e6 * value / done[name] for stage, value in stages.items()} for name, stages in seconds.items()
    }


def make_report(
    measured: list[MeasuredVariant], stages: dict[str, dict[str, float]], gradient_difference: float
) -> Report:
    """Build the tables, goals and metrics."""
    reference, full = measured[REFERENCE], measured[FULL]
    ratio, lookup_ratio = full.rate() / reference.rate(), reference.lookups_per_target / full.lookups_per_target
    metrics = {
        "ratio_vs_reference": ratio,
        "targets_per_s": full.rate(),
        "reference_targets_per_s": reference.rate(),
        "lookup_ratio": lookup_ratio,
        "data_wait_fraction": full.wait_fraction,
        "gradient_difference": gradient_difference,
    }
    goals = [
        Goal("Targets/s relative to the reference", "≥ 10×", f"{ratio:.1f}×", ratio >= 10),
        Goal(
            "Item lookups per target relative to the reference", "≤ 1/20", f"1/{lookup_ratio:.0f}", lookup_ratio >= 20
        ),
        Goal("Fraction of time waiting for data", "< 5 %", f"{full.wait_fraction:.1%}", full.wait_fraction < 0.05),
    ]
    return Report([rate_table(measured, gradient_difference), stage_table(stages)], goals, metrics)


def rate_table(measured: list[MeasuredVariant], gradient_difference: float) -> ReportTable:
    reference = measured[REFERENCE]
    columns = ["variant", "targets/s", "p10 targets/s", "p90 targets/s", "× previous", "× reference", "lookups/target"]
    rows: list[list[CellValue]] = []
    for result in measured:
        is_reference = result is reference
        rows.append(
            [
                result.variant.name,
                result.rate(),
                result.rate(10),
                result.rate(90),
                None if is_reference else result.rate() / measured[result.variant.base_index].rate(),
                result.rate() / reference.rate(),
                result.lookups_per_target,
                round(100 * result.wait_fraction, 1),
                None if is_reference else result.difference,
            ]
        )
    note = (
        "+: one optimization more than the row above; × previous: relative to the variant with one optimization less. "
        "Lookups are those of items. Loss error: relative difference from the reference before training. Gradients "
        f"differ by at most {gradient_difference:.0e} of a parameter's largest entry."
    )
    if measured[-1].variant is VARIANTS[-1]:
        note += COMPILE_NOTE
    return ReportTable("Targets per second by optimization", [*columns, "waiting %", "loss error"], rows, note)


def stage_table(stages: dict[str, dict[str, float]]) -> ReportTable:
    totals = {name: sum(times.values()) for name, times in stages.items()}
    columns = ["stage", *(column for name in stages for column in (f"{name} ms", f"{name} %"))]
    rows: list[list[CellValue]] = [
        [
            stage,
            *(
                round(value, 1)
                for name, times in stages.items()
                for value in (times[stage], 100 * times[stage] / totals[name])
            ),
        ]
        for stage in STAGES
    ]
    return ReportTable("Stages of a step without overlap, ms per 1,000 targets", columns, rows)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
