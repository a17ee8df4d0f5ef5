"""Entry point of ``a2gen``: select the command, parse its arguments, report its errors."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from a2gen_rec import __version__
from a2gen_rec.cli import (
    backfill,
    backtest,
    benchmark,
    doctor,
    ensemble_train,
    evaluate,
    experiment,
    export,
    plan,
    prepare,
    rank,
    report_dataset,
    report_experiment,
    serve,
    simulate,
    spec,
    train,
)
from a2gen_rec.cli.common import is_main_rank
from a2gen_rec.cli.config_file import name_config_file
from a2gen_rec.cli.options import HelpFormatter, hyphenated, normalize_option_names
from a2gen_rec.config.parser_errors import parser_error_text
from a2gen_rec.errors import ConfigError, UserError


class Command(Protocol):
    """Module of a command: its parser, and a function that runs it and returns an exit code."""

    def parser(self) -> ArgumentParser: ...

    def run(self, args: Namespace, /) -> int | None: ...


COMMANDS: dict[str, Command] = {
    "simulate": simulate,
    "spec": spec,
    "prepare": prepare,
    "train": train,
    "ensemble train": ensemble_train,
    "evaluate": evaluate,
    "export": export,
    "rank": rank,
    "serve": serve,
    "backfill": backfill,
    "experiment": experiment,
    "backtest": backtest,
    "report experiment": report_experiment,
    "report dataset": report_dataset,
    "plan": plan,
    "benchmark": benchmark,
    "doctor": doctor,
}

GROUPS = {
    "ensemble": "Combine a run's predictions into one score.",
    "report": "Write a report of an experiment or of a dataset, as HTML and Markdown with charts.",
}
"""Descriptions of the commands that have subcommands."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``a2gen``. The exit code is 0 on success, 1 for invalid input, 2 for invalid settings."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        # All ranks of a job raise the same error; rank 0 prints it.
        if is_main_rank():
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
    name = _command_name(argv)
    parser, parsers = _parsers(name if name in COMMANDS else "")
    _check_command(argv)
    argv = _load_saved_config(argv)
    try:
        args = parser.parse_args(_split_benchmark_args(_normalized(argv, parsers)))
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(name_config_file(_error_text(error, argv, parsers), argv)) from error
    name = args.subcommand
    args = args[name]
    if name in GROUPS:
        name, args = f"{name} {args.subcommand}", args[args.subcommand]
    try:
        args = _instantiated(args, parsers[name])
        return int(COMMANDS[name].run(args) or 0)
    except ConfigError as error:
        raise ConfigError(name_config_file(str(error), argv)) from error


def _instantiated(args: Namespace, parser: ArgumentParser) -> Namespace:
    """Return the arguments with settings as dataclasses.

    Raises:
        ConfigError: A section is not a mapping, as with ``model: 3`` in a file, or a setting is out of range.
    """
    for name in parser.groups or {}:
        if not isinstance(args.get(name, Namespace()), Namespace):
            raise ConfigError(f"{name}: must be a mapping of settings, not {args[name]!r}")
    try:
        return parser.instantiate(args)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(parser_error_text(error)) from error


def _normalized(argv: list[str], parsers: dict[str, ArgumentParser]) -> list[str]:
    """Return the arguments with underscores in the names of the command's options."""
    name = _command_name(argv)
    return normalize_option_names(argv, parsers[name]) if name in parsers else argv


def _command_name(argv: list[str]) -> str:
    return " ".join(argv[: 2 if argv[:1] and argv[0] in GROUPS else 1])


def _load_saved_config(argv: list[str]) -> list[str]:
    """Let ``a2gen train --run DIR`` resume with the run's settings, and read a remote ``--config`` through iopath.

    A new run with ``--init-from`` has the settings of that run, and one epoch.
    """
    from a2gen_rec.training.run_dir import RunDir
    from a2gen_rec.utils import paths

    if argv[:1] not in (["train"], ["plan"]):
        return argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--run")
    parser.add_argument("--init-from", "--init_from")
    known, others = parser.parse_known_args(argv[1:])
    run = ["--run", known.run] if known.run else []
    saved = [RunDir(folder).config_file for folder in (known.run, known.init_from) if folder]
    saved = [file for file in saved if paths.exists(file)][:1]
    settings = [word for file in known.config or saved for word in ("--config", paths.to_local_path(file))]
    if known.init_from:
        run += ["--init-from", known.init_from]
        is_new = not known.run or saved != [RunDir(known.run).config_file]
        settings += ["--train.epochs", "1"] if is_new or known.config else []
        settings += ["--data", ""] if is_new and not known.config else []  # not the data of the earlier run
    return [argv[0], *settings, *run, *others]


def _split_benchmark_args(argv: list[str]) -> list[str]:
    """Pass the benchmark's options, after ``--``, as one argument; argparse accepts ``--`` only after the name."""
    if argv[:1] != ["benchmark"] or "--" not in argv:
        return argv
    end = argv.index("--")
    return [*argv[:end], "--options", json.dumps(argv[end + 1 :])]


@cache
def _parsers(command: str = "") -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """Return the main parser and the parsers of its commands by name: only of ``command``, or of all if it is empty."""
    parser = ArgumentParser(
        prog="a2gen",
        description="Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables.",
        version=__version__,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parsers = {name: module.parser() for name, module in COMMANDS.items() if command in ("", name)}
    subcommands = {"": _add_subcommands(parser)}
    for name, subparser in parsers.items():
        group, _, last = name.rpartition(" ")
        if group not in subcommands:
            group_parser = ArgumentParser(description=GROUPS[group], exit_on_error=False)
            subcommands[""].add_subcommand(group, group_parser, help=GROUPS[group])
            group_parser.prog = f"a2gen {group}"
            subcommands[group] = _add_subcommands(group_parser)
        subcommands[group].add_subcommand(last, subparser, help=subparser.description)
        subparser.prog = f"a2gen {name}"
    return parser, parsers


def _add_subcommands(parser: ArgumentParser) -> Any:
    return parser.add_subcommands(
        dest="subcommand",
        title="commands",
        description="`COMMAND --help` describes a command.",
        metavar="COMMAND",
    )


def _check_command(argv: list[str]) -> None:
    """Check that the arguments start with a command or an option of the main parser.

    Raises:
        ConfigError: The command is missing or unknown.
    """
    group = argv[0] if argv and argv[0] in GROUPS else ""
    names = list(
        dict.fromkeys(name.removeprefix(f"{group} ").split()[0] for name in COMMANDS if name.startswith(group))
    )
    word = "".join(argv[1:2] if group else argv[:1])
    if not word.startswith("-") and word not in names:
        problem = f"unknown command {word!r}" if word else f"{group or 'a2gen'} requires a command"
        raise ConfigError(f"{problem}; choose one of {', '.join(names)}")


def _error_text(error: BaseException, argv: list[str], parsers: dict[str, ArgumentParser]) -> str:
    """Return the error with names of options as on the command line, and with the most similar option."""
    text = parser_error_text(error)
    name = _command_name(argv)
    options = parsers[name]._option_string_actions if name in parsers else {}
    head, _, missing = text.partition("required, but missing: ")
    if missing and not head:
        names = [full.removeprefix(name.replace(" ", ".") + ".") for full in missing.split(", ")]
        return f"required, but missing: {', '.join(hyphenated(f'--{n}') if f'--{n}' in options else n for n in names)}"
    if match := re.match(r"unrecognized arguments: (--[^\s=]+)", text):
        similar = difflib.get_close_matches(match[1].replace("-", "_").replace("__", "--", 1), options, 1, 0.8)
        return text + "".join(f"; did you mean {hyphenated(option)}?" for option in similar)
    return text
