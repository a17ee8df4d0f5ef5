"""``a2gen export``: a trained run as a folder to serve from."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, new_console


def parser() -> ArgumentParser:
    command = build_parser("Export a run for serving: quantised tables, checked against the run's own AUC.")
    command.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is exported")
    command.add_argument("--out", type=str, required=True, help="new folder of the exported model")
    command.add_argument(
        "--dtype", type=Literal["int8", "fp16", "fp32"], default="int8", help="of the tables that are looked up by id"
    )
    command.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    command.add_argument(
        "--tolerance", type=float, default=0.001, help="most that an action's AUC may fall by; else nothing is written"
    )
    command.add_argument("--ensemble", type=str, default="", help="ensemble folder; by default the run's own, if any")
    command.add_argument("--split", type=Literal["valid", "test"], default="test", help="part to measure on")
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.reporting.console.evaluation import export_table
    from a2gen_rec.runs.export import export_run

    exported = export_run(
        options.run,
        options.out,
        options.dtype,
        options.data,
        options.tolerance,
        options.ensemble,
        options.split,
    )
    console = new_console()
    console.print(export_table(exported.manifest.metrics))
    console.print(
        f"{options.out}: version {exported.manifest.version}, {exported.bytes / 2**20:,.1f} MiB", soft_wrap=True
    )
