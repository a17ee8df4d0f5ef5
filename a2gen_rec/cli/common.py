"""Parsers, settings and console shared by the commands."""

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.cli.options import CommandParser, ConfigFileAction
from a2gen_rec.config import EnsembleConfig, EvaluateConfig, PrepareConfig, ServeConfig, SimulateConfig

if TYPE_CHECKING:
    from rich.console import Console

ConfigT = TypeVar("ConfigT", SimulateConfig, PrepareConfig, EvaluateConfig, EnsembleConfig, ServeConfig)


def build_parser(description: str, usage: str | None = None) -> ArgumentParser:
    return CommandParser(description=description, usage=usage, exit_on_error=False)


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="device to run on")


def add_config_file(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action=ConfigFileAction, help="YAML of settings; later arguments override it")


def add_run(parser: ArgumentParser, purpose: str, required: bool = True) -> None:
    """Add ``--run``; ``purpose`` completes "its best checkpoint is …"."""
    help_text = f"run directory; its best checkpoint is {purpose}"
    parser.add_argument("--run", type=str, required=required, default=None if required else "", help=help_text)


def add_data(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=str, default="", help="dataset directory; default: the run's")


def add_ensemble(parser: ArgumentParser) -> None:
    parser.add_argument("--ensemble", type=str, default="", help="ensemble directory; default: the run's, if any")


def add_duckdb_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--memory-limit-gb", type=float, default=PrepareConfig.memory_limit_gb, help="memory limit of DuckDB in GB"
    )
    parser.add_argument(
        "--threads", type=int, default=PrepareConfig.threads, help="number of DuckDB threads; 0 uses all cores"
    )


def config_from_args(config_class: type[ConfigT], args: Namespace) -> ConfigT:
    return config_class(**{field.name: args[field.name] for field in fields(config_class)})


def new_console() -> "Console":
    """Return a console for tables: as wide as the terminal, or 100 columns in a file or pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)


def is_main_rank() -> bool:
    """Return whether this process is rank 0 of its job, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def print_line(line: str) -> None:
    """Print a progress line immediately, in pipes as well."""
    print(line, flush=True)
