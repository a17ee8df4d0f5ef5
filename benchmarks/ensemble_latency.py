"""How long does the ensemble take to score one request's candidates, and what do the nodes of its quadrature buy?

A request is one user's recent events, and the candidates' context and predicted objectives; its answer is the
candidates, best score first. Looking the embeddings up and predicting the objectives is not part of it. Weights are
random: the time does not depend on them, and the quadrature's error is shown for several:

- initial: as training begins;
- × 3: all weights of the transforms three times that;
- × 3, steepness σ: and those of the objective's own value, which alone bend a transform, of standard deviation σ.

The backward pass (Leibniz) evaluates the nodes one after the other and once more; beside it stands the quadrature
within the graph, all nodes at once, with the same layers in the same layout. Values are no leaves of the graph, as in
training: their slope alone is not the same in both (the rate itself, or the quadrature's slope).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from harness import Cell, Goal, Report, ReportTable, Timing, interleave, main
from rss import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from a2gen_rec.ensemble.losses import listwise
from a2gen_rec.errors import ConfigError
from a2gen_rec.models.ensemble.model import Ensemble, Objective
from a2gen_rec.nn.monotonic import MonotonicTransform, clenshaw_curtis
from a2gen_rec.utils.distributed import DistributedContext

MIB = 2**20
SHOWN = 1000
"""Candidates of the figures at the top of the JSON, and of those by degree."""
REQUESTS = 8
"""Different requests that the timed ones take turns among."""
ROUNDS = 5
"""Of all forms in turn."""
WANTED_MS = 10.0


@dataclass
class Settings:
    """Sizes of requests and of training.

    Attributes:
        objectives, candidates: of a request; threads: it runs on.
        degrees: of the quadrature, one node more; the last is the one of the requests and of the targets.
        d_context: width of each candidate's context; events: of the history, of width ``d_event``.
        dim, hidden: of the ensemble.
        requests: timed in every form, as far as ``seconds`` for all forms of a size allow; 200 show a 99th percentile.
        lists, list_candidates: of a training step, which runs on the first of ``threads``.
        repeats: timed training steps of each form.
        exact_degree: of the quadrature that the others are compared with.
        scale, steepness: of weights other than the initial ones, see above.
        fall_candidates: whose transforms are searched for falls.
    """

    objectives: list[int] = field(default_factory=lambda: [8, 12])
    candidates: list[int] = field(default_factory=lambda: [100, 1000, 5000])
    degrees: list[int] = field(default_factory=lambda: [8, 16, 32])
    threads: list[int] = field(default_factory=lambda: [1, 2])
    d_context: int = 350
    events: int = 20
    d_event: int = 64
    dim: int = 32
    hidden: list[int] = field(default_factory=lambda: [16, 8])
    requests: int = 200
    seconds: float = 20.0
    lists: int = 64
    list_candidates: int = 25
    repeats: int = 9
    exact_degree: int = 128
    scale: float = 3.0
    steepness: list[float] = field(default_factory=lambda: [1.0, 3.0, 10.0])
    fall_candidates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("objectives", "candidates", "degrees", "threads", "hidden"):
            if min(getattr(self, name), default=0) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be one or more positive numbers")
        for name in ("d_context", "events", "d_event", "dim", "requests", "lists", "list_candidates", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)} must be at least 1")
        if self.exact_degree <= max(self.degrees):
            raise ConfigError(f"exact_degree {self.exact_degree} must be above the degrees {self.degrees}")


QUICK = {"candidates": [100, 1000], "degrees": [8, 32], "threads": [1], "requests": 60, "seconds": 3.0, "repeats": 3}
QUICK |= {"steepness": [3.0], "fall_candidates": 20}


@dataclass(frozen=True)
class Inputs:
    """What :class:`Ensemble` reads."""

    value: Tensor
    events: Tensor
    length: Tensor
    context: Tensor

    def score(self, model: Ensemble) -> Tensor:
        score: Tensor = model(self.value, self.events, self.length, self.context).score
        return score

    def double(self) -> "Inputs":
        return replace(self, value=self.value.double(), events=self.events.double(), context=self.context.double())


@dataclass(frozen=True)
class Step:
    """A training step's timings and peaks of tensors, by form."""

    timing: dict[str, Timing]
    peak: dict[str, int]


@dataclass(frozen=True)
class Accuracy:
    """One degree's scores beside those of many more nodes, in float64.

    Attributes:
        difference: largest of any score; deviation: standard deviation of the scores.
        swapped: share of all pairs of candidates in another order; fall: largest of any transform.
    """

    difference: float
    deviation: float
    swapped: float
    fall: float


class InGraph(nn.Module):
    """The same transform, its parameters shared, with all nodes of the quadrature in the graph at once."""

    def __init__(self, own: MonotonicTransform) -> None:
        super().__init__()
        self.own = own

    def forward(self, p: Tensor, h: Tensor) -> Tensor:
        own = self.own
        nodes, weights = (p.new_tensor(part) for part in clenshaw_curtis(own.degree))
        tau = (p.permute(2, 0, 1)[..., None] * nodes).unsqueeze(1)  # [K, 1, n, C, nodes]
        context = own.context(h).permute(2, 0, 1).unflatten(0, own.input.shape[:2])[..., None]
        x = own.input[..., None, None] * tau + context
        layers = list(own.layers)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            x = torch.baddbmm(bias, matrix, F.silu(x).flatten(2)).unflatten(2, tau.shape[2:])
        rate = (F.elu(x) + (1 + 1e-4)).squeeze(1)
        integral: Tensor = p * (rate @ weights).permute(1, 2, 0) + own.offset(h)
        return integral


def in_graph(model: Ensemble) -> Ensemble:
    """The same ensemble, its parameters shared and in the same order, with the quadrature in the graph."""
    other = copy.copy(model)
    other._modules = {**model._modules, "transform": InGraph(model.transform)}
    return other


def measure(settings: Settings, process: DistributedContext) -> Report:
    """Requests of every size, training steps and the quadrature's error."""
    if process.world_size > 1:
        raise ConfigError("a request is answered in one process; run this without torchrun")
    torch.manual_seed(settings.seed)
    models = {count: make(count, settings).to(process.device) for count in settings.objectives}
    before = torch.get_num_threads()
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
            (name, degree): accuracy(model, degree, settings, process.device)
            for name, model in varied(models[settings.objectives[-1]], settings).items()
            for degree in settings.degrees
        }
    finally:
        torch.set_num_threads(before)
    return report(requests, steps, accuracies, settings)


def make(objectives: int, settings: Settings) -> Ensemble:
    """Initial weights, but for those of the objectives' weights, which begin equal and would hide differences."""
    names = [Objective(f"objective_{k}", k % 4 != 3) for k in range(objectives)]
    model = Ensemble(names, settings.d_event, settings.d_context, settings.dim, settings.hidden)
    model.query.reset_parameters()
    return model


def draw(n: int, candidates: int, objectives: int, settings: Settings, device: torch.device) -> Inputs:
    """``n`` requests or lists, with full histories."""
    value = 2 * torch.randn(n, candidates, objectives)
    events = torch.randn(n, settings.events, settings.d_event)
    context = torch.randn(n, candidates, settings.d_context)
    length = torch.full((n,), settings.events)
    return Inputs(value.to(device), events.to(device), length.to(device), context.to(device))


@torch.no_grad()
def time_requests(
    model: Ensemble, candidates: int, settings: Settings, device: torch.device
) -> dict[tuple[int, int], Timing]:
    """(degree, threads) -> timing, after scores that are equal but for rounding."""
    requests = [draw(1, candidates, len(model.lower_is_better), settings, device) for _ in range(REQUESTS)]
    direct = in_graph(model)
    forms = [(degree, threads) for degree in settings.degrees for threads in settings.threads]
    for degree, threads in forms:
        model.transform.degree = degree
        torch.set_num_threads(threads)
        what = f"scores of degree {degree} on {on(threads)} and in the graph"
        check_close(requests[0].score(model), requests[0].score(direct), what)
    seconds: dict[tuple[int, int], list[float]] = {form: [] for form in forms}
    for turn in range(ROUNDS):
        for form in forms:
            model.transform.degree = form[0]
            torch.set_num_threads(form[1])
            # Uncounted: it wakes the threads, lets those of the last form rest, and says how many more are affordable.
            affordable = settings.seconds / len(forms) / answer(model, requests[turn % REQUESTS], device)
            for place in range(max(1, int(min(settings.requests, affordable)) // ROUNDS)):
                seconds[form].append(answer(model, requests[(turn + place) % REQUESTS], device))
    return {form: Timing(values) for form, values in seconds.items()}


def answer(model: Ensemble, request: Inputs, device: torch.device) -> float:
    """Seconds of one request."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    request.score(model)[0].argsort(descending=True).tolist()  # what is sent back; it also waits for the device
    return time.perf_counter() - began


def time_steps(model: Ensemble, degree: int, settings: Settings, device: torch.device) -> Step:
    """Forward, loss and backward in both forms, after equal losses and gradients."""
    lists = draw(settings.lists, settings.list_candidates, len(model.lower_is_better), settings, device)
    relevance = (torch.rand(lists.value.shape[:2], device=device) < 0.1).float()
    model.transform.degree = degree
    runs: dict[str, Callable[[], list[Tensor]]] = {
        "Leibniz": partial(step, model, lists, relevance),
        "in-graph": partial(step, in_graph(model), lists, relevance),
    }
    for place, (found, wanted) in enumerate(zip(*(run() for run in runs.values()), strict=True)):
        check_close(found, wanted, f"gradients {place} of degree {degree}" if place else "losses")
    peak = {name: peak_bytes(run, device) for name, run in runs.items()}
    return Step(interleave(runs, settings.repeats, 1, device), peak)


def step(model: Ensemble, lists: Inputs, relevance: Tensor) -> list[Tensor]:
    """The loss, and its gradients by all parameters."""
    loss = listwise(lists.score(model), relevance, torch.ones_like(relevance, dtype=torch.bool)).mean
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def check_close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Raises RuntimeError where the two differ by more than float32's rounding of the largest number."""
    off, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not off <= 1e-4 * largest + 1e-7:
        raise RuntimeError(f"{what} differ by {off:.3g}, the largest being {largest:.3g}")


@torch.no_grad()
def varied(model: Ensemble, settings: Settings) -> dict[str, Ensemble]:
    """Name of some weights -> the model with them, in float64."""
    scaled = copy.deepcopy(model).double()
    for parameter in scaled.transform.parameters():
        parameter.mul_(settings.scale)
    models = {"initial": copy.deepcopy(model).double(), f"× {settings.scale:g}": scaled}
    for steepness in settings.steepness:
        steep = copy.deepcopy(scaled)
        torch.manual_seed(settings.seed)  # the same draw for all: they differ in steepness alone
        steep.transform.input.normal_(0, steepness)
        models[f"× {settings.scale:g}, steepness {steepness:g}"] = steep
    return models


@torch.no_grad()
def accuracy(model: Ensemble, degree: int, settings: Settings, device: torch.device) -> Accuracy:
    """Scores of one request's candidates by a model in float64, which leaves the quadrature's error alone."""
    torch.manual_seed(settings.seed)
    request = draw(1, SHOWN, len(model.lower_is_better), settings, device).double()
    model.transform.degree = settings.exact_degree
    exact = request.score(model)[0]
    model.transform.degree = degree
    score = request.score(model)[0]
    swapped = (score[:, None] > score) != (exact[:, None] > exact)
    falls = model.max_monotonicity_violation(
        request.events, request.length, request.context[:, : settings.fall_candidates]
    )
    difference, deviation = float((score - exact).abs().max()), float(exact.std())
    return Accuracy(difference, deviation, float(swapped.double().mean()), float(falls.max()))


def report(
    requests: dict[tuple[int, int], dict[tuple[int, int], Timing]],
    steps: dict[tuple[int, int], Step],
    accuracies: dict[tuple[str, int], Accuracy],
    settings: Settings,
) -> Report:
    """Tables of what was found, and what was wanted of it."""
    degree = settings.degrees[-1]
    tables = [
        request_table(requests, degree, settings),
        degree_table(requests, settings),
        accuracy_table(accuracies, settings),
        step_table(steps, settings),
    ]
    targets, figures = [], {}
    for count in settings.objectives:
        if (count, SHOWN) not in requests:
            continue
        found = requests[count, SHOWN]
        threads = min(settings.threads, key=lambda threads: found[degree, threads].median)
        what = f"{SHOWN:,} candidates, {count} objectives, {on(threads)}"
        for q in (50, 99) if len(found[degree, threads].seconds) >= 50 else (50,):
            ms = 1000 * found[degree, threads].percentile(q)
            targets.append(Goal(f"{what}: p{q}", f"under {WANTED_MS:g} ms", f"{ms:.1f} ms", ms < WANTED_MS))
            figures[f"p{q}_ms_{count}_objectives"] = ms
    count, least = settings.objectives[-1], settings.degrees[0]
    many, few = steps[count, degree], steps[count, least]
    figures["step_ratio_vs_in_graph"] = many.timing["in-graph"].median / many.timing["Leibniz"].median
    figures["memory_ratio_vs_in_graph"] = many.peak["in-graph"] / many.peak["Leibniz"]
    if least < degree:
        growth = {form: many.peak[form] / few.peak[form] for form in many.peak}
        figures |= {f"peak_growth_{form.lower()}": value for form, value in growth.items()}
        measured = f"{growth['Leibniz']:.2f}; in-graph {growth['in-graph']:.2f}"
        claim = f"peak memory of a training step, degree {degree} over degree {least}"
        targets.append(Goal(claim, "at most 1.05", measured, growth["Leibniz"] <= 1.05))
    return Report(tables, targets, figures)


def request_table(
    requests: dict[tuple[int, int], dict[tuple[int, int], Timing]], degree: int, settings: Settings
) -> ReportTable:
    rows: list[list[Cell]] = []
    for (count, candidates), found in requests.items():
        for threads in settings.threads:
            timing = found[degree, threads]
            p10, p50, p90, p99 = (1000 * timing.percentile(q) for q in (10, 50, 90, 99))
            many = len(timing.seconds)
            rows.append([count, candidates, threads, p10, p50, p90, p99 if many >= 50 else None, many])
    columns = ["objectives", "candidates", "threads", "p10", "p50", "p90", "p99", "requests"]
    return ReportTable(
        f"Milliseconds of a request, degree {degree}", columns, rows, "no p99 from fewer than 50 requests"
    )


def degree_table(requests: dict[tuple[int, int], dict[tuple[int, int], Timing]], settings: Settings) -> ReportTable:
    rows: list[list[Cell]] = [
        [count, candidates, *(1000 * found[degree, settings.threads[0]].median for degree in settings.degrees)]
        for (count, candidates), found in requests.items()
    ]
    columns = ["objectives", "candidates", *(f"degree {degree}" for degree in settings.degrees)]
    return ReportTable(f"Milliseconds of a request by degree, median, {on(settings.threads[0])}", columns, rows)


def accuracy_table(accuracies: dict[tuple[str, int], Accuracy], settings: Settings) -> ReportTable:
    rows: list[list[Cell]] = [
        [name, degree, f"{of.difference:.1e}", of.deviation, f"{1e6 * of.swapped:,.0f}", f"{of.fall:.1e}"]
        for (name, degree), of in accuracies.items()
    ]
    columns = ["weights", "degree", "largest difference", "std of scores", "pairs swapped per million", "largest fall"]
    title = f"Scores of {SHOWN:,} candidates beside those of degree {settings.exact_degree}, in float64"
    note = (
        f"{settings.objectives[-1]} objectives; the fall is that of any transform from one of 257 points of [0, 1] to "
        f"the next, for {settings.fall_candidates} candidates"
    )
    return ReportTable(title, columns, rows, note)


def step_table(steps: dict[tuple[int, int], Step], settings: Settings) -> ReportTable:
    rows: list[list[Cell]] = []
    for (count, degree), found in steps.items():
        own, other = found.timing["Leibniz"], found.timing["in-graph"]
        times = [1000 * value for of in (own, other) for value in (of.median, of.p10, of.p90)]
        rows.append([count, degree, *times, other.median / own.median, *(peak / MIB for peak in found.peak.values())])
    columns = ["objectives", "degree"]
    columns += [name for form in ("Leibniz", "in-graph") for name in (f"{form} ms", "p10", "p90")]
    columns += ["times as fast", "Leibniz MiB", "in-graph MiB"]
    title = f"Forward, loss and backward, {settings.lists} lists of {settings.list_candidates} candidates"
    note = "median and percentiles; MiB: most tensors alive at once, above those alive before"
    return ReportTable(f"{title}, {on(settings.threads[0])}", columns, rows, note)


def on(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    main(__file__, __doc__, Settings, QUICK, measure)
