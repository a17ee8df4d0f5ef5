"""``a2gen backtest``: replay a log day by day and compare how often to train."""

import shlex
import sys
from dataclasses import fields
from datetime import date
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.common import add_config_file, build_parser, new_console, print_line
from a2gen_rec.config import BacktestConfig, PrepareConfig
from a2gen_rec.config.data import SOURCE_NAMES
from a2gen_rec.config.parse import add_config_arguments, config_from_args
from a2gen_rec.errors import ConfigError

SET_BY_BACKTEST = {
    "start",
    "end",
    "valid_start",
    "test_start",
    "valid_fraction",
    "test_fraction",
    "train_only",
    "carry",
}
"""Settings of ``a2gen prepare`` that a backtest sets itself."""
CAPACITY = 1.5
"""Default of ``--prepare.capacity``: tables need free rows for the values of later days."""


def parser() -> ArgumentParser:
    command = build_parser(
        "Replay a log day by day, train by several policies, and compare their models on the following day.",
        usage="a2gen backtest --source SOURCE --raw LOG --from DAY --to DAY --out DIR [--config FILE]\n"
        "                      [--jobs N] [--SECTION.SETTING VALUE ...]",
    )
    command.add_argument("--source", type=Literal[SOURCE_NAMES], required=True, help="kind of raw log")
    command.add_argument("--raw", type=str, required=True, help="file or directory of the log, of all days")
    command.add_argument("--spec", type=str, default="", help="YAML that describes a 'generic' log")
    command.add_argument(
        "--from",
        type=str,
        required=True,
        help="first evaluated day, such as 2024-03-11; earlier ones are trained first",
    )
    command.add_argument("--to", type=str, required=True, help="last evaluated day")
    command.add_argument("--out", type=str, required=True, help="output directory; an existing backtest is resumed")
    command.add_argument("--jobs", type=int, default=1, help="number of concurrent commands, each on one thread")
    command.add_argument(
        "--bootstrap-resamples", type=int, default=500, help="number of bootstrap resamples of users, for intervals"
    )
    command.add_argument("--markdown", type=str, default="", help="path of the Markdown report; default: OUT/report.md")
    command.add_class_arguments(BacktestConfig)
    command.add_class_arguments(PrepareConfig, "prepare", skip=SET_BY_BACKTEST)
    command.set_defaults({"prepare.capacity": CAPACITY, "prepare.threads": 1})
    add_config_file(command)
    add_config_arguments(command)
    return command


def run(args: Namespace) -> None:
    from a2gen_rec.utils.warning_filters import silence_known_warnings

    silence_known_warnings()
    from a2gen_rec.experiments.backtest.comparison import compare_policies
    from a2gen_rec.experiments.backtest.runner import run_backtest
    from a2gen_rec.experiments.backtest.steps import Log
    from a2gen_rec.reporting.console.backtest import backtest_table
    from a2gen_rec.reporting.pages.backtest.page import write_backtest_report
    from a2gen_rec.utils import paths

    if args.bootstrap_resamples < 1:
        raise ConfigError(f"--bootstrap-resamples {args.bootstrap_resamples} must be at least 1")
    log = Log(
        args.source,
        paths.abspath(args.raw),
        paths.abspath(args.spec) if args.spec else "",
        _day("--from", args["from"]),
        _day("--to", args["to"]),
    )
    backtest = run_backtest(
        log,
        BacktestConfig(**_values(BacktestConfig, args)),
        args.prepare if isinstance(args.prepare, PrepareConfig) else PrepareConfig(**args.prepare.as_dict()),
        config_from_args(args),
        args.out,
        args.jobs,
        print_line,
        command=shlex.join(["a2gen", *sys.argv[1:]]),
    )
    console = new_console()
    with console.status("comparing") as status:
        comparison = compare_policies(backtest, args.bootstrap_resamples, lambda line: status.update(line))
        files = write_backtest_report(backtest, comparison, args.markdown)
    for part in backtest_table(comparison):
        console.print(part, soft_wrap=isinstance(part, str))
    for file in files:
        console.print(f"written: {file}", soft_wrap=True)


def _values(kind: Any, args: Namespace) -> dict[str, Any]:
    return {field.name: args[field.name] for field in fields(kind)}


def _day(option: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text!r} is not a day such as 2024-03-11") from None
