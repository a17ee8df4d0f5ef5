"""What commands share: parts of their parsers, the settings read back from them, and the console."""

from dataclasses import fields
from typing import TYPE_CHECKING, Literal, TypeVar

from jsonargparse import ArgumentParser, Namespace

from a2gen_rec.config import EnsembleConfig, EvaluateConfig, PrepareConfig, ServeConfig, SimulateConfig

if TYPE_CHECKING:
    from rich.console import Console

ConfigT = TypeVar("ConfigT", SimulateConfig, PrepareConfig, EvaluateConfig, EnsembleConfig, ServeConfig)


def build_parser(description: str, usage: str | None = None) -> ArgumentParser:
    return ArgumentParser(description=description, usage=usage, exit_on_error=False)


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to run")


def config_from_args(kind: type[ConfigT], options: Namespace) -> ConfigT:
    return kind(**{field.name: options[field.name] for field in fields(kind)})


def new_console() -> "Console":
    """Where tables go: as wide as the terminal, or 100 columns in a file or pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)
