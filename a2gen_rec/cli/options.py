"""Spelling of options: hyphens on the command line and in help, underscores in settings and parsers.

Parsers register every option with underscores, like the fields of the settings dataclasses. The command line accepts
both spellings.
"""

import copy
import re
import textwrap
from argparse import Action, _SubParsersAction
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter, Namespace, set_parsing_settings

set_parsing_settings(
    docstring_parse_attribute_docstrings=True
)  # the texts below the fields of a dataclass are its help


class CommandParser(ArgumentParser):
    """Parser of one command; its options may be added with hyphens."""

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        return super().add_argument(*(_underscored(name) if _is_option(name) else name for name in names), **settings)


class ConfigFileAction(ActionConfigFile):
    """Option of a YAML file of settings, whose mappings are merged with those of earlier files and options.

    jsonargparse 4.53: a mapping in a later file, such as weights by name, replaces the mapping of an earlier file,
    although the fields of a section are merged.
    """

    @staticmethod
    def apply_config(parser: ArgumentParser, cfg: Namespace, dest: str, value: str) -> None:
        earlier = {name: setting for name, setting in cfg.items() if isinstance(setting, dict)}
        ActionConfigFile.apply_config(parser, cfg, dest, value)
        for name, setting in earlier.items():
            if isinstance(later := cfg.get(name), dict):
                cfg[name] = {**setting, **later}


class HelpFormatter(DefaultHelpFormatter):
    """Help with hyphens in option names that keeps the lines of descriptions and usages.

    Headings fit the width. The details of an option omit empty defaults, and types that its choices repeat.
    Subcommands use the main parser's formatter.
    """

    def start_section(self, heading: str | None) -> None:
        super().start_section("\n".join(textwrap.wrap((heading or "").replace("``", "`"), self._width - 1)))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        hangs = ["    " if line.startswith(" ") else "" for line in lines]
        filled = [textwrap.fill(line, width, subsequent_indent=hang) for line, hang in zip(lines, hangs, strict=True)]
        return textwrap.indent("\n".join(filled), indent)

    def _format_usage(self, usage: str | None, actions: Iterable[Action], *args: Any, **kwargs: Any) -> str:
        return str(super()._format_usage(usage, [_hyphenated(action) for action in actions], *args, **kwargs))

    def _format_action_invocation(self, action: Action) -> str:
        return str(super()._format_action_invocation(_hyphenated(action)))

    def _format_action(self, action: Action) -> str:
        if not isinstance(action, _SubParsersAction):
            return str(super()._format_action(action))
        return "".join(self._format_action(command) for command in action._get_subactions())

    def _get_help_string(self, action: Action) -> str:
        if "--print_config" in action.option_strings:
            return "Print the resulting configuration and exit. Flags: skip_default, skip_unset."
        text = str(super()._get_help_string(action))
        if str(self._get_type_str(action)).startswith("Literal["):
            text = re.sub(r", type: %\(type\)s|type: %\(type\)s(, )?", "", text)
        if action.default in ("", None):
            text = re.sub(r"(, )?default: %\(default\)s", "", text)
        return text.removesuffix(" ()")

    def _expand_help(self, action: Action) -> str:
        return str(super()._expand_help(action)).replace("``", "`")


def normalize_option_names(argv: Sequence[str], parser: ArgumentParser) -> list[str]:
    """Replace hyphens in the names of a parser's options by underscores.

    Values, unknown options, keys of mappings (``--num-rows.TABLE``) and everything after ``--`` stay unchanged.
    """
    known = parser._option_string_actions
    words: list[str] = []
    for index, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[index:]]
        name, equals, value = word.partition("=")
        words.append(_normalized(name, known) + equals + value if _is_option(word) else word)
    return words


def _normalized(name: str, known: Iterable[str]) -> str:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):  # the longest known prefix; after it come a mapping's key and its fields
        prefix = _underscored(".".join(parts[:count]))
        if prefix in known:
            key, fields = parts[count : count + 1], map(_underscored, parts[count + 1 :])
            return ".".join([prefix, *key, *fields])
    return name


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _underscored(name: str) -> str:
    dashes = "--" if name.startswith("--") else ""
    return dashes + name.removeprefix("--").replace("-", "_")


def _hyphenated(action: Action) -> Action:
    """Return the action with hyphens in its option names, for display."""
    if not any("_" in name for name in action.option_strings):
        return action
    displayed = copy.copy(action)
    displayed.option_strings = [hyphenated(name) for name in action.option_strings]
    return displayed


def hyphenated(name: str) -> str:
    """Return the name of an option as the help shows it."""
    return name.replace("_", "-")
