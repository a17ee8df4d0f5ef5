"""Parsing of settings from the command line and YAML files: the sections of :class:`Config`, typed and checked."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from functools import cache, lru_cache
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from a2gen_rec.config.parser_errors import parser_error_text
from a2gen_rec.config.training import Config
from a2gen_rec.errors import ConfigError


def add_config_arguments(parser: ArgumentParser) -> None:
    """Add every section of :class:`Config` as ``--SECTION.SETTING`` options and YAML keys."""
    for section in fields(Config):
        kind: Any = section.type
        parser.add_argument(f"--{section.name}", type=kind, default=kind())


def config_from_args(args: Namespace) -> Config:
    """Return the configuration in parsed arguments."""
    return Config(**{field.name: args[field.name] for field in fields(Config)})


def config_from_dict(settings: Mapping[str, Any]) -> Config:
    """Return the configuration of nested settings, as in a YAML file.

    Raises:
        ConfigError: A setting is unknown, of the wrong type, or out of range.
    """
    known = [section.name for section in fields(Config)]
    for name, values in settings.items():
        if name not in known:
            raise ConfigError(f"unknown section {name!r}; choose one of {', '.join(known)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must be a mapping of settings, not {values!r}")
    try:
        return copy.deepcopy(_parse(_Settings(settings)))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(parser_error_text(error)) from error


class _Settings(dict[str, Any]):
    """Nested settings that are equal if they are written equally; ``True``, ``1`` and ``1.0`` are not."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))

    def __eq__(self, other: object) -> bool:
        return repr(self) == repr(other)


@lru_cache(maxsize=256)
def _parse(settings: _Settings) -> Config:
    """Parse settings once: an experiment has the same ones in many places, and parsing takes tens of milliseconds."""
    parser = _parser()
    return config_from_args(parser.instantiate(parser.parse_object(dict(settings))))


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config_arguments(parser)
    return parser
