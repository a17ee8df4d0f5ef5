"""``a2gen plan``: check whether the embedding tables fit a cluster, and how to shard them."""

import argparse
import json
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_config_file, new_console
from a2gen_rec.cli.options import CommandParser
from a2gen_rec.config import Config, PlannerFeature, WorkloadConfig
from a2gen_rec.config.parse import add_config_arguments, config_from_args
from a2gen_rec.errors import ConfigError

PLANNER_SETTINGS = (
    "model.dim",
    "model.feedback_encoding",
    "model.session_features",
    "model.time_buckets",
    "loader.deduplicate_ids",
    "loader.max_impressions_per_batch",
    "loader.max_windows_per_batch",
    "optim.sparse_lr",
    "optim.sparse_optimizer",
    "sharding.",
)
"""Prefixes of the settings of :class:`Config` that change a plan."""

_SECTIONS = [section.name for section in fields(Config)]


class PlanParser(CommandParser):
    """Parser whose help omits the settings that do not change a plan."""

    def format_help(self) -> str:
        hidden = [
            action
            for action in self._actions
            if action.dest.partition(".")[0] in _SECTIONS and not action.dest.startswith(PLANNER_SETTINGS)
        ]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            return str(super().format_help())
        finally:
            for action, text in zip(hidden, texts, strict=True):
                action.help = text


def parser() -> ArgumentParser:
    command = PlanParser(
        description="Check whether embedding tables fit a cluster, and how to shard them. "
        "Needs neither the cluster nor a GPU.\n"
        "Accepts all settings of `a2gen train`, and lists those that change the plan.",
        usage="a2gen plan --config FILE --topology FILE [--data DIR] [--sweep ranks=8,16]\n"
        "                  [--html PAGE] [--save PLAN] [--SECTION.SETTING VALUE ...]\n"
        "       a2gen plan --config FILE [--data DIR] --compare A.yaml B.yaml",
        exit_on_error=False,
    )
    add_config_file(command)
    # A key of a run's config.yaml, without effect on the plan.
    command.add_argument("--init-from", type=str, default="", help=argparse.SUPPRESS)
    command.add_argument("--data", type=str, default="", help="dataset directory; replaces `features`")
    command.add_argument("--topology", type=str, default="", help="YAML of the cluster, as in configs/topologies/")
    command.add_argument("--ranks", type=int, default=0, help="number of ranks; 0 uses the topology's")
    command.add_argument(
        "--num-rows", type=dict[str, int], default={}, help="number of rows of a table: --num-rows.TABLE N"
    )
    command.add_argument("--sweep", type=str, default="", help="also plan for other numbers of ranks: ranks=8,16,32")
    command.add_argument(
        "--compare",
        type=str,
        nargs=2,
        default=None,
        help="two topologies, or two saved plans with --topology",
    )
    command.add_argument("--json", type=str, default="", help="also write the report to this file")
    command.add_argument("--html", type=str, default="", help="also write the report as an HTML page to this file")
    command.add_argument("--save", type=str, default="", help="write the plan for `a2gen train --plan` to this file")
    command.add_argument(
        "--features",
        type=dict[str, PlannerFeature],
        default={},
        help="features to plan without --data, by name: level, rows, zipf_exponent, mean_values",
    )
    command.add_argument("--workload", type=WorkloadConfig, default=WorkloadConfig())
    add_config_arguments(command)
    return command


def run(args: Namespace) -> int:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.cli import plan_report
    from a2gen_rec.reporting.console import plan
    from a2gen_rec.reporting.pages.plan import page
    from a2gen_rec.sharding.planner import PlanningProblem, precision_warning
    from a2gen_rec.sharding.saved_plan import SavedPlan
    from a2gen_rec.utils import paths

    config, console = config_from_args(args), new_console()
    if config.model.name == "gbdt":
        raise ConfigError("model.name gbdt has no embedding tables to plan")
    single_plan_options = [name for name in ("ranks", "sweep", "html", "save") if args[name]]
    if args.compare and single_plan_options:
        raise ConfigError(f"--{single_plan_options[0]} cannot be combined with --compare")
    for file in filter(None, (args.json, args.html, args.save)):
        paths.ensure_writable_dir(paths.dirname(file))
    workload = plan_report.read_workload(args.data, args.features, args.workload, config, args.num_rows)
    if args.compare:
        a, b = (plan_report.report_for_file(file, workload, args.topology, config) for file in args.compare)
        plan.print_comparison(console, a, b)
        result: dict[str, Any] = {"a": a.to_dict(), "b": b.to_dict()}
        fits = a.fits and b.fits
    else:
        problem = PlanningProblem(workload, plan_report.read_cluster(args.topology, args.ranks, config), config)
        clusters = plan_report.read_sweep(args.sweep, problem.cluster) if args.sweep else []
        report, best_plan = plan_report.plan_and_report(problem)
        if warning := precision_warning(problem.cluster.device, config.sharding.dtype):
            console.print(f"warning: {warning}", soft_wrap=True)
        plan.print_plan(console, report)
        swept = plan_report.sweep(problem, clusters)
        if swept:
            plan.print_sweep(console, swept)
        if args.html:
            paths.write_text(args.html, page.render_plan_page(report, swept))
        if args.save and best_plan is not None:
            SavedPlan.from_plan(best_plan, problem).save(args.save)
        elif args.save and paths.exists(args.save):
            paths.remove(args.save)  # the plan of a former command does not fit either
            console.print(f"{args.save}: removed, as no plan fits", soft_wrap=True)
        result = {**report.to_dict(), "sweep": [swept_report.to_dict() for swept_report in swept]}
        fits = report.fits
    if args.json:
        paths.write_text(args.json, json.dumps(result, indent=1) + "\n")
    return int(not fits)
