"""``a2gen prepare``: build a dataset from a raw log."""

import shlex
import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import build_parser, config_from_args, new_console
from a2gen_rec.config import PrepareConfig
from a2gen_rec.config.data import SOURCE_NAMES
from a2gen_rec.errors import ConfigError


def parser() -> ArgumentParser:
    command = build_parser("Build a dataset of user windows from a raw log.")
    command.add_argument("source", type=Literal[SOURCE_NAMES], help="kind of raw log")
    command.add_argument("--raw", type=str, required=True, help="file or directory of the log, local or remote")
    command.add_argument(
        "--out", type=str, default="", help="output directory, new or empty; required without --sample"
    )
    command.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    command.add_argument(
        "--base", type=str, default="", help="dataset that the log continues: --out becomes its next increment"
    )
    command.add_argument(
        "--sample", type=int, default=0, help="show this many of the first impressions as they are read; writes nothing"
    )
    command.add_class_arguments(PrepareConfig)
    return command


def run(args: Namespace) -> None:
    from rich.text import Text

    config = config_from_args(PrepareConfig, args)
    if args.sample:
        _show_sample(args, config)
        return
    if not args.out:
        raise ConfigError("required, but missing: --out")
    from a2gen_rec.data.prepare.pipeline import prepare
    from a2gen_rec.reporting.console.dataset import summary_tables

    command = shlex.join(["a2gen", *sys.argv[1:]])
    card = prepare(args.source, args.raw, args.out, config, args.spec, command, progress=True, base=args.base)
    console = new_console()
    for table in summary_tables(card):
        console.print(table, soft_wrap=isinstance(table, Text))
    console.print(f"dataset: {args.out}", soft_wrap=True)


def _show_sample(args: Namespace, config: PrepareConfig) -> None:
    from a2gen_rec.data.prepare.sample import sample_log
    from a2gen_rec.reporting.console.sample import sample_tables

    if args.out:
        raise ConfigError("--sample writes nothing; remove --out")
    if args.base:
        raise ConfigError("--sample reads the log alone; remove --base")
    console = new_console()
    sample = sample_log(args.source, args.raw, config, args.sample, args.spec, progress=True)
    for table in sample_tables(sample):
        console.print(table)
