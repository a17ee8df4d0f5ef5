"""``a2gen prepare``: a raw log becomes a dataset."""

import shlex
import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, config_from_args, new_console
from a2gen_rec.config import PrepareConfig

SOURCE_NAMES = ("kuairand", "jd", "rec_tmall", "tenrec", "simulated", "generic")


def parser() -> ArgumentParser:
    command = build_parser("Turn a raw log into a dataset of user windows.")
    command.add_argument("source", type=Literal[SOURCE_NAMES], help=f"kind of raw log: {', '.join(SOURCE_NAMES)}")
    command.add_argument("--raw", type=str, required=True, help="the log's file or folder, local or remote")
    command.add_argument("--out", type=str, required=True, help="dataset folder to write; must be new or empty")
    command.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    command.add_class_arguments(PrepareConfig)
    return command


def run(options: Namespace) -> None:
    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.reporting.console.dataset import summary_tables

    command = shlex.join(["a2gen", *sys.argv[1:]])
    config = config_from_args(PrepareConfig, options)
    card = prepare(options.source, options.raw, options.out, config, options.spec, command, progress=True)
    console = new_console()
    for table in summary_tables(card):
        console.print(table)
    console.print(f"dataset: {options.out}", soft_wrap=True)
