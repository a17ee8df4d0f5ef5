"""How many target impressions a second does training take, and what does each lever bring?

The same data and mathematics twice: user windows with factorized attention on sharded tables, as `a2gen train` runs
them, and a pointwise reference, one padded history per target (benchmarks/reference). Every target has a full
history. Losses and gradients are compared before anything is timed; then all forms train in turn, round after round,
each on the same number of targets per round. A form first takes a few steps off the clock, so that batches made while
it waited for its turn do not count in its favour.

The split of a step is timed stage by stage on a step without overlap, the graph cut where looked-up rows enter the
dense part: embedding is the lookups, their backward pass and, where it is fused into that, the tables' update.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from harness import Goal, Report, ReportTable, main
from optimizations import Optimizations, WindowTraining, whole_weights
from reference.examples import build as build_examples
from reference.examples import targets_of
from reference.pointwise import PointwiseA2Gen, renamed
from reference.pointwise import loss as reference_loss
from reference.trainer import Pointwise
from simulated_data import simulated
from stages import STAGES, Stopwatch
from torch import Tensor

from a2gen_rec.config import Config, LoaderConfig, ModelConfig
from a2gen_rec.data.batch import collate
from a2gen_rec.data.columns import WindowColumns
from a2gen_rec.data.parquet_reader import read_columns, read_row_groups
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError, UserError
from a2gen_rec.losses.loss import Loss
from a2gen_rec.models.embedding_tables import EmbeddingTables
from a2gen_rec.models.factory import build_model
from a2gen_rec.utils.distributed import DistributedContext

LEAD = 6
"""Steps before the clock starts: the batches that a loader and a pipeline hold ready."""

TURNS = 3
"""Alternations of the two forms while steps are split."""

SAME_LOSS, SAME_GRADIENT, SAME_IN_BF16 = 1e-5, 1e-4, 1e-2


@dataclass
class Settings:
    """Sizes and repetitions.

    Attributes:
        history: impressions that every target may look back on; dim, heads: of the model.
        users, items, impressions_per_user: of the simulated log.
        max_impressions: of a batch of windows; direct_impressions: the same where attention is direct.
        batch_targets: of a batch of the reference.
        targets: trained on per form and round, at the least.
        repeats: rounds that count, after one that does not.
        compile: measure torch.compile too, which takes a minute or two to compile.
    """

    history: int = 100
    dim: int = 32
    heads: int = 4
    users: int = 400
    items: int = 20_000
    impressions_per_user: int = 300
    max_impressions: int = 4096
    direct_impressions: int = 256
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


@dataclass(frozen=True)
class Row:
    """One form in training: its name, its levers (the reference has none), and the place of the row it adds one to."""

    name: str
    levers: Optimizations | None
    base: int


ROWS = [
    Row("pointwise reference", None, 0),
    Row("+ one history per window", Optimizations(False, False, False, False, False), 0),
    Row("+ factorized attention", Optimizations(True, False, False, False, False), 1),
    Row("+ ragged action level", Optimizations(True, True, False, False, False), 2),
    Row("+ deduplicated lookups", Optimizations(True, True, True, False, False), 3),
    Row("+ sharded tables, fused update", Optimizations(True, True, True, True, False), 4),
    Row("+ batches and lookups ahead: ours", Optimizations(), 5),
    Row("ours in bf16", Optimizations(bf16=True), 6),
    Row("ours, item level compiled", Optimizations(compiled=True), 6),
]
REFERENCE, OURS = 0, 6
COMPILED = (
    " torch.compile takes the item level alone: the other levels work on one piece per length of action sequences, and "
    "would be compiled again for every new set of lengths."
)


@dataclass
class Work:
    """Targets that a form trained on in one round, the seconds it took, and those of them spent waiting for data."""

    targets: int
    seconds: float
    wait_s: float


@dataclass
class Measured:
    """A form, its rounds, and by how much its loss differs from the reference's, as a share of it."""

    row: Row
    form: Pointwise | WindowTraining
    difference: float
    lookups: float
    rounds: list[Work] = field(default_factory=list)

    def rate(self, q: float = 50) -> float:
        """Targets per second, the ``q``-th percentile of the rounds."""
        return float(np.percentile([work.targets / work.seconds for work in self.rounds], q))

    @property
    def wait_share(self) -> float:
        return sum(work.wait_s for work in self.rounds) / sum(work.seconds for work in self.rounds)


@dataclass(frozen=True)
class Setting:
    """What all forms share; losses and gradients are compared on the windows ``rows`` of ``sample``."""

    data: str
    card: DatasetCard
    config: Config
    process: DistributedContext
    settings: Settings
    sample: WindowColumns
    rows: np.ndarray

    def windows(self, levers: Optimizations, weights: dict[str, Tensor] | None = None) -> WindowTraining:
        impressions = self.settings.max_impressions if levers.factorized else self.settings.direct_impressions
        config = replace(self.config, loader=LoaderConfig(max_impressions_per_batch=impressions))
        return WindowTraining(self.data, self.card, config, self.process, levers, weights)

    def pointwise(self) -> Pointwise:
        return Pointwise(self.data, self.card, self.config, self.process, self.settings.batch_targets)


def measure(settings: Settings, process: DistributedContext) -> Report:
    # The reference is the source's model, which has no such tower.
    model = ModelConfig(dim=settings.dim, num_heads=settings.heads, max_history=settings.history, occurrence_head=False)
    with dataset(settings, process) as data:
        card = DatasetCard.load(data)
        files = sorted(str(file) for file in Path(data, "train").glob("*.parquet"))
        sample = read_columns(read_row_groups(files)[:1], card)
        setting = Setting(data, card, Config(model=model), process, settings, sample, np.arange(min(3, len(sample))))
        gradient = gradient_difference(setting)
        measured = prepare_forms(setting)
        try:
            train_in_turn(measured, settings, process.device)
            split = stage_split(setting)
        finally:
            for each in measured:
                each.form.close()
    return report(measured, split, gradient)


@contextmanager
def dataset(settings: Settings, process: DistributedContext) -> Iterator[str]:
    """A simulated dataset whose training targets all have a full history; the first rank makes it for all."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(Path(scratch, "data"))
        if process.is_main:
            simulated(
                folder,
                settings.users,
                settings.items,
                settings.impressions_per_user,
                settings.history,
                seed=settings.seed,
            )
            full = [keep_full_histories(file, settings.history) for file in Path(folder, "train").glob("*.parquet")]
            if sum(full) < 8 * process.world_size:
                raise ConfigError(
                    f"impressions_per_user {settings.impressions_per_user} or users {settings.users} are too few for "
                    f"histories of {settings.history}"
                )
        shared = [folder]
        dist.broadcast_object_list(shared, src=0)
        yield shared[0]
        dist.barrier()


def keep_full_histories(file: Path, history: int) -> int:
    """Keep of a file the windows whose targets all have that many impressions before them; returns how many."""
    windows = pq.read_table(file, filters=pc.field("first_target") >= history)
    file.unlink()
    if windows.num_rows:
        pq.write_table(windows, file, row_group_size=64)
    return windows.num_rows


def gradient_difference(setting: Setting) -> float:
    """Largest difference of any parameter's gradient between A2Gen and the reference, as a share of its largest entry.

    Raises:
        UserError: it is too large, or their losses differ.
    """
    card, config, device = setting.card, setting.config, setting.process.device
    torch.manual_seed(config.train.seed)
    model = build_model(card, config, device).to(device)
    fill_zeros(model)
    batch = collate(
        setting.sample,
        setting.rows,
        EmbeddingTables.from_card(card, config.model).full_tables,
        bucket_overhead=config.loader.bucket_overhead_tokens,
    ).to(device)
    loss, _ = Loss(config.loss)(model(batch), batch)
    loss.backward()
    reference = PointwiseA2Gen(card, config.model).to(device)
    reference.load_state_dict(renamed(model.state_dict()))
    targets = targets_of(setting.sample, setting.rows)
    examples = build_examples(setting.sample, *targets, config.model.max_history).to(device)
    expected = reference_loss(reference(examples), examples, config.loss)
    expected.backward()
    check_loss("A2Gen", loss.item(), expected.item(), SAME_LOSS)
    found, wanted = renamed(gradients(model)), gradients(reference)
    largest = max(relative(found[name], gradient) for name, gradient in wanted.items())
    if not largest <= SAME_GRADIENT:
        raise UserError(f"A2Gen: gradients differ from the reference's by {largest:.1e} of their size")
    return largest


def fill_zeros(module: torch.nn.Module) -> None:
    """Draw what begins at zero: it would hide the gradients, and the faults, of what comes before it."""
    for parameter in module.parameters():
        if not parameter.count_nonzero():
            torch.nn.init.normal_(parameter, std=0.1)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Of every parameter; zeros for those the loss does not depend on."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def check_loss(name: str, found: float, expected: float, tolerance: float) -> float:
    """The losses' relative difference.

    Raises:
        UserError: it is beyond ``tolerance``.
    """
    difference = abs(found - expected) / abs(expected)
    if not difference <= tolerance:
        raise UserError(f"{name}: loss {found:.7g} differs from {expected:.7g}; nothing was timed")
    return difference


def prepare_forms(setting: Setting) -> list[Measured]:
    """All forms, begun at the same weights, each checked to give the reference's loss."""
    seeded = setting.windows(Optimizations(ahead=False))
    torch.manual_seed(setting.config.train.seed)
    fill_zeros(seeded.model.ranker)
    weights = whole_weights(seeded.model, setting.process)
    measured: list[Measured] = []
    expected = math.nan
    for row in ROWS:
        if row.levers is None:
            form: Pointwise | WindowTraining = setting.pointwise()
            form.model.load_state_dict(renamed(weights))
            loss = expected = form.loss(setting.sample, setting.rows)
        else:
            if row.levers.compiled and not setting.settings.compile:
                continue
            form = setting.windows(row.levers, weights)
            loss = form.loss(setting.sample, setting.rows)
        tolerance = SAME_IN_BF16 if row.levers is not None and row.levers.bf16 else SAME_LOSS
        measured.append(Measured(row, form, check_loss(row.name, loss, expected, tolerance), form.lookups(32)))
    return measured


def train_in_turn(measured: list[Measured], settings: Settings, device: torch.device) -> None:
    """Round after round, every form once; the first round does not count."""
    for turn in range(1 + settings.repeats):
        for each in measured:
            work = train(each.form, settings.targets, device)
            if turn:
                each.rounds.append(work)


def train(form: Pointwise | WindowTraining, targets: int, device: torch.device) -> Work:
    """Train on at least so many targets."""
    for _ in range(LEAD):
        form.step()
    synchronize(device)
    began, waited, done = time.perf_counter(), form.wait_s, 0
    while done < targets:
        done += form.step()
    synchronize(device)
    return Work(done, time.perf_counter() - began, form.wait_s - waited)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stage_split(setting: Setting) -> dict[str, dict[str, float]]:
    """Form -> stage -> milliseconds per 1,000 targets of steps without overlap, in turns."""
    forms: dict[str, Pointwise | WindowTraining] = {
        "reference": setting.pointwise(),
        "ours": setting.windows(Optimizations()),
    }
    split = {name: dict.fromkeys(STAGES, 0.0) for name in forms}
    done = dict.fromkeys(forms, 0)
    try:
        for turn in range(1 + TURNS):
            for name, form in forms.items():
                watch = Stopwatch(setting.process.device)
                targets = 0
                while targets < setting.settings.targets // TURNS:
                    targets += form.staged_step(watch)
                if turn:
                    done[name] += targets
                    for stage in STAGES:
                        split[name][stage] += watch.seconds[stage]
    finally:
        for form in forms.values():
            form.close()
    return {
        name: {stage: 1e6 * seconds / done[name] for stage, seconds in stages.items()} for name, stages in split.items()
    }


def report(measured: list[Measured], split: dict[str, dict[str, float]], gradient: float) -> Report:
    reference, ours = measured[REFERENCE], measured[OURS]
    levers = ReportTable(
        "Targets per second, one lever after another",
        ["form", "targets/s", "p10", "p90", "× changed", "× reference", "lookups/target", "wait %", "loss error"],
        [
            [
                each.row.name,
                each.rate(),
                each.rate(10),
                each.rate(90),
                each.rate() / measured[each.row.base].rate() if each is not reference else None,
                each.rate() / reference.rate(),
                each.lookups,
                round(100 * each.wait_share, 1),
                each.difference if each is not reference else None,
            ]
            for each in measured
        ],
        "Each + adds one lever to the row above; × changed: against the row with one lever less. Lookups are of items. "
        "Loss error: relative, against the reference, before training; gradients of ours differ by at most "
        f"{gradient:.0e} of a parameter's largest.{COMPILED if measured[-1].row is ROWS[-1] else ''}",
    )
    totals = {name: sum(stages.values()) for name, stages in split.items()}
    stages = ReportTable(
        "A step without overlap, stage by stage: milliseconds per 1,000 targets",
        ["stage", *(column for name in split for column in (name, f"{name}, %"))],
        [
            [
                stage,
                *(
                    round(value, 1)
                    for name in split
                    for value in (split[name][stage], 100 * split[name][stage] / totals[name])
                ),
            ]
            for stage in STAGES
        ],
    )
    ratio, lookups = ours.rate() / reference.rate(), reference.lookups / ours.lookups
    figures = {
        "ratio_vs_reference": ratio,
        "targets_per_s": ours.rate(),
        "reference_targets_per_s": reference.rate(),
        "lookup_ratio": lookups,
        "data_wait_share": ours.wait_share,
        "gradient_difference": gradient,
    }
    targets = [
        Goal("Targets/s against the reference's", "≥ 10×", f"{ratio:.1f}×", ratio >= 10),
        Goal("Item lookups per target, of the reference's", "≤ 1/20", f"1/{lookups:.0f}", lookups >= 20),
        Goal("Share of training spent waiting for data", "< 5 %", f"{ours.wait_share:.1%}", ours.wait_share < 0.05),
    ]
    return Report([levers, stages], targets, figures)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
