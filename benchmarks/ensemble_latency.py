"""How long does the ensemble take to score one request, and how accurate is its quadrature?

A request has one user's recent history, and the context and predicted objectives of the candidates. The response
is the candidates sorted by score. Embedding lookups and the prediction of the objectives are not included. Weights are
random: the time does not depend on them. The quadrature error is reported for several:

- initial: weights at the start of training;
- × 3: all weights of the transforms times three;
- × 3, steepness σ: in addition, input weights of the objective's value with standard deviation σ. Only these weights
  bend a transform.

The backward pass (Leibniz) evaluates the nodes again, one after another. It is compared with the quadrature in the
autograd graph, all nodes at once, with the same layers in the same layout. As in training, the objectives' values are
not leaves of the graph. Only their gradient differs: Leibniz uses the rate itself, the graph the quadrature's slope.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from ensemble_variants import Inputs, check_close, in_graph
from harness import CellValue, Goal, Report, ReportTable, Timing, interleave, main
from peak_memory import peak_bytes
from torch import Tensor

from a2gen_rec.ensemble.losses import listwise
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.model import Ensemble, Objective
from a2gen_rec.utils.distributed import DistributedContext

MIB = 2**20
REPORTED_CANDIDATES = 1000
"""Candidates of the metrics and of the accuracy table."""
REQUESTS = 8
"""Number of distinct requests that the timed runs cycle through."""
ROUNDS = 5
"""Rounds of all variants in turn."""
MAX_LATENCY_MS = 10.0
"""Goal for the latency of a request."""


@dataclass
class Settings:
    """Sizes of requests and of training.

    Attributes:
        objectives: numbers of objectives of a request.
        candidates: numbers of candidates of a request.
        degrees: degrees of the quadrature, which has degree + 1 nodes. Request times and goals use the last one.
        threads: numbers of threads of a request.
        d_context: width of each candidate's context.
        history_length: items of the user's history.
        d_history_item: width of a history item.
        dim: width of the ensemble.
        hidden: hidden widths of the transforms.
        requests: timed requests of each variant, within ``seconds``; at least 50 are required for a 99th percentile.
        seconds: time limit for all variants of one size.
        lists: lists of a training step, which runs on the first of ``threads``.
        list_candidates: candidates of each list.
        repeats: timed training steps of each variant.
        reference_degree: degree of the reference quadrature.
        scale: factor of the scaled weights.
        steepness: standard deviations of the steep weights.
        monotonicity_candidates: candidates whose transforms are checked for monotonicity.
        seed: random seed.
    """

    objectives: list[int] = field(default_factory=lambda: [8, 12])
    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000])
    degrees: list[int] = field(default_factory=lambda: [8, 16, 32])
    threads: list[int] = field(default_factory=lambda: [1, 2])
    d_context: int = 350
    history_length: int = 20
    d_history_item: int = 64
    dim: int = 32
    hidden: list[int] = field(default_factory=lambda: [16, 8])
    requests: int = 200
    seconds: float = 20.0
    lists: int = 64
    list_candidates: int = 25
    repeats: int = 9
    reference_degree: int = 128
    scale: float = 3.0
    steepness: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0])
    monotonicity_candidates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("objectives", "candidates", "degrees", "threads", "hidden"):
            if min(getattr(self, name), default=0) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be one or more positive numbers")
        for name in (
            "d_context",
            "history_length",
            "d_history_item",
            "dim",
            "requests",
            "lists",
            "list_candidates",
            "repeats",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.reference_degree <= max(self.degrees):
            raise ConfigError(f"reference_degree {self.reference_degree} must be above the degrees {self.degrees}")


QUICK = {"candidates": [100, 1000], "degrees": [8, 32], "threads": [1], "requests": 60, "seconds": 3.0, "repeats": 3}
QUICK |= {"steepness": [3.0], "monotonicity_candidates": 20}


@dataclass(frozen=True)
class StepResult:
    """Timings and peak tensor memory of a training step, by variant."""

    timing: dict[str, Timing]
    peak: dict[str, int]


@dataclass(frozen=True)
class Accuracy:
    """Scores of one degree compared with those of the reference degree, in float64.

    Attributes:
        max_error: maximum absolute difference of a score.
        score_std: standard deviation of the reference scores.
        swapped_fraction: fraction of candidate pairs in a different order.
        max_violation: largest monotonicity violation of a transform.
    """

    max_error: float
    score_std: float
    swapped_fraction: float
    max_violation: float


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Time requests and training steps, and measure the quadrature's error."""
    if process.world_size > 1:
        raise ConfigError("a request runs in one process; run this benchmark without torchrun")
    torch.manual_seed(settings.seed)
    models = {count: make_ensemble(count, settings).to(process.device) for count in settings.objectives}
    num_threads = torch.get_num_threads()
    try:
        requests = {
            (count, candidates): time_requests(model, candidates, settings, process.device)
            for count, model in models.items()
            for candidates in settings.candidates
        }
        torch.set_num_threads(settings.threads[0])
        steps = {
            (count, degree): time_steps(model, degree, settings, process.device)
            for count, model in models.items()
            for degree in settings.degrees
        }
        accuracies = {
            (name, degree): measure_accuracy(model, degree, settings, process.device)
            for name, model in weight_variants(models[settings.objectives[-1]], settings).items()
            for degree in settings.degrees
        }
    finally:
        torch.set_num_threads(num_threads)
    return make_report(requests, steps, accuracies, settings)


def make_ensemble(num_objectives: int, settings: Settings) -> Ensemble:
    """Build an ensemble with initial weights and random objective weights; equal ones would hide differences."""
    names = [Objective(f"objective_{k}", k % 4 != 3) for k in range(num_objectives)]
    model = Ensemble(names, settings.d_history_item, settings.d_context, settings.dim, settings.hidden)
    model.query.reset_parameters()
    return model


def draw_inputs(batch_size: int, candidates: int, objectives: int, settings: Settings, device: torch.device) -> Inputs:
    """Draw a batch of requests or lists with full histories."""
    value = 2 * torch.randn(batch_size, candidates, objectives)
    events = torch.randn(batch_size, settings.history_length, settings.d_history_item)
    context = torch.randn(batch_size, candidates, settings.d_context)
    length = torch.full((batch_size,), settings.history_length)
    return Inputs(value.to(device), events.to(device), length.to(device), context.to(device))


@torch.no_grad()
def time_requests(
    model: Ensemble, candidates: int, settings: Settings, device: torch.device
) -> dict[tuple[int, int], Timing]:
    """Time requests by (degree, threads), after a check that both variants give equal scores up to rounding."""
    requests = [draw_inputs(1, candidates, len(model.lower_is_better), settings, device) for _ in range(REQUESTS)]
    reference = in_graph(model)
    cases = [(degree, threads) for degree in settings.degrees for threads in settings.threads]
    for degree, threads in cases:
        model.transform.degree = degree
        torch.set_num_threads(threads)
        name = f"scores of degree {degree} on {thread_label(threads)} and in the graph"
        check_close(requests[0].score(model), requests[0].score(reference), name)
    seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for round_index in range(ROUNDS):
        for case in cases:
            model.transform.degree, threads = case
            torch.set_num_threads(threads)
            # Untimed: it wakes the threads, lets those of the last case sleep, and determines the affordable repeats.
            affordable = settings.seconds / len(cases) / time_request(model, requests[round_index % REQUESTS], device)
            for repeat in range(max(1, int(min(settings.requests, affordable)) // ROUNDS)):
                seconds[case].append(time_request(model, requests[(round_index + repeat) % REQUESTS], device))
    return {case: Timing(values) for case, values in seconds.items()}


def time_request(model: Ensemble, request: Inputs, device: torch.device) -> float:
    """Return the seconds of one request."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    request.score(model)[0].argsort(descending=True).tolist()  # the response; tolist() synchronizes
    return time.perf_counter() - start


def time_steps(model: Ensemble, degree: int, settings: Settings, device: torch.device) -> StepResult:
    """Time forward, loss and backward of both variants, after a check of equal losses and gradients."""
    lists = draw_inputs(settings.lists, settings.list_candidates, len(model.lower_is_better), settings, device)
    relevance = (torch.rand(lists.value.shape[:2], device=device) < 0.1).float()
    model.transform.degree = degree
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "Leibniz": partial(training_step, model, lists, relevance),
        "in-graph": partial(training_step, in_graph(model), lists, relevance),
    }
    for index, (actual, expected) in enumerate(zip(*(run() for run in runs.values()), strict=True)):
        check_close(actual, expected, f"gradients {index} of degree {degree}" if index else "losses")
    peak = {name: peak_bytes(run, device) for name, run in runs.items()}
    return StepResult(interleave(runs, settings.repeats, 1, device), peak)


def training_step(model: Ensemble, lists: Inputs, relevance: Tensor) -> list[Tensor]:
    """Return the loss and its gradients with respect to all parameters."""
    loss = listwise(lists.score(model), relevance, torch.ones_like(relevance, dtype=torch.bool)).mean
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@torch.no_grad()
def weight_variants(model: Ensemble, settings: Settings) -> dict[str, Ensemble]:
    """Return float64 copies of the model with initial, scaled and steep weights, by name."""
    scaled = copy.deepcopy(model).double()
    for parameter in scaled.transform.parameters():
        parameter.mul_(settings.scale)
    models = {"initial": copy.deepcopy(model).double(), f"× {settings.scale:g}": scaled}
    for steepness in settings.steepness:
        steep = copy.deepcopy(scaled)
        torch.manual_seed(settings.seed)  # same draw for all: only the steepness differs
        steep.transform.input.normal_(0, steepness)
        models[f"× {settings.scale:g}, steepness {steepness:g}"] = steep
    return models


@torch.no_grad()
def measure_accuracy(model: Ensemble, degree: int, settings: Settings, device: torch.device) -> Accuracy:
    """Measure the quadrature error of one request's scores in float64, which excludes rounding errors."""
    torch.manual_seed(settings.seed)
    request = draw_inputs(1, REPORTED_CANDIDATES, len(model.lower_is_better), settings, device).double()
    model.transform.degree = settings.reference_degree
    reference = request.score(model)[0]
    model.transform.degree = degree
    score = request.score(model)[0]
    swapped = (score[:, None] > score) != (reference[:, None] > reference)
    violations = model.max_monotonicity_violation(
        request.history, request.length, request.context[:, : settings.monotonicity_candidates]
    )
    max_error, score_std = float((score - reference).abs().max()), float(reference.std())
    return Accuracy(max_error, score_std, float(swapped.double().mean()), float(violations.max()))


def make_report(
    requests: dict[tuple[int, int], dict[tuple[int, int], Timing]],
    steps: dict[tuple[int, int], StepResult],
    accuracies: dict[tuple[str, int], Accuracy],
    settings: Settings,
) -> Report:
    """Build the tables, goals and metrics."""
    degree = settings.degrees[-1]
    tables = [
        request_table(requests, degree, settings),
        degree_table(requests, settings),
        accuracy_table(accuracies, settings),
        step_table(steps, settings),
    ]
    goals, metrics = [], {}
    for count in settings.objectives:
        if (count, REPORTED_CANDIDATES) not in requests:
            continue
        timings = requests[count, REPORTED_CANDIDATES]
        threads = min(settings.threads, key=lambda threads: timings[degree, threads].median)
        request = f"{REPORTED_CANDIDATES:,} candidates, {count} objectives, {thread_label(threads)}"
        for q in (50, 99) if len(timings[degree, threads].seconds) >= 50 else (50,):
            ms = 1000 * timings[degree, threads].percentile(q)
            goals.append(Goal(f"{request}: p{q}", f"under {MAX_LATENCY_MS:g} ms", f"{ms:.1f} ms", ms < MAX_LATENCY_MS))
            metrics[f"p{q}_ms_{count}_objectives"] = ms
    count, lowest_degree = settings.objectives[-1], settings.degrees[0]
    step, lowest = steps[count, degree], steps[count, lowest_degree]
    metrics["step_ratio_vs_in_graph"] = step.timing["in-graph"].median / step.timing["Leibniz"].median
    metrics["memory_ratio_vs_in_graph"] = step.peak["in-graph"] / step.peak["Leibniz"]
    if lowest_degree < degree:
        growth = {variant: step.peak[variant] / lowest.peak[variant] for variant in step.peak}
        metrics |= {f"peak_growth_{variant.lower()}": value for variant, value in growth.items()}
        measured = f"{growth['Leibniz']:.2f}; in-graph {growth['in-graph']:.2f}"
        claim = f"peak memory of a training step, degree {degree} relative to degree {lowest_degree}"
        goals.append(Goal(claim, "at most 1.05", measured, growth["Leibniz"] <= 1.05))
    return Report(tables, goals, metrics)


def request_table(
    requests: dict[tuple[int, int], dict[tuple[int, int], Timing]], degree: int, settings: Settings
) -> ReportTable:
    rows: list[list[CellValue]] = []
    for (count, candidates), timings in requests.items():
        for threads in settings.threads:
            timing = timings[degree, threads]
            p10, p50, p90, p99 = (1000 * timing.percentile(q) for q in (10, 50, 90, 99))
            repeats = len(timing.seconds)
            rows.append([count, candidates, threads, p10, p50, p90, p99 if repeats >= 50 else None, repeats])
    columns = ["objectives", "candidates", "threads", "p10 ms", "p50 ms", "p90 ms", "p99 ms", "requests"]
    return ReportTable(f"Latency of a request, degree {degree}", columns, rows, "–: no p99 from fewer than 50 requests")


def degree_table(requests: dict[tuple[int, int], dict[tuple[int, int], Timing]], settings: Settings) -> ReportTable:
    rows: list[list[CellValue]] = [
        [count, candidates, *(1000 * timings[degree, settings.threads[0]].median for degree in settings.degrees)]
        for (count, candidates), timings in requests.items()
    ]
    columns = ["objectives", "candidates", *(f"degree {degree}, ms" for degree in settings.degrees)]
    return ReportTable(f"Median latency of a request by degree, {thread_label(settings.threads[0])}", columns, rows)


def accuracy_table(accuracies: dict[tuple[str, int], Accuracy], settings: Settings) -> ReportTable:
    rows: list[list[CellValue]] = [
        [
            name,
            degree,
            f"{result.max_error:.1e}",
            result.score_std,
            f"{1e6 * result.swapped_fraction:,.0f}",
            f"{result.max_violation:.1e}",
        ]
        for (name, degree), result in accuracies.items()
    ]
    columns = ["weights", "degree", "max error", "std of scores", "swapped pairs per million", "max violation"]
    title = f"Scores of {REPORTED_CANDIDATES:,} candidates compared with degree {settings.reference_degree}, in float64"
    note = (
        f"{settings.objectives[-1]} objectives; violation: decrease of a transform between adjacent points of 257 in "
        f"[0, 1], for {settings.monotonicity_candidates} candidates"
    )
    return ReportTable(title, columns, rows, note)


def step_table(steps: dict[tuple[int, int], StepResult], settings: Settings) -> ReportTable:
    rows: list[list[CellValue]] = []
    for (count, degree), result in steps.items():
        leibniz, graph = result.timing["Leibniz"], result.timing["in-graph"]
        times = [1000 * value for timing in (leibniz, graph) for value in (timing.median, timing.p10, timing.p90)]
        peaks = [peak / MIB for peak in result.peak.values()]
        rows.append([count, degree, *times, graph.median / leibniz.median, *peaks])
    columns = ["objectives", "degree"]
    columns += [name for variant in ("Leibniz", "in-graph") for name in (f"{variant} ms", "p10 ms", "p90 ms")]
    columns += ["Leibniz speed-up", "Leibniz MiB", "in-graph MiB"]
    title = f"Forward, loss and backward, {settings.lists} lists of {settings.list_candidates} candidates"
    note = "median and percentiles; MiB: peak bytes of live tensors above those live before"
    return ReportTable(f"{title}, {thread_label(settings.threads[0])}", columns, rows, note)


def thread_label(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
