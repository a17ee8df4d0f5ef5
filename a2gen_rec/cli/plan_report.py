"""Inputs and reports of ``a2gen plan``."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from rich.console import Console
from rich.progress import track

from a2gen_rec.config import Config, PlannerFeature, WorkloadConfig
from a2gen_rec.data.card import DatasetCard
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
    num_rows: Mapping[str, int],
) -> Workload:
    """Return the workload of a prepared dataset, or of described features if ``data`` is empty.

    Args:
        data: Dataset directory, or empty.
        features: Features by name, used without ``data``.
        workload: Batch of one rank, used without ``data``.
        config: Settings of model, loader and sharding.
        num_rows: Number of rows of single tables, in place of the described ones.

    Raises:
        ConfigError: The description is incomplete.
        DataError: The dataset does not exist.
    """
    if data:
        return workload_from_dataset(DatasetCard.load(data), config).with_rows(num_rows)
    return workload_from_features(features, workload, config).with_rows(num_rows)


def read_cluster(file: str, ranks: int, config: Config) -> Cluster:
    """Read a topology file and apply the number of ranks (0: the file's) and the configured memory.

    Raises:
        ConfigError: The file is invalid, or the number of ranks does not fill its hosts.
    """
    if not file:
        raise ConfigError("--topology is missing: a file such as those in configs/topologies/")
    cluster = Cluster.from_yaml(file).with_memory(config.sharding)
    return cluster.with_ranks(ranks) if ranks else cluster


def plan_and_report(problem: PlanningProblem) -> tuple[PlanReport, Plan | None]:
    """Run :func:`plan_and_describe` with a spinner on terminals: searching remedies for hundreds of ranks is slow."""
    console = Console(stderr=True)
    with console.status("planning") if console.is_terminal else nullcontext():
        return plan_and_describe(problem)


def sweep(problem: PlanningProblem, clusters: Sequence[Cluster]) -> list[PlanReport]:
    """Plan the same tables on other clusters."""
    console = Console(stderr=True)
    steps = track(clusters, "planning", console=console, transient=True, disable=not console.is_terminal)
    return [
        plan_and_describe(PlanningProblem(problem.workload, cluster, problem.config), with_remedies=False)[0]
        for cluster in steps
    ]


def read_sweep(text: str, cluster: Cluster) -> list[Cluster]:
    """Return the clusters of ``ranks=8,16,32``: the same hosts with other numbers of ranks.

    Raises:
        ConfigError: The text is invalid, or a number of ranks does not fill the hosts.
    """
    name, _, values = text.partition("=")
    try:
        ranks = [int(value) for value in values.split(",")]
    except ValueError:
        ranks = []
    if name != "ranks" or not ranks or min(ranks) < 1:
        raise ConfigError(f"--sweep {text}: expected ranks=8,16,32")
    return [cluster.with_ranks(count) for count in ranks]


def report_for_file(file: str, workload: Workload, topology: str, config: Config) -> PlanReport:
    """Return the report of a topology's best plan, or of a saved plan on the topology in the file ``topology``.

    Raises:
        UserError: The file is neither, or is a plan for other tables.
    """
    raw = paths.read_yaml(file)
    if not isinstance(raw, dict) or "tables" not in raw:
        return plan_and_report(
            PlanningProblem(workload, Cluster.from_dict(raw, file).with_memory(config.sharding), config)
        )[0]
    saved = SavedPlan.from_dict(raw, file)
    problem = PlanningProblem(workload, read_cluster(topology, saved.world_size, config), config)
    return describe_plan(problem, saved.apply(problem, file))
