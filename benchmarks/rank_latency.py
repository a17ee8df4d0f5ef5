"""How long does ranking take for one user, by number of candidates and length of the history?

A request consists of one user's past impressions and the table rows of the candidates. The response is the probability
of every action and the expected watch time, best candidates first. Reading the history from disk is not included. All
variants use the same trained weights and compute the same result:

- factorized: one encoded history, attention of all candidates in three matrix products, and the prefix tree of action
  sequences explored up to the error bound;
- cached: as factorized, with cached encodings of the actions inside past impressions, which depend on no candidate;
- reference: an n×n attention matrix per candidate (`--model.attention_impl reference`) and the full prefix tree;
- reference attention, full tree: only one of the two, with the fast implementation of the other;
- pointwise: one padded history per candidate (benchmarks/reference), prefix tree as in factorized.

A model is trained for a few steps for every length of the history: the number of explored action sequences depends on
the entropy of its predictions.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import CellValue, Goal, Report, ReportTable, Timing, main
from reference.examples import Examples, build_examples
from reference.pointwise import PointwiseA2Gen, to_reference_names
from simulated_data import make_dataset
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import FULL_WINDOW, WindowBatch
from a2gen_rec.data.card import DatasetCard
from a2gen_rec.data.collate import collate
from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.data.window_reader import read_columns, read_row_groups
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.embedding_tables import ACTION, TIME, EmbeddingTables
from a2gen_rec.nn.generator import StepEmbeddings
from a2gen_rec.nn.marginals import ActionMarginals, action_marginals
from a2gen_rec.runs.next_window import append_candidates_now
from a2gen_rec.training.trainer import Trainer
from a2gen_rec.utils.distributed import DistributedContext

GIB = 2**30
REPORTED_SIZE = (1000, 100)
"""Candidates and history length of the metrics and goals."""
FAST_VARIANTS = ("factorized", "cached")
"""Variants with many timed requests."""
REQUESTS = 8
"""Number of distinct requests that the timed runs cycle through."""


@dataclass
class Settings:
    """Sizes of the requests and of the model.

    Attributes:
        candidates: numbers of candidates of a request.
        histories: lengths of the history of a request.
        dim: width of the model.
        num_heads: attention heads of the model.
        max_unexplored_mass: bound on the probability of unexplored action sequences.
        requests: timed requests of the fast variants at every size, within ``seconds``; at least 50 are required for a
            99th percentile.
        slow_requests: timed requests of the other variants.
        seconds: time limit of a fast variant at one size.
        threads: threads of a request. Its operations are too small for several cores, which can serve other requests.
        max_reference_gib: maximum size of the reference's attention matrices; the slow variants are skipped above it.
        users: simulated users.
        steps: training steps.
        seed: random seed.
    """

    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000])
    histories: list[int] = field(default_factory=lambda: [50, 100, 500])
    dim: int = 32
    num_heads: int = 4
    max_unexplored_mass: float = 0.03
    requests: int = 200
    slow_requests: int = 3
    seconds: float = 8.0
    threads: int = 1
    max_reference_gib: float = 2.0
    users: int = 200
    steps: int = 300
    seed: int = 0


QUICK = {"candidates": [100, 1000], "histories": [100], "requests": 60, "slow_requests": 3, "users": 100, "steps": 100}


@dataclass(frozen=True)
class Request:
    """A user's history as one window, and the candidates."""

    history: WindowColumns
    items: CandidateItems


@dataclass(frozen=True)
class Ranking:
    """Candidates sorted by expected watch time, and their predictions in request order."""

    order: Tensor
    marginals: ActionMarginals


class RankerVariants:
    """Ranking variants with the weights of one trained model."""

    def __init__(self, trainer: Trainer, max_unexplored_mass: float) -> None:
        self.card, self.config, self.device = trainer.card, trainer.config, trainer.process.device
        self.max_unexplored_mass = max_unexplored_mass
        trainer.training_model.model_parallel.eval()
        self.model = trainer.training_model.model
        self.ranker: Any = self.model.ranker  # Any: A2Gen's submodules are called directly
        self.reference = PointwiseA2Gen(self.card, self.config.model).to(self.device).eval()
        weights = {name: _full_tensor(value) for name, value in self.model.state_dict().items()}
        self.reference.load_state_dict(to_reference_names(weights))

    def rank(
        self,
        request: Request,
        attention_impl: str = "factorized",
        max_unexplored_mass: float | None = None,
        states: Tensor | None = None,
    ) -> Ranking:
        """Rank by the model.

        Args:
            request: request to rank.
            attention_impl: implementation of the item-level attention.
            max_unexplored_mass: error bound; default: the benchmark's setting.
            states: cached action states.
        """
        encoder = self.ranker.encoder
        encoder.impl = attention_impl
        targets = self.model.encode(self.batch(request), states)
        encoder.impl = "factorized"
        if max_unexplored_mass is None:
            max_unexplored_mass = self.max_unexplored_mass
        return _to_ranking(self.ranker.marginals(targets, max_unexplored_mass))

    def pointwise(self, request: Request) -> Ranking:
        """Rank by the pointwise reference."""
        examples, ranker = self.examples(request), self.ranker
        context = self.reference.context(self.reference.embed(examples), examples)
        weights = self.reference.state_dict()
        tables = StepEmbeddings(weights[f"tables.{ACTION}.weight"], weights[f"tables.{TIME}.weight"])
        marginals = action_marginals(
            ranker.generator, context, tables, ranker._feeds_back_time, self.max_unexplored_mass
        )
        return _to_ranking(marginals)

    def batch(self, request: Request) -> WindowBatch:
        """Collate a request as one window whose targets are the candidates."""
        columns = append_candidates_now(request.history, request.items, self.card)
        tables, loader = EmbeddingTables.from_card(self.card, self.config.model).full_tables, self.config.loader
        batch = collate(
            columns,
            np.zeros(1, np.int64),
            tables,
            request_gap_s=FULL_WINDOW,
            bucket_overhead=loader.bucket_overhead_tokens,
        )
        return batch.to(self.device)

    def examples(self, request: Request) -> Examples:
        """Build one example per candidate: the first candidate's example with the items replaced."""
        columns = append_candidates_now(request.history, request.items, self.card)
        first = build_examples(columns, np.zeros(1, np.int64), columns.first_target, self.model.ranker.max_history)
        examples = first.map_tensors(lambda part: part.expand(len(request.items.ids), *part.shape[1:]))
        items = {name: torch.from_numpy(rows) for name, rows in request.items.rows.items()}
        return replace(examples, target={**examples.target, **items}).to(self.device)

    def states(self, request: Request) -> Tensor:
        """Encode the action states, which serving caches between requests."""
        batch = self.batch(request)
        return self.model.ranker.encode_actions(self.model.embeddings(batch.sparse), batch)


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Compare and time the variants on requests of every size."""
    if process.world_size > 1:
        raise ConfigError("a request runs in one process; run this benchmark without torchrun")
    torch.set_num_threads(settings.threads)
    timings_by_size: dict[tuple[int, int], dict[str, Timing]] = {}
    for history in settings.histories:
        with tempfile.TemporaryDirectory() as scratch:
            variants, columns = _train_model(history, settings, process, Path(scratch))
            with torch.no_grad():
                timings_by_size |= {
                    (count, history): _measure_size(variants, columns, count, history, settings)
                    for count in settings.candidates
                }
    return _make_report(timings_by_size, settings)


def _train_model(
    history: int, settings: Settings, process: DistributedContext, scratch: Path
) -> tuple[RankerVariants, WindowColumns]:
    """Train a model on histories of one length; return its variants and the windows for drawing requests."""
    # The reference has neither an occurrence head nor statistics.
    model = ModelConfig(dim=settings.dim, num_heads=settings.num_heads, occurrence_head=False, statistics=False)
    config = Config(model=model)
    config.loader.prefetch, config.train.seed = False, settings.seed
    config.train.epochs, config.train.max_steps, config.train.validation_interval = 1000, settings.steps, settings.steps
    data = make_dataset(scratch / "data", settings.users, 5000, history + 60, history, seed=settings.seed)
    trainer = Trainer(config, data, str(scratch / "run"), process)
    trainer.fit()
    files = [str(file) for file in Path(data, "train").glob("*.parquet")]
    return RankerVariants(trainer, settings.max_unexplored_mass), read_columns(read_row_groups(files), trainer.card)


def _measure_size(
    variants: RankerVariants, columns: WindowColumns, count: int, history: int, settings: Settings
) -> dict[str, Timing]:
    """Check that all variants give equal rankings for one request size, then time them."""
    rng = np.random.default_rng([settings.seed, count, history])
    requests = [_draw_request(variants.card, columns, count, history, rng) for _ in range(REQUESTS)]
    states = [variants.states(request) for request in requests]
    runs: dict[str, Callable[[int], Ranking]] = {
        "factorized": lambda index: variants.rank(requests[index]),
        "cached": lambda index: variants.rank(requests[index], states=states[index]),
        "full tree": lambda index: variants.rank(requests[index], max_unexplored_mass=0.0),
    }
    if count * history**2 * settings.num_heads * 4 <= settings.max_reference_gib * GIB:
        runs |= {
            "reference attention": lambda index: variants.rank(requests[index], "reference"),
            "reference": lambda index: variants.rank(requests[index], "reference", 0.0),
            "pointwise": lambda index: variants.pointwise(requests[index]),
        }
    _check_equal({name: run(0) for name, run in runs.items()}, settings.max_unexplored_mass)
    return _time_variants(runs, settings, variants.device)


def _draw_request(
    card: DatasetCard, columns: WindowColumns, count: int, history: int, rng: np.random.Generator
) -> Request:
    """Draw ``history`` impressions of a random user and random candidates."""
    window = columns.take(rng.choice(np.flatnonzero(columns.lengths >= history), 1))
    rows = {feature.name: rng.integers(1, feature.cardinality, count) for feature in card.features_at("item")}
    statistics = np.zeros((count, len(card.statistics)), np.float16)
    numbers = np.zeros((count, len(card.numbers_at("item"))), np.float32)
    items = CandidateItems([""] * count, np.ones(count, bool), rows, statistics, numbers)
    return Request(_truncate_history(window, history), items)


def _truncate_history(window: WindowColumns, history: int) -> WindowColumns:
    """Keep the last ``history`` impressions of one window."""
    skip = len(window.ts_ms) - history
    token = window.action_starts[skip]
    return replace(
        window,
        lengths=np.array([history]),
        impression_ids={name: ids[skip:] for name, ids in window.impression_ids.items()},
        session={name: rows[skip:] for name, rows in window.session.items()},
        outcome={name: rows[skip:] for name, rows in window.outcome.items()},
        ts_ms=window.ts_ms[skip:],
        end_ms=window.end_ms[skip:],
        labels=window.labels[skip:],
        objectives=window.objectives[skip:],
        oracle=window.oracle[skip:],
        action_starts=window.action_starts[skip:] - token,
        action_lengths=window.action_lengths[skip:],
        action=window.action[token:],
        offset_s=window.offset_s[token:],
    )


def _full_tensor(value: Any) -> Tensor:
    """Return a parameter, or the only shard of a table on this process."""
    return value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value


def _to_ranking(marginals: ActionMarginals) -> Ranking:
    return Ranking(marginals.time[:, -1].argsort(descending=True), marginals)


def _check_equal(rankings: dict[str, Ranking], max_unexplored_mass: float) -> None:
    """Check that all variants are within the error bound, and equal if they explore the same tree.

    Raises:
        RuntimeError: they are not.
    """
    rounding = 1e-4
    exact, bounded = rankings["full tree"].marginals.probability, rankings["factorized"].marginals
    for name, ranking in rankings.items():
        error = float((exact - ranking.marginals.probability).abs().max())
        if error > min(float(ranking.marginals.unexplored_mass.max()), max_unexplored_mass) + rounding:
            raise RuntimeError(f"{name} differs from the exact probabilities by {error}")
    for name in rankings.keys() & {"cached", "reference attention", "pointwise"}:
        # Rounding may move a sequence across the exploration bound; the change is at most the mass of the sequence.
        error = float((rankings[name].marginals.probability - bounded.probability).abs().max())
        if error > max_unexplored_mass / 5:
            raise RuntimeError(f"{name} differs from the factorized probabilities by {error}")


def _time_variants(
    variants: dict[str, Callable[[int], Ranking]], settings: Settings, device: torch.device
) -> dict[str, Timing]:
    """Time the variants in turn: in each round, one request by each slow variant and many by each fast one."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    variants["factorized"](0)
    affordable = settings.seconds / (time.perf_counter() - start)
    fast_repeats = max(1, int(min(settings.requests, affordable)) // settings.slow_requests)
    for round_index in range(-1, settings.slow_requests):
        for name, run in variants.items():
            for repeat in range(fast_repeats if name in FAST_VARIANTS else 1):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run((round_index + repeat) % REQUESTS).order.tolist()  # the response; tolist() synchronizes
                if round_index >= 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def _make_report(timings_by_size: dict[tuple[int, int], dict[str, Timing]], settings: Settings) -> Report:
    slow_variants = ("reference", "reference attention", "full tree", "pointwise")
    rows: list[list[CellValue]] = []
    ratios: list[list[CellValue]] = []
    for (count, history), timings in timings_by_size.items():
        for name in sorted(timings, key=lambda name: name not in FAST_VARIANTS):
            timing = timings[name]
            p10, p50, p90, p99 = (1000 * timing.percentile(q) for q in (10, 50, 90, 99))
            rows.append(
                [count, history, name, p10, p50, p90, p99 if len(timing.seconds) >= 50 else None, len(timing.seconds)]
            )
        factorized = timings["factorized"].median
        relative: list[CellValue] = [
            timings[name].median / factorized if name in timings else None for name in slow_variants
        ]
        ratios.append([count, history, *relative, factorized / timings["cached"].median])
    tables = [
        ReportTable(
            "Latency of a request",
            ["candidates", "history", "variant", "p10 ms", "p50 ms", "p90 ms", "p99 ms", "requests"],
            rows,
            f"error of probabilities at most {settings.max_unexplored_mass}, 0 with the full tree; "
            "–: no p99 from fewer than 50 requests",
        ),
        ReportTable(
            "Latency relative to the factorized variant",
            ["candidates", "history", *slow_variants, "factorized / cached"],
            ratios,
            f"–: attention matrices of more than {settings.max_reference_gib:g} GiB",
        ),
    ]
    if REPORTED_SIZE not in timings_by_size or "reference" not in timings_by_size[REPORTED_SIZE]:
        return Report(tables)
    timings = timings_by_size[REPORTED_SIZE]
    timing = timings["factorized"]
    p50, p99 = 1000 * timing.median, 1000 * timing.percentile(99)
    ratio = {name: timings[name].median / timing.median for name in slow_variants}
    size = f"{REPORTED_SIZE[0]:,} candidates, history {REPORTED_SIZE[1]}"
    goals = [
        Goal(
            f"{size}: speed-up over the reference", "at least 20", f"{ratio['reference']:.1f}", ratio["reference"] >= 20
        ),
        Goal(f"{size}: p50", "under 60 ms", f"{p50:.1f} ms", p50 < 60),
        Goal(f"{size}: p99", "under 2 × p50", f"{p99 / p50:.2f} × p50", p99 < 2 * p50),
    ]
    metrics = {f"ratio_vs_{name.replace(' ', '_')}": value for name, value in ratio.items()}
    metrics |= {"p50_ms": p50, "p99_ms": p99, "error_bound": settings.max_unexplored_mass}
    return Report(tables, goals, metrics)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
