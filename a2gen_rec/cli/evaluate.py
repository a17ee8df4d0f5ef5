"""``a2gen evaluate``: evaluate a run on one split."""

import json
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import (
    add_data,
    add_device,
    add_ensemble,
    add_run,
    build_parser,
    config_from_args,
    new_console,
)
from a2gen_rec.config import EvaluateConfig


def parser() -> ArgumentParser:
    command = build_parser(
        "Evaluate a run on one split and compare it with trivial baselines. Also under torchrun or TorchX."
    )
    add_run(command, "evaluated")
    command.add_argument("--split", type=Literal["train", "valid", "test"], default="test", help="split to evaluate on")
    command.add_argument("--full", action="store_true", help="print all tables, not only the summary")
    command.add_argument("--json", type=str, default="", help="also write the full result to this file")
    command.add_argument(
        "--predictions", type=str, default="", help="also write per-target predictions to this Parquet file"
    )
    add_data(command)
    add_ensemble(command)
    add_device(command)
    command.add_class_arguments(EvaluateConfig)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.ensemble import list_metrics_tables
    from a2gen_rec.reporting.console.evaluation import evaluation_summary_tables, evaluation_tables
    from a2gen_rec.runs.evaluate import evaluate_run
    from a2gen_rec.utils import paths

    for file in filter(None, (args.json, args.predictions)):
        paths.ensure_writable_dir(paths.dirname(file))
    config = config_from_args(EvaluateConfig, args)
    result = evaluate_run(args.run, args.split, args.data, config, args.device, args.ensemble, args.predictions)
    if not result:
        return
    console = new_console()
    tables: list[Any] = evaluation_tables(result) if args.full else evaluation_summary_tables(result)
    if args.full and result["lists"]:
        tables += list_metrics_tables(result["lists"])
    for table in tables:
        console.print(table)
    console.print(f"run: {args.run}{'' if args.full else '; --full prints all tables'}", soft_wrap=True)
    if result["data_digest"] != result["training_data_digest"]:
        console.print(f"data: {result['data']}; the run was trained on other data", soft_wrap=True)
    if args.json:
        paths.write_text(args.json, json.dumps(result, indent=1) + "\n")
