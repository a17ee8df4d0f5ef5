"""``a2gen``: the command line. Every command imports what it needs when it runs, so that help comes at once."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from a2gen_rec import __version__
from a2gen_rec.config import Config, EvaluateConfig, PrepareConfig, SimulateConfig
from a2gen_rec.errors import ConfigError, UserError

if TYPE_CHECKING:
    from rich.console import Console

Section = TypeVar("Section", SimulateConfig, PrepareConfig, EvaluateConfig)

SOURCES = ("kuairand", "jd", "rec_tmall", "tenrec", "simulated", "generic")


@dataclass(frozen=True)
class Command:
    """A subcommand: its parser and what runs it."""

    parser: ArgumentParser
    run: Any


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: exit code 0 when done, 1 for unusable input, 2 for unusable settings."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # Ranks of one job agree on their errors; the first one tells.
        if os.environ.get("RANK", "0") == "0":
            print(f"a2gen: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 0
    sys.stdout.flush()
    if code:
        sys.exit(code)


def _run(argv: list[str]) -> int:
    parser, commands = _parser()
    try:
        options = parser.parse_args(_with_saved_config(argv))
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(_one_line(error)) from error
    name = options.subcommand
    command = commands[name]
    try:
        settings = command.parser.instantiate(options[name])
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_one_line(error)) from error
    return int(command.run(settings) or 0)


def _with_saved_config(argv: list[str]) -> list[str]:
    """Let `a2gen train --run DIR` go on with the run's own settings, and read a remote --config through iopath."""
    from a2gen_rec import paths

    if argv[:1] != ["train"]:
        return argv
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    known.add_argument("--run")
    given, others = known.parse_known_args(argv[1:])
    run = ["--run", given.run] if given.run else []
    saved = paths.join(given.run, "config.yaml") if given.run else ""
    config = given.config or (saved if saved and paths.exists(saved) else "")
    return ["train", *(["--config", paths.local_copy(config)] if config else []), *run, *others]


def _parser() -> tuple[ArgumentParser, dict[str, Command]]:
    parser = ArgumentParser(
        prog="a2gen",
        description="Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables.",
        version=f"a2gen {__version__}",
        exit_on_error=False,
    )
    commands = {
        "simulate": Command(_simulate_parser(), _simulate),
        "prepare": Command(_prepare_parser(), _prepare),
        "train": Command(_train_parser(), _train),
        "evaluate": Command(_evaluate_parser(), _evaluate),
        "rank": Command(_rank_parser(), _rank),
        "doctor": Command(_new("Check versions, the torch/fbgemm/torchrec match, devices and backends."), _doctor),
    }
    subcommands = parser.add_subcommands(dest="subcommand", title="commands", metavar="COMMAND")
    for name, command in commands.items():
        subcommands.add_subcommand(name, command.parser, help=command.parser.description)
    return parser, commands


def _new(description: str, usage: str | None = None) -> ArgumentParser:
    return ArgumentParser(description=description, usage=usage, exit_on_error=False)


def _simulate_parser() -> ArgumentParser:
    parser = _new("Write the log of a simulated short-video world whose true probabilities are known.")
    parser.add_argument("--out", type=str, required=True, help="folder to write; must be new or empty")
    parser.add_class_arguments(SimulateConfig)
    return parser


def _prepare_parser() -> ArgumentParser:
    parser = _new("Turn a raw log into a dataset of user windows.")
    parser.add_argument("source", type=Literal[SOURCES], help=f"kind of raw log: {', '.join(SOURCES)}")
    parser.add_argument("--raw", type=str, required=True, help="the log's file or folder, local or remote")
    parser.add_argument("--out", type=str, required=True, help="dataset folder to write; must be new or empty")
    parser.add_argument("--spec", type=str, default=None, help="YAML that describes a 'generic' log")
    parser.add_class_arguments(PrepareConfig)
    return parser


def _train_parser() -> ArgumentParser:
    parser = _new(
        "Train a model, or resume a run. Under torchrun or TorchX: on all their ranks together.",
        usage="a2gen train --run DIR [--config FILE] [--data DIR] [--SECTION.SETTING VALUE ...]",
    )
    parser.add_argument("--config", action="config", help="YAML of settings; later arguments override it")
    parser.add_argument("--data", type=str, default="", help="dataset folder from `a2gen prepare`")
    parser.add_argument("--run", type=str, required=True, help="run folder; one that exists is resumed")
    for section in fields(Config):
        kind: Any = section.type
        parser.add_argument(f"--{section.name}", type=kind, default=kind())
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _new("Measure a run on one split, beside trivial references. Also under torchrun or TorchX.")
    parser.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is evaluated")
    parser.add_argument("--split", type=Literal["train", "valid", "test"], default="test", help="part to measure on")
    parser.add_argument("--json", type=str, default="", help="also write the result to this file")
    parser.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    _add_device(parser)
    parser.add_class_arguments(EvaluateConfig)
    return parser


def _rank_parser() -> ArgumentParser:
    parser = _new("Rank candidates for one user: probabilities, expected watch time, likely action timeline.")
    parser.add_argument("--run", type=str, required=True, help="run folder; its best checkpoint is used")
    parser.add_argument("--user", type=str, required=True, help="raw user identifier, as in the log")
    parser.add_argument(
        "--candidates", type=str, default="", help="file of raw item identifiers, one a line; default: popular ones"
    )
    parser.add_argument("--by", type=str, default="", help="action or label to rank by; default: expected watch time")
    parser.add_argument("--top", type=PositiveInt, default=10, help="rows shown")
    parser.add_argument("--data", type=str, default="", help="dataset folder; by default the run's own")
    _add_device(parser)
    return parser


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")


def _simulate(options: Namespace) -> None:
    from a2gen_rec.data.simulator import simulate

    summary = simulate(options.out, _section(SimulateConfig, options), progress=True)
    rates = ", ".join(f"{name} {rate:.1%}" for name, rate in summary.rates.items())
    print(f"{summary.impressions:,} impressions of {summary.users:,} users on {summary.items:,} items in {options.out}")
    print(f"rates: {rates}")


def _prepare(options: Namespace) -> None:
    from a2gen_rec.data.prepare import prepare
    from a2gen_rec.data.summary import summary_tables

    command = shlex.join(["a2gen", *sys.argv[1:]])
    config = _section(PrepareConfig, options)
    card = prepare(options.source, options.raw, options.out, config, options.spec, command, progress=True)
    console = _console()
    for table in summary_tables(card):
        console.print(table)
    console.print(f"dataset: {options.out}", soft_wrap=True)


def _train(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.training.trainer import train

    config = Config(**{field.name: options[field.name] for field in fields(Config)})
    if not options.data:
        raise ConfigError("--data is missing: the dataset folder from `a2gen prepare`")
    train(config, options.data, options.run)


def _evaluate(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec import paths
    from a2gen_rec.reporting.tables import evaluation_tables
    from a2gen_rec.training.run import evaluate_run

    if options.json:
        paths.make_folder(paths.parent(options.json))
    config = _section(EvaluateConfig, options)
    result = evaluate_run(options.run, options.split, options.data, config, options.device)
    if not result:
        return
    console = _console()
    for table in evaluation_tables(result):
        console.print(table)
    console.print(f"run: {options.run}", soft_wrap=True)
    if options.json:
        paths.write_text(options.json, json.dumps(result, indent=1) + "\n")


def _rank(options: Namespace) -> None:
    from a2gen_rec.quiet import quiet

    quiet()
    from a2gen_rec.reporting.tables import ranking_table
    from a2gen_rec.serving.rank import rank

    ranking = rank(options.run, options.user, options.candidates, options.by, options.top, options.data, options.device)
    _console().print(ranking_table(ranking))


def _doctor(_: Namespace) -> int:
    from a2gen_rec.doctor import diagnose, failed, render

    findings = diagnose()
    _console().print(render(findings))
    return int(failed(findings))


def _console() -> "Console":
    """Where tables go: as wide as the terminal, or 100 columns in a file or pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def _section(kind: type[Section], options: Namespace) -> Section:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def _one_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)


if __name__ == "__main__":
    main()
