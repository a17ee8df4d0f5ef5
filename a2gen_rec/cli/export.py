"""``a2gen export``: export a trained run for serving."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_data, add_ensemble, add_run, build_parser, new_console


def parser() -> ArgumentParser:
    command = build_parser("Export a run for serving, with quantized tables, and compare its AUC with the run's.")
    add_run(command, "exported")
    command.add_argument("--out", type=str, required=True, help="output directory of the exported model")
    command.add_argument(
        "--dtype", type=Literal["int8", "fp16", "fp32"], default="int8", help="data type of the tables of id features"
    )
    add_data(command)
    command.add_argument(
        "--max-auc-drop",
        type=float,
        default=0.001,
        help="maximum drop of an action's AUC; if exceeded, nothing is written",
    )
    add_ensemble(command)
    command.add_argument("--split", type=Literal["valid", "test"], default="test", help="split to compare AUC on")
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.evaluation import export_table
    from a2gen_rec.runs.export import export_run

    exported = export_run(args.run, args.out, args.dtype, args.data, args.max_auc_drop, args.ensemble, args.split)
    console = new_console()
    console.print(export_table(exported.manifest.metrics))
    console.print(
        f"{args.out}: version {exported.manifest.version}, {exported.size_bytes / 2**20:,.1f} MiB", soft_wrap=True
    )
