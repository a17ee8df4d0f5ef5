"""The entry point: which command, with which arguments, and what its errors become."""

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Protocol

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from a2gen_rec import __version__
from a2gen_rec.cli import (
    backfill,
    benchmark,
    doctor,
    evaluate,
    experiment,
    export,
    plan,
    prepare,
    rank,
    report,
    serve,
    simulate,
    train,
    train_ensemble,
)
from a2gen_rec.errors import ConfigError, UserError


class Command(Protocol):
    """A subcommand's module: its parser and what runs it, to an exit code."""

    def parser(self) -> ArgumentParser: ...

    def run(self, options: Namespace, /) -> int | None: ...


COMMANDS: dict[str, Command] = {
    "simulate": simulate,
    "prepare": prepare,
    "train": train,
    "train-ensemble": train_ensemble,
    "evaluate": evaluate,
    "export": export,
    "rank": rank,
    "serve": serve,
    "backfill": backfill,
    "experiment": experiment,
    "report": report,
    "plan": plan,
    "benchmark": benchmark,
    "doctor": doctor,
}


class LineWrappingFormatter(DefaultHelpFormatter):
    """Help whose texts keep their lines. Subcommands take over the main parser's formatter."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        hang = ["    " if line.startswith(" ") else "" for line in lines]
        filled = [textwrap.fill(line, width, subsequent_indent=by) for line, by in zip(lines, hang, strict=True)]
        return textwrap.indent("\n".join(filled), indent)


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
    parser, parsers = _parsers()
    try:
        options = parser.parse_args(_split_benchmark_args(_load_saved_config(argv)))
    except (ArgumentError, ConfigError) as error:
        raise ConfigError(_first_line(error)) from error
    name = options.subcommand
    try:
        settings = parsers[name].instantiate(options[name])
    except (ArgumentError, ValueError) as error:
        raise ConfigError(_first_line(error)) from error
    return int(COMMANDS[name].run(settings) or 0)


def _load_saved_config(argv: list[str]) -> list[str]:
    """Let `a2gen train --run DIR` go on with the run's own settings, and read a remote --config through iopath."""
    from a2gen_rec.utils import paths

    if argv[:1] not in (["train"], ["plan"]):
        return argv
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--config")
    known.add_argument("--run")
    given, others = known.parse_known_args(argv[1:])
    run = ["--run", given.run] if given.run else []
    saved = paths.join(given.run, "config.yaml") if given.run else ""
    config = given.config or (saved if saved and paths.exists(saved) else "")
    return [argv[0], *(["--config", paths.to_local_path(config)] if config else []), *run, *others]


def _split_benchmark_args(argv: list[str]) -> list[str]:
    """What follows ``--`` is the benchmark's; the parser would take it only right after the name."""
    if argv[:1] != ["benchmark"] or "--" not in argv:
        return argv
    end = argv.index("--")
    return [*argv[:end], "--options", json.dumps(argv[end + 1 :])]


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The main parser and those of the commands."""
    parser = ArgumentParser(
        prog="a2gen",
        description="Short-video ranking from action sequences: A2Gen on TorchRec-sharded embedding tables.",
        version=f"a2gen {__version__}",
        formatter_class=LineWrappingFormatter,
        exit_on_error=False,
    )
    parsers = {name: command.parser() for name, command in COMMANDS.items()}
    subcommands = parser.add_subcommands(dest="subcommand", title="commands", metavar="COMMAND")
    for name, command in parsers.items():
        subcommands.add_subcommand(name, command, help=command.description)
    return parser, parsers


def _first_line(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)
