"""The questions of ``a2gen plan``: files and settings in, reports out."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.progress import track

from a2gen_rec.config import Config, PlannerFeature, WorkloadConfig
from a2gen_rec.data.schema import DatasetCard
from a2gen_rec.errors import ConfigError
from a2gen_rec.sharding.planner import Plan, PlanningProblem
from a2gen_rec.sharding.report import PlanReport
from a2gen_rec.sharding.report_builder import describe_plan, plan_and_describe
from a2gen_rec.sharding.saved_plan import SavedPlan
from a2gen_rec.sharding.topology import Cluster
from a2gen_rec.sharding.workload import Workload, workload_from_dataset, workload_from_features
from a2gen_rec.utils import paths


def read_workload(
    data: str,
    features: Mapping[str, PlannerFeature],
    workload: WorkloadConfig,
    config: Config,
    rows: Mapping[str, int],
) -> Workload:
    """The tables of a prepared dataset, or of described features where ``data`` is empty; ``rows`` changes sizes.

    Raises:
        ConfigError: the description is not complete; DataError: no dataset is there.
    """
    if data:
        return workload_from_dataset(DatasetCard.load(data), config).with_rows(rows)
    return workload_from_features(features, workload, config).with_rows(rows)


def read_cluster(file: str, ranks: int, config: Config) -> Cluster:
    """A topology file, with another number of ranks (0: its own) and other memory if configured.

    Raises:
        ConfigError: the file is none, or its hosts cannot have so many ranks.
    """
    if not file:
        raise ConfigError("--topology is missing: a file such as those in configs/topologies/")
    cluster = Cluster.from_yaml(file).with_memory(config.sharding)
    return cluster.with_ranks(ranks) if ranks else cluster


def plan_and_report(problem: PlanningProblem) -> tuple[PlanReport, Plan | None]:
    """:func:`explain`, with a sign of life on a terminal: looking for remedies on hundreds of ranks takes a while."""
    console = Console(stderr=True)
    with console.status("planning") if console.is_terminal else nullcontext():
        return plan_and_describe(problem)


def sweep(problem: PlanningProblem, clusters: Sequence[Cluster]) -> list[PlanReport]:
    """The same tables on other clusters."""
    console = Console(stderr=True)
    steps = track(clusters, "planning", console=console, transient=True, disable=not console.is_terminal)
    return [
        plan_and_describe(PlanningProblem(problem.workload, cluster, problem.config), with_remedies=False)[0]
        for cluster in steps
    ]


def read_sweep(text: str, cluster: Cluster) -> list[Cluster]:
    """``ranks=8,16,32``: that many ranks of the same kind of host.

    Raises:
        ConfigError: it is something else, or hosts cannot have so many ranks.
    """
    name, _, values = text.partition("=")
    try:
        ranks = [int(value) for value in values.split(",")]
    except ValueError:
        ranks = []
    if name != "ranks" or not ranks or min(ranks) < 1:
        raise ConfigError(f"--sweep {text}: must be numbers of ranks, such as ranks=8,16,32")
    return [cluster.with_ranks(count) for count in ranks]


def report_for_file(file: str, workload: Workload, topology: str, config: Config) -> PlanReport:
    """What a topology's plan, or a saved plan on the topology that ``topology`` names, does to the tables.

    Raises:
        UserError: the file is neither, or is a plan for other tables.
    """
    raw = paths.read_yaml(file)
    if not isinstance(raw, dict) or "tables" not in raw:
        return plan_and_report(
            PlanningProblem(workload, Cluster.from_dict(raw, file).with_memory(config.sharding), config)
        )[0]
    saved = SavedPlan.from_dict(raw, file)
    problem = PlanningProblem(workload, read_cluster(topology, saved.world_size, config), config)
    return describe_plan(problem, saved.apply(problem, file))
