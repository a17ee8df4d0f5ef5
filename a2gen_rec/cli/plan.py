"""``a2gen plan``: whether and how the tables fit on a cluster."""

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, new_console
from a2gen_rec.config import PlannerFeature, WorkloadConfig
from a2gen_rec.config.parse import add_config_arguments, config_from_args
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = build_parser(
        "Tell whether and how the embedding tables fit on a cluster. Needs neither the cluster nor a GPU.",
        usage="a2gen plan --config FILE --topology FILE [--data DIR] [--sweep ranks=8,16] [--html PAGE] [--save PLAN]\n"
        "       a2gen plan --config FILE [--data DIR] --compare A.yaml B.yaml",
    )
    command.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    command.add_argument("--data", type=str, default="", help="dataset folder; takes the place of `features`")
    command.add_argument("--topology", type=str, default="", help="YAML of the cluster, as in configs/topologies/")
    command.add_argument("--ranks", type=int, default=0, help="ranks on such hosts; 0 takes the topology's")
    command.add_argument("--rows", type=dict[str, int], default={}, help="--rows.TABLE N: other number of rows")
    command.add_argument("--sweep", type=str, default="", help="also plan for other numbers of ranks: ranks=8,16,32")
    command.add_argument(
        "--compare",
        type=str,
        nargs=2,
        default=None,
        help="two topologies, or saved plans with --topology",
    )
    command.add_argument("--json", type=str, default="", help="also write the report to this file")
    command.add_argument("--html", type=str, default="", help="also write the report as a page to this file")
    command.add_argument("--save", type=str, default="", help="write the plan for `a2gen train --plan` to this file")
    command.add_argument(
        "--features", type=dict[str, PlannerFeature], default={}, help="tables, where there is no --data"
    )
    command.add_argument("--workload", type=WorkloadConfig, default=WorkloadConfig())
    add_config_arguments(command)
    return command


def run(options: Namespace) -> int:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.cli import plan_report
    from a2gen_rec.reporting.console import plan
    from a2gen_rec.reporting.pages.plan import page
    from a2gen_rec.sharding.planner import PlanningProblem
    from a2gen_rec.sharding.saved_plan import SavedPlan
    from a2gen_rec.utils import paths

    config, console = config_from_args(options), new_console()
    alone = [name for name in ("ranks", "sweep", "html", "save") if options[name]]
    if options.compare and alone:
        raise ConfigError(f"--{alone[0]} is for one plan, --compare for two: give one of them")
    for file in filter(None, (options.json, options.html, options.save)):
        paths.ensure_writable_dir(paths.dirname(file))
    workload = plan_report.read_workload(options.data, options.features, options.workload, config, options.rows)
    if options.compare:
        a, b = (plan_report.report_for_file(file, workload, options.topology, config) for file in options.compare)
        plan.print_comparison(console, a, b)
        result: dict[str, Any] = {"a": a.to_dict(), "b": b.to_dict()}
        fits = a.fits and b.fits
    else:
        problem = PlanningProblem(workload, plan_report.read_cluster(options.topology, options.ranks, config), config)
        clusters = plan_report.read_sweep(options.sweep, problem.cluster) if options.sweep else []
        report, found = plan_report.plan_and_report(problem)
        plan.print_plan(console, report)
        swept = plan_report.sweep(problem, clusters)
        if swept:
            plan.print_sweep(console, swept)
        if options.html:
            paths.write_text(options.html, page.render_plan_page(report, swept))
        if options.save and found is not None:
            SavedPlan.from_plan(found, problem).save(options.save)
        result = {**report.to_dict(), "sweep": [each.to_dict() for each in swept]}
        fits = report.fits
    if options.json:
        paths.write_text(options.json, json.dumps(result, indent=1) + "\n")
    return int(not fits)
