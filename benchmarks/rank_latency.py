"""How long does ranking take for one user, by candidates and history?

A request is one user's past impressions and the candidates' table rows; its answer is every action's probability of
happening at all and the expected watch time, best candidates first. Reading the history from disk is not part of it.
The forms compute the same, with the same trained weights:

- factorized: the history is read once, the attention of all candidates is three matrix products, and of the tree of
  action sequences only what the bound on the error asks for is followed;
- cached: the same, with what the user did inside each past impression encoded before (it depends on no candidate);
- direct: an n×n attention matrix per candidate (`--model.attention_impl reference`), and the whole tree;
- direct attention, whole tree: the two apart, each with the other's fast form;
- pointwise: each candidate by itself with a padded history of its own (benchmarks/reference), tree as in factorized.

A model is trained a little for every length of history: how many action sequences must be followed depends on how
sure it is.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Cell, Goal, Report, ReportTable, Timing, main
from reference.examples import Examples, build
from reference.pointwise import PointwiseA2Gen, renamed
from simulated_data import simulated
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from a2gen_rec.config import Config, ModelConfig
from a2gen_rec.data.batch import WHOLE_WINDOW, WindowBatch, collate
from a2gen_rec.data.columns import CandidateItems, WindowColumns
from a2gen_rec.data.parquet_reader import read_columns, read_row_groups
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.embedding_tables import ACTION, TIME, EmbeddingTables
from a2gen_rec.nn.generator import StepEmbeddings
from a2gen_rec.nn.marginals import ActionMarginals, action_marginals
from a2gen_rec.runs.next_window import append_candidates_now
from a2gen_rec.training.trainer import Trainer
from a2gen_rec.utils.distributed import DistributedContext

GIB = 2**30
SHOWN = (1000, 100)
"""Candidates and history of the figures at the top of the JSON."""
FAST = ("factorized", "cached")
REQUESTS = 8
"""Different requests that the timed ones take turns among."""


@dataclass
class Settings:
    """Sizes of the requests.

    Attributes:
        candidates, histories: of a request.
        dim, heads: of the model.
        max_error: bound on the probability of action sequences that are not followed to their end.
        requests: timed of the fast forms in every cell, as far as ``seconds`` allow; 200 show a 99th percentile.
        slow_requests: timed of the other forms.
        seconds: that a fast form may take in a cell.
        threads: of a request; its operations are too small to share among cores, which can answer other requests.
        max_gib: direct forms that would need larger attention matrices than this are left out.
        users: of the simulated world that requests are drawn from; steps: of training in it.
    """

    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000])
    histories: list[int] = field(default_factory=lambda: [50, 100, 500])
    dim: int = 32
    heads: int = 4
    max_error: float = 0.03
    requests: int = 200
    slow_requests: int = 3
    seconds: float = 8.0
    threads: int = 1
    max_gib: float = 2.0
    users: int = 200
    steps: int = 300
    seed: int = 0


QUICK = {"candidates": [100, 1000], "histories": [100], "requests": 60, "slow_requests": 3, "users": 100, "steps": 100}


@dataclass(frozen=True)
class Request:
    """A user's past as one window, and the candidates."""

    history: WindowColumns
    items: CandidateItems


@dataclass(frozen=True)
class Answer:
    """Which candidate is best, second, …, and what is expected of them in their own order."""

    order: Tensor
    what: ActionMarginals


class Rankers:
    """The forms, over the weights of one trained model."""

    def __init__(self, trainer: Trainer, max_error: float) -> None:
        self.card, self.config, self.device = trainer.card, trainer.config, trainer.process.device
        self.max_error = max_error
        trainer.training_model.model_parallel.eval()
        self.model = trainer.training_model.model
        self.ranker: Any = self.model.ranker  # A2Gen's, whose parts are measured
        self.reference = PointwiseA2Gen(self.card, self.config.model).to(self.device).eval()
        weights = {name: _whole(value) for name, value in self.model.state_dict().items()}
        self.reference.load_state_dict(renamed(weights))

    def rank(
        self, request: Request, form: str = "factorized", max_error: float | None = None, states: Tensor | None = None
    ) -> Answer:
        """By the model; ``form`` of its item-level attention; ``states``: action states known before."""
        encoder = self.ranker.encoder
        encoder.form = form
        targets = self.model.encode(self.batch(request), states)
        encoder.form = "factorized"
        return _answer(self.ranker.occurrence(targets, self.max_error if max_error is None else max_error))

    def pointwise(self, request: Request) -> Answer:
        """By the reference."""
        examples, ranker = self.examples(request), self.ranker
        context = self.reference.context(self.reference.embed(examples), examples)
        weights = self.reference.state_dict()
        tables = StepEmbeddings(weights[f"tables.{ACTION}.weight"], weights[f"tables.{TIME}.weight"])
        return _answer(action_marginals(ranker.generator, context, tables, ranker.timed, self.max_error))

    def batch(self, request: Request) -> WindowBatch:
        columns = append_candidates_now(request.history, request.items, self.card)
        whole, loader = EmbeddingTables.from_card(self.card, self.config.model).full_tables, self.config.loader
        made = collate(
            columns,
            np.zeros(1, np.int64),
            whole,
            request_gap_s=WHOLE_WINDOW,
            bucket_overhead=loader.bucket_overhead_tokens,
        )
        return made.to(self.device)

    def examples(self, request: Request) -> Examples:
        """One example for each candidate: the first one's, with the others' items."""
        columns = append_candidates_now(request.history, request.items, self.card)
        first = build(columns, np.zeros(1, np.int64), columns.first_target, self.model.ranker.max_history)
        many = first.each(lambda part: part.expand(len(request.items.ids), *part.shape[1:]))
        items = {name: torch.from_numpy(rows) for name, rows in request.items.rows.items()}
        return replace(many, target={**many.target, **items}).to(self.device)

    def states(self, request: Request) -> Tensor:
        """What serving may keep of a user between requests."""
        batch = self.batch(request)
        return self.model.ranker.encode_actions(self.model.embeddings(batch.sparse), batch)


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Compare and time the forms on requests of every size."""
    if process.world_size > 1:
        raise ConfigError("a request is answered in one process; run this without torchrun")
    torch.set_num_threads(settings.threads)
    found: dict[tuple[int, int], dict[str, Timing]] = {}
    for history in settings.histories:
        with tempfile.TemporaryDirectory() as scratch:
            rankers, columns = _trained(history, settings, process, Path(scratch))
            with torch.no_grad():
                found |= {
                    (count, history): _cell(rankers, columns, count, history, settings) for count in settings.candidates
                }
    return _report(found, settings)


def _trained(
    history: int, settings: Settings, process: DistributedContext, scratch: Path
) -> tuple[Rankers, WindowColumns]:
    """A model trained a little on histories of that length, and the windows that requests are drawn from."""
    # The reference is the source's model, which has no such tower.
    config = Config(model=ModelConfig(dim=settings.dim, num_heads=settings.heads, occurrence_head=False))
    config.loader.prefetch, config.train.seed = False, settings.seed
    config.train.epochs, config.train.max_steps, config.train.validation_interval = 1000, settings.steps, settings.steps
    data = simulated(scratch / "data", settings.users, 5000, history + 60, history, seed=settings.seed)
    trainer = Trainer(config, data, str(scratch / "run"), process)
    trainer.fit()
    files = [str(file) for file in Path(data, "train").glob("*.parquet")]
    return Rankers(trainer, settings.max_error), read_columns(read_row_groups(files), trainer.card)


def _cell(rankers: Rankers, columns: WindowColumns, count: int, history: int, settings: Settings) -> dict[str, Timing]:
    """Timings of the forms for one size of request, after they have given equal answers."""
    rng = np.random.default_rng([settings.seed, count, history])
    requests = [_request(rankers.card, columns, count, history, rng) for _ in range(REQUESTS)]
    states = [rankers.states(request) for request in requests]
    forms: dict[str, Callable[[int], Answer]] = {
        "factorized": lambda place: rankers.rank(requests[place]),
        "cached": lambda place: rankers.rank(requests[place], states=states[place]),
        "whole tree": lambda place: rankers.rank(requests[place], max_error=0.0),
    }
    if count * history**2 * settings.heads * 4 <= settings.max_gib * GIB:
        forms |= {
            "direct attention": lambda place: rankers.rank(requests[place], "reference"),
            "direct": lambda place: rankers.rank(requests[place], "reference", 0.0),
            "pointwise": lambda place: rankers.pointwise(requests[place]),
        }
    _check_equal({name: run(0) for name, run in forms.items()}, settings.max_error)
    return _time(forms, settings, rankers.device)


def _request(card: DatasetCard, columns: WindowColumns, count: int, history: int, rng: np.random.Generator) -> Request:
    """A random user's ``history`` impressions and random items."""
    window = columns.take(rng.choice(np.flatnonzero(columns.lengths >= history), 1))
    rows = {feature.name: rng.integers(1, feature.cardinality, count) for feature in card.features_at("item")}
    return Request(_last(window, history), CandidateItems([""] * count, np.ones(count, bool), rows))


def _last(window: WindowColumns, history: int) -> WindowColumns:
    """The last ``history`` impressions of one window."""
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


def _whole(value: Any) -> Tensor:
    """A parameter, or a table whose only shard is here."""
    return value.local_shards()[0].tensor if isinstance(value, ShardedTensor) else value


def _answer(what: ActionMarginals) -> Answer:
    return Answer(what.time[:, -1].argsort(descending=True), what)


def _check_equal(answers: dict[str, Answer], max_error: float) -> None:
    """All forms within the bound of the exact answer, and equal to those that follow as much of the tree."""
    rounding = 1e-4
    exact, bounded = answers["whole tree"].what.probability, answers["factorized"].what
    for name, answer in answers.items():
        most = float((exact - answer.what.probability).abs().max())
        if most > min(float(answer.what.unexplored_mass.max()), max_error) + rounding:
            raise RuntimeError(f"{name} differs from the exact probabilities by {most}")
    for name in answers.keys() & {"cached", "direct attention", "pointwise"}:
        # Rounding may move a sequence across the bound of what is followed, which moves no more than its own mass.
        worst = float((answers[name].what.probability - bounded.probability).abs().max())
        if worst > max_error / 5:
            raise RuntimeError(f"{name} gives probabilities that differ by {worst}")


def _time(forms: dict[str, Callable[[int], Answer]], settings: Settings, device: torch.device) -> dict[str, Timing]:
    """Rounds of one request by each slow form and many by each fast one, all forms in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    began = time.perf_counter()
    forms["factorized"](0)
    affordable = settings.seconds / (time.perf_counter() - began)
    fast = max(1, int(min(settings.requests, affordable)) // settings.slow_requests)
    for turn in range(-1, settings.slow_requests):
        for name, run in forms.items():
            for place in range(fast if name in FAST else 1):
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                run((turn + place) % REQUESTS).order.tolist()  # what is sent back; it also waits for the device
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - began)
    return {name: Timing(values) for name, values in seconds.items()}


def _report(found: dict[tuple[int, int], dict[str, Timing]], settings: Settings) -> Report:
    against = ("direct", "direct attention", "whole tree", "pointwise")
    rows: list[list[Cell]] = []
    ratios: list[list[Cell]] = []
    for (count, history), timings in found.items():
        for name in sorted(timings, key=lambda name: name not in FAST):
            timing = timings[name]
            p10, p50, p90, p99 = (1000 * timing.percentile(q) for q in (10, 50, 90, 99))
            rows.append(
                [count, history, name, p10, p50, p90, p99 if len(timing.seconds) >= 50 else None, len(timing.seconds)]
            )
        ours = timings["factorized"].median
        slower: list[Cell] = [timings[name].median / ours if name in timings else None for name in against]
        ratios.append([count, history, *slower, ours / timings["cached"].median])
    tables = [
        ReportTable(
            "Milliseconds of a request",
            ["candidates", "history", "form", "p10", "p50", "p90", "p99", "requests"],
            rows,
            f"probabilities off by at most {settings.max_error}, exact with the whole tree; no p99 from a few requests",
        ),
        ReportTable(
            "How many times as long a request takes as in the factorized form",
            ["candidates", "history", *against, "over cached"],
            ratios,
            f"–: attention matrices of more than {settings.max_gib:g} GiB; over cached: factorized / cached",
        ),
    ]
    if SHOWN not in found or "direct" not in found[SHOWN]:
        return Report(tables)
    shown = found[SHOWN]
    best = shown["factorized"]
    p50, p99 = 1000 * best.median, 1000 * best.percentile(99)
    ratio = {name: shown[name].median / best.median for name in against}
    what = f"{SHOWN[0]:,} candidates, history {SHOWN[1]}"
    targets = [
        Goal(f"{what}: times as fast as direct", "at least 20", f"{ratio['direct']:.1f}", ratio["direct"] >= 20),
        Goal(f"{what}: p50", "under 60 ms", f"{p50:.1f} ms", p50 < 60),
        Goal(f"{what}: p99", "under 2 × p50", f"{p99 / p50:.2f} × p50", p99 < 2 * p50),
    ]
    figures = {f"ratio_vs_{name.replace(' ', '_')}": value for name, value in ratio.items()}
    figures |= {"p50_ms": p50, "p99_ms": p99, "error_bound": settings.max_error}
    return Report(tables, targets, figures)


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
