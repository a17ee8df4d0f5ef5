"""``a2gen evaluate``: a run measured on one split."""

import json
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_device, build_parser, config_from_args, new_console
from a2gen_rec.config import EvaluateConfig


def parser() -> ArgumentParser:
    command = build_parser("Measure a run on one split, beside trivial references. Also under torchrun or TorchX.")
    command.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is evaluated")
    command.add_argument("--split", type=Literal["train", "valid", "test"], default="test", help="part to measure on")
    command.add_argument("--json", type=str, default="", help="also write the result to this file")
    command.add_argument("--predictions", type=str, default="", help="also write every target's, as Parquet")
    command.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    command.add_argument("--ensemble", type=str, default="", help="ensemble folder; by default the run's own, if any")
    add_device(command)
    command.add_class_arguments(EvaluateConfig)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.ensemble import list_metrics_tables
    from a2gen_rec.reporting.console.evaluation import evaluation_tables
    from a2gen_rec.runs.evaluate import evaluate_run
    from a2gen_rec.utils import paths

    for file in filter(None, (options.json, options.predictions)):
        paths.ensure_writable_dir(paths.dirname(file))
    config = config_from_args(EvaluateConfig, options)
    result = evaluate_run(
        options.run, options.split, options.data, config, options.device, options.ensemble, options.predictions
    )
    if not result:
        return
    console = new_console()
    tables = evaluation_tables(result) + (list_metrics_tables(result["lists"]) if result["lists"] else [])
    for table in tables:
        console.print(table)
    console.print(f"run: {options.run}", soft_wrap=True)
    if options.json:
        paths.write_text(options.json, json.dumps(result, indent=1) + "\n")
