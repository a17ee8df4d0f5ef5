"""``a2gen prepare``: build a dataset from a raw log."""

import shlex
import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, config_from_args, new_console
from a2gen_rec.config import PrepareConfig
from a2gen_rec.config.data import SOURCE_NAMES


def parser() -> ArgumentParser:
    command = build_parser("Build a dataset of user windows from a raw log.")
    command.add_argument("source", type=Literal[SOURCE_NAMES], help="kind of raw log")
    command.add_argument("--raw", type=str, required=True, help="file or directory of the log, local or remote")
    command.add_argument("--out", type=str, required=True, help="output directory; must be new or empty")
    command.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    command.add_class_arguments(PrepareConfig)
    return command


def run(args: Namespace) -> None:
    from rich.text import Text

    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.reporting.console.dataset import summary_tables

    command = shlex.join(["a2gen", *sys.argv[1:]])
    config = config_from_args(PrepareConfig, args)
    card = prepare(args.source, args.raw, args.out, config, args.spec, command, progress=True)
    console = new_console()
    for table in summary_tables(card):
        console.print(table, soft_wrap=isinstance(table, Text))
    console.print(f"dataset: {args.out}", soft_wrap=True)
