"""Settings as the command line and YAML files give them: the sections of :class:`Config`, typed and checked."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from a2gen_rec.config.training import Config
from a2gen_rec.errors import ConfigError


def add_config_arguments(parser: ArgumentParser) -> None:
    """Take every section of :class:`Config` as ``--SECTION.SETTING``, or from a YAML file."""
    for section in fields(Config):
        kind: Any = section.type
        parser.add_argument(f"--{section.name}", type=kind, default=kind())


def config_from_args(options: Namespace) -> Config:
    """The configuration in parsed options."""
    return Config(**{field.name: options[field.name] for field in fields(Config)})


def config_from_dict(settings: Mapping[str, Any]) -> Config:
    """The configuration of plain nested settings, as in a YAML file.

    Raises:
        ConfigError: a setting is unknown, of the wrong type, or out of range.
    """
    known = [section.name for section in fields(Config)]
    for name, values in settings.items():
        if name not in known:
            raise ConfigError(f"no section {name!r}; there are {', '.join(known)}")
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} must hold settings, not {values!r}")
    parser = _parser()
    try:
        return config_from_args(parser.instantiate(parser.parse_object(dict(settings))))
    except (ArgumentError, ValueError, TypeError) as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        raise ConfigError(" ".join(lines)) from error


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    add_config_arguments(parser)
    return parser
